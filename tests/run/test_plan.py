"""How run splits a pipeline, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn

import models
import tdgeom as tg
from tdgeom.run.plan import make_plan

SITES = ["x.0", "x.1"]


def full(capture):
    s = capture.sites
    return TensorDictSequential(
        capture,
        tg.SelectTokens(s),
        tg.ForEach(tg.StreamingCovariance(), s),
        tg.RowSample(s, size=16),
        tg.ForEach(tg.EigenSpectrum(k=4), s),
        tg.ForEach(tg.SpectrumMetrics(), s),
        tg.ForEach(tg.NormalizationAblation(), s),
        tg.ForEachPair(tg.SubspaceNovelty(k=2), s),
    )


def names(units):
    return list(dict.fromkeys(type(getattr(unit, "module", None) or unit).__name__ for unit in units))


def wrapped(function, reads, writes):
    return TensorDictModule(function, in_keys=reads, out_keys=writes)


def refused(match, *stages, given=(), error=ValueError):
    with pytest.raises(error, match=match):
        make_plan(TensorDictSequential(*stages), given)


def test_the_default_pipeline():
    plan = make_plan(full(tg.Capture(models.gpt2(), "residual_input")))
    assert names(plan.batch) == ["Capture", "SelectTokens"]
    assert names(plan.stream) == ["StreamingCovariance", "RowSample"]
    assert names(plan.end)[:3] == ["EigenSpectrum", "SpectrumMetrics", "NormalizationAblation"]
    assert len(plan.end) == 3 * 3 + 1
    assert plan.stream_keys[-1] == "row_id" and len(plan.stream_keys) == 4


def test_order_of_batch_and_stream_does_not_matter_to_the_split():
    double = wrapped(lambda x: 2 * x, [("tokens", "x.0")], [("doubled", "x.0")])
    mean = tg.StreamingMean(in_keys=[("doubled", "x.0")])
    plan = make_plan(
        TensorDictSequential(
            tg.ForEach(tg.StreamingCovariance(), SITES), tg.ForEach(tg.RankMe(), SITES), double, mean
        )
    )
    assert plan.batch == [double]
    assert len(plan.stream) == 3 and len(plan.end) == 2


def test_a_parent_key_counts_as_its_leaves():
    total = wrapped(lambda td: td["covariance"].diagonal().sum(), [("moments", "x.0")], ["trace"])
    plan = make_plan(TensorDictSequential(tg.ForEach(tg.StreamingCovariance(), SITES), total))
    assert plan.end == [total]
    raw = {"tokens": {site: torch.randn(9, 3, dtype=torch.float64) for site in SITES}}
    result = tg.run(
        TensorDictSequential(tg.ForEach(tg.StreamingCovariance(), SITES), total), [raw], progress=False
    )
    torch.testing.assert_close(result["trace"], raw["tokens"]["x.0"].var(0).sum())


def test_an_optional_input_decides_nothing_when_absent():
    ablation = tg.NormalizationAblation()
    plan = make_plan(TensorDictSequential(tg.RowSample(), ablation))
    assert plan.end == [ablation]


def test_given_results_count_as_finished():
    project = wrapped(lambda x, v: x @ v, [("tokens", "x.0"), ("eigenvectors", "x.0")], [("low", "x.0")])
    mean = tg.StreamingMean(in_keys=[("low", "x.0")])
    plan = make_plan(TensorDictSequential(project, mean), [("eigenvectors", "x.0")])
    assert plan.batch == [project] and plan.stream == [mean]


# ------------------------------------------------------------------------------------------ refusals


def test_batch_rows_mixed_with_finished_results():
    project = wrapped(lambda x, v: x @ v, ["tokens", "eigenvectors"], ["low"])
    refused(
        r"reads finished results \['eigenvectors'\] together with \['tokens'\].*"
        r"tg\.run\(second_pipeline, loader, inputs=first_result\)",
        tg.StreamingCovariance(),
        tg.EigenSpectrum(),
        project,
        tg.StreamingMean(in_keys="low"),
    )
    refused(
        r"together with \['eigenvlaues'\].*misspelt, name the keys",
        tg.StreamingCovariance(),
        tg.EigenSpectrum(),
        wrapped(lambda a, b: a + b, ["eigenvalues", "eigenvlaues"], ["sum"]),
    )


def test_a_streaming_stage_that_reads_finished_results():
    refused(
        r"StreamingMean streams rows but reads \['eigenvalues'\], which exist only when the stream has ended; run it in a "
        r"second pass",
        tg.StreamingCovariance(),
        tg.EigenSpectrum(),
        tg.StreamingMean(in_keys="eigenvalues"),
    )
    refused(
        r"StreamingMean at x.1 streams rows but reads",
        tg.ForEach(tg.StreamingCovariance(), SITES),
        tg.ForEach(tg.EigenSpectrum(), SITES),
        tg.ForEach(tg.StreamingMean(in_keys="eigenvalues"), ["x.1"]),
    )


def test_two_writers_of_one_key():
    refused(
        r"StreamingCovariance and StreamingCovariance both write \('moments', 'count'\)\. .*another root with out_keys=",
        tg.StreamingCovariance(),
        tg.StreamingCovariance(),
    )
    refused(
        r"StreamingCovariance at x.0 and TensorDictModule\(sum\) both write \('moments', 'x.0', 'mean'\)",
        tg.ForEach(tg.StreamingCovariance(), SITES),
        wrapped(torch.sum, [("moments", "x.1", "mean")], [("moments", "x.0", "mean")]),
    )
    refused(
        r"both write 'moments'",
        tg.StreamingCovariance(),
        wrapped(torch.sum, [("moments", "mean")], ["moments"]),
    )
    make_plan(TensorDictSequential(tg.StreamingCovariance(), tg.StreamingCovariance(out_keys="again")))


def test_an_idle_per_batch_stage():
    refused(
        r"writes \['norm'\], but nothing it writes reaches a streaming stage.*Put tg.StreamingMean\(\) or tg.Collect\(\)",
        tg.StreamingCovariance(),
        wrapped(torch.sum, ["tokens"], ["norm"]),
    )
    refused(
        r"SampleMetrics at x.0 runs once a batch .*reads 'sample', which no earlier stage writes: put tg.RowSample\(sites\)",
        tg.ForEach(tg.StreamingCovariance(), SITES),
        tg.ForEach(tg.SampleMetrics(), SITES[:1]),
    )
    refused(
        r"ForEachPair runs once a batch.*put tg.RowSample\(sites\) before it",
        tg.ForEach(tg.StreamingCovariance(), SITES),
        tg.ForEachPair(tg.LinearCKA(), SITES),
    )
    refused(
        r"EigenSpectrum runs once a batch.*put tg.ForEach\(tg.StreamingCovariance\(\), sites\) before it",
        tg.RowSample(),
        tg.EigenSpectrum(),
    )


def test_the_remedy_for_an_idle_stage_names_what_was_meant():
    capture = tg.Capture(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "residual_output", in_keys=["x"])
    refused(
        r"The streaming stages read rows: put tg.SelectTokens\(\['residual_output.0', 'residual_output.1'\]\) behind it",
        capture,
        tg.RowSample(capture.sites),
    )
    refused(
        r"LabelOverlap at residual_output.0 reads \[\('sample_carried', 'label'\)\], which nothing put into the sample.*"
        r"SelectTokens\(..., also=\['label'\]\) and RowSample\(..., also=\['label'\]\), or analyze_model",
        capture,
        tg.SelectTokens(capture.sites),
        tg.RowSample(capture.sites),
        tg.ForEach(tg.LabelOverlap(), capture.sites),
    )
    site = capture.sites[0]
    rows = (capture, tg.SelectTokens(capture.sites))
    refused(
        r"It reads \('sample', 'residual_output.0'\), which RowSample writes further on: put TwoNN at residual_output.0 behind",
        *rows,
        tg.ForEach(tg.TwoNN(), [site]),
        tg.RowSample(capture.sites),
    )
    refused(
        r"It reads \('sample', 'residual_output'\), which no stage writes; under 'sample' there is \['residual_output.0', ",
        *rows,
        tg.RowSample(capture.sites),
        tg.ForEach(tg.TwoNN(), ["residual_output"]),
    )
    refused(
        r"It reads 'samples', which no stage writes\. Did you mean 'sample'\?",
        tg.RowSample(),
        tg.TwoNN(in_keys=["samples"]),
    )


def test_a_compiled_pipeline_and_compiled_parts():
    pipeline = TensorDictSequential(tg.StreamingCovariance(), tg.EigenSpectrum())
    with pytest.raises(TypeError, match="cannot see into a compiled module: its stages would vanish"):
        make_plan(torch.compile(pipeline, backend="eager"))
    refused("cannot see into a compiled module", torch.compile(pipeline, backend="eager"), error=TypeError)
    refused(
        "cannot see into a compiled module",
        torch.compile(tg.StreamingCovariance(), backend="eager"),
        error=TypeError,
    )
    single = torch.compile(tg.EigenSpectrum(), backend="eager")
    pipeline = TensorDictSequential(tg.StreamingCovariance(), single)
    assert make_plan(pipeline).end == [single]
    refused("EigenSpectrum runs once a batch", tg.RowSample(), single)


class Hiding(TensorDictModuleBase):
    def __init__(self):
        super().__init__()
        self.in_keys, self.out_keys = ["tokens"], ["variance"]
        self.inner = tg.StreamingMean()

    def forward(self, tensordict):
        return self.inner(tensordict)


def test_a_streaming_stage_out_of_reach():
    refused(
        r"Hiding holds the streaming stage StreamingMean where run cannot reach its update\(\)\. Put it in a "
        r"TensorDictSequential, or use ForEach",
        Hiding(),
        error=TypeError,
    )
    refused("Hiding holds the streaming stage", TensorDictSequential(Hiding()), error=TypeError)
    refused("holds the streaming stage StreamingMean", tg.ForEach(Hiding(), SITES), error=TypeError)

    class Own(TensorDictSequential):
        def forward(self, tensordict, **kwargs):
            return super().forward(tensordict)

    refused(
        r"inside this Own by themselves.*it overrides forward\(\)", Own(tg.StreamingMean()), error=TypeError
    )


def test_things_that_are_no_stages():
    with pytest.raises(
        TypeError, match="run takes TensorDict modules, got Linear, which has no in_keys and out_keys"
    ):
        make_plan(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="run takes TensorDict modules, got Sequential"):
        tg.run(nn.Sequential(tg.StreamingMean()), [])


def test_a_list_of_stages_is_no_pipeline():
    with pytest.raises(
        TypeError, match=r"run takes one pipeline, got a list: TensorDictSequential\(\*stages\)"
    ):
        tg.run([tg.StreamingMean()], [])


def test_no_streaming_stage():
    double = wrapped(lambda x: 2 * x, ["tokens"], ["doubled"])
    with pytest.raises(ValueError, match="nothing it writes reaches a streaming stage"):
        tg.run(TensorDictSequential(double), [{"tokens": torch.ones(2, 1)}])
    with pytest.raises(ValueError, match=re.escape("run found no streaming stage in the pipeline")):
        tg.run(TensorDictSequential(), [])


def test_named_stages_and_nested_sequences_are_opened():
    pipeline = TensorDictSequential(
        {
            "cov": tg.StreamingCovariance(),
            "rest": TensorDictSequential(tg.EigenSpectrum(), tg.SpectrumMetrics()),
        }
    )
    plan = make_plan(pipeline)
    assert [type(unit).__name__ for unit in plan.end] == ["EigenSpectrum", "SpectrumMetrics"]
    rows = torch.randn(20, 4)
    found = tg.run(pipeline, [{"tokens": rows}], progress=False)
    expected = TensorDictSequential(tg.StreamingCovariance(), tg.EigenSpectrum(), tg.SpectrumMetrics())(
        TensorDict(tokens=rows)
    )
    assert float(found["spectrum", "d_pr"]) == pytest.approx(float(expected["spectrum", "d_pr"]))
