"""``LinearProbe``: ridge, least squares and linear discriminant from streamed moments; logistic and leave-one-out on rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.probing.closed_form import (
    default_alphas,
    fold_errors,
    lda_probe,
    ridge_loo,
    ridge_probe,
    signed_targets,
)
from tdgeom.probing.control_task import BUCKETS, control_map
from tdgeom.probing.label_moments import (
    LEAVES,
    add_rows,
    class_counts,
    label_moments,
    merge_into,
    pool_folds,
    widen,
    zero_moments,
)
from tdgeom.probing.labelled_rows import one_hot
from tdgeom.probing.probe import Probe
from tdgeom.probing.rules import Fitted, Task
from tdgeom.probing.splits import fold_index, row_groups

__all__ = ["LinearProbe", "MomentProbe", "logistic_probe"]


def logistic_probe(
    rows: Tensor,
    label: Tensor,
    classes: int,
    penalty: float = 1.0,
    *,
    balanced: bool = False,
    steps: int = 500,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS: weight (K, D), bias (K,), float64.

    Minimises Σ cross-entropy + penalty/2·|W|² with a free intercept; for two classes penalty/2·|w₁-w₀|², what the decision
    depends on: scikit-learn's ``LogisticRegression`` with C = 1/penalty. Rows are centred and scaled to unit mean variance
    on the way, which changes no optimum.

    >>> weight, bias = logistic_probe(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), 2)
    >>> bool(weight[1] > weight[0])
    True
    """
    x = rows.double()
    mean = x.mean(0)
    x = x - mean
    scale = x.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    x = x / scale
    if classes == 2:  # the two rows of a softmax share w₁-w₀: |w₁-w₀|² is twice |w₀|² + |w₁|²
        penalty = 2 * penalty
    weights = None
    if balanced:
        counts = label.bincount(minlength=classes).double()
        weights = label.shape[0] / (classes * counts)
    parameters = torch.zeros(
        classes, x.shape[1] + 1, dtype=torch.float64, device=x.device, requires_grad=True
    )
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=steps, tolerance_grad=1e-9, tolerance_change=0.0, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = x @ parameters[:, :-1].mT + parameters[:, -1]
        value = torch.nn.functional.cross_entropy(logits, label, weight=weights, reduction="sum")
        value = (value + 0.5 * penalty / scale**2 * parameters[:, :-1].square().sum()) / x.shape[0]
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    weight = parameters.detach()[:, :-1] / scale
    return weight, parameters.detach()[:, -1] - weight @ mean


