"""Neighbours that carry a row's own label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys
from tdgeom.core.stage import Stage
from tdgeom.core.warnings import tell
from tdgeom.core.words import Words, class_names, class_numbers, integers_with_gaps
from tdgeom.measures.neighbors.foreign_tables import own_distances, own_index
from tdgeom.measures.neighbors.nearest_neighbors import nearest_neighbors
from tdgeom.measures.neighbors.neighbor_table import Neighbors, check_rows, minkowski
from tdgeom.measures.neighbors.row_classes import (
    RowClasses,
    cells_of,
    nearest_classes,
    repeats,
)
from tdgeom.measures.neighbors.tie_weights import tie_weights, warn_of_ties_beyond, weighted_table
from tdgeom.numerics.centring import holds, occurs, warn_undefined
from tdgeom.numerics.copies import all_alike, undefined_where_alike
from tdgeom.numerics.opaque import opaque

__all__ = ["LabelOverlap", "label_overlap", "label_overlap_of"]


def label_overlap(
    x: Tensor,
    label: Tensor,
    *,
    k: int = 30,
    class_fraction: float | None = None,
    balanced: bool = False,
    metric: str | float = "euclidean",
    ignore_index: int = -100,
    memory: int | None = None,
) -> Tensor:
    r"""Mean share of a row's k nearest neighbours that carry its label: see ``label_overlap_of``.

    Neighbours are sought as far as ties reach, among the rows that have a label. NaN with one warning where the rows are all
    alike or have no label.

    >>> import torch
    >>> x = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]])
    >>> label_overlap(x, torch.tensor([0, 0, 0, 1, 1]), k=1).item()
    1.0
    """
    label, used = _classes(label, x.shape[:-1], ignore_index)
    each = _asked(label, k, class_fraction)
    rows, _ = check_rows(x, 1)
    share = label_shares(rows.detach(), label, each, used, *minkowski(metric), memory)
    value = _mean(share, label, used, balanced)
    alike = all_alike(x)
    undefined_where_alike(
        torch.zeros_like(value), alike, "label_overlap"
    )  # its word alone: no labels have another
    return torch.where(alike, torch.nan, value)


@opaque(lambda x, label, *settings: label.new_empty(label.shape, dtype=torch.float64))
def label_shares(
    x: Tensor, label: Tensor, each: Tensor, used: Tensor, p: float, cosine: bool, memory: int | None
) -> Tensor:
    """Share of each row's ``each`` (*B, N) nearest rows that carry its label; NaN where a row is not ``used``."""
    n = x.shape[-2]
    flat = [part.reshape(-1, n, *part.shape[label.ndim :]) for part in (x, label, each, used)]
    share = torch.full(flat[1].shape, torch.nan, dtype=torch.float64, device=x.device)
    whole = flat[3].all(-1)
    for items in filter(len, (whole.nonzero().flatten(), *(~whole).nonzero())):
        rows, own, asked = (part[items] for part in flat[:3])
        at = flat[3][items[0]].nonzero().flatten()
        if not len(at):
            continue
        rows, own, asked = rows[:, at], own[:, at], asked[:, at]

        if repeats(rows) and bool((asked == asked[0, 0]).all()):
            found = nearest_classes(rows, int(asked[0, 0]), "cosine" if cosine else p, memory)
            same = torch.stack([_same_in_classes(*one) for one in zip(found, own)])
            share[items.unsqueeze(-1), at] = same / asked
            continue

        def search(width: int, rows: Tensor = rows) -> Neighbors:
            return nearest_neighbors(rows, width, metric="cosine" if cosine else p, memory=memory)

        most = int(asked.max())
        index, weight = weighted_table(search, asked, most, len(at), all_alike(rows))
        share[items.unsqueeze(-1), at] = _same(index, weight, own) / asked
    return share.view(label.shape)


def _same(index: Tensor, weight: Tensor, label: Tensor) -> Tensor:
    """The weight of neighbours with a row's own label, (*B, N)."""
    near = label.gather(-1, index.flatten(-2)).view(index.shape)
    return ((near == label.unsqueeze(-1)) * weight).sum(-1)


def _same_in_classes(classes: RowClasses, label: Tensor) -> Tensor:
    """As ``_same``, of one data set whose rows repeat."""
    names, number = label.unique(return_inverse=True)
    cells = cells_of(classes, RowClasses(number, names, names.unsqueeze(-1), names.unsqueeze(-1)))
    code = cells.a * len(names) + cells.b
    index, weight = classes.index[classes.group], classes.weight[classes.group]
    wanted = index * len(names) + number.unsqueeze(-1)
    place = torch.searchsorted(code, wanted).clamp(max=len(code) - 1)
    many = torch.where(code[place] == wanted, cells.count[place], 0)
    return (weight * (many - (index == classes.group.unsqueeze(-1)).long())).sum(-1)


