"""Moments of rows together with their labels, one set a fold: what every closed-form probe is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.probing.labelled_rows import LabelledStage, one_hot, row_labels
from tdgeom.probing.splits import fold_index, row_groups

__all__ = [
    "LEAVES",
    "StreamingLabelMoments",
    "add_rows",
    "class_counts",
    "label_moments",
    "pool_folds",
    "widen",
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
        "scatter": x.mT @ x if scatter else x.new_zeros(0, 0),
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


def add_rows(state: Mapping[str, Tensor], rows: Tensor, targets: Tensor, fold: Tensor) -> None:
    """Add rows (N, D) with targets (N, K) to their folds (N,) of ``state`` in place; a fold below 0 is left out."""
    for index in range(state["count"].shape[0]):
        chosen = fold == index
        if bool(chosen.any()):
            whole = state["scatter"].numel() > 0
            merge_into(state, index, label_moments(rows[chosen], targets[chosen], scatter=whole))


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
    summed = {name: sum(moments[name][g] for g in used) for name in LEAVES if name.endswith("scatter")}
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
    pooled = pool_folds(moments) if moments["count"].ndim else moments
    return (pooled["target_mean"] * pooled["count"]).round().long()


class StreamingLabelMoments(LabelledStage):
    """Moments of all rows together with their labels: what LEACE, Fisher directions and closed-form probes need.

    Integer labels (N,) become one-hot targets (classes are found as they come, or ``classes`` gives their number);
    floating-point labels (N,) or (N, K) are regression targets as they are. float64 throughout, about the means; exact
    under any batch split, order and merge, to rounding. Rows are kept apart by ``folds`` folds of whole sequences, so
    that one pass gives every leave-one-fold-out fit. Memory 8·folds·D·(D+K) bytes.

    Args:
        folds: folds of sequences, ``hash(row_id >> 20, seed)``; 1 keeps all rows together.
        classes: number of classes, when it is known; labels outside 0..classes-1 are then refused.
        ignore_index: integer labels of this value mark rows without a label, which are left out.
        seed: of the folds.

    Reads ``"tokens"`` (N, D), ``("tokens", "label")`` and ``"row_id"`` (the latter two shared under ``ForEach``);
    writes ``("label_moments", "count" | "mean" | "scatter" | "target_mean" | "cross_scatter" | "target_scatter")`` of
    shapes (G,), (G, D), (G, D, D), (G, K), (G, D, K), (G, K, K); scatter is the sum of products, not divided by n.

    Raises:
        ValueError: labels that do not fit the rows, negative classes, a label kind or width that changes.

        >>> import torch, tdgeom as tg
        >>> stage = tg.StreamingLabelMoments(out_keys="m")
        >>> out = stage(torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([0, 1, 1]), torch.arange(3) << 20)
        >>> out[0].tolist(), out[4].flatten().tolist()  # rows, and sums of products with the class indicators
        ([3], [-2.0, 2.0])
    """

    writes = [("label_moments", name) for name in LEAVES]

    def __init__(
        self,
        *,
        folds: int = 1,
        classes: int | None = None,
        ignore_index: int = -100,
        seed: int = 0,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if folds < 1:
            raise ValueError(f"StreamingLabelMoments: folds must be at least 1, got {folds}.")
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.folds, self.classes, self.ignore_index, self.seed = folds, classes, ignore_index, seed
        for name in LEAVES:
            self.add_state(name, torch.int64 if name == "count" else torch.float64)

    def settings(self) -> dict[str, Any]:
        """Folds must be the same to be merged."""
        return {
            "folds": self.folds,
            "classes": self.classes,
            "ignore_index": self.ignore_index,
            "seed": self.seed,
        }

    def start(self, tokens: Tensor, label: Tensor, row_id: Tensor | None) -> LabelMoments:
        """Zeros of the rows' width; classes are added when they come."""
        regression = label.is_floating_point()
        targets = (1 if label.ndim == 1 else label.shape[-1]) if regression else self.classes or 1
        return zero_moments(self.folds, tokens.shape[-1], targets, tokens.device)

    def accumulate(self, tokens: Tensor, label: Tensor, row_id: Tensor | None) -> None:
        """Add a block of rows."""
        label, used = row_labels(
            label, tokens, self.in_keys[1], self.ignore_index, self.classes, type(self).__name__
        )
        held = self.target_mean.shape[1]
        if label.is_floating_point():
            targets = label if label.ndim == 2 else label[:, None]
            if targets.shape[1] != held:
                raise ValueError(
                    f"StreamingLabelMoments has seen {held} targets a row and now gets {targets.shape[1]} at "
                    f"{self.in_keys[1]!r}: give every batch the same kind of label, or reset()."
                )
        else:
            width = max(held, int(label.max()) + 1)
            if width > held:
                self._set(widen(self._state(), width))
            targets = one_hot(label.clamp(min=0), width)
        fold = torch.zeros_like(used, dtype=torch.int64)
        if self.folds > 1:
            if row_id is None:
                raise ValueError(
                    f"{type(self).__name__}(folds={self.folds}) needs {'row_id'!r} to keep sequences together: name it third in "
                    f"in_keys, or take folds=1."
                )
            fold = fold_index(row_groups(row_id), self.folds, self.seed)
        add_rows(self._state(), tokens, targets, torch.where(used, fold, -1))

    def _set(self, state: Mapping[str, Tensor]) -> None:
        for name in LEAVES:
            setattr(self, name, state[name])

    def merge_(self, other: StreamingLabelMoments) -> StreamingLabelMoments:  # type: ignore[override]
        """Add the moments of ``other``; either may have met classes that the other has not."""
        if isinstance(other, StreamingLabelMoments) and not self.is_empty and not other.is_empty:
            width = max(self.target_mean.shape[1], other.target_mean.shape[1])
            self._set(widen(self._state(), width))
            other = other._with_state(widen(other._state(), width))  # type: ignore[assignment]
        return super().merge_(other)  # type: ignore[return-value]

    def combine(self, other: StreamingLabelMoments) -> None:
        """Add another's moments, fold by fold."""
        theirs = {name: value.to(self.mean.device) for name, value in other._state().items()}
        for fold in range(self.folds):
            if int(theirs["count"][fold]):
                merge_into(self._state(), fold, {name: value[fold] for name, value in theirs.items()})

    def result(self) -> LabelMoments:
        """The moments of all rows so far."""
        return {name: value.clone() for name, value in self._state().items()}
