"""Blocks that work on (T, B, D): what is read, edited and turned into rows is (B, T, D)."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn

import models
import tdgeom as tg


class Turned(nn.Module):
    """Embeds (B, T), works on (T, B, D), gives (B, T, D)."""

    def __init__(self, torchs_own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(models.VOCAB, 16)
        if torchs_own:
            layers = [nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0) for _ in range(2)]
        else:
            layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)]
        self.layers = nn.ModuleList(layers)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1)


def xlnet() -> nn.Module:
    torch.manual_seed(0)
    config = tf.XLNetConfig(vocab_size=models.VOCAB, d_model=16, n_layer=2, n_head=4, d_inner=32)
    return tf.XLNetModel(config).eval()


MODELS = {"xlnet": xlnet, "torch": lambda: Turned(True).eval(), "linear": lambda: Turned(False).eval()}
SHAPES = [(2, 6), (6, 2), (5, 5), (1, 4), (3, 1)]  # as many texts as tokens: only a pass of other shape tells


def batch(shape):
    ids = torch.randint(4, models.VOCAB, shape, generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, : shape[1] // 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def output(model, given):
    with torch.no_grad():
        out = model(**given)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(MODELS))
def test_what_is_read_is_batch_first(name, shape):
    model, given, site = MODELS[name](), batch(shape), "residual_output.1"
    right = output(model, given)
    with torch.no_grad(), tg.Capture(model, site) as calls:
        model(**given)
    assert torch.equal(calls[0]["acts", site], right)
    # no mask reaches the blocks of the other two: what stands at padding is seen by others, which the check would say
    capture = tg.Capture(model, site, withhold=[] if name == "xlnet" else ["position_ids"])
    td = TensorDictSequential(capture, tg.SelectTokens([site]))(TensorDict(given))
    torch.testing.assert_close(td["acts", site], right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        td["tokens", site], right[given["attention_mask"].bool()], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(MODELS))
def test_an_edit_at_last_is_at_every_texts_last_token(name, shape):
    model, given = MODELS[name](), batch(shape)
    given["attention_mask"][-1, shape[1] // 2 + 1 :] = 0
    edit = tg.Steer(torch.full((16,), 2.0), positions="last")
    with torch.no_grad():
        before = output(model, given)
        with tg.Intervene(model, {"residual_output.1": edit}):
            moved = (output(model, given) - before).abs().amax(-1) > 1e-3
    places = torch.arange(shape[1]).expand(shape)
    last = torch.where(given["attention_mask"].bool(), places, -1).amax(1)
    assert torch.equal(moved, places == last[:, None])


def test_inputs_that_are_time_first_themselves():
    """No ids say how many texts there are; torch's own blocks say what they take."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    src, padding = torch.randn(5, 3, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        right = model(src, src_key_padding_mask=padding).transpose(0, 1)
    td = TensorDict({"src": src, "src_key_padding_mask": padding})
    capture = tg.Capture(model, "residual_output.1")
    rows = TensorDictSequential(capture, tg.SelectTokens(capture.sites))(td)["tokens", "residual_output.1"]
    torch.testing.assert_close(rows, right[~padding], rtol=1e-5, atol=1e-5)


def test_gradients_of_time_first_blocks_are_refused():
    model = MODELS["torch"]()
    with (
        pytest.raises(RuntimeError, match=r"is \(T, B, D\), of which gradients"),
        tg.Capture(model, "residual_output.0", direction="backward"),
    ):
        model(**batch((2, 6))).sum().backward()
