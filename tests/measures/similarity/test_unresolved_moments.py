"""Measures between sites from float32 products say where these do not resolve them, and are silent where they do."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensordict import TensorDict

import tdgeom as tg


def sides(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sites: 'steep' has features that are others, but for a thousandth."""
    g = torch.Generator().manual_seed(0)
    n, width = 2000, 24
    size = torch.logspace(0, -3 if kind == "steep" else 0, width)
    base = torch.randn(n, width, generator=g) * size
    turn = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
    return base @ turn, (base + 0.3 * torch.randn(n, width, generator=g) * size) @ turn


def found(stage: tg.PairStage, kind: str, precision: str) -> tuple[dict[str, float], list[str]]:
    x, y = sides(kind)
    stream = tg.StreamingCrossMoments(["a", "b"], pairs=[("a", "b")], precision=precision)
    between = tg.ForEachPair(stage, ["a", "b"], pairs=[("a", "b")])
    td = TensorDict({"tokens": {"a": x, "b": y}})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = between(stream(td))["between", "a->b"]
    said = [str(one.message) for one in caught if issubclass(one.category, tg.UnresolvedMeasureWarning)]
    return {name: float(value) for name, value in out.items()}, said


STAGES = [tg.CCA, tg.SVCCA, tg.PWCCA, tg.LinearR2, tg.Procrustes, tg.LinearCKA]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["plain", "steep"])
def test_what_moves_is_said_and_what_is_silent_did_not_move(stage, kind):
    how = {"estimator": "both"} if stage is tg.LinearCKA else {}
    (narrow, said), (wide, nothing) = (
        found(stage(source="moments", **how), kind, precision) for precision in ("float32", "float64")
    )
    assert not nothing and len(said) <= 1
    moved = max(abs(narrow[name] - wide[name]) for name in wide)
    if not said:
        assert moved < 1e-4
    assert bool(said) == (kind == "steep" and stage in (tg.CCA, tg.PWCCA, tg.LinearR2))
    for text in said:
        assert "float32 products" in text and "StreamingCrossMoments(precision='float64')" in text


def test_samples_and_moments_of_other_makers_say_nothing():
    x, y = sides("steep")
    with warnings.catch_warnings():
        warnings.simplefilter("error", tg.UnresolvedMeasureWarning)
        tg.CCA()(sample_a=x, sample_b=y)
        x, y = (rows.double() - rows.double().mean(0) for rows in (x, y))
        moments = {
            side: {"count": torch.tensor(2000), "mean": torch.zeros(24), "covariance": rows.T @ rows / 1999}
            for side, rows in (("a", x), ("b", y))
        }
        td = TensorDict({"cross_moments": {**moments, "cross_covariance": x.T @ y / 1999}})
        tg.CCA(source="moments")(td)
