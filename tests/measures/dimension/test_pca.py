"""Counting rules, the participation ratio without bias, and the decimation profile."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from tensordict import TensorDict

from tdgeom import EigenSpectrum, StreamingCovariance, UndefinedMeasureWarning
from tdgeom.measures.dimension.decimation import Decimation
from tdgeom.measures.dimension.gride import Gride
from tdgeom.measures.dimension.likelihood import LevinaBickel
from tdgeom.measures.dimension.pca import (
    PCA_RULES,
    GlobalPCA,
    ParticipationRatio,
    global_pca,
    participation_ratio,
    pca_dimension,
)
from tdgeom.measures.dimension.twonn import TwoNN, twonn

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.double() - x.double().mean(-2, keepdim=True)
    n = x.shape[-2]
    return torch.full(x.shape[:-2], n), x.mT @ x / (n - 1), x.square().sum(-1).square().sum(-1)


def test_scikit_dimension():
    with np.load(GOLDEN / "inputs.npz") as data:
        layers = torch.from_numpy(data["layers"])
    tool = json.loads((GOLDEN / "reference.json").read_text())["tools"]["scikit-dimension"]
    assert global_pca(layers).estimate.tolist() == tool["lpca_fo"]
    ratio = global_pca(layers, rule="participation_ratio").estimate
    np.testing.assert_allclose(ratio.numpy(), tool["lpca_participation_ratio"], rtol=1e-6)


def test_rules_by_hand():
    spectrum = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.39, 0.3, 0.0])
    share = spectrum / spectrum.sum()
    assert pca_dimension(spectrum) == 4
    assert pca_dimension(spectrum, alpha=0.3) == 2
    assert pca_dimension(spectrum, rule="ratio") == 1 + int((share.cumsum(0) < 0.95).sum())
    assert pca_dimension(spectrum, rule="ratio", share=1.0) == 6
    assert pca_dimension(spectrum, rule="kaiser") == int((spectrum > spectrum.mean()).sum())
    stick = [sum(1 / j for j in range(i, 8)) / 7 for i in range(1, 8)]
    assert stick[0] < share[0] and stick[1] < share[1] and stick[2] > share[2]
    assert pca_dimension(spectrum, rule="broken_stick") == 2
    assert pca_dimension(spectrum, rule="participation_ratio") == pytest.approx(
        float(spectrum.sum() ** 2 / spectrum.square().sum())
    )


@pytest.mark.parametrize("n, width", [(200, 12), (15, 40)])
def test_the_spectrum_is_that_of_pca(n, width):
    x = torch.randn(n, width, dtype=torch.float64) * torch.linspace(0.1, 2, width)
    values = PCA().fit(x.numpy()).explained_variance_[: n - 1]  # n centred rows have no more
    for rule in ("fukunaga_olsen", "participation_ratio", "ratio", "kaiser"):
        expected = pca_dimension(torch.from_numpy(values), rule=rule)
        torch.testing.assert_close(global_pca(x, rule=rule).estimate, expected)
    assert global_pca(x).scale == pytest.approx(values.sum() ** 0.5)


def test_global_pca_counts_copies_once():
    x = torch.randn(80, 6)
    dirty = torch.cat((x, x[:1].expand(400, -1)))
    for rule in ("participation_ratio", "kaiser"):
        plain, repeated = global_pca(x, rule=rule), global_pca(dirty, rule=rule)
        torch.testing.assert_close(repeated.estimate, plain.estimate)
        torch.testing.assert_close(repeated.scale, plain.scale)
    assert repeated.duplicates == 400 and repeated.rows == 80


@pytest.mark.parametrize("rule", ["kaiser", "broken_stick", "ratio"])
def test_copies_add_no_eigenvalue(rule):
    """Fewer distinct rows than features: zeros for the copies would lower Kaiser's mean and lengthen the stick."""
    x = torch.randn(2, 8, 40) * torch.linspace(0.2, 2, 40)
    dirty = torch.cat((x, x[:, :3].repeat(1, 20, 1)), 1)
    dirty[1, -1] = x[1, 4]
    repeated = global_pca(dirty, rule=rule)
    torch.testing.assert_close(repeated.estimate, global_pca(x, rule=rule).estimate)
    assert repeated.rows.tolist() == [8, 8] and repeated.duplicates.tolist() == [60, 60]


