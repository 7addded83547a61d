"""CKA from random projections: what groups of independent projections estimate, and how well."""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom.measures.similarity.hsic import alignment

__all__ = ["block_squares", "group_traces", "ratio_over_groups"]


def block_squares(matrix: Tensor, groups: int) -> Tensor:
    """(..., G·k, G·l) -> (..., G, G): the squared Frobenius norm of each block."""
    blocks = matrix.unflatten(-1, (groups, -1)).unflatten(-3, (groups, -1))
    return torch.linalg.vector_norm(blocks, dim=(-3, -1)).square()


def group_traces(matrix: Tensor, groups: int) -> Tensor:
    """(..., G·k, G·k) -> (..., G): the trace of each diagonal block."""
    return torch.diagonal(matrix, dim1=-2, dim2=-1).unflatten(-1, (groups, -1)).sum(-1)


def ratio_over_groups(cross: Tensor, self_a: Tensor, self_b: Tensor) -> tuple[Tensor, Tensor]:
    """``cross/sqrt(self_a self_b)`` from tables (..., G, G) of products between group g of one factor and h of the
    other, and its standard error.

    Different groups are independent and each stands for the whole on average, so the products with g ≠ h are unbiased
    even where both factors are the same site; those with g = h are not and are left out. The standard error is the
    jackknife over groups (Efron & Stein 1981), each leaving one group out of all three tables.
    """
    tables = torch.stack([cross, self_a, self_b], -1)
    groups = cross.shape[-1]
    other = 1 - torch.eye(groups, dtype=tables.dtype, device=tables.device)
    tables = tables * other.unsqueeze(-1)
    whole = tables.sum((-3, -2))
    left_out = whole.unsqueeze(-2) - tables.sum(-2) - tables.sum(-3)
    replicates = alignment(*left_out.unbind(-1))
    spread = (replicates - replicates.mean(-1, keepdim=True)).square().sum(-1)
    return alignment(*whole.unbind(-1)), (spread * (groups - 1) / groups).sqrt()
