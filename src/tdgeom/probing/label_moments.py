"""Moments of rows together with their labels, one set a fold: what every closed-form probe is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.numerics.products import gram
from tdgeom.probing.class_labels import NamesClasses, moved_targets
from tdgeom.probing.labelled_rows import labelled_keys, one_hot, row_labels
from tdgeom.probing.splits import fold_index, row_groups

__all__ = [
    "LEAVES",
    "LabelMoments",
    "StreamingLabelMoments",
    "class_counts",
    "label_moments",
    "merged_moments",
    "pool_folds",
    "row_targets",
    "some_targets",
    "with_rows",
    "zero_moments",
]

LEAVES = ("count", "mean", "scatter", "target_mean", "cross_scatter", "target_scatter")
LabelMoments = dict[str, Tensor]


def zero_moments(
    folds: int, features: int, targets: int, device: torch.device, *, scatter: bool = True
) -> LabelMoments:
    """Moments of no rows, a fold first: count (G,), mean (G, D), scatter (G, D, D), target_mean (G, K), and so on.

    With ``scatter=False`` that leaf is (G, 0, 0), and stays so: for what needs no more than means.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "mean": (features,),
        "scatter": (features, features) if scatter else (0, 0),
        "target_mean": (targets,),
        "cross_scatter": (features, targets),
        "target_scatter": (targets, targets),
    }
    zeros = {k: torch.zeros((folds, *s), dtype=torch.float64, device=device) for k, s in shapes.items()}
    return {"count": torch.zeros(folds, dtype=torch.int64, device=device), **zeros}


def widen(moments: Mapping[str, Tensor], targets: int) -> LabelMoments:
    """The same moments with further targets that were zero in every row so far (classes not met before)."""
    more = targets - moments["target_mean"].shape[-1]
    if more <= 0:
        return dict(moments)
    pad = torch.nn.functional.pad
    return {
        **moments,
        "target_mean": pad(moments["target_mean"], (0, more)),
        "cross_scatter": pad(moments["cross_scatter"], (0, more)),
        "target_scatter": pad(moments["target_scatter"], (0, more, 0, more)),
    }


def label_moments(rows: Tensor, targets: Tensor, *, scatter: bool = True) -> LabelMoments:
    """The moments of one set of rows, (N, D) and (N, K), N >= 1, in float64 about the means.

    ``scatter`` = Σ(x-x̄)(x-x̄)ᵀ, ``cross_scatter`` = Σ(x-x̄)(t-t̄)ᵀ, ``target_scatter`` = Σ(t-t̄)(t-t̄)ᵀ;
    ``scatter=False`` leaves the first out, as (0, 0).

    >>> label_moments(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]]))["cross_scatter"]
    tensor([[1.]], dtype=torch.float64)
    """
    x, t = rows.double(), targets.double()
    mean, target_mean = x.mean(0), t.mean(0)
    x, t = x - mean, t - target_mean
    return {
        "count": torch.full((), x.shape[0], dtype=torch.int64, device=x.device),
        "mean": mean,
        "scatter": gram(x) if scatter else x.new_zeros(0, 0),
        "target_mean": target_mean,
        "cross_scatter": x.mT @ t,
        "target_scatter": t.mT @ t,
    }


def merge_into(state: Mapping[str, Tensor], fold: int, block: Mapping[str, Tensor]) -> None:
    """Add a block's moments to one fold of ``state`` in place (Chan, Golub and LeVeque 1979)."""
    own, more = state["count"][fold].double(), block["count"].double()
    total = own + more
    weight = own * more / total
    delta, shift = block["mean"] - state["mean"][fold], block["target_mean"] - state["target_mean"][fold]
    for name, left, right in (
        ("scatter", delta, delta),
        ("cross_scatter", delta, shift),
        ("target_scatter", shift, shift),
    ):
        if state[name].numel():
            state[name][fold].add_(block[name]).addr_(left * weight, right)
    state["mean"][fold].add_(delta * (more / total))
    state["target_mean"][fold].add_(shift * (more / total))
    state["count"][fold].add_(block["count"])


def row_targets(label: Tensor, held: int) -> Tensor:
    """Targets (N, K) of labels as ``row_labels`` gives them: numbers as they are, classes as indicators, ``held`` or more."""
    if label.is_floating_point():
        return label
    return one_hot(label.clamp(min=0), max(held, int(label.max()) + 1))


