"""Measures between two sides without each group of their rows, from sums over the groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdgeom.measures.similarity.hsic import alignment, hsic1

__all__ = ["PairSide", "cosine_without", "linear_cka_without"]

_IN_FLOAT64 = 2**31  # products of so many numbers at most cost nothing that shows


class PairSide(NamedTuple):
    """One side's inputs, and what has been computed of them."""

    inputs: list[Any]
    held: dict[str, Any]


class _Rows(NamedTuple):
    rows: Tensor  # (n, D) about the mean of all, of size 1
    parts: list[Tensor]  # which rows each group has
    left: Tensor  # (G,) rows without each group
    means: Tensor  # (G, D) of what is left, about the mean of all
    norm2: Tensor  # (n, G) squared norms about it; 0 for the group's own rows
    square: Tensor  # (G,) ||XᵀX||²_F of what is left


def _prepared(side: PairSide, group: Tensor, groups: int) -> _Rows:
    if "sums" not in side.held:
        given: Tensor = side.inputs[0]
        group = group.to(given.device)
        small = given.shape[0] * given.shape[1] ** 2 <= _IN_FLOAT64
        rows = given.double() if small or not given.is_floating_point() else given
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = rows - rows.mean(0)
        size = rows.abs().amax()
        rows = rows / torch.where(size > 0, size, 1)
        parts = [(group == g).nonzero().flatten() for g in range(groups)]
        left = given.shape[0] - torch.stack([torch.as_tensor(len(part)) for part in parts]).double().to(
            given.device
        )
        sums = torch.stack([rows[part].sum(0, dtype=torch.float64) for part in parts])
        means = -sums / left.unsqueeze(-1)
        norm2 = (
            rows.square().sum(-1, dtype=torch.float64).unsqueeze(-1)
            - 2 * (rows.double() @ means.mT)
            + means.square().sum(-1)
        )
        norm2 = torch.where(group.unsqueeze(-1) == torch.arange(groups, device=group.device), 0.0, norm2)
        held = _Rows(rows, parts, left, means, norm2, left)
        side.held["sums"] = held._replace(square=_squares(held, held))
    return side.held["sums"]


def _squares(a: _Rows, b: _Rows) -> Tensor:
    """||XᵀY||²_F about the means of what is left, without each group, (G,).

    With P = Σ over all rows, P_g over the group's, what is left is P - P_g - n·x̄ȳᵀ; each square is multiplied out, so that
    the groups' products are read once.
    """
    parts = [a.rows[part].mT @ b.rows[part] for part in a.parts]
    whole = torch.stack(parts).sum(0, dtype=torch.float64)
    flat, size = whole.flatten(), whole.square().sum()
    squares = []
    for part, n, x, y in zip(parts, a.left, a.means, b.means):
        # sums of so many products are not float32's
        own = part.double()
        one = own.flatten()
        along = (x @ whole - x @ own) @ y
        square = size - 2 * (one @ flat) + one @ one - 2 * n * along
        squares.append(square + n.square() * (x @ x) * (y @ y))
    return torch.stack(squares)


def linear_cka_without(
    stage: Any, a: PairSide, b: PairSide, group: Tensor, groups: int
) -> list[Tensor] | None:
    """``LinearCKA`` of a sample over all rows and without each group, (groups+1,) each; None of other sources."""
    if stage.source != "sample" or a.inputs[0].ndim != 2:
        return None
    for side in (a, b):
        if "plain" not in side.held:
            side.held["plain"] = stage.prepare(*side.inputs)
    whole = stage.compare(a.held["plain"], b.held["plain"])
    x, y = _prepared(a, group, groups), _prepared(b, group, groups)
    if x.rows.dtype != y.rows.dtype:
        wide = torch.promote_types(x.rows.dtype, y.rows.dtype)
        x, y = x._replace(rows=x.rows.to(wide)), y._replace(rows=y.rows.to(wide))
    cross = _squares(x, y)
    found = []
    for name, value in zip(stage.estimates, whole):
        pairs = ((cross, x, y), (x.square, x, x), (y.square, y, y))
        if name == "linear_cka":
            left = alignment(*(square for square, *_ in pairs))
        else:
            left = alignment(
                *(
                    hsic1(square - s, s, p.norm2.sum(0), q.norm2.sum(0), x.left)
                    for square, p, q in pairs
                    for s in [(p.norm2 * q.norm2).sum(0)]
                )
            )
        found.append(
            torch.cat((value.double()[None], torch.where(x.left < group.shape[0], left, value.double())))
        )
    return found


def cosine_without(stage: Any, a: PairSide, b: PairSide, group: Tensor, groups: int) -> list[Tensor] | None:
    """``LayerCosine`` over all rows and without each group, (groups+1,)."""
    if a.inputs[0].ndim != 2:
        return None
    for side in (a, b):
        if "plain" not in side.held:
            side.held["plain"] = stage.prepare(side.inputs[0])
    x, y = a.held["plain"], b.held["plain"]
    whole = stage.compare(x, y)
    counted = x.directed & y.directed
    cosine = torch.where(counted, torch.linalg.vecdot(x.rows, y.rows), 0.0)
    group = group.to(cosine.device)
    apart = cosine.new_zeros(groups).index_add_(0, group, cosine)
    fewer = cosine.new_zeros(groups).index_add_(0, group, counted.double())
    left = (cosine.sum() - apart) / (counted.double().sum() - fewer)
    return [torch.cat((whole.double()[None], left.clamp(-1, 1)))]
