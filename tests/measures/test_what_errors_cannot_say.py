"""Intervals where a bias is more than a correction, and errors of numbers that only rounding moves: none, with the reason."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from tensordict import TensorDict

import tdgeom as tg
import tdgeom.functional as F
from tdgeom.measures.spectrum_errors import replicate_spectrum_metrics


def test_the_interval_holds_a_third_of_the_bias():
    value, error, bias = torch.tensor(10.0), torch.tensor(0.5), torch.tensor([-1.8, float("nan"), 0.0])
    low, high = F.error_interval(value, error, 9, scale="log", bias=bias)
    wide = student.ppf(0.975, 9) * math.hypot(0.5, 0.6) / 11.8
    assert float(low[0]) == pytest.approx(11.8 * math.exp(-wide))
    assert float(high[0]) == pytest.approx(11.8 * math.exp(wide))
    plain = F.error_interval(value, error, 9, scale="log")
    assert float(low[1]) == float(low[2]) == float(plain[0])
    # more than a fifth of the value and than its error: no correction; of a value near 0 it is one
    assert F.error_interval(value, error, 9, bias=torch.tensor(-2.1))[0].isnan()
    assert F.error_interval(torch.tensor(0.01), error, 9, bias=torch.tensor(0.2))[0].isfinite()


def spectra_of(rows, groups=20):
    td = TensorDict(tokens=rows, row_id=torch.arange(len(rows)) << 20)
    for stage in (
        tg.GroupedCovariance(groups=groups),
        tg.LeaveOutSpectrum(k=4),
        tg.SpectrumErrors(parts=True),
    ):
        td = stage(td)
    found = replicate_spectrum_metrics(td["eigenvalues"])
    return {
        name: (found[name], td["spectrum", f"{name}_se"], td["spectrum_bias", name])
        for name in ("d_pr", "d_entropy", "effective_rank")
    }


SPECTRA = {
    "flat": lambda d: torch.ones(d),
    "steep": lambda d: 1 / torch.arange(1.0, d + 1) ** 2,
    "few large": lambda d: torch.cat((torch.full((4,), 20.0), torch.ones(d - 4))),
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("documents", [60, 240])
def test_no_interval_is_confidently_wrong_where_rows_are_fewer_than_features(kind, documents):
    """Wide and empty, or it holds the truth: 12 data sets of D = 100 each, of a population that is known."""
    values = SPECTRA[kind](100).double()
    truth = replicate_spectrum_metrics(values)
    held, given = 0, 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(documents, 100, generator=generator, dtype=torch.float64) * values.sqrt()
        for name, (value, error, bias) in spectra_of(rows).items():
            low, high = F.error_interval(value, error, 19, scale="log", bias=bias)
            given += bool(low.isfinite())
            held += bool((low <= truth[name]) & (truth[name] <= high))
    assert held >= 0.85 * given
    if kind == "flat" and documents == 60:
        assert given == 0  # d_pr is 38 where 100 is right


def test_a_table_says_why_there_is_no_interval():
    model = torch.nn.Identity()
    batches = [{"input": torch.randn(60, 300, generator=torch.Generator().manual_seed(0))}]
    with pytest.warns(tg.FewRowsWarning):
        results = tg.analyze_model(
            model, batches, sites="module_output:", errors=True, metrics="spectrum", progress=False
        )
    table = tg.intervals(results).set_index("metric")
    row = table.loc["d_pr"]
    assert abs(row["bias"]) > row["value"] / 5 and np.isnan(row["low"]) and np.isnan(row["high"])
    assert row["reason"] == "few rows: the bias is more than a fifth of the value"
    assert (table["reason"][table["low"].notna()] == "").all() and table["low"].notna().any()


def alike(kind):
    base = torch.randn(8, generator=torch.Generator().manual_seed(0))
    rows = base.expand(400, 8).clone()
    if kind == "one feature":
        rows[::3, 0] = torch.nextafter(rows[::3, 0], torch.tensor(9.0))
    elif kind == "every feature":
        rows = rows * (1 + 1e-7 * torch.randn(400, 8, generator=torch.Generator().manual_seed(1)))
    else:
        rows = (rows * (1 + 2**-9 * torch.randn(400, 8))).bfloat16()
    return rows


@pytest.mark.filterwarnings("ignore::tdgeom.FewRowsWarning", "ignore::tdgeom.UndefinedMeasureWarning")
@pytest.mark.parametrize("kind", ["one feature", "every feature", "half precision"])
def test_rows_that_are_equal_up_to_rounding_have_no_error(kind):
    """Their spectrum is one of rounding: a participation ratio of 1.0 is no measurement, let alone one with error 0."""
    batches = [{"input": rows} for rows in alike(kind).split(50)]
    with pytest.warns(
        tg.UnresolvedMeasureWarning, match="rows differ from their mean by .* roundings of their type"
    ):
        found = tg.analyze_model(
            torch.nn.Identity(),
            batches,
            sites="module_output:",
            errors=True,
            metrics=["spectrum"],
            progress=False,
        ).metrics
    assert found["d_pr"].notna().all() and found[["d_pr_se", "k90_se", "top1_share_se"]].isna().all(axis=None)


def test_rows_far_from_the_origin_keep_their_errors():
    rows = (
        torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) + 1e5
    )  # a tenth of a spread is resolved
    td = TensorDict(
        tokens=rows, row_id=torch.arange(400) << 20, sample=rows, sample_row_id=torch.arange(400) << 20
    )
    for stage in (tg.SampleGroups(), tg.GroupedCovariance(), tg.LeaveOutSpectrum(k=2), tg.SpectrumErrors()):
        td = stage(td)
    assert 0 < td["spectrum", "d_pr_se"] < 0.2


@pytest.mark.parametrize("measure", ["novelty", "cka", "cosine"])
def test_what_only_rounding_moves_has_no_error_of_zero(measure):
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.arange(200) << 20
    td = TensorDict({"sample": {"a": x, "b": 3 * x}, "sample_row_id": ids})
    stage, key = {
        "novelty": (None, "feature_subspace_novelty"),
        "cka": (tg.LeaveOutPair(tg.LinearCKA()), "linear_cka"),
        "cosine": (tg.LeaveOutPair(tg.LayerCosine()), "layer_cosine_sim"),
    }[measure]
    if stage is None:
        for side in ("a", "b"):
            part = tg.LeaveOutSpectrum(k=3)(
                tg.GroupedCovariance()(TensorDict(tokens=td["sample", side], row_id=ids))
            )
            td["subspaces", side], td["sample_group_rows"] = (
                part["replicates", "subspaces"],
                part["replicates", "rows"],
            )
        td["between", key] = F.feature_subspace_novelty(td["subspaces", "a"], td["subspaces", "b"])
    else:
        td = stage(tg.SampleGroups()(td))
    td = tg.Jackknife([("between", key)], full=True, rows="sample_group_rows")(td)
    assert td["between", f"{key}_se"].isnan() and td["between", f"{key}_low"].isnan()
    assert abs(float(td["between", key]) - (0 if measure == "novelty" else 1)) < 1e-12