def with_rows(state: Mapping[str, Tensor], rows: Tensor, targets: Tensor, fold: Tensor) -> LabelMoments:
    """The moments with rows (N, D) and targets (N, K) added to their folds (N,); a fold below 0 is left out."""
    state = widen(state, targets.shape[1])
    for index in range(state["count"].shape[0]):
        at = (fold == index).nonzero()[:, 0]
        if len(at):
            whole = state["scatter"].numel() > 0
            merge_into(state, index, label_moments(rows[at], targets[at], scatter=whole))
    return state


def merged_moments(state: Mapping[str, Tensor], other: Mapping[str, Tensor], owner: str) -> LabelMoments:
    """Two sets of moments as one, fold by fold; either may have met classes that the other has not."""
    widths = state["mean"].shape[1], other["mean"].shape[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"{owner} holds moments of rows of width {widths[0]}, the stage to merge of width {widths[1]}: they saw other rows."
        )
    targets = max(state["target_mean"].shape[1], other["target_mean"].shape[1])
    state, other = widen(state, targets), widen(other, targets)
    for fold in range(state["count"].shape[0]):
        if int(other["count"][fold]):
            block = {name: value[fold].to(state[name].device) for name, value in other.items()}
            merge_into(state, fold, block)
    return state


def some_targets(moments: Mapping[str, Tensor], which: slice) -> LabelMoments:
    """The moments of some of the targets."""
    return {
        **moments,
        "target_mean": moments["target_mean"][..., which],
        "cross_scatter": moments["cross_scatter"][..., which],
        "target_scatter": moments["target_scatter"][..., which, which],
    }


def pool_folds(moments: Mapping[str, Tensor], keep: Tensor | None = None) -> LabelMoments:
    """The moments of several folds' rows together: leaves (G, ...) -> (...); ``keep`` (G,) bool chooses folds.

    Leaves that carry no fold (``count`` of shape ()) are taken as they are.

    >>> both = pool_folds(dict(count=torch.tensor([1, 1]), mean=torch.tensor([[0.0], [2.0]]).double(),
    ...     scatter=torch.zeros(2, 1, 1).double(), target_mean=torch.zeros(2, 1).double(),
    ...     cross_scatter=torch.zeros(2, 1, 1).double(), target_scatter=torch.zeros(2, 1, 1).double()))
    >>> both["mean"], both["scatter"]
    (tensor([1.], dtype=torch.float64), tensor([[2.]], dtype=torch.float64))
    """
    if moments["count"].ndim == 0:
        return dict(moments)
    count = moments["count"] if keep is None else torch.where(keep, moments["count"], 0)
    total = count.sum()
    if int(total) == 0:
        raise ValueError("no rows are left in these folds: every row of the stream fell into other folds.")
    share = count.double() / total
    mean, target_mean = share @ moments["mean"], share @ moments["target_mean"]
    # The spread of the folds' means about the common one, as rows scaled by √n.
    apart = (moments["mean"] - mean) * count.double().sqrt()[:, None]
    shift = (moments["target_mean"] - target_mean) * count.double().sqrt()[:, None]
    used = (count > 0).nonzero().flatten().tolist()
    summed = {
        name: sum((moments[name][g] for g in used[1:]), moments[name][used[0]])
        for name in LEAVES
        if name.endswith("scatter")
    }
    return {
        "count": total,
        "mean": mean,
        "scatter": summed["scatter"] + apart.mT @ apart if moments["scatter"].numel() else summed["scatter"],
        "target_mean": target_mean,
        "cross_scatter": summed["cross_scatter"] + apart.mT @ shift,
        "target_scatter": summed["target_scatter"] + shift.mT @ shift,
    }


def class_counts(moments: Mapping[str, Tensor]) -> Tensor:
    """Rows of each class, from moments with one-hot targets: int64 (K,).

    >>> moments = label_moments(torch.zeros(3, 1), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    >>> class_counts(moments).tolist()
    [2, 1]
    """
    pooled = pool_folds(moments)
    return (pooled["target_mean"] * pooled["count"]).round().long()


