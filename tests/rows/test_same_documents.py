"""A document that comes again is no further draw: errors, p-values and splits are those of one reading."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from tdgeom.demo import demo_model
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom.rows.same_documents import SameDocuments, contents_of_ids, sequence_contents

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "it",
    "ran",
    "far",
    "away",
    "over",
    "the",
    "old",
    "hill",
]


def texts(count, seed=0):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=int(draw.integers(6, 30)))) for _ in range(count)]


class TwoLayers(torch.nn.Module):
    """Linear maps of floats (B, T, 6)."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = torch.nn.Linear(6, 5), torch.nn.Linear(5, 5)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x):
        return self.b(self.a(x).relu())


def float_batches(count=40, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 6, generator=generator) + torch.randn(count, 5, 6, generator=generator)
    return [{"x": rows} for rows in x.split(size)]


def renumbered(batches, repeats):
    """The batches over and over, with another document id each time."""
    found, start = [], 0
    for batch in batches * repeats:
        count = len(next(iter(batch.values())))
        found.append({**batch, "document_id": torch.arange(start, start + count)})
        start += count
    return found


def table(model, data, **settings):
    sites = {} if "tokenizer" in settings else {"sites": ["module_output:a", "module_output:b"]}
    found = tg.analyze_model(model, data, errors=True, progress=False, sample_size=2048, **sites, **settings)
    return found.metrics, found.pairs


COLUMNS = ["d_pr_se", "effective_rank_se", "k90_se"]


@pytest.mark.parametrize("numbers", ["none", "the same", "new ones"])
def test_a_loader_read_three_times_knows_no_more(numbers):
    once = float_batches()
    named = renumbered(once, 1)
    more = {"none": once * 3, "the same": named * 3, "new ones": renumbered(once, 3)}[numbers]
    (metrics, pairs), (thrice, pairs3) = table(TwoLayers(), once), table(TwoLayers(), more)
    np.testing.assert_allclose(thrice[COLUMNS], metrics[COLUMNS], rtol=1e-6)
    np.testing.assert_allclose(pairs3["linear_cka_se"], pairs["linear_cka_se"], rtol=1e-6)
    # the p-value's first 512 rows hold other rows of the same documents
    assert abs(np.log(pairs3["linear_cka_z"][0] / pairs["linear_cka_z"][0])) < 0.3


@pytest.mark.slow
def test_copies_in_a_corpus_in_another_order_and_cut_into_several_sequences():
    model, tokenizer = demo_model()
    corpus = texts(24)
    settings = dict(tokenizer=tokenizer, max_length=12, batch_size=4, sites="residual_output.-1")

    def errors(data):
        found = tg.analyze_model(model, data, errors=True, progress=False, metrics="spectrum", **settings)
        return found.metrics[COLUMNS]

    once = errors(corpus)
    np.testing.assert_allclose(errors([*corpus, *reversed(corpus)]), once, rtol=1e-4)
    np.testing.assert_allclose(errors([*corpus, *corpus]), once, rtol=1e-5)


def test_compare_and_stages_of_a_pipeline():
    net, batches = TwoLayers(), float_batches()
    sites = ["module_output:a", "module_output:b"]

    def errors(data):
        found = tg.compare(
            net, net, data, sites=sites, errors=True, progress=False, metrics=["linear_cka"], names=("a", "b")
        )
        return found.novelty["linear_cka_se"].to_numpy()

    np.testing.assert_allclose(errors(batches * 2), errors(batches), rtol=1e-6, atol=1e-12)
    select = tg.SelectTokens(["x"])
    ids = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 7, 8, 9, 1], [9, 9, 9, 9, 0, 0]])
    batch = {"acts": {"x": torch.randn(3, 6, 2)}, "input_ids": ids, "attention_mask": (ids != 0).long()}
    found = [select(TensorDict(batch))["carried", "document_id"] for _ in range(2)]
    assert found[0].tolist() == found[1].tolist() == [0] * 5 + [1] * 6 + [2] * 4  # whatever the row ids
    select.reset()
    assert select(TensorDict({**batch, "document_id": torch.tensor([4, 4, 9])}))[
        "carried", "document_id"
    ].unique().tolist() == [4, 9]