def label_overlap_of(
    index: Tensor,
    label: Tensor,
    *,
    k: int = 30,
    class_fraction: float | None = None,
    balanced: bool = False,
    distance: Tensor | None = None,
    tied_beyond: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""Mean share of a row's neighbours that carry its label, from a neighbour table.

    Formula:
        label_overlap = mean_i (1/k) Σ_j w_ij [y_j = y_i]; y the labels

    Plain: the mean over rows, w_ij = 1 for the k nearest neighbours; where a rows are as near
    as the k-th and r places are left for them, w_ij = r/a for each (with ``distance``; without, ties are not seen and go to
    whoever stands first). ``balanced``: the mean over classes of the class's mean (DADApy's default, ``weighted=True``).
    ``class_fraction=f``: row i looks at its k_i = max(1, int(f·n_c)) nearest neighbours, n_c the size of its class, instead of
    k. Rows labelled ``ignore_index`` have no label: they are neither asked nor counted as neighbours.

    Args:
        index: (\*B, N, >=k) neighbours (>= the largest k_i).
        label: (\*B, N) integers, or (N,) for all of \*B.
        distance, tied_beyond: (\*B, N, >=k) and (\*B, N), as ``NearestNeighbors`` writes them; the latter tells whether ties go
            beyond the table, which one warning says.
        ignore_index: the label of rows without one.

    Returns:
        (\*B,) in [0, 1], float64.

    Invariances: those of the table (Euclidean: orthogonal maps, isotropic scale, offsets), the order of the rows, and any
    renaming of the labels. Bias: unrelated labels give Σ_c (n_c/N)(n_c-1)/(N-1), plain, and the mean of (n_c-1)/(N-1), balanced.

    Raises:
        ValueError: labels that do not match the rows or are no classes, a table with too few columns, or one that holds the
            row itself, padding, or distances that do not ascend.

    Doimo et al.: "Hierarchical nucleation in deep neural networks", NeurIPS 2020; Valeriani et al.: "The geometry of
    hidden representations of large transformer models", NeurIPS 2023.

    >>> import torch
    >>> index, label = torch.tensor([[1], [0], [1], [0]]), torch.tensor([7, 7, 7, 8])
    >>> label_overlap_of(index, label, k=1).item(), label_overlap_of(index, label, k=1, balanced=True).item()
    (0.75, 0.5)
    """
    label, used = _classes(label, index.shape[:-1], ignore_index)
    each = _asked(label, k, class_fraction)
    width = index.shape[-1]
    if holds(torch.where(used, each, 0).max() > width):
        most = int(torch.where(used, each, 0).max())
        raise ValueError(
            f"label_overlap looks at {most} neighbours, the table has {width} (shape {tuple(index.shape)}). Use "
            f"NearestNeighbors(k={most}) or more."
        )
    index = own_index(index, "label_overlap")
    far = torch.arange(width, dtype=torch.float64, device=index.device).expand(index.shape)
    if distance is not None:
        far = own_distances(distance, "label_overlap").double()
    if occurs(~used):
        # Neighbours without a label go behind the others.
        labelled = used.gather(-1, index.flatten(-2)).view(index.shape)
        order = labelled.logical_not().to(torch.int8).sort(dim=-1, stable=True).indices
        index, far = index.gather(-1, order), torch.where(labelled, far, torch.inf).gather(-1, order)
        there = labelled.sum(-1)
        if occurs(used & (there < each)) and width < index.shape[-2] - 1:
            tell(
                f"label_overlap: some rows have fewer labelled neighbours in the table of {width} columns than they look at, and "
                f"look at those they have. Use NearestNeighbors(k=...) with a larger k, or source='sample'.",
                UserWarning,
            )
        used, each = used & (there > 0), torch.minimum(each, there).clamp(min=1)
    each = each.clamp(max=width)
    # places in a table without distances are all different
    weight, beyond = tie_weights(far, each, torch.zeros_like(used) if distance is None else tied_beyond)
    warn_of_ties_beyond(beyond & used, width, "label_overlap")
    return _mean(torch.where(used, _same(index, weight, label) / each, torch.nan), label, used, balanced)


def _classes(label: Tensor, rows: torch.Size, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels of all rows (*B, N), and which rows have one."""
    n = rows[-1]
    if label.shape[-1:] != (n,) or label.ndim > len(rows):
        raise ValueError(
            f"label_overlap expects one label a row, {tuple(rows)} or ({n},), got {tuple(label.shape)}."
        )
    if label.is_floating_point() and occurs(label != label.round()):
        raise ValueError(
            f"label_overlap compares classes, got {label.dtype} labels that are no whole numbers (or NaN), so that no two need "
            f"be equal. Bin a continuous label first: torch.bucketize(label, edges)."
        )
    label = (label.double() if label.is_floating_point() else label.long()).expand(rows)
    return label, label != ignore_index


