"""Contributions add up to the logits that the model gives, and each is what own hooks and the weights give by hand."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn

import models
import tdgeom as tg
from tdgeom.model.lens.frozen_norm import FrozenNorm
from tdgeom.model.lens.linear_tail import soft_cap


def small_opt():
    """Norms behind each part, and projections around the blocks."""
    settings = {"ffn_dim": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    shape = {"vocab_size": models.VOCAB, "hidden_size": 16, "num_hidden_layers": 3, "word_embed_proj_dim": 8}
    return models._seeded(tf.OPTForCausalLM, tf.OPTConfig(**settings, **shape, do_layer_norm_before=False))


def capped():
    config = tf.Gemma2Config(**models._GEMMA, tie_word_embeddings=False, final_logit_softcapping=1.5)
    model = models._seeded(tf.Gemma2ForCausalLM, config)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # far into the cap
    return model


def llava():
    text = {**models._LLAMA, "model_type": "llama", "num_hidden_layers": 2}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    vision |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5, image_token_id=5)
    return models._seeded(tf.LlavaForConditionalGeneration, config)


def image_batch():
    ids = torch.randint(10, models.VOCAB, (3, 9), generator=torch.Generator().manual_seed(3))
    ids[:, 1:5] = 5
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def cohere():
    return models._seeded(tf.CohereForCausalLM, tf.CohereConfig(**models._LLAMA, logit_scale=0.3))


TEXT = (
    "gpt2",
    "gpt_neox",
    "gpt_neox_sequential",
    "llama",
    "qwen3",
    "gemma3",
    "phi",
    "granite",
    "olmo2",
    "mixtral",
)
MAKERS = {
    **{name: models.TEXT_MODELS[name] for name in (*TEXT, "opt", "bloom", "falcon")},
    **{"small_opt": small_opt, "capped": capped, "llava": llava, "cohere": cohere, "t5": models.t5},
}


def inputs_for(name):
    if name == "llava":
        return image_batch()
    batch = models.text_batch()
    return {**batch, "decoder_input_ids": batch["input_ids"][:, :5]} if name == "t5" else batch


def last_logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[:, -1].double()


@pytest.mark.parametrize("name", list(MAKERS))
def test_contributions_add_up_to_the_logits(name):
    model, batch = MAKERS[name](), inputs_for(name)
    logits = last_logits(model, batch)
    expected = torch.stack([logits[:, 7], logits[:, 7] - logits[:, 11]], 1)
    for by in ("layer", "component", "head", "neuron"):
        if (name, by) == ("mixtral", "neuron"):
            with pytest.raises(ValueError, match="mlp_act, which MixtralForCausalLM has at no layer"):
                tg.logit_attribution(model, batch, [7], by=by)
            continue
        table = tg.logit_attribution(model, batch, [7, (7, 11)], by=by)
        sums = (
            table.groupby(["text", "answer"], sort=False)["contribution"]
            .sum()
            .to_numpy()
            .reshape(3, 2)
            .copy()
        )
        if name == "capped":
            one, two = (float(v) for v in (sums[0, 0], sums[0, 0] - sums[0, 1]))
            cap = table.attrs["soft_cap"]
            assert cap == 1.5 and abs(one) > 0.2
            squeezed = [cap * torch.tanh(torch.tensor(v, dtype=torch.float64) / cap) for v in (one, two)]
            torch.testing.assert_close(squeezed[0], expected[0, 0], rtol=0, atol=1e-5)
            torch.testing.assert_close(squeezed[0] - squeezed[1], expected[0, 1], rtol=0, atol=1e-5)
        else:
            torch.testing.assert_close(torch.tensor(sums), expected, rtol=0, atol=1e-5)
        own = (
            table.groupby(["text", "answer"], sort=False)["model_logit"]
            .first()
            .to_numpy()
            .reshape(3, 2)
            .copy()
        )
        torch.testing.assert_close(torch.tensor(own), expected, rtol=0, atol=1e-6)
        assert table.attrs["largest_difference"] < 1e-5 and not table["contribution"].isna().any()


def watched(model, modules, batch):
    """What modules take and give in a pass, by own hooks."""
    taken, gave, handles = {}, {}, []
    for name, module in modules.items():

        def look(m, args, output, name=name):
            taken[name] = args[0].detach()[:, -1].double() if args else None
            gave[name] = (output[0] if isinstance(output, tuple) else output).detach()[:, -1].double()

        handles.append(module.register_forward_hook(look))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return taken, gave


def test_llama_by_hand():
    """RMS norm: gain / rms of the stream, times the column of the unembedding; heads and neurons through their weights."""
    model, batch = models.llama(), models.text_batch()
    layer = model.model.layers[1]
    modules = {"norm": model.model.norm, "o": layer.self_attn.o_proj, "down": layer.mlp.down_proj}
    modules["first"] = model.model.embed_tokens
    taken, gave = watched(model, modules, batch)
    stream = taken["norm"]
    scale = (stream.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
    read = scale * model.model.norm.weight.double() * model.lm_head.weight.double()[9]
    pick = lambda table, **where: table[(table[list(where)] == list(where.values())).all(axis=1)][
        "contribution"
    ].to_numpy()
    close = lambda found, right: torch.testing.assert_close(
        torch.tensor(found), right.detach(), rtol=1e-4, atol=1e-6
    )
    parts = tg.logit_attribution(model, batch, 9)
    close(pick(parts, component="attn_output.1"), (gave["o"] * read).sum(-1))
    close(pick(parts, component="mlp_output.1"), (gave["down"] * read).sum(-1))
    close(pick(parts, component="embed"), (gave["first"] * read).sum(-1))
    layers = tg.logit_attribution(model, batch, 9, by="layer")
    close(pick(layers, component="layer.1"), ((gave["o"] + gave["down"]) * read).sum(-1))
    heads = tg.logit_attribution(model, batch, 9, by="head")
    weight = layer.self_attn.o_proj.weight.double()
    for head in range(4):
        own = slice(4 * head, 4 * head + 4)
        right = ((taken["o"][:, own] @ weight[:, own].T) * read).sum(-1)
        close(pick(heads, kind="head", layer=1, head=head), right)
    neurons = tg.logit_attribution(model, batch, 9, by="neuron")
    right = taken["down"] * (read @ layer.mlp.down_proj.weight.double())
    for neuron in (0, 17, 31):
        close(pick(neurons, kind="neuron", layer=1, neuron=neuron), right[:, neuron])


def test_gpt2_by_hand():
    """LayerNorm centres parts; its bias, the projections' and no other belong to nobody."""
    model, batch = models.gpt2(), models.text_batch()
    block, norm = model.transformer.h[2], model.transformer.ln_f
    taken, gave = watched(model, {"norm": norm, "c": block.attn.c_proj, "down": block.mlp.c_proj}, batch)
    stream, unembedding = taken["norm"], model.lm_head.weight.detach().double()[3]
    scale = (stream.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
    direction = norm.weight.detach().double() * unembedding
    read = lambda part: ((part - part.mean(-1, keepdim=True)) * scale * direction).sum(-1)
    heads = tg.logit_attribution(model, batch, 3, by="head").set_index(["text", "component"])["contribution"]
    weight = block.attn.c_proj.weight.detach().double()
    for text in range(3):
        for head in range(4):
            own = slice(4 * head, 4 * head + 4)
            right = read(taken["c"][:, own] @ weight[own])[text]
            assert heads[text, f"head.2[{head}]"] == pytest.approx(float(right), abs=1e-6)
        bias = read(block.attn.c_proj.bias.detach().double().expand(3, -1))[text]
        assert heads[text, "bias:attn_output.2"] == pytest.approx(float(bias), abs=1e-6)
        assert heads[text, "bias:final_norm"] == pytest.approx(
            float(norm.bias.detach().double() @ unembedding), abs=1e-6
        )
        assert heads[text, "bias:unembedding"] == 0
        assert heads[text, "mlp_output.2"] == pytest.approx(float(read(gave["down"])[text]), abs=1e-6)


def test_parts_go_on_through_norms_in_the_stream():
    """A part of the first layer of a model that normalises behind each part: every later norm applied by hand, as it was."""
    model, batch = small_opt(), models.text_batch()
    decoder = model.model.decoder
    norms = [n for layer in decoder.layers for n in (layer.self_attn_layer_norm, layer.final_layer_norm)]
    modules = {str(i): norm for i, norm in enumerate(norms)}
    taken, gave = watched(model, {**modules, "out": decoder.layers[0].self_attn.out_proj}, batch)
    part = gave["out"]
    for index, norm in enumerate(norms):
        centred = part - part.mean(-1, keepdim=True)
        scale = (taken[str(index)].var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
        part = centred * scale * norm.weight.detach().double()
    weight = model.lm_head.weight.detach().double()[8] @ decoder.project_out.weight.detach().double()
    table = tg.logit_attribution(model, batch, 8)
    found = table[table["component"] == "attn_output.0"]["contribution"].to_numpy()
    torch.testing.assert_close(torch.tensor(found), part @ weight, rtol=1e-4, atol=1e-6)
    assert (table["kind"] == "bias").sum() == 3 * (len(norms) + 1)


def test_positions_and_padding_change_nothing():
    model, batch = models.gpt2(), models.text_batch(2, 6)
    whole = tg.logit_attribution(model, batch, 5, positions=[3, 5], by="layer")
    with torch.no_grad():
        logits = model(**batch).logits[:, [3, 5], 5]
    sums = whole.groupby(["text", "position"])["contribution"].sum()
    torch.testing.assert_close(torch.tensor(sums.to_numpy()).reshape(2, 2).float(), logits, rtol=0, atol=1e-5)
    assert list(sums.index) == [(0, 3), (0, 5), (1, 3), (1, 5)]
    pad = lambda value, fill: nn.functional.pad(value, (2, 0), value=fill)
    padded = {"input_ids": pad(batch["input_ids"], 0), "attention_mask": pad(batch["attention_mask"], 0)}
    again = tg.logit_attribution(model, padded, 5, positions=[3, 5], by="layer")
    assert (again["contribution"] - whole["contribution"]).abs().max() < 1e-5
    assert again["position"].equals(whole["position"])
    with pytest.raises(ValueError, match="no text has the positions 9"):
        tg.logit_attribution(model, batch, 5, positions=9)


WORDS = {"<unk>": 0, "a": 4, "b": 5, "c": 6, "d": 7}


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(tokenizer_models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<unk>")


def test_answers_as_text_several_and_one_for_each_text(tokenizer):
    model = models.llama()
    texts = ["a b c", "d c b a"]
    table = tg.logit_attribution(model, texts, ["a", ("b", "d"), 9], tokenizer=tokenizer)
    assert list(dict.fromkeys(table["answer"])) == ["a", "b - d", tokenizer.decode([9])]
    sums = table.groupby(["text", "answer"], sort=False)["contribution"].sum()
    for text, ids in enumerate(([[4, 5, 6]], [[7, 6, 5, 4]])):
        logits = last_logits(model, {"input_ids": torch.tensor(ids)})[0]
        assert sums[text, "a"] == pytest.approx(float(logits[4]), abs=1e-5)
        assert sums[text, "b - d"] == pytest.approx(float(logits[5] - logits[7]), abs=1e-5)
    with pytest.raises(ValueError, match="lists 2 answers for 2 texts. Remedy: per_text=True"):
        tg.logit_attribution(model, texts, ["a", "b"], tokenizer=tokenizer)
    each = tg.logit_attribution(model, texts, ["a", "b"], tokenizer=tokenizer, per_text=True)
    assert each.groupby("text")["answer"].unique().map(list).to_dict() == {0: ["a"], 1: ["b"]}
    as_tensor = tg.logit_attribution(model, texts, torch.tensor([4, 5]), tokenizer=tokenizer)
    assert as_tensor["contribution"].equals(each["contribution"])
    every = tg.logit_attribution(model, texts, ["a", "b"], tokenizer=tokenizer, per_text=False)
    assert len(every) == 2 * len(each)


def test_refusals(tokenizer):
    model, batch = models.llama(), models.text_batch()
    ask = lambda answers, **how: tg.logit_attribution(model, batch, answers, **how)
    with pytest.raises(ValueError, match=r"one token, and 'a b' is 2: \['a', 'b'\]"):
        ask("a b", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="'a' is text: tokenizer="):
        ask("a")
    with pytest.raises(ValueError, match="a tuple in answers= is a difference of two"):
        ask((1, 2, 3))
    with pytest.raises(ValueError, match="one answer for each of 3 texts, got 2"):
        ask([1, 2], per_text=True)
    with pytest.raises(ValueError, match="tokens and differences from text to text"):
        ask([1, (2, 3), 4], per_text=True)
    with pytest.raises(ValueError, match=r"\(B,\) or \(B, A\) for the 3 texts"):
        ask(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="by= expects one of layer, component, head, neuron"):
        ask(1, by="heads")
    with pytest.raises(ValueError, match="token ids from 0 to 47"):
        ask(99)
    with pytest.raises(TypeError, match="texts with tokenizer=, got str and no tokenizer"):
        tg.logit_attribution(model, "a b", 1)
    with pytest.raises(ValueError, match="no linear map behind a norm.*activation in it"):
        tg.logit_attribution(models.bert(), batch, 1)
    with pytest.raises(ValueError, match="reads whole sequences out"):
        tg.logit_attribution(models.vit(), {"pixel_values": torch.zeros(1, 3, 8, 8)}, 1)

    class Halved(nn.Module):
        """A block that halves the stream on its way."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs) * 0.5

    model.model.layers[1] = Halved(model.model.layers[1])
    with pytest.raises(
        (ValueError, RuntimeError), match="do not add up|not where its structure says|no known part"
    ):
        ask(1)
    table = ask(1, by="layer")  # what a block adds is what it gives less what it takes
    sums = table.groupby("text")["contribution"].sum().to_numpy()
    torch.testing.assert_close(torch.tensor(sums), last_logits(model, batch)[:, 1], rtol=0, atol=1e-5)


def test_inside_an_intervene_the_edited_pass_is_taken_apart():
    """What an edit leaves of a part is that part's; what is a share of no part is refused, with the edit named."""
    model, batch = models.llama(), models.text_batch()
    shift = torch.linspace(-2, 2, models.WIDTH)
    plain = last_logits(model, batch)[:, 7]
    for site, edit, by in (
        ("z.1", tg.Ablate(heads=[1]), "head"),
        ("mlp_output.1", tg.Ablate(), "component"),
        ("residual_input.1", tg.Steer(shift), "component"),
        ("residual_output.0", tg.Steer(shift), "layer"),
    ):
        with tg.Intervene(model, {site: edit}):
            expected = last_logits(model, batch)[:, 7]
            table = tg.logit_attribution(model, batch, 7, by=by)
        sums = table.groupby("text")["contribution"].sum().to_numpy().copy()
        torch.testing.assert_close(torch.tensor(sums), expected, rtol=0, atol=1e-5)
        assert not torch.allclose(expected, plain, atol=1e-4)
        if by == "head":
            assert not table[table["component"] == "head.1[1]"]["contribution"].any()
        if site == "mlp_output.1":
            assert not table[table["component"] == site]["contribution"].any()
    with (
        tg.Intervene(model, {"head_output.1": tg.Ablate(heads=[0])}),
        pytest.raises(
            ValueError, match="An Intervene is open on the model: .* leave the with block, or by='layer'"
        ),
    ):
        tg.logit_attribution(model, batch, 7, by="head")


def test_texts_without_a_token_are_refused():
    model, ids = models.gpt2(), torch.ones(2, 3, dtype=torch.long)
    for batch, match in (
        ({"input_ids": ids[:, :0]}, "texts without a token"),
        ({"input_ids": ids[:0]}, "given no text"),
        (
            {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
            r"the texts \[1\] have no token",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            tg.logit_attribution(model, batch, 5)


def test_half_precision_and_other_surroundings():
    model, batch = models.llama(), models.text_batch()
    right = tg.logit_attribution(model, batch, 5, by="head")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        again = tg.logit_attribution(model, batch, 5, by="head")
    assert again["contribution"].equals(right["contribution"])
    half = tg.logit_attribution(model.bfloat16(), batch, 5, by="head")
    off = (half["contribution"] - right["contribution"]).abs().max()
    assert 0 < off < 0.05 * right["contribution"].abs().max()


def test_offloaded_weights():
    """Weights that are there for a module's forward only."""
    plain, model, batch = models.gpt2(), models.gpt2(), models.text_batch()
    for module in model.modules():
        if not module._parameters:
            continue
        home = {n: p.detach().clone() for n, p in module._parameters.items() if p is not None}

        def put(module=module, home=home, device=None):
            for name, value in home.items():
                module._parameters[name] = nn.Parameter(value if device is None else value.to(device), False)

        def forward(*args, own=module.forward, put=put, **kwargs):
            put()
            found = own(*args, **kwargs)
            put(device="meta")
            return found

        put(device="meta")
        module.forward = forward
    for by in ("component", "head", "neuron"):
        found, right = (tg.logit_attribution(m, batch, 5, by=by)["contribution"] for m in (model, plain))
        assert (found - right).abs().max() < 1e-6


def test_a_frozen_norm_is_asked_what_it_is():
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    norm = nn.LayerNorm(7)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    frozen = FrozenNorm(norm, x, norm(x).detach())
    torch.testing.assert_close(frozen.gain.float(), norm.weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(frozen.scale.float(), (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt())
    direction, part = torch.randn(4, 7).double(), torch.randn(4, 7)
    left, right = (
        (frozen.linear(part) * direction).sum(-1),
        (part.double() * frozen.transposed(direction)).sum(-1),
    )
    torch.testing.assert_close(left, right)
    with pytest.raises(ValueError, match="Tanh is no norm"):
        FrozenNorm(nn.Tanh(), x, x.tanh())
    assert soft_cap(torch.tensor([0.5]), torch.tensor([0.5])) is None


@pytest.mark.parametrize("name", ["gpt2", "phi", "falcon", "granite", "capped"])
def test_a_lens_with_the_statistics_of_the_pass_adds_up(name):
    """All tokens of the vocabulary: parts, heads among them, and biases are the logits before a cap."""
    model, batch = MAKERS[name](), models.text_batch()
    with torch.no_grad():
        logits = model(**batch).logits
    lens = tg.logit_lens(
        model, batch, sites=["embed", "attn_output", "mlp_output"], outputs="logits", norm="final"
    )["lens"]
    found = sum(leaf["logits"] for leaf in lens.values())
    if name == "capped":
        found = 1.5 * torch.tanh(found / 1.5)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)
    if name == "gpt2":
        heads = tg.Capture(model, ["head_output.1", "residual_output.2"])(TensorDict(batch))
        read = tg.LogitLens(model, outputs=["logits"], norm="final")
        shares, stream = heads["acts", "head_output.1"], heads["acts", "residual_output.2"]
        each = [read.compute(shares[:, :, h], stream)["logits"] for h in range(4)]
        bias = read.compute(model.transformer.h[1].attn.c_proj.bias.expand_as(stream), stream)["logits"]
        torch.testing.assert_close(sum(each) + bias, lens["attn_output.1", "logits"], rtol=0, atol=1e-5)


def test_such_a_lens_in_a_pipeline_and_its_refusals():
    model, batch = models.llama(), models.text_batch()
    capture = tg.Capture(model, ["mlp_output", "residual_output.2"], clone=True)
    sites = ["mlp_output.0", "mlp_output.1", "mlp_output.2"]
    lens = tg.LogitLens(model, outputs=["logit_diff"], directions=[(5, 7)], norm="final")
    assert lens.in_keys == ["acts", "stream"] and lens.last_site == "residual_output.2"
    td = capture(TensorDict(batch))
    td["stream"] = td["acts", lens.last_site]
    td = tg.ForEach(lens, sites)(td)
    table = tg.logit_attribution(model, batch, (5, 7))
    right = table[table["component"] == "mlp_output.1"]["contribution"].to_numpy()
    found = td["lens", "mlp_output.1", "logit_diff"][:, -1, 0].double()
    torch.testing.assert_close(found, torch.tensor(right), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="reads the last block's output beside"):
        lens.compute(td["acts", "mlp_output.0"])
    with pytest.raises(ValueError, match="with the statistics of the last block's output there"):
        lens.compute(td["acts", "mlp_output.0"], td["acts", "residual_output.2"][:, :2])
    for wrong in ({"norm": "last"}, {"norm": "final", "apply_norm": False}, {"apply_norm": "final"}):
        with pytest.raises(ValueError, match="norm= expects 'own' or 'final'"):
            tg.LogitLens(model, **wrong)
    bert = tg.LogitLens(models.bert(), outputs="logits", norm="final")
    x = torch.randn(1, 2, models.WIDTH)
    with pytest.raises(ValueError, match="no linear map"):
        bert.compute(x, x)
