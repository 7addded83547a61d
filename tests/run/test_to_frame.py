"""Results as tables."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom.measures.spectrum_metrics import SPECTRUM_MARKS, SPECTRUM_METRICS

SITES = ["residual_input.0", "residual_input.1", "mlp_output.0"]


@pytest.fixture(scope="module")
def result():
    generator = torch.Generator().manual_seed(0)
    rows = {site: torch.randn(40, 6, generator=generator) for site in SITES}
    pipeline = TensorDictSequential(
        tg.ForEach(tg.StreamingCovariance(), SITES),
        tg.RowSample(SITES),
        tg.ForEach(tg.EigenSpectrum(k=2), SITES),
        tg.ForEach(tg.SpectrumMetrics(), SITES),
        tg.ForEach(tg.RankMe(), SITES),
        tg.ForEach(tg.NormalizationAblation(variants=["raw", "token_l2"]), SITES),
        tg.ForEachPair(tg.LinearCKA(), SITES, pairs="all"),
        tg.ForEachPair(tg.SubspaceNovelty(k=2), SITES, pairs=[(SITES[0], SITES[1])]),
    )
    return tg.run(pipeline, [{"tokens": rows}], progress=False)


def test_one_row_a_site(result):
    frame = tg.to_frame(result, "spectrum")
    assert list(frame["site"]) == SITES and list(frame["layer"]) == [0, 1, 0]
    assert list(frame["kind"]) == ["residual_input", "residual_input", "mlp_output"]
    assert set(frame.columns) == {
        "site",
        "kind",
        "layer",
        "stack",
        "rankme",
        *SPECTRUM_METRICS,
        *SPECTRUM_MARKS,
    }
    for i, site in enumerate(SITES):
        assert frame["d_pr"][i] == float(result["spectrum", site, "d_pr"])
    assert (
        frame["layer"].dtype.kind == "i"
        and frame["k90"].dtype.kind == "i"
        and frame["d_pr"].dtype.kind == "f"
    )


def test_one_row_a_pair(result):
    frame = tg.to_frame(result, "between")
    assert len(frame) == 3
    row = frame[frame["pair"] == "residual_input.0->mlp_output.0"].iloc[0]
    assert (row["a"], row["b"], row["layer_a"], row["layer_b"]) == ("residual_input.0", "mlp_output.0", 0, 0)
    assert row["linear_cka"] == float(result["between", row["pair"], "linear_cka"])
    novelty = frame.set_index("pair")["feature_subspace_novelty"]
    assert pd.notna(novelty["residual_input.0->residual_input.1"])
    assert pd.isna(novelty["residual_input.0->mlp_output.0"])


def test_one_row_a_variant(result):
    frame = tg.to_frame(result, "ablation")
    assert len(frame) == 6 and list(frame["variant"][:2]) == ["raw", "token_l2"]
    one = frame[(frame["site"] == SITES[1]) & (frame["variant"] == "token_l2")]
    assert one["d_pr"].item() == float(result["ablation", SITES[1], "token_l2", "d_pr"])


def test_a_dimension_estimator_is_a_level():
    td = TensorDict(
        {"dimension": {"x.0": {"twonn": {"estimate": torch.tensor(2.5), "scale": torch.ones(3)}}}}
    )
    frame = tg.to_frame(td, "dimension")
    assert frame["estimator"].item() == "twonn" and frame["estimate"].item() == 2.5
    assert frame["scale"].item().tolist() == [1, 1, 1]


def test_vectors_stay_arrays(result):
    frame = tg.to_frame(result, "eigenvalues")
    assert list(frame["site"]) == SITES
    assert frame["eigenvalues"][1].tolist() == result["eigenvalues", SITES[1]].tolist()
    half = TensorDict({"mean": {"x.0": {"mean": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)}}})
    assert tg.to_frame(half, "mean")["mean"].item().tolist() == [1, 1]


def test_without_sites():
    pipeline = TensorDictSequential(tg.StreamingCovariance(), tg.EigenSpectrum(), tg.SpectrumMetrics())
    result = tg.run(pipeline, [{"tokens": torch.randn(30, 4)}], progress=False)
    frame = tg.to_frame(result, "spectrum")
    assert len(frame) == 1 and frame["d_pr"].item() == float(result["spectrum", "d_pr"])
    frame = tg.to_frame(result, "run")
    assert frame["rows"].dropna().tolist() == [30]


def test_a_site_without_a_layer_in_its_name_has_one():
    td = TensorDict(
        {"spectrum": {"embed": {"d_pr": torch.tensor(1.0)}, "mlp_output.1": {"d_pr": torch.tensor(2.0)}}}
    )
    frame = tg.to_frame(td, "spectrum")
    assert frame["layer"].tolist() == [0, 1]


def test_an_unknown_root_lists_those_there_are(result):
    with pytest.raises(
        KeyError, match=r"nothing under 'spectra'; there is \['ablation', 'between', 'eigenvalues'"
    ):
        tg.to_frame(result, "spectra")
