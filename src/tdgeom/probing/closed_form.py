"""Linear probes in closed form from moments: ridge, its cross-validation, linear discriminant, mean difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tdgeom.numerics.numerical_rank import above_rounding, directions_that_vary
from tdgeom.probing.label_moments import class_counts, pool_folds

__all__ = [
    "class_means",
    "default_alphas",
    "fold_errors",
    "lda_probe",
    "mean_difference",
    "ridge_loo",
    "ridge_probe",
    "within_scatter",
]


def signed_targets(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same moments with class indicators 0/1 turned into targets -1/+1, as scikit-learn's RidgeClassifier has."""
    return {
        **moments,
        "target_mean": 2 * moments["target_mean"] - 1,
        "cross_scatter": 2 * moments["cross_scatter"],
        "target_scatter": 4 * moments["target_scatter"],
    }


def ridge_probe(
    moments: Mapping[str, Tensor], alpha: float | Tensor | Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Ridge regression with a free intercept, from moments: argmin Σ|t - Wx - b|² + α|W|².

    W = C (S + αI)⁻¹ and b = t̄ - W x̄, with S = Σ(x-x̄)(x-x̄)ᵀ and C = Σ(t-t̄)(x-x̄)ᵀ: scikit-learn's ``Ridge(alpha)`` on
    all rows. α = 0 is least squares of least norm. One eigendecomposition serves every α.

    Args:
        moments: leaves of ``label_moments``; with folds first, the folds are pooled.
        alpha: () or (A,).

    Returns:
        weight (K, D) and bias (K,), or (A, K, D) and (A, K) for several α.

    >>> from tdgeom.functional import label_moments
    >>> weight, bias = ridge_probe(label_moments(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]])), 0.0)
    >>> weight, bias
    (tensor([[2.]], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    pooled = pool_folds(moments)
    alphas = torch.as_tensor(alpha, dtype=torch.float64, device=pooled["mean"].device)
    values, vectors = torch.linalg.eigh(pooled["scatter"])
    values = values.clamp(min=0)
    turned = vectors.mT @ pooled["cross_scatter"]
    shrunk = values + alphas[..., None]
    # Directions without variance carry rounding only: with α = 0 they are left out, as in a pseudoinverse.
    keep = directions_that_vary(values, vectors, pooled["scatter"]) | (alphas[..., None] > 0)
    inverse = torch.where(keep, 1 / torch.where(keep, shrunk, 1.0), 0.0)
    weight = (vectors @ (inverse[..., :, None] * turned)).mT
    return weight, pooled["target_mean"] - weight @ pooled["mean"]


def squared_error(moments: Mapping[str, Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """Σ|t - Wx - b|² over the rows that the moments are of: (*A, K, D), (*A, K) -> (*A,)."""
    gap = moments["target_mean"] - weight @ moments["mean"] - bias
    explained = (weight * moments["cross_scatter"].mT).sum((-2, -1))
    model = ((weight @ moments["scatter"]) * weight).sum((-2, -1))
    total = moments["target_scatter"].diagonal().sum()
    return total - 2 * explained + model + moments["count"].double() * gap.square().sum(-1)


def fold_errors(moments: Mapping[str, Tensor], alphas: Sequence[float] | Tensor) -> Tensor:
    """Held-out mean squared error of ridge for each fold and α, from moments of the folds alone: (G, A).

    Entry (g, a) is the error on fold g of the probe fitted on all the others: what scikit-learn's
    ``GridSearchCV(Ridge(), cv=PredefinedSplit(fold))`` finds with a pass over the rows for each. Empty folds are NaN.

    >>> from tdgeom.functional import label_moments
    >>> fold = label_moments(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]]))
    >>> round(float(fold_errors({k: torch.stack([v, v]) for k, v in fold.items()}, [0.0]).max()), 9)
    0.0
    """
    folds = moments["count"].shape[0]
    errors = torch.full((folds, len(alphas)), torch.nan, dtype=torch.float64, device=moments["mean"].device)
    numbers = torch.arange(folds, device=errors.device)
    for g in range(folds):
        if int(moments["count"][g]) and int(moments["count"].sum() - moments["count"][g]):
            weight, bias = ridge_probe(pool_folds(moments, numbers != g), alphas)
            held = {name: value[g] for name, value in moments.items()}
            errors[g] = squared_error(held, weight, bias) / held["count"]
    return errors


def default_alphas(moments: Mapping[str, Tensor]) -> Tensor:
    """Thirteen α in units of the data: mean eigenvalue of the scatter x 10^-8 … 10^4, free of the data's scale. (13,)"""
    pooled = pool_folds(moments)
    unit = pooled["scatter"].diagonal().mean()
    return unit * torch.logspace(-8, 4, 13, dtype=torch.float64, device=unit.device)


def ridge_loo(rows: Tensor, targets: Tensor, alphas: Sequence[float] | Tensor) -> Tensor:
    """Leave-one-out squared errors of ridge in closed form: (N, D), (N, K) -> (A, N, K).

    The residual over 1 minus the leverage, from one singular value decomposition of the centred rows; what
    scikit-learn's ``RidgeCV(store_cv_results=True)`` keeps. Needs the rows themselves: no moments tell it.

    >>> ridge_loo(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [2.0]]), [1e-9]).max() < 1e-12
    tensor(True)
    """
    x, t = rows.double(), targets.double()
    x, centred = x - x.mean(0), t - t.mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    alphas = torch.as_tensor(alphas, dtype=torch.float64, device=x.device)[:, None]
    real = above_rounding(s.square())
    filters = torch.where(real, s.square() / torch.where(real, s.square() + alphas, 1.0), 0.0)
    fitted = torch.einsum("nr,ar,rk->ank", u, filters, u.mT @ centred)
    leverage = torch.einsum("nr,ar->an", u.square(), filters) + 1 / x.shape[0]
    return ((centred - fitted) / (1 - leverage)[..., None]).square()


def class_means(moments: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows and mean of each class, from moments with one-hot targets: (K,) and (K, D).

    >>> from tdgeom.functional import label_moments
    >>> class_means(label_moments(torch.tensor([[0.0], [2.0], [4.0]]), torch.eye(2)[[0, 1, 1]]))[1].flatten()
    tensor([0., 3.], dtype=torch.float64)
    """
    pooled = pool_folds(moments)
    count = class_counts(pooled)
    return count, pooled["mean"] + pooled["cross_scatter"].mT / count[:, None].double()


def within_scatter(moments: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scatter within and between classes, from moments with one-hot targets: two (D, D) that sum to ``scatter``.

    >>> from tdgeom.functional import label_moments
    >>> within_scatter(label_moments(torch.tensor([[0.0], [2.0], [4.0]]), torch.eye(2)[[0, 1, 1]]))
    (tensor([[2.]], dtype=torch.float64), tensor([[6.]], dtype=torch.float64))
    """
    pooled = pool_folds(moments)
    count = class_counts(pooled).double().clamp(min=1)
    between = (pooled["cross_scatter"] / count) @ pooled["cross_scatter"].mT
    return pooled["scatter"] - between, between


def lda_probe(
    moments: Mapping[str, Tensor], shrinkage: float = 0.0, *, balanced: bool = False
) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis from moments with one-hot targets: weight (K, D), bias (K,).

    w_c = Σ⁻¹ m_c and b_c = -w_c·m_c/2 + ln π_c, Σ the covariance within classes (divided by n) shrunk to
    (1-s)Σ + s·tr(Σ)/D·I, Σ⁻¹ its pseudoinverse over the directions in which rows vary: scikit-learn's
    ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)``. ``balanced`` takes equal priors π instead of the classes' shares.

    >>> from tdgeom.functional import label_moments
    >>> rows = torch.tensor([[-1.0], [1.0], [9.0], [11.0]])
    >>> weight, bias = lda_probe(label_moments(rows, torch.eye(2)[[0, 0, 1, 1]]))
    >>> weight[1] - weight[0], bias[1] - bias[0]
    (tensor([10.], dtype=torch.float64), tensor(-50., dtype=torch.float64))
    """
    pooled = pool_folds(moments)
    count, means = class_means(pooled)
    within, _ = within_scatter(pooled)
    covariance = within / pooled["count"]
    d = covariance.shape[0]
    level = covariance.diagonal().mean()
    covariance = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(d, dtype=torch.float64).to(
        covariance
    )
    values, vectors = torch.linalg.eigh(covariance)
    keep = directions_that_vary(values, vectors, covariance)
    inverse = torch.where(keep, 1 / torch.where(keep, values, 1.0), 0.0)
    weight = ((means @ vectors) * inverse) @ vectors.mT
    share = (
        torch.full_like(count, 1 / count.shape[0], dtype=torch.float64)
        if balanced
        else count / pooled["count"]
    )
    return weight, -0.5 * (weight * means).sum(-1) + share.double().log()


def mean_difference(moments: Mapping[str, Tensor], *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """The classifier between class means, from moments with one-hot targets: weight (K, D), bias (K,).

    Two classes: coef = mean₁ - mean₀ and intercept = -(|mean₁|² - |mean₀|²)/2, both divided by |coef| when normalised;
    weight is (-coef/2, coef/2), so that the difference of the two decisions is coef·x + intercept. More classes:
    w_c = mean_c, b_c = -|mean_c|²/2 about the common mean (the nearest mean wins), never normalised.

    >>> from tdgeom.functional import label_moments
    >>> weight, bias = mean_difference(label_moments(torch.tensor([[0.0], [4.0]]), torch.eye(2)))
    >>> weight[1] - weight[0], bias[1] - bias[0]
    (tensor([1.], dtype=torch.float64), tensor(-2., dtype=torch.float64))
    """
    pooled = pool_folds(moments)
    _, means = class_means(pooled)
    if means.shape[0] == 2:
        weight = means[1] - means[0]
        bias = -(means[1].square().sum() - means[0].square().sum()) / 2
        size = weight.square().sum().sqrt() if normalize else torch.ones_like(bias)
        weight, bias = weight / size, bias / size
        return torch.stack((-weight, weight)) / 2, torch.stack((-bias, bias)) / 2
    weight = means - pooled["mean"]
    return weight, -0.5 * weight.square().sum(-1) - weight @ pooled["mean"]
