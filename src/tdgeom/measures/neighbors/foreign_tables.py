"""Neighbour tables of other libraries: checked, turned into our own, and refused where they are given as they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.numerics.centring import occurs
from tdgeom.numerics.copies import SAME

__all__ = ["neighbors_from", "own_distances", "own_index", "without_self"]

_REMEDY = "tg.neighbors_from(distance, index) turns the table of another library into one of ours."


@answer_guesses
def neighbors_from(
    distance: Any = None, index: Any = None, *, mus: Any = None, site: str | None = None
) -> TensorDict:
    r"""A neighbour table from arrays of scikit-learn, FAISS, DADApy or files: checked, without the rows themselves, ascending.

    A row's own index may stand in any column, in every row or in some, or be missing; entries of -1 are padding, and so are NaN
    and infinite distances. Rows are brought into ascending order and cut to the number of neighbours that all of them have. Such
    a table names no copies: rows at distance 0 count as copies of one another, the first of them is kept, and a row whose
    neighbours among distinct rows run out has NaN there. What cannot be told from the numbers: whether distances are squared
    (FAISS's L2 indices give squares, and inner products for IP: take their root first), and which metric was used.

    Args:
        distance: (N, K) array, tensor or lists. None: indices alone, for overlaps, which then see no ties.
        index: (N, K) integers of any kind, 0..N-1 or -1. None: distances alone, for dimensions; without an index a first column
            of zeros is taken for the rows themselves.
        mus: ratios μ instead of distances, (N,) or (N, S), as DADApy and the files of Valeriani et al. keep them: r₂/r₁ in the
            first column, r₄/r₂, r₈/r₄, ... in further ones. Distances are then in units of the first, r₁ = 1, which is all that
            ``TwoNN`` and ``Gride`` look at but for their ``scale``; columns between powers of two are NaN.
        site: at which site to put it; None: ``("neighbors", leaf)``.

    Returns:
        A TensorDict with ``("neighbors", [site,] leaf)``: ``distance``, ``index`` (N, k), ``distinct_distance`` (N, k),
        ``duplicates``, ``near_duplicates`` (-1: unknown), ``tied_beyond`` (N,), as ``NearestNeighbors`` writes them, as far as
        they follow from what is given. Stages with ``source="neighbors"`` read it.

    Raises:
        ValueError: shapes that are no table or do not match, an index outside of 0..N-1, one named twice in a row, negative
            distances, ratios below 1, no neighbour left.

    Doimo et al. 2020 and Valeriani et al. 2023 publish such files (distances, indices and ratios to neighbour 2, 4, 8, ...).

    >>> import tdgeom as tg
    >>> from sklearn.neighbors import NearestNeighbors
    >>> x = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)).numpy()
    >>> table = tg.neighbors_from(*NearestNeighbors(n_neighbors=9).fit(x).kneighbors(x))  # each row is its own first neighbour
    >>> table["neighbors", "index"].shape
    torch.Size([200, 8])
    >>> round(float(tg.TwoNN(source="neighbors")(table)["dimension", "twonn", "estimate"]), 1)
    2.1
    """
    if mus is not None:
        if distance is not None or index is not None:
            raise ValueError("neighbors_from takes distances (and an index) or ratios (mus=), not both.")
        return _placed({"distinct_distance": _from_ratios(_array(mus, "mus", floating=True))}, site)
    if distance is None and index is None:
        raise ValueError("neighbors_from takes distance, index, both, or mus=; got none of them.")
    near = None if distance is None else _array(distance, "distance", floating=True)
    at = None if index is None else _array(index, "index", floating=False)
    if near is not None and at is not None and near.shape != at.shape:
        raise ValueError(
            f"neighbors_from: distance and index are tables of one shape, got {tuple(near.shape)} and {tuple(at.shape)}."
        )
    given = near if near is not None else at
    assert given is not None
    if given.ndim != 2 or not given.numel():
        raise ValueError(f"neighbors_from expects tables of shape (N, K), got {tuple(given.shape)}.")
    n = len(given)
    own = torch.arange(n).unsqueeze(-1)
    usable = torch.ones(given.shape, dtype=torch.bool)
    if at is not None:
        outside = (at < -1) | (at >= n)
        if bool(outside.any()):
            raise ValueError(
                f"neighbors_from: an index lies in 0..{n - 1} (or is -1, padding) for {n} rows, got {int(at[outside][0])}. The "
                f"table must be of the rows among themselves, in their order."
            )
        usable &= (at != -1) & (at != own)
    if near is not None:
        if bool((near < 0).any()):
            raise ValueError(
                f"neighbors_from: distances are at least 0, got {float(near[near < 0][0]):.3g}. Of similarities or "
                f"inner products take distances first."
            )
        usable &= torch.isfinite(near)
        if at is None and bool((near[:, 0] == 0).all()):
            usable[:, 0] = False
    k = int(usable.sum(-1).min())
    if not k:
        raise ValueError(
            f"neighbors_from: row {int(usable.sum(-1).argmin())} has no neighbour besides itself and padding. Ask the other "
            f"library for more neighbours."
        )
    # Usable entries first, by distance; ties and tables without distances in the order given.
    rank = near if near is not None else torch.zeros(given.shape, dtype=torch.float64)
    order = torch.where(usable, rank, torch.inf).sort(dim=-1, stable=True).indices
    order = order.gather(
        -1, usable.gather(-1, order).logical_not().to(torch.int8).sort(dim=-1, stable=True).indices
    )
    leaves: dict[str, Tensor] = {}
    if at is not None:
        at = at.gather(-1, order)[:, :k]
        ordered = at.sort(-1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            row = int((ordered[:, 1:] == ordered[:, :-1]).any(-1).int().argmax())
            raise ValueError(f"neighbors_from: row {row} names a neighbour twice.")
        leaves["index"] = at.contiguous()
    if near is not None:
        everything = torch.where(usable, near, torch.inf).gather(-1, order)
        near = everything[:, :k].contiguous()
        edge = everything[:, k] if everything.shape[1] > k else torch.full((n,), torch.inf)
        leaves["distance"] = near
        # Where the table goes on, its next entry tells; at its end, two equal distances let suspect a third.
        suspect = torch.isinf(edge) & (near[:, -2:].diff(dim=-1) <= (SAME - 1) * near[:, -1:]).any(-1)
        leaves["tied_beyond"] = ((edge <= SAME * near[:, -1]) | suspect) & torch.tensor(k < n - 1)
        leaves["distinct_distance"], leaves["duplicates"] = _distinct(near, at)
    return _placed(leaves, site)


def _placed(leaves: dict[str, Tensor], site: str | None) -> TensorDict:
    order = ("distance", "index", "distinct_distance", "duplicates", "near_duplicates", "tied_beyond")
    if "distinct_distance" in leaves:
        leaves.setdefault("duplicates", torch.zeros((), dtype=torch.int64))
        leaves["near_duplicates"] = torch.full((), -1, dtype=torch.int64)
    table = TensorDict({name: leaves[name] for name in order if name in leaves})
    return TensorDict({"neighbors": table if site is None else {site: table}})


def _array(given: Any, name: str, *, floating: bool) -> Tensor:
    value = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.asarray(given).copy())
    if floating:
        return value.double()
    if (value.is_floating_point() and bool((value != value.round()).any())) or value.dtype == torch.bool:
        raise ValueError(
            f"neighbors_from: {name} holds the indices of rows, whole numbers, got {value.dtype}. The order of the arguments is "
            f"neighbors_from(distance, index)."
        )
    return value.long()


def _distinct(near: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distances among distinct rows, NaN on later copies and behind the last, and the number of copies.

    Two rows at distance 0 are copies. Without an index, or where the table does not show all copies, no more can be told.
    """
    n = len(near)
    first = torch.arange(n)
    if at is not None:
        row, column = (near == 0).nonzero(as_tuple=True)
        first = first.scatter_reduce(0, row, at[row, column], "amin")
        for _ in range(
            n.bit_length()
        ):  # a row of more copies than columns names another that names the first
            first = first[first]
    copy = first != torch.arange(n)
    skip = near == 0 if at is None else copy[at] | (near == 0)
    distance = torch.where(skip, torch.inf, near).sort(dim=-1).values
    # Beyond a copy that was left out there may be nearer rows than those the table shows last: none is made up.
    distance = torch.where(torch.isinf(distance), torch.nan, distance)
    return torch.where(copy.unsqueeze(-1), torch.nan, distance), copy.sum()