class MomentProbe(Probe):
    """A probe trained from streamed moments of every row: it keeps no training rows, whatever the stream's length."""

    needs_rows = False
    parameters_out = ("weight", "bias")
    _fixed_folds = 1
    _scatter = True  # False for what needs no more than means

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if not self.keeps_rows:
            for name in LEAVES:
                self.add_state("moment_" + name, torch.int64 if name == "count" else torch.float64)

    @property
    def folds_used(self) -> int:
        """Folds kept apart in the state: more than one only where something is chosen by cross-validation."""
        return self._fixed_folds

    @property
    def _extra(self) -> int:
        """Leading target columns that count the control task's buckets."""
        return BUCKETS if self.control is not None else 0

    def moments(self) -> dict[str, Tensor]:
        """Moments of the training rows so far, folds first (the leaves of ``StreamingLabelMoments``)."""
        return self._columns(slice(self._extra, None))

    def _all(self) -> dict[str, Tensor]:
        return {name: self._buffers["moment_" + name] for name in LEAVES}  # type: ignore[misc]

    def _columns(self, which: slice) -> dict[str, Tensor]:
        state = self._all()
        return {
            **state,
            "target_mean": state["target_mean"][..., which],
            "cross_scatter": state["cross_scatter"][..., which],
            "target_scatter": state["target_scatter"][..., which, which],
        }

    def _set(self, moments: Mapping[str, Tensor]) -> None:
        for name in LEAVES:
            setattr(self, "moment_" + name, moments[name])

    def start(self, tokens: Tensor, label: Tensor, *rest: Tensor | None) -> dict[str, Tensor]:
        """Zero moments beside the held-out sample."""
        state = super().start(tokens, label, *rest)  # type: ignore[arg-type]
        if self.keeps_rows:
            return state
        targets = state["test_label"].shape[1] if state["test_label"].ndim == 2 else 1
        features = state["test_x"].shape[1]
        width = self._extra + targets
        moments = zero_moments(self.folds_used, features, width, tokens.device, scatter=self._scatter)
        return {**state, **{"moment_" + name: value for name, value in moments.items()}}

    def learn(self, rows: Mapping[str, Tensor]) -> None:
        """Add training rows to their folds' moments."""
        label = rows["label"]
        if label.is_floating_point():
            targets = label
        else:
            width = max(self.moment_target_mean.shape[1] - self._extra, int(label.max()) + 1)
            self._set(widen(self._all(), self._extra + width))
            targets = one_hot(label, width)
        if self._extra:
            targets = torch.cat((one_hot(rows["bucket"], BUCKETS), targets), 1)
        group = row_groups(rows["ids"])
        add_rows(self._all(), rows["x"], targets, fold_index(group, self.folds_used, self.seed))

    def merge_(self, other: Probe) -> Probe:  # type: ignore[override]
        """Add the state of ``other``; either may have met classes that the other has not."""
        if type(other) is type(self) and not self.keeps_rows and not self.is_empty and not other.is_empty:
            width = max(self.moment_target_mean.shape[1], other.moment_target_mean.shape[1])
            self._set(widen(self._all(), width))
            wide = {"moment_" + name: value for name, value in widen(other._all(), width).items()}
            other = other._with_state(wide)  # type: ignore[assignment]
        return super().merge_(other)  # type: ignore[return-value]

    def combine(self, other: MomentProbe) -> None:  # type: ignore[override]
        """Add another's moments and samples."""
        super().combine(other)
        if not self.keeps_rows:
            theirs = {name: value.to(self.count.device) for name, value in other._all().items()}
            for fold in range(self.folds_used):
                if int(theirs["count"][fold]):
                    merge_into(self._all(), fold, {name: value[fold] for name, value in theirs.items()})

    def _solve(self) -> tuple[Task, Fitted, Fitted | None]:
        if self.keeps_rows:
            return super()._solve()
        moments = self.moments()
        rows = int(moments["count"].sum())
        regression = self.test_label.is_floating_point()
        if rows == 0:
            raise ValueError(
                f"{type(self).__name__} got no labelled rows to train on. Lower holdout=, or check the labels."
            )
        pooled = pool_folds(moments)
        if regression:
            spread = pooled["target_scatter"].diagonal()
            flat = (spread <= 0).nonzero().flatten().tolist()
            if flat:
                raise ValueError(
                    f"{type(self).__name__}: target {flat} is constant ({pooled['target_mean'][flat].tolist()}) over {rows} "
                    f"training rows, so there is nothing to learn. Give targets that vary, or integer labels for classes."
                )
            task, counts = Task(True, spread.shape[0]), None
        else:
            counts = class_counts(pooled)
            task = self.task_of_counts(counts)
        fitted = {"train_rows": rows, "counts": counts, **self.solve_moments(moments, task)}
        control = None
        if self._extra and not regression:
            choice = one_hot(control_map(counts, self.seed), task.classes)
            buckets = self._columns(slice(0, BUCKETS))
            control = self.solve_moments(
                {
                    **buckets,
                    "target_mean": buckets["target_mean"] @ choice,
                    "cross_scatter": buckets["cross_scatter"] @ choice,
                    "target_scatter": choice.mT @ buckets["target_scatter"] @ choice,
                },
                task,
            )
        return task, fitted, control

    def solve(self, inputs: tuple[Tensor, ...], label: Tensor, task: Task) -> Fitted:
        """Fit rows: their moments, then ``solve_moments``."""
        targets = label if task.regression else one_hot(label, task.classes)
        moments = label_moments(inputs[0], targets)
        return self.solve_moments({name: value[None] for name, value in moments.items()}, task)

    def solve_moments(self, moments: dict[str, Tensor], task: Task) -> Fitted:
        """Fit moments with folds first: at least "weight" (K, D) and "bias" (K,)."""
        raise TypeError(f"{type(self).__name__} defines no solve_moments().")

    def decide(self, fitted: Fitted, inputs: tuple[Tensor, ...]) -> Tensor:
        """Wx + b."""
        weight = fitted["weight"].to(inputs[0].device)
        return inputs[0].to(weight.dtype) @ weight.mT + fitted["bias"].to(weight.device)


