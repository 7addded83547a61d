"""Scores of a probe on held-out rows, with error bars over groups, a baseline and a permutation null."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tdgeom.probing.labelled_rows import as_numpy

__all__ = ["SCORES", "clustered_error", "permutation_null", "probe_scores"]

SCORES = (
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "r2",
    "standard_error",
    "majority_baseline",
    "control_accuracy",
    "selectivity",
    "null_mean",
    "p_value",
    "train_rows",
    "test_rows",
)


def clustered_error(value: Tensor, group: Tensor) -> Tensor:
    """Standard error of the mean of ``value`` when rows of one group vary together: (N,), (N,) -> ().

    √(G/(G-1) Σ_g (Σ_{i in g} (v_i - v̄))²)/N over G groups; with one row a group, the usual s/√N. NaN for one group.

    >>> value = torch.tensor([0.0, 1.0, 0.0, 1.0]).double()
    >>> round(float(clustered_error(value, torch.arange(4))), 6), float(clustered_error(value, torch.tensor([0, 0, 1, 1])))
    (0.288675, 0.0)
    """
    _, index = torch.unique(group, return_inverse=True)
    groups = int(index.max()) + 1
    sums = torch.zeros(groups, dtype=torch.float64, device=value.device)
    sums.index_add_(0, index, value.double() - value.double().mean())
    if groups < 2:
        return sums.new_tensor(torch.nan)
    return (sums.square().sum() * groups / (groups - 1)).sqrt() / value.shape[0]


def permutation_null(
    statistic: Callable[[Tensor], Tensor], label: Tensor, group: Tensor, *, repeats: int = 200, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The mean of a statistic over permuted labels, and the p-value of the real one: two ().

    Labels are permuted against the predictions of the fitted probe on rows it never saw, which is an exact test that
    the predictions know nothing of the labels. Where all rows of each group have one label, whole groups change places; where
    they have several, rows do, as if they were independent. p = (1 + permutations at least as good)/(1 + repeats).

    >>> label = torch.arange(20) % 2
    >>> mean, p = permutation_null(lambda y: (y == label).double().mean(), label, torch.arange(20))
    >>> 0.4 < float(mean) < 0.6, float(p) < 0.01
    (True, True)
    """
    generator = torch.Generator().manual_seed(seed)
    groups, index, first, by_group = _groups_of(label, group)
    real, values = statistic(label), []
    for _ in range(repeats):
        count = len(groups) if by_group else len(label)
        order = torch.randperm(count, generator=generator, device="cpu").to(label.device)
        values.append(statistic(label[first[order][index] if by_group else order]))
    null = torch.stack(values).double()
    return null.mean(), (1 + (null >= real - 1e-12).sum()).double() / (1 + repeats)


def _groups_of(label: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """The groups, which each row is of, a row of each, and whether all rows of each have one label."""
    groups, index = torch.unique(group, return_inverse=True)
    first = torch.zeros_like(groups).scatter_(0, index, torch.arange(len(index), device=index.device))
    return groups, index, first, bool((label[first[index]] == label).all())


def _in_common(
    answer: Tensor, targets: Callable[[Tensor], Tensor], label: Tensor, group: Tensor, repeats: int, seed: int
) -> tuple[Tensor, Tensor]:
    """What answers and targets (N, K) have in common by chance, Σ (answer - mean)·(target - mean): its mean, and p of the real.

    About the means, so that an answer that is the same for all rows has nothing in common with any labels, however many rows the
    documents of each label have. Labels of whole documents change places (``permutation_null``). Where a document holds several,
    what each document adds keeps its size and changes its sign.
    """
    apart = answer - answer.mean(0)
    groups, index, _, whole = _groups_of(label, group)
    if whole:
        return permutation_null(
            lambda y: (apart * targets(y)).sum(), label, group, repeats=repeats, seed=seed
        )
    target = targets(label)
    each = (apart * (target - target.mean(0))).sum(-1)
    added = each.new_zeros(len(groups)).index_add(0, index, each)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 2, (repeats, len(groups)), generator=generator, device="cpu")
    null = (2 * drawn - 1).to(added.device, added.dtype) @ added
    return null.mean(), (1 + (null >= added.sum() - 1e-12).sum()).double() / (1 + repeats)


