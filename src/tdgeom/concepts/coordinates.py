"""Rows as coordinates on a basis, back again, and in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.stage import Stage
from tdgeom.numerics.centring import in_one_type, occurs

__all__ = ["Interpolate", "Project", "Reconstruct", "interpolate", "project", "reconstruct"]


def project(rows: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
    """Coordinates (x - mean)·C: (*B, N, D), (*B, D, n), (*B, D) -> (*B, N, n), in the widest of the three precisions.

    >>> project(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 1.0]))
    tensor([[2.]])
    """
    rows, basis, mean = in_one_type(rows, basis, mean)
    return (rows - mean.unsqueeze(-2)) @ basis


def reconstruct(coordinates: Tensor, dual: Tensor, mean: Tensor) -> Tensor:
    """Rows z·Cᵀ + mean: (*B, N, n), (*B, D, n), (*B, D) -> (*B, N, D), in the widest of the three precisions.

    >>> reconstruct(torch.tensor([[2.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 1.0]))
    tensor([[3., 1.]])
    """
    coordinates, dual, mean = in_one_type(coordinates, dual, mean)
    return coordinates @ dual.mT + mean.unsqueeze(-2)


def interpolate(a: Tensor, b: Tensor, alpha: float | Tensor, *, spherical: bool = False) -> Tensor:
    """Between two concepts: (*B, D), (*B, D) -> (*B, D) for a number, (A, *B, D) for (A,) values of alpha, in the wider type.

    Linear: (1-α)a + αb. Spherical: along the great circle between the directions at constant speed, the length going
    linearly from |a| to |b|, so that unit vectors stay unit. α = 0 and 1 give a and b exactly.

    Raises:
        ValueError: spherical between opposite directions or a zero vector, where no shortest way is defined.

    Shoemake (1985), Animating rotation with quaternion curves.

    >>> interpolate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5, spherical=True)
    tensor([0.7071, 0.7071])
    """
    a, b = in_one_type(a, b)
    alpha = torch.as_tensor(alpha, dtype=a.dtype, device=a.device)
    alpha = alpha.reshape(alpha.shape + (1,) * a.ndim)
    if not spherical:
        mixed = (1 - alpha) * a + alpha * b
    else:
        size_a, size_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
        u, v = a / size_a, b / size_b
        # The angle from the sum and the difference: exact also for nearly parallel directions, where arccos is not.
        angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
        if occurs(~(angle < torch.pi * (1 - 1e-6))):
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


class Project(Stage):
    """Coordinates of rows on concepts.

    Formula:
        z = (x - μ)C; C the basis, μ the mean

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
    """Rows from their coordinates on concepts: with n = D the rows themselves.

    Formula:
        x̂ = zCᵀ + μ; with whitened concepts the ``dual`` in place of C

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

    Formula:
        c = (1-α)a + αb; linear

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
