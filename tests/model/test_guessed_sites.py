"""Sites under other libraries' names: the same tensor, by hooks of our own and the model's own outputs, or the right spelling."""

from __future__ import annotations

import re

import pytest
import torch
from tensordict import TensorDict
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5Model,
)

import tdgeom as tg
from tdgeom.model.guessed_sites import OTHERS, SAME
from tdgeom.model.sites import KINDS, Site

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50
        )
    ).eval()


@pytest.fixture(scope="module")
def t5():
    return T5Model(
        T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50, decoder_start_token_id=0
        )
    ).eval()


def seen(model, path, side="output"):
    """What a plain hook sees at a module."""
    found = []
    module = model.get_submodule(path)
    if side == "input":
        handle = module.register_forward_pre_hook(
            lambda m, args, kwargs: found.append((args or (kwargs["hidden_states"],))[0]), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(
            lambda m, args, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    return found[0]


def read(model, name):
    capture = tg.Capture(model, name)
    (site,) = capture.sites
    return str(site), capture(TensorDict({"input_ids": IDS}))["acts", site]


HOOKED = [
    ("blocks.1.hook_resid_pre", "residual_input.1", "transformer.h.1", "input"),
    ("blocks.1.hook_resid_mid", "residual_mid.1", "transformer.h.1.ln_2", "input"),
    ("blocks.0.hook_resid_post", "residual_output.0", "transformer.h.0", "output"),
    ("blocks.0.hook_attn_out", "attn_output.0", "transformer.h.0.attn", "output"),
    ("blocks.0.hook_mlp_out", "mlp_output.0", "transformer.h.0.mlp", "output"),
    ("blocks.0.mlp.hook_post", "mlp_act.0", "transformer.h.0.mlp.c_proj", "input"),
    ("resid_post1", "residual_output.1", "transformer.h.1", "output"),
    (("mlp_out", 1), "mlp_output.1", "transformer.h.1.mlp", "output"),
    (("post", 1, "mlp"), "mlp_act.1", "transformer.h.1.mlp.c_proj", "input"),
    ("resid_in_1", "residual_input.1", "transformer.h.1", "input"),
    ("extract_resid_out.1", "residual_output.1", "transformer.h.1", "output"),
    ({"layer": 1, "component": "block_output"}, "residual_output.1", "transformer.h.1", "output"),
    ("Residual-Input.1", "residual_input.1", "transformer.h.1", "input"),
    ("RESIDUAL_OUTPUT[-1]", "residual_output.1", "transformer.h.1", "output"),
    ("residual input 1", "residual_input.1", "transformer.h.1", "input"),
    ("1.residual_output", "residual_output.1", "transformer.h.1", "output"),
    ("transformer.h.1", "module_output:transformer.h.1", "transformer.h.1", "output"),
    ("transformer.h[1].mlp", "module_output:transformer.h.1.mlp", "transformer.h.1.mlp", "output"),
    ("transformer.h.1.mlp.input", "module_input:transformer.h.1.mlp", "transformer.h.1.mlp", "input"),
    ("transformer.h.0.mlp.output", "module_output:transformer.h.0.mlp", "transformer.h.0.mlp", "output"),
    ("transformer.h.0.attn.output[0]", "module_output:transformer.h.0.attn[0]", "transformer.h.0.attn", "output"),
    (r"transformer\.h\.1\.m\wp", "module_output:transformer.h.1.mlp", "transformer.h.1.mlp", "output"),
    ("lm_head", "module_output:lm_head", "lm_head", "output"),
]  # fmt: skip


@pytest.mark.parametrize("name, ours, path, side", HOOKED, ids=[str(name) for name, *_ in HOOKED])
def test_a_name_that_is_taken_means_what_it_says(gpt2, name, ours, path, side):
    site, value = read(gpt2, name)
    assert site == ours
    assert torch.equal(value, seen(gpt2, path, side))


def test_heads_by_other_names_are_the_models_own(gpt2):
    """Queries, keys, values, patterns and what heads give, from the weights and the model's own attentions."""
    attention = gpt2.transformer.h[1].attn
    normed = seen(gpt2, "transformer.h.1.ln_1")
    q, k, v = (part.unflatten(-1, (2, 8)) for part in attention.c_attn(normed).split(16, -1))
    with torch.no_grad():
        pattern = gpt2(input_ids=IDS, output_attentions=True).attentions[1]
    z = torch.einsum("bhts,bshd->bthd", pattern, v)
    result = torch.einsum("bthd,hdm->bthm", z, attention.c_proj.weight.view(2, 8, 16))
    for name, ours, expected in [
        ("blocks.1.attn.hook_q", "q.1", q), ("blocks.1.attn.hook_k", "k.1", k), ("blocks.1.attn.hook_v", "v.1", v),
        ("blocks.1.attn.hook_pattern", "attn_pattern.1", pattern), ("attentions.1", "attn_pattern.1", pattern),
        ("attentions[-1]", "attn_pattern.1", pattern), (("z", 1), "z.1", z), ("blocks.1.attn.hook_z", "z.1", z),
        ("blocks.1.attn.hook_result", "head_output.1", result),
    ]:  # fmt: skip
        site, value = read(gpt2, name)
        assert site == ours
        torch.testing.assert_close(value, expected)
    scores = read(gpt2, "blocks.1.attn.hook_attn_scores")[1]
    torch.testing.assert_close(scores.softmax(-1), pattern)


def test_hidden_states_are_exact_and_the_last_is_told(gpt2, bert, t5):
    for model in (gpt2, bert):
        with torch.no_grad():
            recorded = model(input_ids=IDS, output_hidden_states=True).hidden_states
        for i in (0, 1):
            site, value = read(model, f"hidden_states.{i}")
            assert site == f"residual_input.{i}"
            assert torch.equal(value, recorded[i])
    assert read(bert, "hidden_states[-1]")[0] == "residual_output.1"  # normalises last: no norm behind
    assert torch.equal(read(bert, "hidden_states.2")[1], recorded[2])
    with pytest.raises(
        ValueError, match=r"Write 'final_norm' for that, 'residual_output\.1' for what the last block gives"
    ):
        tg.Capture(gpt2, "hidden_states.-1")
    with pytest.raises(IndexError, match="from 0 to 2"):
        tg.Capture(gpt2, "hidden_states.3")
    with pytest.raises(ValueError, match=r"sites=\['residual_input', 'final_norm'\]"):
        tg.Capture(gpt2, "hidden_states")
    with pytest.raises(ValueError, match=r"sites=\['residual_input', 'residual_output\.1'\]"):
        tg.Capture(bert, "hidden_states")
    assert tg.Capture(t5, "decoder_hidden_states.1").sites == ["decoder.residual_input.1"]
    with pytest.raises(ValueError, match="'encoder_hidden_states.1' or 'decoder_hidden_states.1'"):
        tg.Capture(t5, "hidden_states.1")


def test_a_word_that_is_another_tensor_in_this_model_is_refused(bert):
    """TransformerLens reads hook_resid_post before the norm that ends a block of BERT, and results before Gemma 2's norm."""
    with pytest.raises(ValueError, match=r"another tensor.*Write 'residual_output\.0'"):
        tg.Capture(bert, "blocks.0.hook_resid_post")
    assert tg.Capture(bert, "blocks.0.hook_resid_mid").sites == ["residual_mid.0"]
    gemma = Gemma2Model(
        Gemma2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            intermediate_size=32, vocab_size=50,
        )
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match=r"norm behind the attention.*'head_output\.1'"):
        tg.Capture(gemma, "blocks.1.attn.hook_result")
    assert tg.Capture(gemma, "blocks.1.hook_attn_out").sites == ["attn_output.1"]


ANSWERED = [
    ("hook_embed", "'module_output:transformer.wte'"),
    ("hook_pos_embed", "'module_output:transformer.wpe'"),
    ("ln_final.hook_normalized", "'final_norm' is what it gives"),
    ("blocks.0.ln1.hook_normalized", "'attn_norm'"),
    ("blocks.0.ln2.hook_scale", "nothing is read"),
    ("blocks.0.mlp.hook_pre", "'module_output:<path>'"),
    ("blocks.0.hook_attn_in", "'residual_input'"),
    ("blocks.0.hook_mlp_in", "'residual_mid'"),
    ("unembed", "model_outputs='logits'"),
    ("logits", "model_outputs='logits'"),
    ("pooler_output", "model_outputs='pooler_output'"),
    ("last_hidden_state", "'final_norm'"),
    ("residual_inputs", "'residual_input'"),
    ("residual_input_s.1", r"'residual_input\.1'"),
    ("resid_pst.0", r"'residual_output\.0'"),
    ("attn", "'attn_output'"),
    ("mlp", "'mlp_output'"),
    ("layers.1", "'residual_output' behind it"),
    ("h.1.attn", "'module_output:transformer.h.1.attn'"),
    ("model.transformer.h[0].output", "'module_output:transformer.h.0'"),
    ("model.transformer.h.0.mlp.input", "'module_input:transformer.h.0.mlp'"),
    ("wte", "'module_output:transformer.wte'"),
    ("transformer.h.0.mpl", "'module_output:transformer.h.0.mlp'"),
    ("transformer.h.0.*", r"re.compile\('transformer.h.0"),
    (r"transformer\.k\.\d", r"re.compile\(.*matches no module"),
    ("residual_input.99", "from 0 to 1"),
    (1, "layers=1"),
    (-1, "layers=-1"),
    ([0, 1], r"layers=\[0, 1\]"),
    ("3", "layers=3"),
    ("residual_input,mlp_output", r"sites=\['residual_input', 'mlp_output'\]"),
    (None, "got None"),
    ({"layer": 1}, "got"),
    (torch.nn.Linear(2, 2), "does not hold it"),
]  # fmt: skip


@pytest.mark.parametrize("name, answer", ANSWERED, ids=[str(name) for name, _ in ANSWERED])
def test_what_is_near_and_not_the_same_is_answered(gpt2, name, answer):
    for use in (tg.Capture, lambda model, sites: tg.verify_sites(model, {"input_ids": IDS}, sites=sites)):
        if name is not None or use is tg.Capture:
            with pytest.raises((ValueError, IndexError), match=answer):
                use(gpt2, name)


def test_every_way_in_takes_the_same_names(gpt2):
    loader = [{"input_ids": IDS}]
    name, ours = "blocks.1.hook_resid_pre", "residual_input.1"
    assert list(
        tg.analyze_model(gpt2, loader, hook_point=name, metrics=["spectrum"], progress=False).metrics["site"]
    ) == [ours]
    assert list(
        tg.analyze_model(gpt2, loader, sites=[name], metrics=["spectrum"], progress=False).metrics["site"]
    ) == [ours]
    compared = tg.compare(gpt2, gpt2, loader, ["procrustes"], sites="transformer.h.1.mlp", progress=False)
    assert set(compared.novelty["a"]) == {"a/module_output:transformer.h.1.mlp"}
    assert set(tg.verify_sites(gpt2, {"input_ids": IDS}, sites=name)["site"]) == {ours}
    assert tg.CaptureSpec([name]).build(gpt2)(TensorDict(loader[0]))["acts", ours].shape == (2, 5, 16)
    plain = gpt2(input_ids=IDS).logits
    for key in (
        name,
        "transformer.h[0]",
        gpt2.transformer.h[0],
        ("resid_pre", 1),
        re.compile(r"transformer\.h\.0"),
    ):
        intervene = tg.Intervene(gpt2, {key: lambda x: x.roll(1, -1)})
        with intervene:
            edited = gpt2(input_ids=IDS).logits
        with tg.Intervene(gpt2, {ours: lambda x: x.roll(1, -1)}):
            torch.testing.assert_close(edited, gpt2(input_ids=IDS).logits)
        assert not torch.allclose(edited, plain)
    patched = tg.activation_patching(
        gpt2,
        {"input_ids": IDS},
        {"input_ids": IDS[:, ::2].repeat(1, 2)[:, :5]},
        sites=name,
        metric=lambda logits, _: logits[..., 0],
    )
    assert "residual_input" in str(sorted(patched.keys(True, True), key=str))
    assert tg.logit_lens(gpt2, {"input_ids": IDS}, sites="resid_out_1")[
        "lens", "residual_output.1", "entropy"
    ].shape == (2, 5)


def test_modules_and_known_sites_are_taken_as_they_are(gpt2):
    assert tg.Capture(gpt2, gpt2.transformer.h[1].mlp).sites == ["module_output:transformer.h.1.mlp"]
    assert tg.Capture(gpt2, [block.attn for block in gpt2.transformer.h]).sites == [
        f"module_output:transformer.h.{i}.attn" for i in (0, 1)
    ]
    known = tg.available_sites(gpt2)[:2]
    assert tg.Capture(gpt2, known).sites == [entry.site for entry in known]
    assert tg.Capture(gpt2, (name for name in ["embed", "final_norm"])).sites == ["embed", "final_norm"]
    assert tg.Capture(gpt2, "b/blocks.0.hook_resid_pre", prefix="b/").sites == ["b/residual_input.0"]
    assert tg.Capture(gpt2, ["resid_pre", "transformer.h.0.mlp"], layers=[0]).sites == [
        "residual_input.0",
        "module_output:transformer.h.0.mlp",
    ]


def test_the_table_leads_to_kinds_that_there_are():
    assert set(SAME.values()) <= set(KINDS)
    assert not set(SAME) & set(OTHERS)
    for word, answer in OTHERS.items():
        named = re.findall(r"'([a-z_]+)'", answer.partition("model_outputs=")[0])
        assert set(named) <= {*KINDS}, word
        with pytest.raises(ValueError, match="Kinds: "):
            Site(word)