def probe_scores(
    decision: Tensor,
    label: Tensor,
    group: Tensor,
    *,
    train_counts: Tensor | None = None,
    permutations: int = 0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores by name, each (): of decisions (N, K) against classes int (N,), or of predictions (N, K) against floats.

    Classification: ``accuracy`` of the largest decision; ``balanced_accuracy`` (mean recall of the classes); ``auroc``
    (of the two decisions' difference; for more classes the mean over one-against-rest, of each
    decision minus the row's mean decision); ``majority_baseline``, the
    accuracy of always naming the most frequent class of ``train_counts`` (default: of these labels). Regression: ``r2``
    (mean over targets). ``standard_error`` of the accuracy (or R²) over groups; ``null_mean``, the accuracy (or R²) of these
    answers if they knew nothing of the labels, and the ``p_value`` of what they share beyond that: labels of whole groups
    change places, and where a group holds several labels, what each group adds its sign. What a task does not have is NaN.

    >>> scores = probe_scores(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    >>> float(scores["accuracy"]), float(scores["auroc"]), float(scores["majority_baseline"])
    (1.0, 1.0, 0.5)
    """
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    found: dict[str, float | Tensor] = {}
    if label.is_floating_point():
        label, decision = (label if label.ndim == 2 else label[:, None]).double(), decision.double()
        spread = (label - label.mean(0)).square()
        if bool((spread.sum(0) == 0).any()):
            raise ValueError(
                f"a target is constant over all {label.shape[0]} held-out rows, so R² is undefined. Give targets that vary, or "
                f"hold out more groups."
            )
        residual, total = (label - decision).square(), spread.sum(0)
        lost = residual.sum(0) / total
        found["r2"] = 1 - lost.mean()
        # Each row's share in R² = 1 - A/B, to first order.
        influence = -((residual - lost * spread) / total).mean(-1) * label.shape[0]
        found["standard_error"] = clustered_error(influence, group)
        # R² = chance + what they have in common: the rest does not change where labels change places
        answer, targets = 2 * decision / (total * len(total)), lambda y: y
        found["null_mean"] = found["r2"] - (answer - answer.mean(0)).mul(label).sum()
    else:
        guess = decision.argmax(-1)
        right = (guess == label).double()
        held = label.bincount(minlength=decision.shape[1])
        missing = (held == 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(
                f"expected rows of every class 0..{decision.shape[1] - 1} among the {label.shape[0]} held-out rows, class "
                f"{missing} is missing. Hold out more groups (holdout=, test_rows=), take another seed=, or leave out rare "
                f"classes (ignore_index)."
            )
        found["accuracy"] = right.mean()
        found["standard_error"] = clustered_error(right, group)
        found["balanced_accuracy"] = balanced_accuracy_score(as_numpy(label), as_numpy(guess))
        most = (held if train_counts is None else train_counts).argmax()
        found["majority_baseline"] = (label == most).double().mean()
        if decision.shape[1] == 2:
            found["auroc"] = roc_auc_score(as_numpy(label), as_numpy(decision[:, 1] - decision[:, 0]))
        else:
            hot = np.eye(decision.shape[1])[as_numpy(label)]
            # What all decisions of a row share (arbitrary in LDA and softmax) ranks no row above another.
            apart = as_numpy(decision - decision.mean(1, keepdim=True))
            found["auroc"] = roc_auc_score(hot, apart, average="macro")
        hot_guess = one_hot(guess, decision.shape[1]).double() / len(label)
        answer, targets = hot_guess, lambda y: one_hot(y, decision.shape[1]).double()
        found["null_mean"] = found["accuracy"] - (answer - answer.mean(0)).mul(targets(label)).sum()
    chance = found.pop("null_mean")
    if permutations:
        more, found["p_value"] = _in_common(answer, targets, label, group, permutations, seed)
        found["null_mean"] = chance + more
    found["test_rows"] = float(label.shape[0])
    return complete(found, label.device)


def complete(found: Mapping[str, float | Tensor], device: torch.device) -> dict[str, Tensor]:
    """All score names; NaN for those not found."""
    return {
        name: torch.as_tensor(found.get(name, torch.nan), dtype=torch.float64, device=device)
        for name in SCORES
    }