class LinearProbe(MomentProbe):
    """A linear probe trained on every row of a stream in one pass and in closed form, scored on held-out sequences.

    ``solver="ridge"`` (default): W = C(S + αI)⁻¹ from moments streamed in float64, targets -1/+1 a class (scikit-learn's
    ``RidgeClassifier``) or the numbers themselves (``Ridge``), the same for every batch split. α by K-fold: the moments of
    K folds of sequences give every leave-one-fold-out fit and its exact held-out squared error, for every α, with no
    second pass. ``"lda"``: linear discriminant analysis (``LinearDiscriminantAnalysis``), from the same moments.
    ``"logistic"``: multinomial logistic regression by L-BFGS, on a uniform sample of ``train_rows``.

    Args:
        solver: "ridge", "lda" or "logistic".
        alpha: ridge: a number (0: least squares), a list to choose from, or None for thirteen values in units of the
            data. logistic: the penalty (default 1). lda: the shrinkage in [0, 1] (default 0).
        selection: how ridge chooses α: "folds" (from moments), or "loo", leave-one-out in closed form, which needs rows
            and so a sample of ``train_rows``.
        folds: folds of whole sequences for "folds".
        balanced: give every class the same weight (lda: equal priors; logistic: weights). Ridge has no such closed form.

    For the other arguments, what it reads and its scores see ``Probe``. Also writes ``("probe_fit", "weight" | "bias" |
    "alpha")``: (K, D), (K,), () with a row a class (for two classes row 1 is scikit-learn's, row 0 its negative under
    ridge). ``direction()`` is the concept activation vector. Memory 8·folds·D² bytes (``alpha`` a number: 8·D²).

    Alain and Bengio (2016), Understanding intermediate layers using linear classifier probes; Hewitt and Liang (2019),
    Designing and interpreting probes with control tasks; Kim et al. (2018), TCAV.

        >>> import torch, tdgeom as tg
        >>> x = torch.randn(200, 4)
        >>> probe = tg.LinearProbe(alpha=1.0).fit(x, (x[:, 0] > 0).long())
        >>> probe.direction().shape, probe.score(x, (x[:, 0] > 0).long())["accuracy"] > 0.9
        (torch.Size([4]), True)
    """

    parameters_out = ("weight", "bias", "alpha")

    def __init__(
        self,
        *,
        solver: str = "ridge",
        alpha: float | Sequence[float] | None = None,
        selection: str = "folds",
        folds: int = 5,
        balanced: bool = False,
        **settings: Any,
    ) -> None:
        if solver not in ("ridge", "lda", "logistic") or selection not in ("folds", "loo"):
            raise ValueError(
                f"LinearProbe: solver takes 'ridge', 'lda' or 'logistic' and selection 'folds' or 'loo', got {solver!r} and "
                f"{selection!r}."
            )
        if balanced and solver == "ridge":
            raise ValueError(
                "LinearProbe: ridge weights rows alike; for balanced classes take solver='lda' or 'logistic', or read "
                "balanced_accuracy and auroc."
            )
        listed = isinstance(alpha, Sequence) or (isinstance(alpha, Tensor) and alpha.ndim > 0)
        if listed and solver != "ridge":
            raise ValueError(f"LinearProbe(solver={solver!r}) takes one alpha, got {alpha!r}.")
        values = [] if alpha is None else list(alpha) if listed else [alpha]  # type: ignore[arg-type]
        if any(value < 0 for value in values) or (listed and not values):
            raise ValueError(f"LinearProbe: alpha must be 0 or more, got {alpha!r}.")
        if folds < 2:
            raise ValueError(f"LinearProbe: folds must be at least 2, got {folds}.")
        self.solver, self.alpha, self.selection, self.folds, self.balanced = (
            solver,
            alpha,
            selection,
            folds,
            balanced,
        )
        self._choose = solver == "ridge" and (alpha is None or len(values) > 1)
        super().__init__(**settings)

    @property
    def keeps_rows(self) -> bool:
        """True for logistic regression and leave-one-out."""
        return self.solver == "logistic" or (self._choose and self.selection == "loo")

    @property
    def folds_used(self) -> int:
        """Folds are kept apart only where α is chosen from them."""
        return self.folds if self._choose else 1

    def settings(self) -> dict[str, Any]:
        """What two shards must share."""
        return {
            **super().settings(),
            "solver": self.solver,
            "folds": self.folds_used,
            "rows": self.keeps_rows,
        }

    def solve(self, inputs: tuple[Tensor, ...], label: Tensor, task: Task) -> Fitted:
        """Fit rows: logistic regression, or ridge with leave-one-out."""
        if self.solver == "logistic":
            if task.regression:
                raise ValueError(
                    "LinearProbe(solver='logistic') predicts classes: give integer labels, or take solver='ridge'."
                )
            penalty = 1.0 if self.alpha is None else float(self.alpha)  # type: ignore[arg-type]
            weight, bias = logistic_probe(inputs[0], label, task.classes, penalty, balanced=self.balanced)
            return {"weight": weight, "bias": bias, "alpha": weight.new_tensor(penalty)}
        targets = label if task.regression else 2 * one_hot(label, task.classes) - 1
        moments = label_moments(inputs[0], targets)
        alphas = self._alphas(moments)
        errors = ridge_loo(inputs[0], targets, alphas).mean((1, 2))
        return self._ridge(moments, alphas[errors.argmin()], errors, alphas)

    def solve_moments(self, moments: dict[str, Tensor], task: Task) -> Fitted:
        """Ridge (with α by K-fold) or linear discriminant analysis."""
        if self.solver == "lda":
            if task.regression:
                raise ValueError(
                    "LinearProbe(solver='lda') predicts classes: give integer labels, or take solver='ridge'."
                )
            shrinkage = 0.0 if self.alpha is None else float(self.alpha)  # type: ignore[arg-type]
            weight, bias = lda_probe(moments, shrinkage, balanced=self.balanced)
            return {"weight": weight, "bias": bias, "alpha": weight.new_tensor(shrinkage)}
        moments = moments if task.regression else signed_targets(moments)
        alphas = self._alphas(moments)
        if len(alphas) == 1:
            return self._ridge(moments, alphas[0])
        errors = fold_errors(moments, alphas)
        used = ~errors.isnan().any(1)
        if not bool(used.any()):
            raise ValueError(
                f"LinearProbe chooses alpha over {self.folds} folds of whole sequences, but all training rows are in one. Give "
                f"more sequences, one alpha=, or selection='loo'."
            )
        # As scikit-learn's GridSearchCV: the mean over folds of the folds' mean errors.
        mean = errors[used].mean(0)
        return self._ridge(moments, alphas[mean.argmin()], mean, alphas)

    def _alphas(self, moments: Mapping[str, Tensor]) -> Tensor:
        if self.alpha is None:
            return default_alphas(moments)
        return torch.as_tensor(self.alpha, dtype=torch.float64, device=moments["mean"].device).reshape(-1)

    @staticmethod
    def _ridge(
        moments: Mapping[str, Tensor], alpha: Tensor, errors: Any = None, alphas: Any = None
    ) -> Fitted:
        weight, bias = ridge_probe(moments, alpha)
        return {"weight": weight, "bias": bias, "alpha": alpha, "cv_errors": errors, "alphas": alphas}