class StreamingLabelMoments(NamesClasses):
    """Moments of all rows together with their labels: what LEACE, Fisher directions and closed-form probes need.

    Labels that are names are numbered in the order of the names (``classes``). Integer labels (N,) become one-hot targets
    (classes are found as they come, or ``n_classes`` gives their number);
    floating-point labels (N,) or (N, K) are regression targets as they are. float64 throughout, about the means; exact
    under any batch split, order and merge, to rounding. Rows are kept apart by ``folds`` folds of whole documents, so
    that one pass gives every leave-one-fold-out fit. Memory 8·folds·D·(D+K) bytes.

    Args:
        labels: the carried value to read, ``SelectTokens(..., also=[labels])``.
        folds: folds of documents (where none is told, of sequences, ``row_id >> 20``), by a hash; 1 keeps all rows together.
        n_classes: number of classes, when it is known; labels outside 0..n_classes-1 are then refused.
        ignore_index: integer labels of this value mark rows without a label, which are left out.
        seed: of the folds.

    Reads ``"tokens"`` (N, D), ``("carried", labels)``, ``"row_id"`` and, where present, ``("carried", "document_id")`` (all but
    the first shared under ``ForEach``); writes ``("label_moments", "count" | "mean" | "scatter" | "target_mean" |
    "cross_scatter" | "target_scatter")`` of shapes (G,), (G, D), (G, D, D), (G, K), (G, D, K), (G, K, K); scatter is the sum of
    products, not divided by n.

    Raises:
        ValueError: labels that do not fit the rows, negative classes, a label kind or width that changes.

        >>> import torch, tdgeom as tg
        >>> stage = tg.StreamingLabelMoments(out_keys="m")
        >>> out = stage(torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([0, 1, 1]), torch.arange(3) << 20)
        >>> out[0].tolist(), out[4].flatten().tolist()  # rows, and sums of products with the class indicators
        ([3], [-2.0, 2.0])
    """

    writes = [("label_moments", name) for name in LEAVES]
    optional = frozenset({"row_id", "document_id"})
    target_mean: Tensor

    def __init__(
        self,
        *,
        labels: str = "label",
        folds: int = 1,
        n_classes: int | None = None,
        ignore_index: int = -100,
        seed: int = 0,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if folds < 1:
            raise ValueError(f"StreamingLabelMoments: folds must be at least 1, got {folds}.")
        reads = labelled_keys("StreamingLabelMoments", labels)
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads)
        self.folds, self.n_classes, self.ignore_index, self.seed = folds, n_classes, ignore_index, seed
        for name in LEAVES:
            self.add_state(name, torch.int64 if name == "count" else torch.float64)
        self.add_class_names()

    def start(
        self, tokens: Tensor, label: Any, row_id: Tensor | None, document: Tensor | None = None
    ) -> LabelMoments:
        """Zeros of the rows' width; classes are added when they come."""
        label = self.numbered(label, self.in_keys[1])
        regression = label.is_floating_point()
        targets = (1 if label.ndim == 1 else label.shape[-1]) if regression else self.n_classes or 1
        return zero_moments(self.folds, tokens.shape[-1], targets, tokens.device)

    def accumulate(
        self, tokens: Tensor, label: Any, row_id: Tensor | None, document: Tensor | None = None
    ) -> None:
        """Add a block of rows."""
        key, ignore = self.in_keys[1], self.ignore_index
        label = self.numbered(label, key).to(tokens.device)
        owner = "StreamingLabelMoments"
        label, used = row_labels(
            label, tokens, key=key, owner=owner, ignore_index=ignore, n_classes=self.n_classes
        )
        held = self.target_mean.shape[1]
        if label.is_floating_point() and label.shape[1] != held:
            raise ValueError(
                f"{owner} has seen {held} targets a row and now gets {label.shape[1]} at {key!r}: give every batch the same "
                f"kind of label, or reset()."
            )
        fold = torch.zeros_like(used, dtype=torch.int64)
        if self.folds > 1:
            if row_id is None:
                raise ValueError(
                    f"{owner}(folds={self.folds}) needs 'row_id' to keep documents together: name it third in in_keys, or take "
                    f"folds=1."
                )
            fold = fold_index(row_groups(row_id, document), self.folds, self.seed)
        targets = row_targets(label, held)
        self.set_state(with_rows(self.moments, tokens, targets, torch.where(used, fold, -1)))

    @property
    def moments(self) -> LabelMoments:
        """The state's moments."""
        return {name: getattr(self, name) for name in LEAVES}

    def renumber(self, places: Tensor, classes: int) -> None:
        """Move the classes' targets."""
        self.set_state(moved_targets(self.moments, places, classes))

    def fits(self, name: str, value: Tensor) -> bool:
        """Either may have met classes that the other has not; ``combine`` compares the rest."""
        return True

    def combine(self, other: StreamingLabelMoments) -> None:
        """Add another's moments, fold by fold."""
        other = self.agree_on_classes(other)
        self.set_state(merged_moments(self.moments, other.moments, "StreamingLabelMoments"))

    def result(self) -> LabelMoments:
        """The moments of all rows so far."""
        return {name: value.clone() for name, value in self.moments.items()}
