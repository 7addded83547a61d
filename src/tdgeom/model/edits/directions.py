"""Edits that take a subspace out of an activation, or leave nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdgeom.model.edits.edit import Edit
from tdgeom.numerics.array_arguments import tensor_of

__all__ = ["ProjectOnto", "ProjectOut"]


class ProjectOut(Edit):
    """Remove a subspace: ``x - Q Qᵀ (x - mean)``, Q an orthonormal basis of the columns of ``basis``.

    Args:
        basis: (D, k) or (D,), need not be orthonormal; or an object with such a tensor as ``components``.
        mean: (D,), the point that the projection leaves alone; default the origin.

    Raises ``ValueError`` for a basis or mean of another width than the site's.

    >>> ProjectOut(torch.tensor([2.0, 0.0]))(activation=torch.ones(1, 1, 2))
    tensor([[[0., 1.]]])
    """

    basis: Tensor
    mean: Tensor | None

    def __init__(self, basis: Tensor, *, mean: Tensor | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        owner = f"{type(self).__name__}"
        basis = tensor_of(getattr(basis, "components", basis), owner, "basis")
        columns = basis.detach().double()
        columns = columns.unsqueeze(-1) if columns.ndim == 1 else columns
        if columns.ndim != 2 or columns.shape[1] > columns.shape[0]:
            raise ValueError(
                f"{type(self).__name__} expects a basis (D, k) with k <= D, got {tuple(basis.shape)}. Remedy: .T, where the "
                "rows are the directions (a probe's are)."
            )
        if not bool(torch.isfinite(columns).all()) or not bool(columns.any()):
            raise ValueError(
                f"{type(self).__name__} expects a basis with directions, got {tuple(basis.shape)} of zeros, NaN or Inf."
            )
        u, s, _ = torch.linalg.svd(columns, full_matrices=False)
        self.register_buffer("basis", u[:, s > s.max() * 1e-10])
        self.register_buffer(
            "mean", None if mean is None else tensor_of(mean, owner, "mean").detach().double()
        )

    def inside(self, value: Tensor) -> Tensor:
        """The part of ``x - mean`` in the subspace."""
        basis = self.basis.to(value)
        for what, given in (("a basis", basis[:, 0]), ("a mean", self.mean)):
            if given is not None and given.shape != value.shape[-1:]:
                raise ValueError(
                    f"{type(self).__name__} expected {what} of the site's {value.shape[-1]} features, got one of "
                    f"{tuple(given.shape)}."
                )
        centred = value if self.mean is None else value - self.mean.to(value)
        return (centred @ basis) @ basis.T

    def edit(self, value: Tensor) -> Tensor:
        """``x - Q Qᵀ (x - mean)``."""
        return value - self.inside(value)


class ProjectOnto(ProjectOut):
    """Keep a subspace only: ``mean + Q Qᵀ (x - mean)``; arguments as :class:`ProjectOut`.

    >>> ProjectOnto(torch.tensor([2.0, 0.0]))(activation=torch.ones(1, 1, 2))
    tensor([[[1., 0.]]])
    """

    def edit(self, value: Tensor) -> Tensor:
        """``mean + Q Qᵀ (x - mean)``."""
        inside = self.inside(value)
        return inside if self.mean is None else inside + self.mean.to(value)