@settings(max_examples=15)
@given(exponent=st.floats(-6, 6), offset=st.sampled_from([0.0, 10.0, 1000.0]), seed=st.integers(0, 2**20))
def test_unit_offset_and_rotation_change_nothing(exponent, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 5, dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator)).Q
    moved = (x @ rotation + offset) * 10.0**exponent
    for rule in ("participation_ratio", "kaiser", "fukunaga_olsen"):
        torch.testing.assert_close(global_pca(moved, rule=rule).estimate, global_pca(x, rule=rule).estimate)
    torch.testing.assert_close(
        participation_ratio(*moments(moved)).estimate,
        participation_ratio(*moments(x)).estimate,
        rtol=1e-6,
        atol=0,
    )


def test_global_pca_of_eigenvalues_is_that_of_all_rows():
    x = torch.randn(90, 8)
    td = EigenSpectrum(k=2)(StreamingCovariance()(TensorDict({"tokens": x})))
    GlobalPCA(source="eigenvalues", rule="participation_ratio")(td)
    result = td["dimension", "global_pca"]
    torch.testing.assert_close(
        result["estimate"], global_pca(x, rule="participation_ratio").estimate, rtol=1e-5, atol=0
    )
    assert result["rows"] == 90 and result["duplicates"] == -1
    alone = GlobalPCA(source="eigenvalues", rule="kaiser")(TensorDict(eigenvalues=td["eigenvalues"]))
    assert alone["dimension", "global_pca", "rows"] == -1


@pytest.mark.parametrize("rule", PCA_RULES)
@pytest.mark.parametrize(("n", "width"), [(40, 100), (100, 100), (101, 100), (300, 100), (2, 5)])
def test_rules_agree_whatever_they_read(rule, n, width):
    x = torch.randn(n, width) * torch.linspace(3, 0.1, width)
    td = EigenSpectrum(k=2)(StreamingCovariance()(TensorDict(tokens=x)))
    GlobalPCA(source="eigenvalues", rule=rule)(td)
    torch.testing.assert_close(td["dimension", "global_pca", "estimate"], global_pca(x, rule=rule).estimate)


def test_participation_ratio_is_the_average_over_disjoint_rows():
    """Numerator and denominator over all ordered 4-tuples of different rows: unbiased by construction."""
    x = torch.randn(7, 3, dtype=torch.float64) ** 3 + 5
    above = below = 0.0
    for i, j, k, m in itertools.permutations(range(7), 4):
        a, b = x[i] - x[j], x[k] - x[m]
        above += (a @ a) * (b @ b) / 4
        below += (a @ b) ** 2 / 4
    assert participation_ratio(*moments(x)).estimate == pytest.approx(float(above / below), rel=1e-9)


