"""Sequences: what they read is declared, parts of them keep what they need, and they merge, reset and are hooked as one."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, set_skip_existing

import models
import tdgeom as tg
from stage_examples import CountAbove
from tdgeom.core.keys import optional_in_keys
from tdgeom.core.pipeline import parts_of, streams_of, why_closed

SITES = ["x", "y"]


def wrapped(function, reads, writes):
    return TensorDictModule(function, in_keys=reads, out_keys=writes)


def rows(count=12, width=3, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(found, expected, keys):
    for key in keys:
        torch.testing.assert_close(
            found[key], expected[key], rtol=1e-9, atol=1e-11, equal_nan=True, msg=str(key)
        )


# ------------------------------------------------------------------------------------------ what a pipeline reads


def full_batch():
    """All that a tokenizer and a collator give; the second text is padded on the left."""
    batch = models.text_batch(3, 6)
    batch["attention_mask"][1, :2] = 0
    special = torch.zeros_like(batch["input_ids"])
    special[:, -1] = 1
    return TensorDict(
        {
            **batch,
            "token_type_ids": (torch.arange(6) >= 3).long().expand(3, 6).clone(),
            "special_tokens_mask": special,
            "sequence_id": torch.tensor([7, 3, 5]),
            "label": torch.arange(3),
            "document_id": torch.arange(3),
            "labels": batch["input_ids"].clone(),
            "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0) + 3,
        }
    )


def model_pipeline(model, kind=TensorDictSequential, **select):
    capture = tg.Capture(model, ["residual_input.1", "residual_output.-1"])
    sites = capture.sites
    return kind(
        capture,
        tg.SelectTokens(sites, also=["label"], skip_special=True, **select),
        tg.RowSample(sites, size=8, also=["label"]),
        tg.ForEach(tg.StreamingMean(), sites),
        tg.ForEach(tg.LabelOverlap(k=2), sites),
    )


@pytest.mark.filterwarnings("ignore::tdgeom.UndefinedMeasureWarning")
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_every_entry_that_changes_a_result_is_declared(name):
    model = models.TEXT_MODELS[name]()
    td = full_batch()
    make = lambda: model_pipeline(model)
    pipeline = make()
    expected = pipeline(td.copy())
    results = [
        key
        for key in pipeline.out_keys
        if key[0] in ("sample", "mean", "neighborhood") or key == "sample_row_id"
    ]
    optional = set(optional_in_keys(pipeline))
    assert optional < set(pipeline.in_keys)
    moved = set()
    for key in td.keys():
        stage = make()
        if key in pipeline.in_keys and key not in optional:
            with pytest.raises(KeyError):
                stage(td.exclude(key))
            continue
        if key == "special_tokens_mask":  # needed where special tokens are to be left out, and said to be
            with pytest.raises(KeyError, match="needs 'special_tokens_mask' in the batch"):
                stage(td.exclude(key))
            continue
        found = stage(td.exclude(key))
        alike = [
            found[r].shape == expected[r].shape
            and torch.equal(found[r].nan_to_num(), expected[r].nan_to_num())
            for r in results
        ]
        if not all(alike):
            moved.add(key)
    assert moved <= optional and {"attention_mask", "sequence_id"} <= moved
    assert ("token_type_ids" in moved) == (name != "llama")
    assert "labels" not in pipeline.in_keys and "document_id" in optional
    # so whatever follows in_keys loses nothing
    same(make()(td.select(*pipeline.in_keys, strict=False)), expected, results)
    named = {key: td[key] for key in td.keys() if key in pipeline.in_keys}
    called = make()
    found = dict(zip(called.out_keys, called(**named)))
    same(found, expected, results)


def mask_maker():
    return wrapped(lambda ids: (ids != 0).long(), ["input_ids"], ["attention_mask"])


def padded_acts():
    acts = rows(24).reshape(4, 6, 3)
    ids = torch.full((4, 6), 9)
    acts[:, 4:], ids[:, 4:] = 1e6, 0
    return TensorDict({"acts": {site: acts for site in SITES}, "input_ids": ids})


CONTAINERS = {
    "a plain sequence": TensorDictSequential,
    "a pipeline": tg.Pipeline,
    "named stages": lambda *parts: TensorDictSequential(
        OrderedDict((f"stage {i}", p) for i, p in enumerate(parts))
    ),
    "nested": lambda *parts: TensorDictSequential(
        parts[0], TensorDictSequential(*parts[1:3]), tg.Pipeline(*parts[3:])
    ),
    "named inside": lambda *parts: tg.Pipeline(
        TensorDictSequential({"mask": parts[0], "select": parts[1]}), *parts[2:]
    ),
    "tolerant": lambda *parts: TensorDictSequential(*parts, partial_tolerant=True),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_maker_of_an_optional_input_stays(container):
    make = lambda: CONTAINERS[container](
        mask_maker(),
        tg.SelectTokens(SITES),
        tg.ForEach(tg.StreamingMean(), SITES),
        tg.RowSample(SITES, size=5),
    )
    td = padded_acts()
    expected = make()(td.copy())
    assert int(expected["mean", "x", "count"]) == 16
    part = make().select_subsequence(out_keys=[("mean", "y", "mean")])
    found = part(td.copy())
    same(found, expected, [("mean", "y", name) for name in ("count", "mean", "variance")])
    assert "sample" not in found.keys() and ("mean", "x", "mean") not in found.keys(True)
    assert "attention_mask" not in part.in_keys and part.partial_tolerant == (container == "tolerant")
    # from the other side: who has the activations needs neither ids nor a mask
    later = make().select_subsequence(in_keys=[("acts", site) for site in SITES])
    assert "attention_mask" not in later.out_keys and set(later.out_keys) < set(make().out_keys)
    assert int(later(td.copy())["mean", "x", "count"]) == 24


def test_a_part_is_of_the_same_modules_names_and_kind():
    named = OrderedDict(
        mask=mask_maker(), select=tg.SelectTokens(SITES), mean=tg.ForEach(tg.StreamingMean(), SITES)
    )
    whole = TensorDictSequential(named)
    part = whole.select_subsequence(out_keys=["row_id"])
    assert list(part.module) == ["mask", "select"] and part.module["select"] is named["select"]
    assert type(part) is TensorDictSequential
    assert type(tg.Pipeline(*parts_of(whole)).select_subsequence(out_keys=["row_id"])) is tg.Pipeline
    each = tg.ForEach(TensorDictSequential(tg.StreamingCovariance(), tg.EigenSpectrum()), SITES)
    one = each.select_subsequence(out_keys=[("eigenvalues", "y")])
    assert type(one) is tg.Pipeline and list(one.module) == [each[1], each[3]]
    with pytest.raises(ValueError, match=r"no stage of ForEach runs from .* towards out_keys=\['nowhere'\]"):
        each.select_subsequence(out_keys=["nowhere"])


def row_ids(pipeline):
    tg.reset(pipeline)
    return pipeline(padded_acts())["row_id"]


class Doubled(TensorDictSequential):
    """A subclass that does more than its parts."""

    def forward(self, tensordict, tensordict_out=None, **kwargs):
        out = super().forward(tensordict, tensordict_out, **kwargs)
        return out.set("row_id", 2 * out["row_id"])


def test_a_part_of_a_subclass_still_does_what_the_subclass_does():
    whole = Doubled(mask_maker(), tg.SelectTokens(SITES), tg.ForEach(tg.StreamingMean(), SITES))
    part = whole.select_subsequence(out_keys=["row_id"])
    assert type(part) is Doubled and len(part) == 2
    assert torch.equal(row_ids(part), row_ids(whole)) and int(row_ids(part)[1]) == 2


def test_inside_a_part_what_is_more_than_its_parts_stays_whole():
    inner = TensorDictSequential(mask_maker(), tg.SelectTokens(SITES))
    inner.register_forward_hook(lambda module, args, out: out.set("row_id", 2 * out["row_id"]))
    whole = TensorDictSequential(inner, tg.ForEach(tg.StreamingMean(), SITES))
    part = whole.select_subsequence(out_keys=["row_id"])
    assert part.module[0] is inner
    assert torch.equal(row_ids(part), row_ids(whole)) and int(row_ids(part)[1]) == 2


def test_optional_inputs_of_a_sequence_are_those_that_no_part_needs_from_outside():
    need = wrapped(torch.sum, ["sample_eigenvalues"], ["total"])
    written = TensorDictSequential(tg.SampleMetrics(), tg.SampleSpectrum(), need)
    assert "sample_eigenvalues" in optional_in_keys(written)
    outside = TensorDictSequential(tg.SampleMetrics(), need)
    assert "sample_eigenvalues" not in optional_in_keys(outside) and "sample_covariance" in optional_in_keys(
        outside
    )
    assert optional_in_keys(TensorDictSequential(tg.StreamingMean())) == []
    written(TensorDict(sample=rows(40)))

    class Own(TensorDictModuleBase):
        in_keys, out_keys, optional_in_keys = ["tokens", "weight"], ["w"], ["weight"]

    assert optional_in_keys(Own()) == ["weight"]
    assert optional_in_keys(TensorDictSequential(Own(), tg.StreamingMean())) == ["weight"]
    assert tg.ForEach(Own(), SITES).in_keys == [
        ("tokens", "x"),
        ("weight", "x"),
        ("tokens", "y"),
        ("weight", "y"),
    ]
    assert set(optional_in_keys(tg.ForEach(Own(), SITES))) == {("weight", "x"), ("weight", "y")}


def test_a_tolerant_sequence_skips_what_lacks_a_required_input_only():
    tolerant = TensorDictSequential(
        tg.SampleMetrics(), tg.NearestNeighbors(2, in_keys="elsewhere"), partial_tolerant=True
    )
    td = tolerant(TensorDict(sample=rows(40)))
    assert ("sample_metrics", "sv_stable_rank") in td.keys(True) and "neighbors" not in td.keys()


# ------------------------------------------------------------------------------------------ where the outputs go


def test_outputs_go_into_tensordict_out():
    moments = [("moments", "x", name) for name in ("count", "mean", "covariance")]
    pipeline = TensorDictSequential(
        tg.ForEach(tg.StreamingCovariance(), SITES),
        tg.ForEach(tg.EigenSpectrum(k=2), SITES),
        tg.ForEachPair(tg.SubspaceNovelty(k=2), SITES),
        tg.RankMe(in_keys=moments),
    )
    td = TensorDict({"tokens": {site: rows(seed=i) for i, site in enumerate(SITES)}})
    expected = deepcopy(pipeline)(td.copy())
    out = TensorDict({})
    assert pipeline(td, tensordict_out=out) is out
    assert set(out.keys(True, True)) == set(pipeline.out_keys) and set(td.keys(True, True)) == set(
        pipeline.in_keys
    )
    same(out, expected, pipeline.out_keys)
    for stage, data in (
        (tg.StreamingMean(), TensorDict(tokens=rows())),
        (tg.SampleMetrics(), TensorDict(sample=rows())),
    ):
        one = TensorDict({})
        assert stage(data, tensordict_out=one) is one and set(one.keys(True, True)) == set(stage.out_keys)
        assert set(data.keys()) == {stage.in_keys[0]}
        picked, chosen = TensorDict({}), stage.out_keys[-1]
        stage.select_out_keys(chosen)
        stage(data, tensordict_out=picked)
        assert set(picked.keys(True, True)) == {chosen}


def test_an_underscore_is_not_written():
    mean = tg.StreamingMean(out_keys=["_", ("mean", "mean"), "_"])
    each = tg.ForEach(mean, SITES)
    td = TensorDict({"tokens": {site: rows() for site in SITES}})
    assert set(each(td.copy())["mean"].keys(True, True)) == {("x", "mean"), ("y", "mean")}
    result = tg.run(each, [td], progress=False)
    assert set(result.keys()) == {"mean", "run"} and "_" not in result.keys(True)
    cca = tg.ForEachPair(tg.PWCCA(out_keys=["_", *tg.PWCCA().out_keys[1:]]), SITES)
    found = cca(TensorDict({"sample": {site: rows(seed=i) for i, site in enumerate(SITES)}}))
    assert set(found["between", "x->y"].keys()) == {key[-1] for key in tg.PWCCA().out_keys[1:]}


@pytest.mark.parametrize(
    "make",
    [
        lambda: tg.ForEach(tg.SpectrumMetrics(), SITES),
        lambda: tg.ForEachPair(tg.LayerCosine(), ["x", "y", "z"]),
    ],
)
def test_what_is_there_is_skipped_site_by_site(make):
    """``set_skip_existing``: a unit whose outputs are all there is not called, as in a sequence of single stages."""
    stage = make()
    td = TensorDict(
        {
            root: {site: rows(30, 30, i).abs().sort(descending=True).values for i, site in enumerate("xyz")}
            for root in ("sample",)
        }
    )
    td["eigenvalues"] = TensorDict({site: td["sample", site][0] for site in SITES})
    expected = stage(td.copy())
    kept = stage.out_keys[: len(stage.out_keys) // 2]
    for key in kept:
        td.set(key, torch.tensor(-7.0))
    with set_skip_existing(True):
        found = make()(td)
    assert all(float(found[key]) == -7 for key in kept)
    same(found, expected, stage.out_keys[len(kept) :])


# ------------------------------------------------------------------------------------------ merging, forgetting


def streams():
    return (
        tg.ForEach(tg.StreamingCovariance(), SITES),
        tg.RowSample(SITES, size=5),
        tg.Collect(["x"]),
        CountAbove(in_keys=[("tokens", "x")]),
        tg.ForEach(tg.EigenSpectrum(k=2), SITES),
    )


def batch(first, last):
    data = {site: rows(30, seed=i)[first:last] for i, site in enumerate(SITES)}
    return TensorDict({"tokens": data, "row_id": torch.arange(first, last)})


MERGED = {
    "a pipeline": (lambda: tg.Pipeline(*streams()), lambda a, b: a.merge_(b)),
    "a plain sequence": (lambda: TensorDictSequential(*streams()), tg.merge_),
    "named and nested": (
        lambda: TensorDictSequential(
            {"one": tg.Pipeline(*streams()[:2]), "two": TensorDictSequential(*streams()[2:])}
        ),
        tg.merge_,
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_shards_add_up_and_are_forgotten(name):
    make, merge = MERGED[name]
    whole, shards = make(), [make() for _ in range(3)]
    expected = whole(batch(0, 30))
    for shard, (first, last) in zip(shards, ((0, 7), (7, 9), (9, 30))):
        shard(batch(first, last))
    merged = make()
    for shard in (pickle.loads(pickle.dumps(shards[2])), shards[0], deepcopy(shards[1])):
        assert merge(merged, shard) is merged
    tg.sync_(merged)  # one process: nothing changes
    out = TensorDict({})
    for stream in streams_of(merged):
        stream.publish(out)
    same(out, expected, list(out.keys(True, True)))
    tg.reset(merged)
    assert all(stream.is_empty for stream in streams_of(merged))
    same(merged(batch(0, 30)), expected, merged.out_keys)


def test_for_each_merges_resets_and_syncs_itself():
    a, b, whole = (tg.ForEach(tg.StreamingMean(), SITES) for _ in range(3))
    a(batch(0, 10)), b(batch(10, 30))
    assert a.merge_(b) is a
    a.sync_()
    same(
        whole(batch(0, 30)),
        {key: value for key, value in a[0].publish(TensorDict({})).items(True, True)},
        [("mean", "x", "mean")],
    )
    a.reset()
    assert a[0].is_empty and a[1].is_empty
    with pytest.raises(
        ValueError, match=r"StreamingMean at x cannot merge StreamingMean at y: both must be of the same site"
    ):
        b.merge_(tg.ForEach(tg.StreamingMean(), SITES[::-1]))


def test_a_merge_that_is_refused_has_changed_nothing():
    a, b = (
        tg.Pipeline(tg.StreamingMean(in_keys=[("tokens", "x")]), tg.RowSample(["x"], size=5, seed=seed))
        for seed in (0, 1)
    )
    a(batch(0, 10)), b(batch(10, 30))
    with pytest.raises(ValueError, match="the same settings: seed is 1 there and 0 here"):
        a.merge_(b)
    assert int(a[0].count) == 10
    wide = tg.Pipeline(
        tg.StreamingMean(in_keys=[("tokens", "x")]), tg.StreamingCovariance(in_keys=[("tokens", "y")])
    )
    narrow = deepcopy(wide)
    wide(batch(0, 10))
    narrow(TensorDict({"tokens": {"x": rows(9, 3), "y": rows(9, 2)}}))
    with pytest.raises(ValueError, match="they saw rows of different width"):
        wide.merge_(narrow)
    assert int(wide[0].count) == 10
    with pytest.raises(ValueError, match="this one has 2 streaming stages, the other 1"):
        wide.merge_(tg.Pipeline(tg.StreamingMean()))


class Exploration(TensorDictModuleBase):
    """A module of another library whose ``reset`` means something else."""

    in_keys, out_keys = ["tokens"], ["noise"]

    def reset(self, tensordict):
        raise AssertionError("not ours to call")

    def forward(self, tensordict):
        return tensordict.set("noise", tensordict["tokens"])


def test_reset_forgets_rows_counts_sequences_anew_and_leaves_other_libraries_alone():
    select = tg.SelectTokens(["x"])
    pipeline = tg.Pipeline(Exploration(), select, tg.StreamingMean(in_keys=[("tokens", "x")]))
    select(TensorDict({"acts": {"x": rows(6).reshape(2, 3, 3)}}))
    assert int(select.sequences) == 2
    pipeline.reset()
    assert int(select.sequences) == 0
    alone = tg.StreamingMean()
    alone(tokens=rows())
    tg.reset(alone)
    assert alone.is_empty


# ------------------------------------------------------------------------------------------ open and closed


def test_why_a_sequence_is_more_than_its_parts():
    def sequence(**options):
        return TensorDictSequential(mask_maker(), tg.SelectTokens(SITES), **options)

    assert why_closed(sequence()) is None and why_closed(sequence(inplace=True)) is None
    hooked, pre, selected, patched = sequence(), sequence(), sequence(), sequence()
    hooked.register_forward_hook(lambda *_: None)
    pre.register_forward_pre_hook(lambda *_: None)
    selected.select_out_keys("row_id")
    patched.forward = lambda tensordict: tensordict
    for closed, why in (
        (hooked, "forward hooks"),
        (pre, "forward hooks"),
        (selected, "select_out_keys"),
        (patched, r"overrides forward"),
        (Doubled(mask_maker()), "overrides forward"),
        (sequence(inplace=False), "inplace=False"),
        (sequence(inplace="empty"), "inplace='empty'"),
        (sequence(partial_tolerant=True), "partial_tolerant"),
    ):
        assert why in why_closed(closed)
    assert why_closed(selected.reset_out_keys()) is None