def test_what_is_a_copy():
    ids = torch.tensor([[1, 2, 3, 4, 0], [0, 1, 2, 3, 4], [1, 2, 3, 0, 0], [4, 3, 2, 1, 0]])
    a, b, short, turned = contents_of_ids(ids, ids != 0)
    assert a == b != turned and short == 0
    same = SameDocuments()
    # the second document begins as the first does; a later sequence that both have joins nobody else
    assert same.of([0, 0, 1, 1, 2, 2], [11, 12, 11, 13, 14, 12]).tolist() == [0, 0, 0, 0, 2, 2]
    assert same.of([7, 8], [0, 0]).tolist() == [7, 8] and same.copies == 1
    td = TensorDict({"x": torch.ones(2, 3, 4), "a": {"input_ids": ids[:2]}}, batch_size=[])
    one, other = sequence_contents(td, 2, ["x"], "attention_mask")
    assert one == other
    one, other = sequence_contents(td, 2, ["x", ("a", "input_ids")], "attention_mask")
    assert one != other
    td["a", "attention_mask"] = (ids[:2] != 0).long()
    one, other = sequence_contents(td, 2, ["x", ("a", "input_ids")], "attention_mask")
    assert one == other
    assert sequence_contents(td, 2, ["y"], "attention_mask") is None


def test_a_run_that_goes_on_knows_what_came_before(tmp_path):
    """Copies of what an interrupted run has read, in the part that is read after it."""
    net, batches = TwoLayers(), float_batches() * 2
    settings = dict(sites="module_output:a", errors=True, progress=False, metrics="spectrum")
    whole = tg.analyze_model(net, batches, **settings).metrics[COLUMNS]

    def broken():
        yield from islice(batches, 6)
        raise RuntimeError("the power went out")

    with pytest.raises(RuntimeError, match="the power went out"):
        tg.analyze_model(net, broken(), checkpoint=tmp_path / "state", **settings)
    resumed = tg.analyze_model(net, batches, checkpoint=tmp_path / "state", **settings).metrics[COLUMNS]
    np.testing.assert_allclose(resumed, whole, rtol=1e-9)


def significant(repeats, stage, measure, seed, keep=True):
    """Whether two sides that have nothing to do with each other are called alike at 5 %."""
    draw = torch.Generator().manual_seed(seed)
    sides = {
        name: torch.randn(30, 1, 6, generator=draw) + torch.randn(30, 4, 6, generator=draw) for name in "xy"
    }
    data = [{"acts": {name: value[i : i + 10] for name, value in sides.items()}} for i in range(0, 30, 10)]
    pipeline = TensorDictSequential(
        tg.SelectTokens(["x", "y"]),
        tg.RowSample(["x", "y"], also=["document_id"] * keep),
        tg.ForEachPair(stage, ["x", "y"], pairs=[("x", "y")]),
    )
    found = tg.run(pipeline, data * repeats, progress=False)
    return float(found["between", "x->y", f"{measure}_p"]) <= 0.05


@pytest.mark.parametrize("repeats", [1, 3])
def test_copies_do_not_make_chance_significant(repeats):
    """2 of 40 at the level of 5 %; more than 7 (of 16: more than 4) come once in a thousand such sets."""
    assert sum(significant(repeats, tg.CKANull(), "linear_cka", seed) for seed in range(40)) <= 7
    overlap = tg.Calibrated(tg.NeighborhoodOverlap(k=4), repeats=39)
    assert sum(significant(repeats, overlap, "neighborhood_overlap", seed) for seed in range(16)) <= 4


def test_a_sample_that_does_not_keep_documents_is_told_of_copies():
    with pytest.warns(
        tg.FewRowsWarning, match=r"some came before.*RowSample\(\.\.\., also=\['document_id'\]\)"
    ):
        significant(3, tg.CKANull(), "linear_cka", 0, keep=False)


def test_pictures_under_one_prompt_are_documents_of_their_own():
    """So are targets of one source; the same pictures under the same prompt are the same again."""
    ids = torch.tensor([[1, 5, 6, 7, 8, 2]]).expand(4, 6)
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, value in (("pixel_values", pixels), ("decoder_input_ids", torch.arange(24).reshape(4, 6))):
        keys = ["input_ids", "attention_mask", name]
        td = TensorDict(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), name: value}, batch_size=[]
        )
        found = sequence_contents(td, 4, keys, "attention_mask")
        assert len(set(found)) == 4
        again = td.clone().set(name, value[[2, 2, 0, 1]])
        assert sequence_contents(again, 4, keys, "attention_mask") == [found[i] for i in (2, 2, 0, 1)]
        bare = td.select("input_ids", "attention_mask")
        assert len(set(sequence_contents(bare, 4, keys, "attention_mask"))) == 1
