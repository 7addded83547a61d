"""What measures between two sites say where rows are few for their features."""

from __future__ import annotations

from torch import Tensor

from tdgeom.core.warnings import tell_few_rows
from tdgeom.numerics.centring import occurs

__all__ = ["tell_beyond_features", "tell_few_for_bias"]


def tell_beyond_features(stage: str, measures: str, rows: int | Tensor, features: int) -> None:
    """Where rows are no more than features some map between any two sites is perfect."""
    if _below(rows, features + 1):
        tell_few_rows(
            stage,
            measures,
            rows if isinstance(rows, int) else rows.min(),
            f"more than the {features} features of the wider side: with no more any two sites agree",
            "Give more rows, or compare by linear_cka_debiased, svcca or a ridge",
        )


def tell_few_for_bias(stage: str, measures: str, rows: int | Tensor, features: int) -> None:
    """Where rows are fewer than four for each feature, independent sites have a biased CKA of more than a fifth."""
    if _below(rows, 4 * features):
        tell_few_rows(
            stage,
            measures,
            rows if isinstance(rows, int) else rows.min(),
            f"4 for each of the {features} features of the wider side, or is biased upwards",
            "Take linear_cka_debiased (LinearCKA(estimator='debiased')), or give more rows",
        )


def _below(rows: int | Tensor, needed: int) -> bool:
    return rows < needed if isinstance(rows, int) else occurs(rows < needed)
