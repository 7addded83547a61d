"""Padded batches: every sequence is read as the model computes it alone, or the batch is refused."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from torch import nn

import models
import tdgeom as tg
from tdgeom.model.calls.verified import verified

GENERATOR = torch.Generator().manual_seed(5)
TEXTS = [torch.randint(4, models.VOCAB, (n,), generator=GENERATOR) for n in (9, 3, 7, 5)]
_BERT = {
    "vocab_size": models.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_OTHERS = {
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=models.VOCAB,
            hidden_size=16,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=3,
        )
    ),
    "mpnet": lambda: tf.MPNetModel(tf.MPNetConfig(**_BERT)),
    "ibert": lambda: tf.IBertModel(tf.IBertConfig(**_BERT)),
    "mra": lambda: tf.MraModel(tf.MraConfig(**_BERT)),
    "xlnet": lambda: tf.XLNetLMHeadModel(
        tf.XLNetConfig(vocab_size=models.VOCAB, d_model=16, n_layer=2, n_head=4, d_inner=32)
    ),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=models.VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
    "deberta": lambda: tf.DebertaModel(tf.DebertaConfig(**_BERT)),
    "bigcode": lambda: tf.GPTBigCodeForCausalLM(
        tf.GPTBigCodeConfig(vocab_size=models.VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64)
    ),
}
NAMES = [
    "gpt2",
    "llama",
    "opt",
    "bloom",
    "falcon",
    "gpt_neox",
    "bert",
    "roberta",
    "esm",
    "distilbert",
    *_OTHERS,
]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (_OTHERS.get(name) or models.TEXT_MODELS[name])().eval()


def padded(side: str, pad: int, width: int = 10) -> dict[str, torch.Tensor]:
    ids = torch.full((len(TEXTS), width), pad)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(TEXTS):
        where = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        if side == "inside":  # a hole behind the first token
            where = torch.tensor([0, *range(width - len(text) + 1, width)])
        ids[row, where], mask[row, where] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def hidden(model: nn.Module, batch: dict, path: str) -> torch.Tensor:
    """The output of a module in a call of one's own."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    value = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
    return value if value.shape[0] == 1 else value.transpose(0, 1)


def check(model: nn.Module, side: str, pad: int, **options) -> None:
    """Every row of the module form beside the same sequence in a call of one's own."""
    capture = tg.Capture(model, "residual_output.-1", **options)
    site, batch = capture.sites[0], padded(side, pad)
    acts = capture(TensorDict(batch))["acts", site]
    acts = acts if acts.shape[0] == len(TEXTS) else acts.transpose(0, 1)
    for row, text in enumerate(TEXTS):
        right = hidden(model, {"input_ids": text[None]}, capture.module_paths[site])[0]
        found = acts[row][batch["attention_mask"][row].bool()]
        assert float((found - right).norm() / right.norm()) < 1e-5, row


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_sequence_is_read_as_it_is_alone(name, side):
    model = build(name)
    check(model, side, getattr(model.config, "pad_token_id", None) or 0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "roberta", "mra", "xlnet", "bigcode"])
def test_a_hole_in_a_sequence_is_no_position(name):
    model = build(name)
    check(model, "inside", getattr(model.config, "pad_token_id", None) or 0)


def test_the_padding_id_of_another_tokenizer_is_seen():
    """RoBERTa numbers by its own padding id; the mask alone says that other ids are padding."""
    check(build("roberta"), "left", pad=7)


