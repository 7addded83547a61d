"""Concepts: the directions a representation is made of, from streamed moments; projecting, rebuilding, interpolating."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.keys import Key
from tdgeom.probing.closed_form import within_scatter
from tdgeom.probing.moments import LEAVES, class_counts, pool_folds
from tdgeom.spectrum import eigen_spectrum
from tdgeom.stage import Stage
from tdgeom.tokens import POSITION_BITS

__all__ = [
    "ConceptBasis",
    "FisherBasis",
    "Interpolate",
    "Project",
    "Reconstruct",
    "concept_basis",
    "fisher_basis",
    "interpolate",
    "project",
    "reconstruct",
    "token_context",
    "top_activating",
]

CONCEPT_LEAVES = ("basis", "dual", "eigenvalues", "explained_variance", "mean")


def concept_basis(
    covariance: Tensor, mean: Tensor, n: int = 10, *, whiten: bool = False
) -> dict[str, Tensor]:
    """The n directions of most variance, by leaf: from (*B, D, D) and (*B, D).

    ``basis`` (*B, D, n): eigenvectors C as columns, their signs fixed (largest-magnitude entry positive);
    ``eigenvalues`` (*B, n) descending; ``explained_variance`` (*B, n), shares λ_i/Σλ of all D; ``mean``; ``dual``
    (*B, D, n), what coordinates are multiplied with on the way back: C itself, or with ``whiten`` C·√λ, the basis then
    being C/√λ, so that coordinates have unit variance. Directions without variance are zero when whitened.

    >>> leaves = concept_basis(torch.diag(torch.tensor([1.0, 3.0])), torch.zeros(2), 1)
    >>> leaves["basis"].flatten().tolist(), leaves["explained_variance"].tolist()
    ([0.0, 1.0], [0.75])
    """
    values, basis = eigen_spectrum(covariance, n)
    leading = values[..., : basis.shape[-1]]
    dual = basis
    if whiten:
        floor = values[..., :1] * values.shape[-1] * torch.finfo(values.dtype).eps
        scale = torch.where(leading > floor, leading, torch.inf).sqrt()
        basis, dual = basis / scale[..., None, :], basis * leading.sqrt()[..., None, :]
    return {
        "basis": basis,
        "dual": dual,
        "eigenvalues": leading.clone(),
        "explained_variance": leading / values.sum(-1, keepdim=True),
        "mean": mean.double(),
    }


def fisher_basis(
    moments: Mapping[str, Tensor], n: int | None = None, *, shrinkage: float = 0.0
) -> dict[str, Tensor]:
    """The directions that tell classes apart best: S_b w = λ S_w w, from moments with one-hot targets.

    S_w and S_b are the scatter within and between classes over the number of rows; S_w is shrunk to
    (1-s)S_w + s·tr(S_w)/D·I. ``basis`` (D, n) with wᵀS_w w = 1 (without shrinkage scikit-learn's
    ``LinearDiscriminantAnalysis(solver="eigen").scalings_`` up to sign), n <= K-1; ``eigenvalues`` λ;
    ``explained_variance`` λ_i/Σλ, shares of the *between*-class variance in units of the within-class one; ``dual`` =
    S_w·basis; ``mean``.

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
    if values[0] <= values[-1] * d * torch.finfo(torch.float64).eps:
        raise ValueError(
            f"the scatter within classes ({d} x {d}, {int(pooled['count'])} rows) is singular, so Fisher directions are not "
            f"defined. Give more rows, or shrinkage= above 0."
        )
    whitener = vectors / values.sqrt()
    ratios, turned = torch.linalg.eigh(whitener.mT @ between @ whitener)
    limit = classes - 1 if n is None else min(n, classes - 1)
    ratios = ratios.flip(-1).clamp(min=0)
    basis = whitener @ turned.flip(-1)[:, :limit]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)
    return {
        "basis": basis,
        "dual": within @ basis,
        "eigenvalues": ratios[:limit].clone(),
        "explained_variance": ratios[:limit] / ratios.sum(),
        "mean": pooled["mean"].clone(),
    }