def _from_ratios(mus: Tensor) -> Tensor:
    """(N, 2^S) distances in units of the first, from r₂/r₁, r₄/r₂, ...; NaN where no ratio tells."""
    mus = mus.unsqueeze(-1) if mus.ndim == 1 else mus
    if mus.ndim != 2 or not mus.numel():
        raise ValueError(
            f"neighbors_from: mus are ratios of shape (N,) or (N, scales), got {tuple(mus.shape)}."
        )
    if not bool((mus >= 1).all()):
        raise ValueError(
            f"neighbors_from: ratios of an outer to an inner distance are at least 1, got {float(mus[~(mus >= 1)][0]):.3g}."
        )
    scales = mus.shape[1]
    distance = torch.full((len(mus), 2**scales), torch.nan, dtype=torch.float64)
    distance[:, 0] = 1
    distance[:, [2 ** (s + 1) - 1 for s in range(scales)]] = mus.cumprod(-1)
    return distance


def own_index(index: Tensor, name: str) -> Tensor:
    r"""The index (\*B, N, K) of a table as int64; refused where it is not one of ours."""
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"{name} reads indices of rows, whole numbers, got {index.dtype} of shape {tuple(index.shape)}."
        )
    index, n = index.long(), index.shape[-2]
    if occurs((index < 0) | (index >= n)):
        raise ValueError(
            f"{name}: the table (shape {tuple(index.shape)}) names rows outside of 0..{n - 1}, or is padded. {_REMEDY}"
        )
    return without_self(index, name)


def without_self(index: Tensor, name: str) -> Tensor:
    r"""The index (\*B, N, K) of a table, unless a row is its own neighbour."""
    n = index.shape[-2]
    if occurs(index == torch.arange(n, device=index.device).unsqueeze(-1)):
        raise ValueError(
            f"{name}: the table (shape {tuple(index.shape)}) holds the row itself among its neighbours, which would count it as "
            f"its own. {_REMEDY}"
        )
    return index


def own_distances(distance: Tensor, name: str, *, distinct: bool = False) -> Tensor:
    r"""The distances (\*B, N, K) of a table; refused where they are not ours: not ascending, or 0 among ``distinct`` rows."""
    if distinct and occurs(distance[..., 0] == 0):
        raise ValueError(
            f"{name}: the table (shape {tuple(distance.shape)}) holds distances of 0 among distinct rows: the row itself, or "
            f"copies. {_REMEDY}"
        )
    if occurs(distance[..., 1:] * SAME < distance[..., :-1]):
        raise ValueError(
            f"{name}: the distances of the table (shape {tuple(distance.shape)}) do not ascend. {_REMEDY}"
        )
    return distance