class Counting(nn.Module):
    """Positions from 0, whatever the mask says; attention is an average over what came before."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.token, self.place = nn.Embedding(models.VOCAB, 8), nn.Embedding(64, 8)
        self.layers, self.causal = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), causal

    def forward(self, input_ids):
        x = self.token(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            steps = torch.arange(1, x.shape[1] + 1)[:, None]
            x = layer(x.cumsum(1) / steps if self.causal else x.mean(1, keepdim=True) + x)
        return x


def refused(model: nn.Module, side: str, **options) -> str:
    with pytest.raises(ValueError, match="Remedy: .*batches without padding.*withhold=") as caught:
        tg.Capture(model, "residual_output.-1", **options)(TensorDict(padded(side, 0)))
    return str(caught.value)


def test_what_no_numbering_mends_is_refused():
    """Masks that a model does not take, attention that depends on the padded length, holes in a recurrence."""
    check(Counting(), "right", 0)  # what comes behind is not seen
    assert "relative difference" in refused(Counting(), "left")
    refused(Counting(causal=False), "right")
    nystrom = tf.NystromformerModel(tf.NystromformerConfig(**_BERT))
    assert "'position_ids' in the batch" in refused(nystrom.eval(), "right")
    refused(tf.FNetModel(tf.FNetConfig(**_BERT)).eval(), "right")
    refused(build("mamba"), "inside")
    assert "could not be run" in refused(Fixed(), "right")


class Fixed(Counting):
    """Takes sequences of one length only."""

    def forward(self, input_ids):
        if input_ids.shape[1] != 10:
            raise ValueError("ten tokens")
        return super().forward(input_ids)


def test_withhold_is_obeyed_and_what_the_batch_says_is_passed():
    model, batch = build("gpt2"), padded("left", 0)
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    tg.Capture(model, "residual_output.-1", withhold=["position_ids"])(TensorDict(batch))
    assert len(seen) == 1 and "position_ids" not in seen[0]
    own = torch.arange(10).expand(4, 10) + 2
    tg.Capture(model, "residual_output.-1")(TensorDict({**batch, "position_ids": own}))
    assert len(seen) == 2 and torch.equal(seen[1]["position_ids"], own)
    tg.Capture(Counting(), "residual_output.-1", withhold=["position_ids"])(TensorDict(padded("left", 0)))


def test_one_check_a_model_and_a_side():
    model, passes = build("gpt2"), []
    forward = model.transformer.forward

    def counted(*args, **kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        passes.append(ids.shape)
        return forward(*args, **kwargs)

    model.transformer.forward = counted
    model.train()
    heard = []
    model.transformer.register_forward_hook(lambda *_: heard.append(torch.is_grad_enabled()))
    state = torch.get_rng_state()
    left, right = padded("left", 0), padded("right", 0)
    first = tg.Capture(model, "residual_output.-1")
    assert passes == [(2, 5)]  # the structure, once a model
    passes.clear()
    first(TensorDict(left))
    # one sequence without its padding; with it as the model numbers and as it is counted; then the batch
    assert passes == [(1, 9), (1, 10), (1, 10), (4, 10)]
    assert heard == [False]  # by the batch alone, whose pass is the first one and runs to its end
    assert model.training and torch.equal(torch.get_rng_state(), state)
    first(TensorDict(left))
    tg.Intervene(model, {"residual_output.0": tg.Scale(2.0)})(TensorDict(left))
    assert len(passes) == 6
    tg.Capture(model, "embed")(TensorDict(right))
    assert passes[6:] == [(1, 9), (1, 10), (4, 10)]
    tg.Capture(model, "embed")(TensorDict(models.text_batch()))
    assert len(passes) == 10


def test_both_forms_of_an_edit_see_the_same_positions():
    model, batch = build("gpt2"), padded("left", 0)
    steer = tg.Steer(torch.ones(16), positions=2)
    out = tg.Intervene(model, {"residual_output.0": steer})(TensorDict(batch))["logits"]
    for row, text in enumerate(TEXTS):
        with torch.no_grad(), tg.Intervene(model, {"residual_output.0": steer}):
            right = model(input_ids=text[None]).logits[0]
        torch.testing.assert_close(out[row][batch["attention_mask"][row].bool()], right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_the_numbering_is_told_in_other_precisions(name, dtype):
    model = build(name).to(dtype)
    tg.Capture(model, "residual_output.-1")(TensorDict(padded("left", 0)))
    found = [value.words for key, value in verified(model).items() if key[0] == "positions"]
    assert found == ["positions counted over attended tokens" if name != "llama" else found[0]]


def test_a_batch_of_both_sides_and_a_batch_of_nothing_but_padding():
    model = build("bert")
    left, right = padded("left", 0), padded("right", 0)
    both = {key: torch.cat([left[key], right[key]]) for key in left}
    capture = tg.Capture(model, "residual_output.-1")
    acts = capture(TensorDict(both))["acts", "residual_output.2"]
    mask = both["attention_mask"].bool()
    torch.testing.assert_close(acts[:4][mask[:4]], acts[4:][mask[4:]], rtol=1e-4, atol=1e-5)
    empty = {key: torch.zeros(2, 5, dtype=torch.long) for key in left}
    assert capture(TensorDict(empty))["acts", "residual_output.2"].shape == (2, 5, 16)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_both_sides_of_an_encoder_decoder(name):
    config = tf.BartConfig(
        vocab_size=models.VOCAB, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        pad_token_id=0, init_std=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = models.t5() if name == "t5" else tf.BartForConditionalGeneration(config).eval()
    batch = padded("right", 0)
    decoder = {f"decoder_{key}": value[:, :8] for key, value in padded("right", 0).items()}
    capture = tg.Capture(model, ["encoder.residual_output.-1", "decoder.residual_output.-1"])
    acts = capture(TensorDict({**batch, **decoder}))["acts"]
    for row, text in enumerate(TEXTS):
        one = {"input_ids": text[None], "decoder_input_ids": text[None, :8]}
        for site in capture.sites:
            right = hidden(model, one, capture.module_paths[site])[0]
            assert float((acts[site][row, : len(right)] - right).norm() / right.norm()) < 1e-4, site
    left = {f"decoder_{key}": value for key, value in padded("left", 0).items()}
    if name == "bart":  # its decoder counts from the first column and takes no position_ids
        with pytest.raises(ValueError, match="Remedy: batches without padding"):
            capture(TensorDict({**batch, **left}))


def test_positions_in_three_dimensions_are_the_models_own():
    """Images of all sequences lie in one tensor, so no sequence can be cut out: more padding must change nothing."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2, "rope_parameters": rope,
    }  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    }  # fmt: skip
    config = tf.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6, vision_start_token_id=7,
        vision_end_token_id=8,
    )  # fmt: skip
    model = tf.Qwen2VLForConditionalGeneration(config).eval()
    texts = [torch.randint(10, 97, (n,)) for n in (13, 10)]
    for ids in texts:
        ids[2], ids[3:7], ids[7] = 7, 5, 8
    pixels, grid = torch.randn(32, 96), torch.tensor([[1, 4, 4]] * 2)
    capture = tg.Capture(model, "language_model.residual_output.-1")
    site = capture.sites[0]
    for side in ("left", "right"):
        for width in (13, 15):
            ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
            for row, one in enumerate(texts):
                where = slice(width - len(one), width) if side == "left" else slice(0, len(one))
                ids[row, where], mask[row, where] = one, 1
            images = {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == 5).long()}
            acts = capture(TensorDict({"input_ids": ids, "attention_mask": mask, **images}))["acts", site]
            for row, one in enumerate(texts):
                alone = {
                    "input_ids": one[None],
                    "pixel_values": pixels[16 * row : 16 * row + 16],
                    "image_grid_thw": grid[row : row + 1],
                    "mm_token_type_ids": (one == 5).long()[None],
                }
                right = hidden(model, alone, capture.module_paths[site])[0]
                torch.testing.assert_close(acts[row][mask[row].bool()], right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_adapters_and_wrappers_for_several_devices_are_numbered_as_the_model_inside(task):
    from peft import LoraConfig, get_peft_model

    batch, site = padded("left", 0), "residual_output.2"
    right = tg.Capture(models.gpt2(), site)(TensorDict(batch))["acts", site]
    adapted = get_peft_model(
        models.gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type=task)
    ).eval()
    for model in (adapted, nn.DataParallel(models.gpt2())):
        acts = tg.Capture(model, site)(TensorDict(batch))["acts", site]
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(acts[mask], right[mask], rtol=1e-4, atol=1e-5)


def test_a_model_that_ranks_share_is_refused_rather_than_run_by_one_of_them():
    """A pass of one rank alone would wait for the others for ever."""
    model, batch = build("gpt2"), padded("left", 0)
    block = model.transformer.h[0]
    block.__class__ = type("FSDPModule", (type(block),), {})
    capture = tg.Capture(model, "residual_output.-1")
    with pytest.raises(ValueError, match="ranks share its weights. Remedy: 'position_ids' in the batch"):
        capture(TensorDict(batch))
    mask = batch["attention_mask"]
    capture(TensorDict({**batch, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}))
    capture(TensorDict(models.text_batch()))