def _mean(share: Tensor, label: Tensor, used: Tensor, balanced: bool) -> Tensor:
    """The mean of the rows' shares, or of their classes', over the rows that are used; NaN with a warning without any."""
    share, weight = torch.where(used, share, 0.0), used.double()
    if balanced:
        # Each class weighs one: its size among the rows used.
        weight = weight / _class_size(torch.where(used, label, _unlike(label))).double()
    value = (share * weight).sum(-1) / weight.sum(-1)
    return (
        warn_undefined(value, "label_overlap", "no row has a label (and a neighbour with one).")
        if len(share)
        else value
    )


def _unlike(label: Tensor) -> Tensor:
    """A number that is no label."""
    return label.amax(-1, keepdim=True) + 1


def _class_size(label: Tensor) -> Tensor:
    """How many rows carry the label of each row (*B, N)."""
    label = label.contiguous()
    ordered = label.sort(-1).values
    return torch.searchsorted(ordered, label, right=True) - torch.searchsorted(ordered, label)


def _asked(label: Tensor, k: int, fraction: float | None) -> Tensor:
    """Neighbours that each row looks at: k, or max(1, int(fraction · size of its class))."""
    if fraction is None:
        return torch.full_like(label, k, dtype=torch.int64)
    if not 0 < fraction <= 1:
        raise ValueError(f"label_overlap: class_fraction lies in (0, 1], got {fraction!r}.")
    return (_class_size(label).double() * fraction).long().clamp(min=1)


class LabelOverlap(Stage):
    r"""Mean share of a row's neighbours that carry its label: see ``label_overlap_of``.

    The labels are one carried value for all sites, ``("sample_carried", labels)``, where ``SelectTokens(also=[labels])`` and
    ``RowSample(also=[labels])`` put it.

    Args:
        k: neighbours a row, 1 <= k < N.
        class_fraction: look at this share of the row's class size instead of at k neighbours; None: k.
        balanced: mean of the class means instead of the mean over rows (DADApy's default).
        metric: as in ``nearest_neighbors``.
        source: ``"sample"`` (searches itself, in ``memory`` bytes) or ``"neighbors"`` (reads
            ``NearestNeighbors``'s ``index``).
        labels: the name of the carried label: whole numbers, or words, which stand for classes (None: a row without one).
        ignore_index: rows of this label have none: they are neither asked nor counted as neighbours.
        in_keys: default ``["sample", ("sample_carried", labels)]``; with neighbours ``("neighbors", "index")`` first, and last
            ``("neighbors", "distance")`` and ``("neighbors", "tied_beyond")``, which tell of ties.
        out_keys: default ``("neighborhood", "label_overlap")``, ().

    >>> import torch, tdgeom as tg
    >>> x = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]])
    >>> tg.LabelOverlap(k=1)(sample=x, label=torch.tensor([0, 0, 0, 1, 1])).item()
    1.0
    """

    takes_words = frozenset({"sample_carried"})

    def __init__(
        self,
        *,
        k: int = 30,
        class_fraction: float | None = None,
        balanced: bool = False,
        metric: str | float = "euclidean",
        source: Literal["sample", "neighbors"] = "sample",
        labels: str = "label",
        ignore_index: int = -100,
        memory: int | None = None,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        sources: Mapping[str, Mapping[Key, str]] = {
            "sample": {"sample": "N D", ("sample_carried", labels): "N"},
            "neighbors": {
                ("neighbors", "index"): "N k", ("sample_carried", labels): "N",
                ("neighbors", "distance"): "N k", ("neighbors", "tied_beyond"): "N",
            },
        }  # fmt: skip
        if source not in sources:
            raise ValueError(f"LabelOverlap: source is one of {sorted(sources)}, got {source!r}.")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"LabelOverlap: k is a number of neighbours, at least 1, got {k!r}.")
        if class_fraction is not None and not 0 < class_fraction <= 1:
            raise ValueError(f"LabelOverlap: class_fraction lies in (0, 1], got {class_fraction!r}.")
        writes: list[Key] = [("neighborhood", "label_overlap")]
        optional = [("neighbors", "distance"), ("neighbors", "tied_beyond")]
        super().__init__(
            reads=sources[source], writes=writes, optional=optional, in_keys=in_keys, out_keys=out_keys
        )
        self.ignore_index = ignore_index
        self.k, self.class_fraction, self.balanced = k, class_fraction, balanced
        self.metric, self.source, self.memory = metric, source, memory

    def compute(self, given: Tensor, label: Tensor | Words, *table: Tensor | None) -> Tensor:
        """The mean overlap."""
        if isinstance(label, Words):
            numbers = integers_with_gaps(label, self.ignore_index, "LabelOverlap", self.in_keys[1])
            if numbers is None:
                numbers = class_numbers(label, class_names(label), self.ignore_index)
            label = numbers.to(given.device)
        overlap: Callable[..., Tensor] = partial(label_overlap, metric=self.metric, memory=self.memory)
        if self.source == "neighbors":
            distance, tied_beyond = table
            overlap = partial(label_overlap_of, distance=distance, tied_beyond=tied_beyond)
        how = {"k": self.k, "class_fraction": self.class_fraction, "balanced": self.balanced}
        return overlap(given, label, **how, ignore_index=self.ignore_index)
