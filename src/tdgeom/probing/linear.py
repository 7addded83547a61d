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
from tdgeom.probing.label_moments import label_moments
from tdgeom.probing.labelled_rows import one_hot
from tdgeom.probing.lbfgs import minimise
from tdgeom.probing.probe import Probe
from tdgeom.probing.rules import Fitted, Task

__all__ = ["LinearProbe", "logistic_probe"]


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

    def objective() -> Tensor:
        logits = x @ parameters[:, :-1].mT + parameters[:, -1]
        value = torch.nn.functional.cross_entropy(logits, label, weight=weights, reduction="sum")
        return (value + 0.5 * penalty / scale**2 * parameters[:, :-1].square().sum()) / x.shape[0]

    minimise(objective, [parameters], steps=steps, tolerance_grad=1e-9, tolerance_change=0.0)
    weight = parameters.detach()[:, :-1] / scale
    return weight, parameters.detach()[:, -1] - weight @ mean


class LinearProbe(Probe):
    """A linear probe trained on every row of a stream in one pass and in closed form, scored on held-out documents.

    Formula:
        W = C(S + αI)⁻¹; S the scatter of the centred rows, C that of targets and rows: ridge
        selectivity = accuracy - accuracy of the control task

    ``solver="ridge"`` (default): from moments streamed in float64, targets -1/+1 a class (scikit-learn's
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
        folds: folds of whole documents for "folds".
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
        (torch.Size([2, 4]), True)
    """

    needs_rows = False
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
        given = torch.as_tensor([] if alpha is None else alpha, dtype=torch.float64, device="cpu")
        values = given.reshape(-1)
        if bool((values < 0).any()) or (listed and not len(values)):
            raise ValueError(f"LinearProbe: alpha must be 0 or more, got {alpha!r}.")
        if folds < 2:
            raise ValueError(f"LinearProbe: folds must be at least 2, got {folds}.")
        self.solver, self.selection, self.folds, self.balanced = solver, selection, folds, balanced
        self.alphas = values
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

    def solve(self, inputs: tuple[Tensor, ...], label: Tensor, task: Task) -> Fitted:
        """Fit rows: logistic regression, or ridge with leave-one-out."""
        if self.solver == "logistic":
            task.refuse_numbers("LinearProbe(solver='logistic')")
            penalty = float(self.alphas[0]) if len(self.alphas) else 1.0
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
            task.refuse_numbers("LinearProbe(solver='lda')")
            shrinkage = float(self.alphas[0]) if len(self.alphas) else 0.0
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
                f"LinearProbe chooses alpha over {self.folds} folds of whole documents, but all training rows are in one. Give "
                f"more documents, one alpha=, or selection='loo'."
            )
        # As scikit-learn's GridSearchCV: the mean over folds of the folds' mean errors.
        mean = errors[used].mean(0)
        return self._ridge(moments, alphas[mean.argmin()], mean, alphas)

    def _alphas(self, moments: Mapping[str, Tensor]) -> Tensor:
        return self.alphas.to(moments["mean"].device) if len(self.alphas) else default_alphas(moments)

    @staticmethod
    def _ridge(
        moments: Mapping[str, Tensor], alpha: Tensor, errors: Any = None, alphas: Any = None
    ) -> Fitted:
        weight, bias = ridge_probe(moments, alpha)
        return {"weight": weight, "bias": bias, "alpha": alpha, "cv_errors": errors, "alphas": alphas}
