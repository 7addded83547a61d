"""Few rows are said, once, with what helps: no more than features for maps between sites, under 4 for each for biased CKA."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.core.warnings import FewRowsWarning


def told(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    assert all(w.category is FewRowsWarning and w.filename == __file__ for w in seen)
    return [str(w.message) for w in seen]


def sides(n):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=g), torch.randn(n, 9, generator=g)


def moments(n):
    x, y = sides(n)
    return tg.StreamingCrossMoments(["a", "b"])(TensorDict({("tokens", "a"): x, ("tokens", "b"): y}))


MAPS = ["cca_mean", "cca_r2", "pwcca_ab", "pwcca_ba", "linear_r2_ab", "linear_r2_ba"]


@pytest.mark.parametrize("name", MAPS)
def test_functions_with_no_more_rows_than_features(name):
    (text,) = told(lambda: getattr(F, name)(*sides(9)))
    assert (
        text.startswith(f"{name}: few rows, 9: {name} calls for more than the 9 features")
        and "linear_cka_debiased" in text
    )
    assert not told(lambda: getattr(F, name)(*sides(10)))
    with_vmap = told(lambda: torch.vmap(getattr(F, name))(*(side[None] for side in sides(9))))
    assert len(with_vmap) == 1


@pytest.mark.parametrize("stage", [tg.CCA, tg.PWCCA, tg.LinearR2])
def test_stages_with_no_more_rows_than_features_from_rows_and_moments(stage):
    for source in ("sample", "moments"):
        for n, count in ((9, 1), (10, 0)):
            x, y = sides(n)
            td = moments(n) if source == "moments" else TensorDict({("sample", "a"): x, ("sample", "b"): y})
            texts = told(lambda: tg.ForEachPair(stage(source=source), ["a", "b"])(td))  # noqa: B023
            assert len(texts) == count
            assert all(f"{stage.__name__}: few rows, 9:" in text and "[at a->b]" in text for text in texts)
    assert not told(lambda: tg.LinearR2(ridge=0.1)(sample_a=sides(5)[0], sample_b=sides(5)[1]))


def test_biased_cka_below_four_rows_a_feature():
    (text,) = told(lambda: F.linear_cka(*sides(35)))
    assert (
        "linear_cka: few rows, 35" in text and "4 for each of the 9 features" in text and "debiased" in text
    )
    assert not told(lambda: F.linear_cka(*sides(36))) and not told(lambda: F.linear_cka_debiased(*sides(35)))
    for estimator, count in (("biased", 1), ("debiased", 0), ("both", 0)):
        x, y = sides(35)
        assert len(told(lambda: tg.LinearCKA(estimator=estimator)(sample_a=x, sample_b=y))) == count  # noqa: B023
        stage = tg.ForEachPair(tg.LinearCKA(estimator=estimator, source="moments"), ["a", "b"])
        assert len(told(lambda: stage(moments(35)))) == count  # noqa: B023


def test_a_compiled_graph_is_whole():
    compiled = torch.compile(F.linear_cka, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*sides(20)), F.linear_cka(*sides(20)))