def project(rows: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
    """Coordinates (x - mean)·C: (*B, N, D), (*B, D, n), (*B, D) -> (*B, N, n), in the wider of the two precisions.

    >>> project(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 1.0]))
    tensor([[2.]])
    """
    return (rows.to(torch.promote_types(rows.dtype, mean.dtype)) - mean.unsqueeze(-2)) @ basis


def reconstruct(coordinates: Tensor, dual: Tensor, mean: Tensor) -> Tensor:
    """Rows z·Cᵀ + mean: (*B, N, n), (*B, D, n), (*B, D) -> (*B, N, D).

    >>> reconstruct(torch.tensor([[2.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 1.0]))
    tensor([[3., 1.]])
    """
    return coordinates @ dual.mT + mean.unsqueeze(-2)


def interpolate(a: Tensor, b: Tensor, alpha: float | Tensor, *, spherical: bool = False) -> Tensor:
    """Between two concepts: (*B, D), (*B, D) -> (*B, D) for a number, (A, *B, D) for (A,) values of alpha.

    Linear: (1-α)a + αb. Spherical: along the great circle between the directions at constant speed, the length going
    linearly from |a| to |b|, so that unit vectors stay unit. α = 0 and 1 give a and b exactly.

    Raises:
        ValueError: spherical between opposite directions or a zero vector, where no shortest way is defined.

    Shoemake (1985), Animating rotation with quaternion curves.

    >>> interpolate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5, spherical=True)
    tensor([0.7071, 0.7071])
    """
    alpha = torch.as_tensor(alpha, dtype=a.dtype, device=a.device)
    alpha = alpha.reshape(alpha.shape + (1,) * a.ndim)
    if not spherical:
        mixed = (1 - alpha) * a + alpha * b
    else:
        size_a, size_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
        u, v = a / size_a, b / size_b
        # The angle from the sum and the difference: exact also for nearly parallel directions, where arccos is not.
        angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
        if not torch.compiler.is_compiling() and not bool((angle < torch.pi * (1 - 1e-6)).all()):
            raise ValueError(
                "no shortest way on the sphere joins opposite directions or starts at a zero vector. Interpolate linearly, or "
                "go through a third concept."
            )
        close = angle < 1e-4
        sine = torch.where(close, torch.ones_like(angle), angle).sin()
        left = torch.where(close, 1 - alpha, ((1 - alpha) * angle).sin() / sine)
        right = torch.where(close, alpha, (alpha * angle).sin() / sine)
        mixed = left * u + right * v
        mixed = mixed / mixed.norm(dim=-1, keepdim=True) * ((1 - alpha) * size_a + alpha * size_b)
    return torch.where(alpha == 0, a, torch.where(alpha == 1, b, mixed))


def top_activating(coordinates: Tensor, row_id: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
    """The k rows with the largest coordinate on each concept: (N, n), (N,) -> values (n, k) and row ids (n, k).

    >>> top_activating(torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([10, 11, 12]), 2)
    (tensor([[3., 2.]]), tensor([[11, 12]]))
    """
    values, index = coordinates.mT.topk(min(k, coordinates.shape[0]), dim=-1)
    return values, row_id.to(index.device)[index]


def token_context(
    row_id: int | Tensor,
    input_ids: Mapping[int, Sequence[int]] | Sequence[Sequence[int]],
    decode: Callable[[list[int]], str],
    *,
    window: int = 8,
) -> str:
    """The text around a row's token, the token in double brackets.

    Args:
        row_id: sequence << 20 | position, as ``SelectTokens`` numbers rows.
        input_ids: attended token ids by sequence (no padding).
        decode: token ids to text, such as ``tokenizer.decode``.
        window: tokens shown on each side.

    >>> token_context(1, [[5, 6, 7]], lambda ids: " ".join(map(str, ids)))
    '5 [[6]] 7'
    """
    sequence, position = int(row_id) >> POSITION_BITS, int(row_id) & ((1 << POSITION_BITS) - 1)
    ids = [int(i) for i in input_ids[sequence]]
    if position >= len(ids):
        raise ValueError(
            f"row id {int(row_id)} is position {position} of sequence {sequence}, which has {len(ids)} tokens: give the attended "
            f"tokens of each sequence, in the order of the run."
        )
    before, after = ids[max(position - window, 0) : position], ids[position + 1 : position + 1 + window]
    parts = [
        decode(before) if before else "",
        f"[[{decode([ids[position]]).strip()}]]",
        decode(after) if after else "",
    ]
    return " ".join(part.strip() for part in parts if part.strip())


class ConceptBasis(Stage):
    """The n directions of most variance of a representation, with what each explains.

    Eigenvectors of the centred, unbiased D x D covariance, signs fixed (largest-magnitude entry positive). A column of
    ``basis`` is a plain (D,) tensor, ready to steer with; all of them a (D, n) basis, ready to project out.

    Args:
        n: directions; at most D are returned.
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
        return concept_basis(covariance, mean, self.n, whiten=self.whiten)


class FisherBasis(Stage):
    """Directions that tell classes apart best (Fisher's linear discriminants), from streamed label moments.

    S_b w = λ S_w w with wᵀS_w w = 1; at most K-1 directions. See ``fisher_basis``.

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

    reads: Any = [("label_moments", name) for name in LEAVES]
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
        return fisher_basis(dict(zip(LEAVES, moments)), self.n, shrinkage=self.shrinkage)


class Project(Stage):
    """Coordinates of rows on concepts, (x - mean)·C.

    Reads ``"tokens"`` (*B, N, D), ``("concepts", "basis")`` and ``("concepts", "mean")``; writes ``"coordinates"``
    (*B, N, n), in float64 (that of the concepts).

        >>> import torch, tdgeom as tg
        >>> tg.Project()(torch.tensor([[3.0, 1.0]]), torch.eye(2)[:, :1], torch.ones(2))
        tensor([[2.]])
    """

    reads = {"tokens": "N D", ("concepts", "basis"): "D n", ("concepts", "mean"): "D"}
    writes = ["coordinates"]

    def compute(self, tokens: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
        """See ``project``."""
        return project(tokens, basis.to(tokens.device), mean.to(tokens.device))


class Reconstruct(Stage):
    """Rows from their coordinates on concepts, z·Cᵀ + mean: with n = D the rows themselves.

    Of all rows, the share Σ|x - x̂|²/Σ|x - mean|² lost is exactly the variance the concepts do not explain.

    Reads ``"coordinates"`` (*B, N, n), ``("concepts", "dual")`` and ``("concepts", "mean")``; writes ``"reconstruction"``
    (*B, N, D).

        >>> import torch, tdgeom as tg
        >>> tg.Reconstruct()(torch.tensor([[2.0]]), torch.eye(2)[:, :1], torch.ones(2))
        tensor([[3., 1.]])
    """

    reads = {"coordinates": "N n", ("concepts", "dual"): "D n", ("concepts", "mean"): "D"}
    writes = ["reconstruction"]

    def compute(self, coordinates: Tensor, dual: Tensor, mean: Tensor) -> Tensor:
        """See ``reconstruct``."""
        return reconstruct(coordinates, dual.to(coordinates.device), mean.to(coordinates.device))


class Interpolate(Stage):
    """Concepts on the way from one to another, linearly or along the sphere.

    Args:
        alpha: how far, a number or a list of them; 0 gives the first concept, 1 the second, exactly.
        spherical: keep unit vectors unit.

    Reads ``("concept", "a")`` and ``("concept", "b")`` (*B, D); writes ``"interpolated"`` (*B, D), or (A, *B, D) for a
    list of A values.

        >>> import torch, tdgeom as tg
        >>> tg.Interpolate([0.0, 0.5, 1.0])(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000],
                [0.0000, 1.0000]])
    """

    reads = {("concept", "a"): "D", ("concept", "b"): "D"}
    writes = ["interpolated"]

    def __init__(
        self,
        alpha: float | Sequence[float] = 0.5,
        *,
        spherical: bool = False,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.alpha = alpha if isinstance(alpha, float | int) else tuple(alpha)
        self.spherical = spherical

    def compute(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``interpolate``."""
        alpha = self.alpha if isinstance(self.alpha, float | int) else torch.tensor(self.alpha)
        return interpolate(a, b, alpha, spherical=self.spherical)
