"""A neighbour table: the rows a search takes, and the table over all rows from those over distinct ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.numerics.copies import expand_table

__all__ = ["Neighbors", "assemble", "distances_to", "flatten", "over_all_rows", "prepare_rows"]

_SMALLEST, _LARGEST = (
    1e-140,
    1e150,
)  # of the largest value; squares of differences between rows are then numbers


class Neighbors(NamedTuple):
    """A neighbour table: what ``nearest_neighbors`` returns, in the order that ``NearestNeighbors`` writes."""

    distance: Tensor
    index: Tensor
    distinct_distance: Tensor
    duplicates: Tensor


def prepare_rows(x: Tensor, k: int, metric: str | float) -> tuple[Tensor, float]:
    """Rows that the search takes (float32 or float64, unit length for cosine) and the Minkowski exponent."""
    if x.ndim < 2 or x.shape[-1] < 1 or x.is_complex():
        raise ValueError(
            f"nearest neighbours expect real rows of shape (..., N, D), got {tuple(x.shape)} of {x.dtype}."
        )
    n = x.shape[-2]
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is a number of neighbours, at least 1, got {k!r}.")
    if k >= n:
        raise ValueError(
            f"{k} nearest neighbours need at least {k + 1} rows, got {n} (shape {tuple(x.shape)}). Give more rows or a smaller k."
        )
    if not x.is_floating_point():
        x = x.double()
    elif x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    if x.device.type == "mps":  # no float64 there
        x = x.cpu()
    ends = torch.stack(torch.aminmax(x.detach()))  # one pass; NaN wins in both
    if not bool(torch.isfinite(ends).all()):
        raise ValueError(
            f"nearest neighbours: the rows (shape {tuple(x.shape)}) hold NaN or Inf. Drop such rows first; "
            f"run(..., nonfinite='drop') does it at all sites and counts them."
        )
    size = float(ends.abs().max())
    if size and not _SMALLEST <= size <= _LARGEST:
        raise ValueError(
            f"nearest neighbours: the rows reach {size:.0e}, whose square leaves the range of float64. Give them in a "
            f"unit between {_SMALLEST:.0e} and {_LARGEST:.0e}."
        )
    if metric == "euclidean":
        return x, 2.0
    if metric == "cosine":
        norm = torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True)
        if bool((norm == 0).any()):
            raise ValueError(
                "metric='cosine': a row is zero and has no direction. Drop zero rows or use 'euclidean'."
            )
        return x.double() / norm, 2.0
    if isinstance(metric, (int, float)) and not isinstance(metric, bool) and metric >= 1:
        return x, float(metric)
    raise ValueError(
        f"metric is 'euclidean', 'cosine' or a number p >= 1 (math.inf included) for Minkowski's distance, got {metric!r}."
    )


def flatten(rows: Tensor) -> Tensor:
    """(*B, N, D) as (b, N, D)."""
    return rows.reshape(-1, *rows.shape[-2:])


def assemble(
    rows: Tensor, first: Tensor, tables: list[tuple[Tensor, Tensor]], k: int, *, p: float, metric: str | float
) -> Neighbors:
    """The table over all rows (*B, N, D) from the tables over the distinct rows of each data set."""
    flat, n = flatten(rows), rows.shape[-2]
    distinct, _ = over_all_rows(first, tables, k)
    distance, index = distinct, torch.empty(distinct.shape, dtype=torch.int64, device=flat.device)
    if any(len(near) < n for near, _ in tables):
        distance = distinct.clone()
    for item, (near, at) in enumerate(tables):
        if len(near) == n:
            index[item] = at
        else:
            distance[item], index[item] = expand_table(first[item], near, at, k)
    if flat.requires_grad and torch.is_grad_enabled():
        among = distances_to(flat, over_all_rows(first, tables, k)[1], p)
        distinct = among.where(torch.isfinite(distinct), torch.nan)
        distance = distances_to(flat, index, p)
    if metric == "cosine":
        distance, distinct = distance.square() / 2, distinct.square() / 2
    table = Neighbors(distance, index, distinct, (first != torch.arange(n, device=flat.device)).sum(-1))
    return Neighbors(*(leaf.reshape((*rows.shape[:-2], *leaf.shape[1:])) for leaf in table))


def over_all_rows(first: Tensor, tables: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """Tables among first occurrences laid out over all (b, N) rows; NaN and index 0 where there is nothing."""
    b, n = first.shape
    if all(len(near) == n for near, _ in tables):
        return torch.stack([near for near, _ in tables]), torch.stack([at for _, at in tables])
    own = torch.arange(n, device=first.device)
    distance = torch.full((b, n, k), torch.nan, dtype=torch.float64, device=first.device)
    index = torch.zeros((b, n, k), dtype=torch.int64, device=first.device)
    for item, (near, at) in enumerate(tables):
        kept = (first[item] == own).nonzero().squeeze(-1)
        distance[item, kept, : near.shape[-1]] = near
        index[item, kept, : near.shape[-1]] = kept[at]
    return distance, index


def distances_to(flat: Tensor, index: Tensor, p: float) -> Tensor:
    """Distances from every row of (b, N, D) to the rows at ``index`` (b, N, k), inside the graph."""
    near = flat.gather(1, index.flatten(1).unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
    near = near.view(*index.shape, flat.shape[-1])
    return torch.linalg.vector_norm(flat.double().unsqueeze(2) - near.double(), ord=p, dim=-1)
