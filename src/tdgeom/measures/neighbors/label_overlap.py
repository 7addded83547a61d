"""Neighbours that carry a row's own label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys
from tdgeom.core.stage import Stage
from tdgeom.measures.neighbors.nearest_neighbors import nearest_neighbors
from tdgeom.numerics.centring import holds
from tdgeom.numerics.copies import all_alike, undefined_where_alike

__all__ = ["LabelOverlap", "label_overlap", "label_overlap_of"]


def label_overlap(
    x: Tensor,
    label: Tensor,
    *,
    k: int = 30,
    class_fraction: float | None = None,
    balanced: bool = False,
    metric: str | float = "euclidean",
    memory: int | None = None,
) -> Tensor:
    r"""Mean share of a row's k nearest neighbours that carry its label: see ``label_overlap_of``.

    NaN with one warning where the rows are all alike.

    >>> import torch
    >>> x = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]])
    >>> label_overlap(x, torch.tensor([0, 0, 0, 1, 1]), k=1).item()
    1.0
    """
    if class_fraction is not None:
        try:
            most = int(_asked(label, k, class_fraction).max())
        except RuntimeError as error:  # vmap: labels that stand for a batch of others
            raise ValueError(
                "label_overlap: with class_fraction the number of neighbours to search follows from the labels, which vmap "
                "hides. Call it on the whole batch (it takes leading dimensions), or search first: label_overlap_of(index, ...)."
            ) from error
    index = nearest_neighbors(x, k if class_fraction is None else most, metric=metric, memory=memory).index
    value = label_overlap_of(index, label, k=k, class_fraction=class_fraction, balanced=balanced)
    return undefined_where_alike(value, all_alike(x), "label_overlap")


def label_overlap_of(
    index: Tensor, label: Tensor, *, k: int = 30, class_fraction: float | None = None, balanced: bool = False
) -> Tensor:
    r"""Mean share of a row's neighbours that carry its label, from a neighbour table.

    Plain: the mean over rows of |{j in N_k(i): label_j = label_i}|/k. ``balanced``: the mean over classes of
    the class's mean (DADApy's default, ``weighted=True``). ``class_fraction=f``: row i looks at its
    k_i = max(1, int(f·n_c)) nearest neighbours, n_c the size of its class, instead of k.

    Args:
        index: (\*B, N, >=k) neighbours (>= the largest k_i).
        label: (\*B, N) integers, or (N,) for all of \*B.

    Returns:
        (\*B,) in [0, 1], float64.

    Invariances: those of the table (Euclidean: orthogonal maps, isotropic scale, offsets), and any renaming of the
    labels. Bias: unrelated labels give Σ_c (n_c/N)(n_c-1)/(N-1), plain, and the mean of (n_c-1)/(N-1), balanced.

    Raises:
        ValueError: labels that do not match the rows or are no classes, a table with too few columns.

    Doimo et al.: "Hierarchical nucleation in deep neural networks", NeurIPS 2020; Valeriani et al.: "The geometry of
    hidden representations of large transformer models", NeurIPS 2023.

    >>> import torch
    >>> index, label = torch.tensor([[1], [0], [1], [0]]), torch.tensor([7, 7, 7, 8])
    >>> label_overlap_of(index, label, k=1).item(), label_overlap_of(index, label, k=1, balanced=True).item()
    (0.75, 0.5)
    """
    n = index.shape[-2]
    if label.shape[-1:] != (n,) or label.ndim > index.ndim - 1:
        raise ValueError(
            f"label_overlap expects one label a row, {tuple(index.shape[:-1])} or ({n},), got {tuple(label.shape)}."
        )
    if label.is_floating_point() and holds((label != label.round()).any()):
        raise ValueError(
            f"label_overlap compares classes, got {label.dtype} labels that are no whole numbers (or NaN), so that no two need "
            f"be equal. Bin a continuous label first: torch.bucketize(label, edges)."
        )
    label = label.expand(index.shape[:-1])
    each = _asked(label, k, class_fraction)
    if holds(each.max() > index.shape[-1]):
        most = int(each.max())
        raise ValueError(
            f"label_overlap looks at {most} neighbours, the table has {index.shape[-1]} (shape {tuple(index.shape)}). "
            f"Use NearestNeighbors(k={most}) or more."
        )
    near = label.gather(-1, index.flatten(-2)).view(index.shape)
    within = torch.arange(index.shape[-1], device=index.device) < each.unsqueeze(-1)
    share = ((near == label.unsqueeze(-1)) & within).sum(-1).double() / each
    if not balanced:
        return share.mean(-1)
    weight = 1 / _class_size(label).double()  # each class weighs one
    return (share * weight).sum(-1) / weight.sum(-1)


def _class_size(label: Tensor) -> Tensor:
    """How many rows carry the label of each row (*B, N)."""
    label = (label.double() if label.is_floating_point() else label.long()).contiguous()
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
        labels: the name of the carried label.
        in_keys: default ``["sample", ("sample_carried", labels)]``, with neighbours ``("neighbors", "index")`` first.
        out_keys: default ``("neighborhood", "label_overlap")``, ().

    >>> import torch, tdgeom as tg
    >>> x = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]])
    >>> tg.LabelOverlap(k=1)(sample=x, label=torch.tensor([0, 0, 0, 1, 1])).item()
    1.0
    """

    def __init__(
        self,
        *,
        k: int = 30,
        class_fraction: float | None = None,
        balanced: bool = False,
        metric: str | float = "euclidean",
        source: Literal["sample", "neighbors"] = "sample",
        labels: str = "label",
        memory: int | None = None,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        sources: Mapping[str, Mapping[Key, str]] = {
            "sample": {"sample": "N D", ("sample_carried", labels): "N"},
            "neighbors": {("neighbors", "index"): "N k", ("sample_carried", labels): "N"},
        }
        if source not in sources:
            raise ValueError(f"LabelOverlap: source is one of {sorted(sources)}, got {source!r}.")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"LabelOverlap: k is a number of neighbours, at least 1, got {k!r}.")
        if class_fraction is not None and not 0 < class_fraction <= 1:
            raise ValueError(f"LabelOverlap: class_fraction lies in (0, 1], got {class_fraction!r}.")
        writes: list[Key] = [("neighborhood", "label_overlap")]
        super().__init__(reads=sources[source], writes=writes, in_keys=in_keys, out_keys=out_keys)
        self.k, self.class_fraction, self.balanced = k, class_fraction, balanced
        self.metric, self.source, self.memory = metric, source, memory

    def compute(self, given: Tensor, label: Tensor) -> Tensor:
        """The mean overlap."""
        overlap: Callable[..., Tensor] = label_overlap_of
        if self.source == "sample":
            overlap = partial(label_overlap, metric=self.metric, memory=self.memory)
        return overlap(given, label, k=self.k, class_fraction=self.class_fraction, balanced=self.balanced)
