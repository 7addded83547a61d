"""Bases of concepts: the directions of most variance, and those that tell classes apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.stage import Stage
from tdgeom.core.warnings import FewRowsWarning, tell
from tdgeom.measures.eigen_spectrum import eigen_spectrum
from tdgeom.numerics.centring import occurs
from tdgeom.numerics.numerical_rank import above_rounding, directions_that_vary
from tdgeom.probing.closed_form import within_scatter
from tdgeom.probing.label_moments import LEAVES, class_counts, pool_folds

__all__ = ["CONCEPT_LEAVES", "ConceptBasis", "FisherBasis", "concept_basis", "fisher_basis"]

CONCEPT_LEAVES = ("basis", "dual", "eigenvalues", "explained_variance", "mean")


def concept_basis(
    covariance: Tensor, mean: Tensor | None = None, n: int = 10, *, whiten: bool = False
) -> dict[str, Tensor]:
    """The n directions of most variance, by leaf: from (*B, D, D) and (*B, D); no mean stands for rows that are centred.

    ``basis`` (*B, D, n): eigenvectors C as columns, their signs fixed (largest-magnitude entry positive);
    ``eigenvalues`` (*B, n) descending; ``explained_variance`` (*B, n), shares λ_i/Σλ of all D; ``mean``; ``dual``
    (*B, D, n), what coordinates are multiplied with on the way back: C itself, or with ``whiten`` C·√λ, the basis then
    being C/√λ, so that coordinates have unit variance. Directions beyond the numerical rank are zero, for any would do.

    >>> leaves = concept_basis(torch.diag(torch.tensor([1.0, 3.0])), torch.zeros(2), 1)
    >>> leaves["basis"].flatten().tolist(), leaves["explained_variance"].tolist()
    ([0.0, 1.0], [0.75])
    """
    values, basis = eigen_spectrum(covariance, n)
    leading = values[..., : basis.shape[-1]]
    exist = above_rounding(values)[..., : basis.shape[-1]] | leading.isnan()
    basis = torch.where(exist.unsqueeze(-2), basis, 0.0)
    dual = basis
    if whiten:
        real = directions_that_vary(leading, basis, covariance.double())
        scale = torch.where(real, leading, torch.inf).sqrt()
        basis, dual = basis / scale[..., None, :], basis * leading.sqrt()[..., None, :]
    return {
        "basis": basis,
        "dual": dual,
        "eigenvalues": leading.clone(),
        "explained_variance": leading / values.sum(-1, keepdim=True),
        "mean": values.new_zeros(covariance.shape[:-1]) if mean is None else mean.double(),
    }


def fisher_basis(
    moments: Mapping[str, Tensor], n: int | None = None, *, shrinkage: float = 0.0
) -> dict[str, Tensor]:
    """The directions that tell classes apart best: S_b w = λ S_w w, from moments with one-hot targets.

    S_w and S_b are the scatter within and between classes over the number of rows; S_w is shrunk to
    (1-s)S_w + s·tr(S_w)/D·I. ``basis`` (D, n) with wᵀS_w w = 1 (without shrinkage scikit-learn's
    ``LinearDiscriminantAnalysis(solver="eigen").scalings_`` up to sign), n <= K-1; ``eigenvalues`` λ;
    ``explained_variance`` λ_i/Σλ, shares of the *between*-class variance in units of the within-class one; ``dual`` =
    S_w·basis; ``mean``. Where class means span fewer than K-1 dimensions the directions beyond are zero.

    Raises:
        ValueError: one class, or S_w singular without shrinkage.

    >>> from tdgeom.functional import label_moments
    >>> x = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0], [1.0, 1.0], [5.0, 1.0]])
    >>> fisher_basis(label_moments(x, torch.eye(2)[[0, 0, 1, 1, 0, 1]]), shrinkage=0.1)["basis"].shape
    torch.Size([2, 1])
    """
    pooled = pool_folds(moments)
    classes = int((class_counts(pooled) > 0).sum())
    if classes < 2:
        raise ValueError(
            f"Fisher directions tell classes apart: expected rows of two classes or more, got {classes}."
        )
    within, between = (scatter / pooled["count"] for scatter in within_scatter(pooled))
    d = within.shape[0]
    eye = torch.eye(d, dtype=torch.float64, device=within.device)
    within = (1 - shrinkage) * within + shrinkage * within.diagonal().mean() * eye
    values, vectors = torch.linalg.eigh(within)
    if not directions_that_vary(values, vectors, within).all():
        raise ValueError(
            f"the scatter within classes ({d} x {d}, {int(pooled['count'])} rows) is singular, so Fisher directions are not "
            f"defined. Give more rows, or shrinkage= above 0."
        )
    whitener = vectors / values.sqrt()
    ratios, turned = torch.linalg.eigh(whitener.mT @ between @ whitener)
    limit = classes - 1 if n is None else min(n, classes - 1)
    ratios = ratios.flip(-1).clamp(min=0)
    exist = above_rounding(ratios)[:limit]
    basis = torch.where(exist, whitener @ turned.flip(-1)[:, :limit], 0.0)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)
    return {
        "basis": basis,
        "dual": within @ basis,
        "eigenvalues": ratios[:limit].clone(),
        "explained_variance": ratios[:limit] / ratios.sum(),
        "mean": pooled["mean"].clone(),
    }


def tell_few_directions(stage: str, basis: Tensor) -> None:
    """A warning where columns of a basis (*B, D, n) are zero: the rows vary in fewer directions than were asked for."""
    columns, exist = basis.shape[-1], (basis != 0).any(-2).sum(-1)
    if occurs(exist < columns):
        tell(
            f"{stage}: few directions, {int(exist.min())} of the {columns} asked for: the rows vary in no more, and the columns "
            f"beyond are zero. Give more rows, or take fewer directions.",
            FewRowsWarning,
        )


class ConceptBasis(Stage):
    """The n directions of most variance of a representation, with what each explains.

    Formula:
        SC = C diag(λ); S the centred, unbiased covariance
        explained_variance = λ_i/Σλ

    Eigenvectors as columns of C, signs fixed (largest-magnitude entry positive). A column of
    ``basis`` is a plain (D,) tensor, ready to steer with; all of them a (D, n) basis, ready to project out.

    Args:
        n: directions; at most D are returned. Those beyond the numerical rank are zero, with one ``FewRowsWarning``.
        whiten: divide directions by √λ, so that coordinates have unit variance.

    Reads ``("moments", "covariance")`` (*B, D, D) and ``("moments", "mean")`` (*B, D); writes ``("concepts", "basis" |
    "dual" | "eigenvalues" | "explained_variance" | "mean")``: (*B, D, n), (*B, D, n), (*B, n), (*B, n), (*B, D); see
    ``concept_basis``. Rows are projected in a second pass: ``run(second, loader, inputs=first_result)``.

        >>> import torch, tdgeom as tg
        >>> out = tg.ConceptBasis(n=1)(torch.diag(torch.tensor([4.0, 1.0])), torch.zeros(2))
        >>> out[0].flatten().tolist(), out[3].tolist()
        ([1.0, 0.0], [0.8])
    """

    reads = {("moments", "covariance"): "D D", ("moments", "mean"): "D"}
    writes = [("concepts", name) for name in CONCEPT_LEAVES]

    def __init__(
        self,
        n: int = 10,
        *,
        whiten: bool = False,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if n < 1:
            raise ValueError(f"ConceptBasis: n must be at least 1, got {n}.")
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.n, self.whiten = n, whiten

    def compute(self, covariance: Tensor, mean: Tensor) -> Mapping[str, Tensor]:
        """See ``concept_basis``."""
        found = concept_basis(covariance, mean, self.n, whiten=self.whiten)
        tell_few_directions("ConceptBasis", found["basis"])
        return found


class FisherBasis(Stage):
    """Directions that tell classes apart best (Fisher's linear discriminants), from streamed label moments.

    Formula:
        S_b w = λ S_w w; ``wᵀS_w w = 1``, S_w and S_b the scatter within and between classes

    At most K-1 directions. See ``fisher_basis``.

    Args:
        n: directions; None for all K-1.
        shrinkage: of the scatter within classes to a multiple of the identity, in [0, 1].

    Reads the six leaves of ``StreamingLabelMoments``; writes ``("concepts", ...)`` as ``ConceptBasis`` does
    (``out_keys="fisher"`` beside it), with λ as ``eigenvalues``.

        >>> import torch, tdgeom as tg
        >>> moments = tg.StreamingLabelMoments()(torch.randn(90, 4), torch.arange(90) % 3, torch.arange(90) << 20)
        >>> tg.FisherBasis()(*moments)[0].shape
        torch.Size([4, 2])
    """

    reads = [("label_moments", name) for name in LEAVES]
    writes = [("concepts", name) for name in CONCEPT_LEAVES]

    def __init__(
        self,
        n: int | None = None,
        *,
        shrinkage: float = 0.0,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if (n is not None and n < 1) or not 0 <= shrinkage <= 1:
            raise ValueError(
                f"FisherBasis: n is at least 1 and shrinkage in [0, 1], got {n} and {shrinkage}."
            )
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.n, self.shrinkage = n, shrinkage

    def compute(self, *moments: Tensor) -> Mapping[str, Tensor]:
        """See ``fisher_basis``."""
        found = fisher_basis(dict(zip(LEAVES, moments)), self.n, shrinkage=self.shrinkage)
        tell_few_directions("FisherBasis", found["basis"])
        return found
