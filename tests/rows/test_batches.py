"""Whatever a loader yields: TensorDicts of any batch size, TensorClasses, ragged stacks, entries that are no tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import (
    LazyStackedTensorDict,
    NonTensorData,
    NonTensorStack,
    TensorClass,
    TensorDict,
    lazy_stack,
)
from tensordict.nn import TensorDictModule, TensorDictSequential, as_tensordict_module

import models
import tdgeom as tg
from tdgeom.rows.batches import as_batch

LENGTHS = (5, 2, 4)


def ids():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, models.VOCAB, (length,), generator=generator) for length in LENGTHS]


def padded():
    """The texts on one length, and the mask that says where they end."""
    full = torch.nn.utils.rnn.pad_sequence(ids(), batch_first=True)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": full, "attention_mask": mask.long(), "label": torch.arange(3)}


class Texts(TensorClass):
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    label: torch.Tensor
    source: str = "web"


def ragged():
    return lazy_stack([TensorDict(input_ids=one, label=torch.tensor(i)) for i, one in enumerate(ids())])


def whole():
    return TensorDict(padded(), batch_size=[])


KINDS = {
    "a dict": padded,
    "a dict of lists": lambda: {key: value.tolist() for key, value in padded().items()},
    "a dict of arrays": lambda: {key: value.numpy() for key, value in padded().items()},
    "a TensorDict": whole,
    "of batch size [B]": lambda: TensorDict(padded(), batch_size=[3]),
    "of batch size [B], locked": lambda: TensorDict(padded(), batch_size=[3]).lock_(),
    "on disk": lambda: TensorDict(padded(), batch_size=[3]).memmap(),
    "a TensorClass": lambda: Texts(**padded(), batch_size=[3]),
    "a stack of TensorClasses": lambda: lazy_stack([Texts(**{k: v[i] for k, v in padded().items()}) for i in range(3)]),
    "a stack": lambda: lazy_stack(list(TensorDict(padded(), batch_size=[3]).unbind(0))),
    "a ragged stack": ragged,
    "a ragged stack, packed": lambda: ragged().densify(),
    "a jagged tensor": lambda: TensorDict({"input_ids": jagged(ids()), "label": torch.arange(3)}),
    "a nested tensor": lambda: {"input_ids": torch.nested.nested_tensor(ids()), "label": torch.arange(3)},
    "with texts beside": lambda: whole().set_non_tensor("text", ["a", "bb", "ccc"]),
    "with other things beside": lambda: {
        **padded(), "text": ["a", "bb", "c"], "none": None, "more": {"name": "x", "deep": {"y": [1.5]}}
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def gpt2():
    return models.gpt2()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_batch_is_the_same_rows(gpt2, name):
    def make():
        capture = tg.Capture(gpt2, "residual_input.1")
        return TensorDictSequential(
            capture, tg.SelectTokens(capture.sites, also=["label"]), tg.Collect(capture.sites, also=["label"])
        )

    expected = tg.run(make(), [padded(), padded()], progress=False)
    assert len(expected["collected_row_id"]) == 2 * sum(LENGTHS)
    batch = KINDS[name]()
    before = set(batch.keys())
    found = tg.run(make(), [batch, KINDS[name]()], progress=False)
    for key in make()[2].out_keys:
        assert torch.equal(found[key], expected[key]), key
    assert set(batch.keys()) == before, "the batch itself is not altered"


def test_batch_sizes_go_and_entries_stay():
    inner = TensorDict({"a": torch.ones(2, 3), "deep": TensorDict({"b": torch.ones(2, 3, 4)}, [2, 3])}, [2])
    td = as_batch(TensorDict({"inner": inner, "x": torch.ones(2)}, [2]), None, None)
    assert td.batch_size == td["inner"].batch_size == td["inner", "deep"].batch_size == ()
    assert set(td.keys(True, True)) == {"x", ("inner", "a"), ("inner", "deep", "b")}
    assert td["inner", "deep", "b"].data_ptr() == inner["deep", "b"].data_ptr(), "nothing is copied"


NAMES = ["a", "bbb", "cc"]


@pytest.mark.parametrize(
    "texts",
    [
        lambda: {"text": NAMES},
        lambda: TensorDict({}).set_non_tensor("text", NAMES),
        lambda: TensorDict({"text": NonTensorStack(*map(NonTensorData, NAMES))}, [3]),
        lambda: TensorDict({"text": NonTensorData(NAMES)}),
        lambda: lazy_stack([TensorDict(text=name) for name in NAMES]),
    ],
    ids=["a dict", "set_non_tensor", "a stack", "data", "a lazy stack"],
)
def test_texts_reach_a_stage_of_ones_own(texts):
    def lengths(tokens, text):
        assert list(text) == NAMES
        return torch.tensor([[float(len(one))] for one in text]) + 0 * tokens[:, :1]

    pipeline = TensorDictSequential(
        TensorDictModule(lengths, ["tokens", "text"], ["long"]), tg.StreamingMean(in_keys="long")
    )
    batch = texts()
    batch = (
        {**batch, "tokens": torch.ones(3, 2)}
        if isinstance(batch, dict)
        else batch.set("tokens", torch.ones(3, 2))
    )
    assert float(tg.run(pipeline, [batch], progress=False)["mean", "mean"]) == 2


def test_texts_where_a_stage_needs_numbers_are_refused_with_the_remedy():
    acts = {"acts": {"x": torch.ones(3, 2)}, "text": NAMES}
    pipeline = TensorDictSequential(
        tg.SelectTokens(["x"], also=["text"]), tg.StreamingMean(in_keys=[("carried", "text")])
    )
    with pytest.raises(
        TypeError,
        match=r"StreamingMean reads a tensor at \('carried', 'text'\), got .*Give numbers as a tensor",
    ):
        tg.run(pipeline, [acts], progress=False)


@as_tensordict_module(in_keys=["tokens"], out_keys=["doubled"])
def doubled(tokens):
    """A function of TensorDict's own making."""
    return 2 * tokens