def test_participation_ratio_on_heavy_tails():
    """Rows whose lengths vary widely: the plain ratio is far too small, the estimate is right on average."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.5, 1.5, 150, dtype=torch.float64)
    length = torch.distributions.StudentT(5.0)  # finite fourth moment is all that is needed
    torch.manual_seed(0)
    factor = length.sample((200, 100, 1)).abs().clamp(max=8).double()
    x = torch.randn(200, 100, 150, dtype=torch.float64, generator=generator) * scales * factor
    variances = scales.square()
    truth = variances.sum() ** 2 / variances.square().sum()
    count, covariance, norm4 = moments(x)
    result = participation_ratio(count, covariance, norm4).estimate
    plain = covariance.diagonal(dim1=-2, dim2=-1).sum(-1).square() / covariance.square().sum((-1, -2))
    assert plain.mean() < 0.4 * truth
    # the ratio of the averages is what is unbiased; single ratios scatter
    assert result.median() == pytest.approx(float(truth), rel=0.1)


def test_participation_ratio_stage_reads_streamed_moments():
    x = torch.randn(60, 20) + 3
    td = ParticipationRatio()(StreamingCovariance()(TensorDict({"tokens": x})))
    expected = participation_ratio(*moments(x))
    result = td["dimension", "participation_ratio"]
    torch.testing.assert_close(result["estimate"], expected.estimate, rtol=1e-4, atol=0)
    assert result["rows"] == 60 and result["duplicates"] == -1 and result["standard_error"].isnan()


def test_batches_equal_items():
    x = torch.randn(3, 30, 6)
    x[1, 20:25] = x[1, :5]
    for function in (global_pca, lambda x: participation_ratio(*moments(x))):
        for i, leaves in enumerate(zip(*function(x))):
            for leaf, item in zip(leaves, function(x[i])):
                torch.testing.assert_close(leaf, item, equal_nan=True)


@pytest.mark.parametrize("x", [torch.zeros(5, 3), torch.ones(5, 3) * 1e-3])
def test_no_variance_is_nan_with_one_reason(x):
    with pytest.warns(UndefinedMeasureWarning, match="do not vary") as caught:
        assert global_pca(x).estimate.isnan()
    assert len(caught) == 1
    with pytest.warns(UndefinedMeasureWarning, match="at least 4 rows, some variance"):
        assert participation_ratio(*moments(x)).estimate.isnan()


def test_participation_ratio_of_too_few_rows_is_nan():
    with pytest.warns(UndefinedMeasureWarning, match="at least 4 rows"):
        assert participation_ratio(*moments(torch.randn(3, 5))).estimate.isnan()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="rule is one of"):
        GlobalPCA(rule="maxgap")
    with pytest.raises(ValueError, match="alpha lies in"):
        GlobalPCA(alpha=0)
    with pytest.raises(ValueError, match="N >= 2"):
        global_pca(torch.zeros(1, 3))
    with pytest.raises(TypeError, match="GlobalPCA expected real numbers, got complex64 .*view_as_real"):
        global_pca(torch.zeros(4, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="hold NaN or Inf. Drop such rows first"):
        global_pca(torch.tensor([[1.0, 2.0], [torch.inf, 0.0], [3.0, 1.0]]))


# --- decimation


def test_decimation_levels_are_means_over_disjoint_runs():
    x = torch.randn(300, 4)
    td = Decimation(min_rows=60)(TensorDict({"sample": x}))["dimension", "twonn_decimation"]
    assert td["rows"].tolist() == [300, 150, 75]
    whole = twonn(x)
    torch.testing.assert_close(td["estimate"][0], whole.estimate)
    torch.testing.assert_close(td["standard_error"][0], whole.standard_error)
    quarters = torch.stack([twonn(x[75 * i : 75 * (i + 1)]).estimate for i in range(4)])
    torch.testing.assert_close(td["estimate"][2], quarters.mean())
    torch.testing.assert_close(td["standard_error"][2], quarters.std() / 2)
    once = Decimation(min_rows=60, max_repeats=1)(sample=x)
    torch.testing.assert_close(once[0][2], quarters[0])


def test_decimation_sees_the_manifold_under_the_noise():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(6000, 2, generator=g) @ torch.eye(2, 12) + 0.003 * torch.randn(6000, 12, generator=g)
    estimate, _, scale, rows, duplicates, _ = Decimation(min_rows=90)(sample=torch.cat((x, x[:50])))
    assert estimate[0] > 3 and estimate[-1] == pytest.approx(2, abs=0.25)
    assert (scale.diff() > 0).all() and duplicates == 50
    assert rows[0] == 6000


def test_decimation_takes_any_scalar_estimator():
    x = torch.randn(2, 200, 4)
    estimate, *_ = Decimation(estimator=LevinaBickel(k=8), min_rows=50)(sample=x)
    assert estimate.shape == (2, 3)
    torch.testing.assert_close(
        estimate[1], Decimation(estimator=LevinaBickel(k=8), min_rows=50)(sample=x[1])[0]
    )
    with pytest.raises(ValueError, match=r"that writes \['estimate'.*got Gride"):
        Decimation(estimator=Gride(range_max=8))(sample=x)
    with pytest.raises(ValueError, match="source='sample'"):
        Decimation(estimator=TwoNN(source="neighbors"))
    with pytest.raises(ValueError, match="min_rows=64, the sample has 20"):
        Decimation()(sample=x[:, :20])
