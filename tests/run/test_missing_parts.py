"""A part of the usual pipeline that was left out is named, with the line to write, in a run and in a call."""

from __future__ import annotations

import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg

MODEL = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh())
SITES = ["module_output:0", "module_output:1"]


def capture():
    return tg.Capture(MODEL, SITES)


def rows():
    return tg.SelectTokens(SITES)


def sample():
    return tg.RowSample(SITES, size=20)


def each(stage):
    return tg.ForEach(stage, SITES)


def pairs(stage):
    return tg.ForEachPair(stage, SITES)


class Mine(tg.Stage):
    """A stage of one's own."""

    reads = {"sample": "N D"}
    writes = [("sample_metrics", "mine")]

    def compute(self, sample):
        return sample.mean((-2, -1))


# the stages behind a capture, and the line to write
FORGOTTEN = {
    "a streaming stage": (lambda: [rows(), tg.StreamingCovariance()], "tg.ForEach(tg.StreamingCovariance(...), sites)"),
    "a mean": (lambda: [rows(), tg.StreamingMean()], "tg.ForEach(tg.StreamingMean(...), sites)"),
    "a sketch": (lambda: [rows(), tg.StreamingSketch(k=4)], "tg.ForEach(tg.StreamingSketch(...), sites)"),
    "an estimator": (lambda: [rows(), sample(), tg.TwoNN()], "tg.ForEach(tg.TwoNN(...), sites)"),
    "neighbours": (lambda: [rows(), sample(), tg.NearestNeighbors(3)], "tg.ForEach(tg.NearestNeighbors(...), sites)"),
    "an own stage": (lambda: [rows(), sample(), Mine()], "tg.ForEach(Mine(...), sites)"),
    "a spectrum": (
        lambda: [rows(), each(tg.StreamingCovariance()), tg.EigenSpectrum()],
        "tg.ForEach(tg.EigenSpectrum(...), sites)",
    ),
    "spectrum metrics": (
        lambda: [rows(), each(tg.StreamingCovariance()), each(tg.EigenSpectrum()), tg.SpectrumMetrics()],
        "tg.ForEach(tg.SpectrumMetrics(...), sites)",
    ),
    "a pair stage": (lambda: [rows(), sample(), tg.LinearCKA()], "tg.ForEachPair(tg.LinearCKA(...), sites)"),
    "another pair stage": (lambda: [rows(), sample(), tg.RSA()], "tg.ForEachPair(tg.RSA(...), sites)"),
    "a pair of neighbours": (
        lambda: [rows(), sample(), tg.NeighborhoodOverlap(k=3)],
        "tg.ForEachPair(tg.NeighborhoodOverlap(...), sites)",
    ),
    "no rows": (lambda: [each(tg.StreamingCovariance())], "tg.SelectTokens("),
    "no rows for a sample": (lambda: [sample(), each(tg.TwoNN())], "tg.SelectTokens("),
    "no sample": (lambda: [rows(), each(tg.TwoNN())], "tg.RowSample(sites)"),
    "no sample for pairs": (lambda: [rows(), pairs(tg.LinearCKA())], "tg.RowSample(sites)"),
    "no moments": (lambda: [rows(), each(tg.EigenSpectrum())], "tg.ForEach(tg.StreamingCovariance(), sites)"),
    "no spectrum": (
        lambda: [rows(), each(tg.StreamingCovariance()), each(tg.SpectrumMetrics())],
        "tg.ForEach(tg.EigenSpectrum(), sites)",
    ),
    "no directions": (lambda: [rows(), sample(), pairs(tg.SubspaceNovelty())], "tg.ForEach(tg.EigenSpectrum(), sites)"),
    "no cross moments": (lambda: [rows(), pairs(tg.CCA(source="moments"))], "tg.StreamingCrossMoments(sites, pairs=...)"),
    "no table": (lambda: [rows(), sample(), each(tg.TwoNN(source="neighbors"))], "tg.ForEach(tg.NearestNeighbors(k), sites)"),
    "no labels": (
        lambda: [rows(), sample(), each(tg.NearestNeighbors(3)), each(tg.LabelOverlap(labels="label"))],
        "RowSample(..., also=['label'])|tg.RowSample(sites, also=['label'])",
    ),
    "another site": (lambda: [tg.SelectTokens(["0"]), tg.RowSample(["0"], size=9)], "as capture.sites does"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGOTTEN)
def test_the_missing_part_is_named(name):
    made, line = FORGOTTEN[name]
    batch = {"input": torch.randn(30, 6)}
    line = "|".join(map(re.escape, line.split("|")))
    with pytest.raises((ValueError, TypeError, KeyError), match=line):
        tg.run(TensorDictSequential(capture(), *made()), [batch], progress=False)
    with pytest.raises((ValueError, TypeError, KeyError), match=line):
        TensorDictSequential(capture(), *made())(TensorDict(batch))


@pytest.mark.parametrize(
    "made", [lambda: [rows(), sample()], lambda: [sample()], lambda: [each(tg.StreamingCovariance())]]
)
def test_a_missing_capture_is_named(made):
    """Also together with what stands between it and the stage."""
    batch = {"input": torch.randn(30, 6)}
    with pytest.raises(KeyError, match=r"tg\.Capture\(model, sites\)"):
        tg.run(TensorDictSequential(*made()), [batch], progress=False)
    with pytest.raises(KeyError, match=r"tg\.Capture\(model, sites\)"):
        TensorDictSequential(*made())(TensorDict(batch))


def test_a_nested_root_is_still_given_to_what_takes_it():
    """A module of one's own may read all sites at once."""
    from tensordict.nn import TensorDictModule

    whole = TensorDictModule(
        lambda td: torch.tensor(float(len(td.keys()))), in_keys=["sample"], out_keys=["sites"]
    )
    result = tg.run(
        TensorDictSequential(capture(), rows(), sample(), whole),
        [{"input": torch.randn(30, 6)}],
        progress=False,
    )
    assert result["sites"] == 2
