"""What a call is given is found wherever it lies: positions and rows of wrappers are those of the attended tokens, or refused."""

from __future__ import annotations

import dataclasses
from collections import namedtuple

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn

import models
import tdgeom as tg
from tdgeom.model.calls.call_tensors import call_tensors

MASK = torch.ones(2, 8, dtype=torch.long)
MASK[1, 3:] = 0
IDS = torch.randint(4, models.VOCAB, (2, 8), generator=torch.Generator().manual_seed(1)) * MASK
SITE = "residual_output.2"
Pair = namedtuple("Pair", ["input_ids", "attention_mask"])


@dataclasses.dataclass
class Features:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class Wrapper(nn.Module):
    """Calls an encoder's forward with what it finds in its one argument; no hook hears of that call."""

    def __init__(self, *, called: bool = False) -> None:
        super().__init__()
        self.inner, self.called = models.bert().bert, called

    def forward(self, batch):
        if isinstance(batch, list):
            ids, mask = batch
        elif isinstance(batch, Features | Pair):
            ids, mask = batch.input_ids, batch.attention_mask
        else:
            ids, mask = batch["input_ids"], batch["attention_mask"]
        inner = self.inner if self.called else self.inner.forward
        hidden = inner(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden if mask is None else (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def rows(model: nn.Module, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad(), tg.Capture(model.eval(), SITE) as calls:
        model(*args, **kwargs)
    selected = TensorDictSequential(tg.SelectTokens([SITE]), tg.Collect([SITE]))
    return tg.run(selected, calls, progress=False)["collected", SITE]


def inside(kind: str, ids=IDS, mask=MASK):
    entries = {"input_ids": ids, "attention_mask": mask}
    return {
        "dict": entries,
        "encoding": tf.BatchEncoding(entries),
        "dataclass": Features(ids, mask),
        "named tuple": Pair(ids, mask),
        "tensordict": TensorDict(entries, batch_size=[len(ids)]),
        "list": [ids, mask],  # nothing is named: the mask is heard of where the encoder inside uses it
    }[kind]


KINDS = ["dict", "encoding", "dataclass", "named tuple", "tensordict", "list"]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_wrapper_are_the_attended_tokens(kind, called):
    model = Wrapper(called=called)
    with torch.no_grad():
        right = (
            model.eval().inner(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states[3]
        )
    torch.testing.assert_close(rows(model, inside(kind)), right[MASK.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", ["last", 1, "last-1"])
def test_an_edit_in_a_wrapper_means_attended_tokens(kind, called, position):
    model, edits = (
        Wrapper(called=called).eval(),
        {"residual_output.1": tg.Steer(torch.ones(16), positions=position)},
    )

    def moved(batch):
        with torch.no_grad():
            plain = model(batch)
            with tg.Intervene(model, edits):
                return (model(batch) - plain)[-1]

    alone = moved(inside(kind, IDS[1:, :3], MASK[1:, :3]))
    assert alone.abs().max() > 1e-3
    torch.testing.assert_close(moved(inside(kind)), alone, rtol=1e-3, atol=1e-4)


def test_no_mask_inside_means_that_there_is_no_padding():
    assert len(rows(Wrapper(), [IDS, None])) == 16 and len(rows(Wrapper(called=True), [IDS, None])) == 16


class OwnMask(nn.Module):
    """A mask under a name that says nothing of what true means."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCAB, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, input_ids, pad_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Blockwise(nn.Module):
    """A wrapper whose blocks are given a mask that nobody can read."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x, lengths_mask=None):
            return self.linear(x)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCAB, 16)
        self.layers = nn.ModuleList([self.Block() for _ in range(3)])

    def forward(self, batch):
        x = self.embed(batch["tokens"])
        for layer in self.layers:
            x = layer(x, batch["valid"])
        return x


@pytest.mark.parametrize("positions", ["last", 0, slice(1, 3)])
def test_a_mask_that_cannot_be_read_is_no_missing_mask(positions):
    for model, args in (
        (OwnMask(), (IDS, MASK == 0)),
        (Blockwise(), ({"tokens": IDS, "valid": MASK.bool()},)),
    ):
        with pytest.raises(ValueError, match="whether a position is padding is not known.*Remedy"):
            rows(model, *args)
        with (
            pytest.raises(ValueError, match="whether a position is padding is not known"),
            tg.Intervene(model, {SITE: tg.Steer(torch.ones(16), positions=positions)}),
        ):
            model(*args)
        with tg.Intervene(model, {SITE: tg.Scale(2.0)}):  # everywhere needs no mask
            model(*args)
    assert len(rows(OwnMask(), IDS)) == 16


class TorchEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCAB, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, batch):
        return self.encoder(self.embed(batch["tokens"]), src_key_padding_mask=batch["padding"])


def test_torchs_own_mask_inside_a_wrapper():
    model = TorchEncoder()
    assert len(rows(model, {"tokens": IDS, "padding": MASK == 0})) == 11
    with torch.no_grad():
        batch = {"tokens": IDS, "padding": MASK == 0}
        plain = model(batch)
        with tg.Intervene(model, {SITE: tg.Steer(torch.ones(16) * 9, positions="last")}):
            moved = (model(batch) - plain).abs().amax(-1) > 1e-3
    assert moved[1].nonzero().flatten().tolist() == [2] and moved[0].nonzero().flatten().tolist() == [7]


def test_names_of_what_lies_inside():
    ids = torch.zeros(1, 2)
    td = TensorDict({"a": {"input_ids": ids}, "obs": ids}, batch_size=[1])
    assert set(call_tensors(["td"], [td], {})) == {("a", "input_ids"), "input_ids", "obs"}
    two = {"query": {"input_ids": ids}, "doc": {"input_ids": ids}}
    assert set(call_tensors(list(two), [], two)) == {("query", "input_ids"), ("doc", "input_ids")}
    output = tf.modeling_outputs.BaseModelOutput(last_hidden_state=ids)
    cache = tf.DynamicCache()
    given = {
        "encoder_outputs": output,
        "past_key_values": cache,
        "use_cache": True,
        "word": "x",
        "mask": {"full": ids},
    }
    assert set(call_tensors(["x"], [ids, {"y": ids}], given)) == {"x", "y", "mask"}
