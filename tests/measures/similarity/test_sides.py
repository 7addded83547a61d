"""What every measure of two sides asks of them: leading dimensions that spread, one device, values that are finite."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F

AROUND = {tg.Calibrated, tg.LeaveOutPair}  # of one data set, around a stage that is tried here itself
STAGES = sorted(
    {
        cls for cls in map(tg.__getattr__, tg.__all__)
        if isinstance(cls, type) and issubclass(cls, tg.PairStage) and cls is not tg.PairStage
        and cls not in AROUND and ("sample", "a") in cls().in_keys
    },
    key=lambda cls: cls.__name__,
)  # fmt: skip
FUNCTIONS = [
    "angular_shape", "cca_mean", "cca_r2", "cknna", "distance_correlation", "information_imbalance", "jaccard_knn",
    "layer_cosine_sim", "linear_cka", "linear_cka_debiased", "linear_r2_ab", "linear_r2_ba", "neighborhood_overlap",
    "procrustes", "pwcca_ab", "pwcca_ba", "rbf_cka", "rsa", "soft_matching", "svcca",
]  # fmt: skip


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(out):
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("stage", STAGES, ids=lambda cls: cls.__name__)
def test_stages_spread_leading_dimensions_or_name_both_shapes(stage):
    x, y = rows(1, 35, 6), rows(3, 35, 6, seed=1)
    # features of a side have something in common, which sampled ones need
    x, y = x + 3 * x[..., :1], y + 3 * x[..., :1]
    for a, b in ((x, y), (y, x), (x[0], y), (y[:, None], y)):
        found = values(stage()(sample_a=a, sample_b=b))
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        pairs = zip(a.expand(*lead, 35, 6).reshape(-1, 35, 6), b.expand(*lead, 35, 6).reshape(-1, 35, 6))
        one_by_one = [values(stage()(sample_a=p, sample_b=q)) for p, q in pairs]
        for value, each in zip(found, zip(*one_by_one)):
            torch.testing.assert_close(value, torch.stack(each).view(lead), rtol=1e-9, atol=1e-9)
    with pytest.raises(
        ValueError, match=r"equal leading \(batch\) dimensions.*\(2, 35, 6\) and \(3, 35, 6\)"
    ):
        stage()(sample_a=rows(2, 35, 6), sample_b=y)
    pair = TensorDict({("sample", "s"): rows(2, 35, 6), ("sample", "t"): y})
    with pytest.raises(ValueError, match=r"\(2, 35, 6\) and \(3, 35, 6\).*\[at s->t\]"):
        tg.ForEachPair(stage(), ["s", "t"])(pair)
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        stage()(sample_a=x[0], sample_b=x[0].to("meta"))


@pytest.mark.parametrize("stage", STAGES, ids=lambda cls: cls.__name__)
def test_stages_of_no_data_sets_give_no_values(stage):
    for value in values(stage()(sample_a=rows(0, 35, 6), sample_b=rows(0, 35, 6))):
        assert value.shape == (0,)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_name_both_shapes(name):
    with pytest.raises(ValueError, match=r"\(2, 35, 6\) and \(3, 35, 6\)|\(2, 35, 30\) and \(3, 35, 30\)"):
        getattr(F, name)(rows(2, 35, 6), rows(3, 35, 6))
    for value in values(getattr(F, name)(rows(1, 35, 6), rows(3, 35, 6, seed=1))):
        assert value.shape == (3,) and value.isfinite().all()


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "layer_cosine_sim"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_refused_and_never_called_constant(name, bad):
    x, y = rows(3, 35, 6), rows(3, 35, 6, seed=1)
    y[1, 3, 2] = bad
    for call in (getattr(F, name), torch.vmap(getattr(F, name))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of operators that vmap maps one by one
            with pytest.raises(ValueError, match="hold NaN or Inf"):
                call(x, y)


@pytest.mark.parametrize(
    "stage", [cls for cls in STAGES if cls is not tg.LayerCosine], ids=lambda cls: cls.__name__
)
def test_a_site_that_is_not_finite_is_named(stage):
    bad = rows(35, 6)
    bad[0] = torch.nan
    pair = TensorDict({("sample", "s"): rows(35, 6), ("sample", "t"): bad})
    with pytest.raises(ValueError, match=r"hold NaN or Inf.*\[at s->t\]"):
        tg.ForEachPair(stage(), ["s", "t"])(pair)
