"""Copies up to rounding: one row computed twice, in batches of other shapes, differs in its last bits.

Rows x and y are copies if |x - y| <= c·eps·|x|, eps that of the precision in which they were captured: c = 64 in float32 (and
float64), 4 in bfloat16 and float16. Repeats of one row by one model differ by up to 25 and 3.6 eps|x|, distinct rows of a float32
model by more than 800. The first row in the given order stands for all within that distance of it, so no two copies are farther
apart than twice that, and there are no chains.

Copies lie within that distance of each other in any projection too. Sorting one projection leaves few pairs to look at in
float32; half precision leaves many, and a product of a few projections (a hundredth of a search) does it there. What is left is
compared from differences in float64.

Float32 rows with a mean of thirty thousand standard deviations or more lie within that distance of one another because of the
mean: there only exact copies are copies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tdgeom.numerics.differences import pair_distances, product_error

__all__ = ["near_copies", "rounding_radius"]

_TIMES = {torch.float64: 64.0, torch.float32: 64.0, torch.bfloat16: 4.0, torch.float16: 4.0}
_LINES = 16  # projections
_PAIRS = 2**16  # looked at together, and more where few of them are near
_FEW = 16  # pairs a row, up to which they are listed
_ENOUGH = 32  # rows whose spread can be told


def rounding_radius(dtype: torch.dtype) -> float:
    """c·eps: how far apart two roundings of a row may lie, as a share of its norm; 0 for whole numbers.

    >>> rounding_radius(torch.bfloat16), rounding_radius(torch.int64)
    (0.03125, 0.0)
    """
    times = _TIMES.get(dtype)
    return 0.0 if times is None else times * torch.finfo(dtype).eps


def near_copies(x: Tensor, radius: float) -> Tensor:
    """(n,): for every row of ``x`` (n, D) the first row that stands for it, itself mostly.

    A row stands for later ones within ``radius`` times its norm, unless an earlier one stands for it or them.

    >>> near_copies(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1e-7]]), rounding_radius(torch.float32)).tolist()
    [0, 1, 0]
    """
    n = len(x)
    own = torch.arange(n, device=x.device)
    if n < 2 or radius == 0:
        return own
    lines, size = _projected(x)
    if _hidden_by_an_offset(x, size, radius):
        return own
    reach = radius * size
    wide = (
        reach + 4 * product_error(x.shape[-1], torch.float64) * size
    )  # what rounding of the projections hides
    leader = own.tolist()
    for i, j in _candidates(lines, wide, leader):
        near = pair_distances(x, i, j) <= reach[i]
        # In the order of i: whether i stands for itself is settled when its pairs come.
        for a, b in zip(i[near].tolist(), j[near].tolist()):
            if leader[a] == a and leader[b] == b:
                leader[b] = a
    return torch.tensor(leader, device=x.device)


def _hidden_by_an_offset(x: Tensor, size: Tensor, radius: float) -> bool:
    """Whether all rows lie within a few radii of their mean, far from 0: then the radius tells nothing about copies.

    Rows much closer than the radius are roundings of one row; few rows are taken at the rule's word.
    """
    if len(x) < _ENOUGH:
        return False
    mean = x.mean(0, dtype=torch.float64)
    spread = (size.square().mean() - mean.square().sum()).clamp(min=0).sqrt()
    within = float(radius * size.square().mean().sqrt() / spread)
    return 0.25 < within < 16.0 if radius < 1e-3 else 1.0 < within < 4.0


def _projected(x: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (n, m) along directions at right angles, in which the rows differ, and their norms (n,); in float64."""
    n, width = x.shape
    generator = torch.Generator().manual_seed(0)
    m = min(_LINES, width)
    a, b = torch.randint(n, (2, m), generator=generator, device="cpu").to(x.device)
    apart = x[a].double() - x[b].double()
    apart /= torch.linalg.vector_norm(apart, dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    random = torch.randn(m, width, generator=generator, dtype=torch.float64, device="cpu").to(x.device)
    directions = torch.linalg.qr((apart + random / width**0.5 / 4).mT).Q
    lines = torch.empty(n, m, dtype=torch.float64, device=x.device)
    size = torch.empty(n, dtype=torch.float64, device=x.device)
    step = max(1, 2**20 // width)
    for s in range(0, n, step):
        part = x[s : s + step].double()
        lines[s : s + step] = part @ directions
        torch.linalg.vector_norm(part, dim=-1, out=size[s : s + step])
    return lines, size


def _candidates(lines: Tensor, wide: Tensor, leader: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs i < j, by ascending i, within ``wide`` of i in every projection; rows that others stand for are left out.

    ``leader`` is read again whenever pairs are asked for.
    """
    some = lines[:, :4].T.contiguous()
    ordered, order = some.sort(-1)
    low = torch.searchsorted(ordered, some - wide)
    count = torch.searchsorted(ordered, some + wide, right=True) - low
    best = int(count.sum(-1).argmin())
    low, count, order = low[best], count[best], order[best]
    n = len(lines)
    own = torch.arange(n, device=lines.device)
    if int(count.sum()) <= _FEW * n:
        # The windows themselves: few rows lie in each.
        which = own[count > 1]
        i = which.repeat_interleave(count[which])
        first = count[which].cumsum(0) - count[which]
        j = order[low[i] + torch.arange(len(i), device=i.device) - first.repeat_interleave(count[which])]
        later = j > i
        i, j = i[later], j[later]
        near = ((lines[i] - lines[j]).abs() <= wide[i].unsqueeze(-1)).all(-1)
        yield i[near], j[near]
        return
    centred = lines - lines.mean(0)
    half = centred.square().sum(-1) / 2
    limit = wide.square() / 2
    limit = limit + product_error(lines.shape[1], torch.float64) * (2 * (2 * half).sqrt() + wide).square() / 2
    start, step = 0, max(1, _PAIRS // n)
    while start < n:
        stands = torch.tensor(leader, device=lines.device) == own
        rows, others = own[start : start + step], own[start:]
        rows, others = rows[stands[rows]], others[stands[others]]
        key = torch.addmm(
            half[others] - limit[rows].unsqueeze(-1), centred[rows], centred[others].T, alpha=-1
        )
        row, other = (key <= -half[rows].unsqueeze(-1)).nonzero(as_tuple=True)
        i, j = rows[row], others[other]
        later = j > i
        start += step
        # Large clusters are taken a few rows at a time: once their first is known, they are not looked at again.
        step = max(1, _PAIRS // n) if int(later.sum()) > _PAIRS // 16 else min(2 * step, 2**22 // n + 1)
        yield i[later], j[later]