def shifted(td):
    """A plain callable: it names no keys."""
    return td.set("tokens", td["tokens"] + 1)


def test_plain_callables_and_wrapped_functions():
    rows = torch.arange(12.0).reshape(6, 2)
    pipeline = TensorDictSequential(
        shifted,
        doubled,
        tg.StreamingMean(in_keys="doubled"),
        TensorDictModule(torch.sum, [("mean", "mean")], ["total"]),
    )
    loader = [{"tokens": rows[:4]}, {"tokens": rows[4:]}]
    result = tg.run(pipeline, loader, progress=False)
    torch.testing.assert_close(result["mean", "mean"], 2 * (rows.double().mean(0) + 1))
    assert float(result["total"]) == float(2 * (rows.mean(0) + 1).sum()) and torch.equal(
        loader[0]["tokens"], rows[:4]
    )
    with pytest.raises(
        TypeError, match=r"with in_keys and out_keys\), got function\. Wrap a function in TensorDictModule"
    ):
        tg.ForEach(doubled, ["x"])  # a function that does not say its keys


def test_rows_that_are_the_batch_of_a_tensordict_are_read_by_run_and_refused_in_a_call():
    """One rule: a run leaves the batch size behind, a call of a stage that makes or reads rows refuses any."""
    acts = torch.randn(4, 4, 4, dtype=torch.float64)  # as many rows of one position a sequence as sequences
    mask = torch.zeros(4, 4)
    mask[:, 0] = 1
    pipeline = lambda: TensorDictSequential(tg.SelectTokens(["x"]), tg.ForEach(tg.StreamingMean(), ["x"]))
    for batch_size in ([4], [4, 4]):
        td = TensorDict({"acts": {"x": acts}, "attention_mask": mask}, batch_size=batch_size)
        found = tg.run(pipeline(), [td], progress=False)
        torch.testing.assert_close(found["mean", "x", "mean"], acts[:, 0].mean(0))
        with pytest.raises(
            ValueError,
            match=r"SelectTokens makes rows of positions, got .* batch size \[4.*auto_batch_size_\(0\)",
        ):
            pipeline()(td)
        found = pipeline()(td.auto_batch_size_(0))
        torch.testing.assert_close(found["mean", "x", "mean"], acts[:, 0].mean(0))


def jagged(parts):
    return torch.nested.nested_tensor(list(parts), layout=torch.jagged)


@pytest.mark.parametrize("kind", [dict, TensorDict, lazy_stack], ids=["dict", "TensorDict", "lazy_stack"])
def test_ragged_rows_inside_are_padded_and_masked(kind):
    acts = [torch.randn(length, 3) for length in LENGTHS]
    if kind is lazy_stack:
        batch = lazy_stack([TensorDict({"acts": {"x": one}}) for one in acts])
    else:
        batch = kind({"acts": {"x": jagged(acts)}})
    assert as_batch(batch, None, None)["acts", "x"].shape == (3, 5, 3)
    pipeline = TensorDictSequential(tg.SelectTokens(["x"]), tg.Collect(["x"]))
    found = tg.run(pipeline, [batch], progress=False)
    assert torch.equal(found["collected", "x"], torch.cat(acts))


def test_which_lengths_are_the_positions_is_not_guessed():
    acts, words = (
        jagged(torch.randn(length, 3) for length in LENGTHS),
        jagged(torch.arange(n) for n in (1, 5, 2)),
    )
    for batch in ({"words": words, "acts": {"x": acts}}, {"acts": {"x": acts}, "words": words}):
        with pytest.raises(
            ValueError, match=r"different lengths, .*'words': \[1, 5, 2\].* Put an 'attention_mask' \(B, T\)"
        ):
            as_batch(batch, None, None)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    told = as_batch({"words": words, "acts": {"x": acts}, "attention_mask": mask}, None, None)
    assert torch.equal(told["attention_mask"], mask)
    named = as_batch({"words": words, "input_ids": jagged(ids())}, None, None)
    assert named["attention_mask"].sum(-1).tolist() == list(LENGTHS)
    dense = as_batch({"words": words, "input_ids": torch.ones(3, 5, dtype=torch.long)}, None, None)
    assert "attention_mask" not in dense.keys()


def test_numpy_scalars_and_empty_entries():
    td = as_batch({"a": np.float32(2), "b": np.arange(3), "c": None, "d": "word", "e": []}, None, None)
    assert float(td["a"]) == 2 and td["b"].tolist() == [0, 1, 2] and "c" not in td.keys()
    assert td["d"] == "word" and td["e"].shape == (0,)
    assert isinstance(as_batch(LazyStackedTensorDict(TensorDict(a=torch.ones(2))), None, None), TensorDict)
