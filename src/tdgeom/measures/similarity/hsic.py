"""The unbiased Hilbert-Schmidt independence criterion, and the ratio that makes an alignment of it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["alignment", "hsic1"]


def hsic1(off: Tensor, sums_product: Tensor, sum_a: Tensor, sum_b: Tensor, n: Tensor | float) -> Tensor:
    """n(n-3) HSIC₁ of Song et al. 2012 of two kernels K and L whose diagonals are left out.

    Args:
        off: Σ_i≠j K_ij L_ji. sums_product: Σ_i k_i l_i, k the column sums of K and l the row sums of L. sum_a, sum_b: Σk
            and Σl. n: rows.

    For linear kernels of centred rows ``k_i = -|x_i|²``: only traces and diagonals are left.

        >>> ones = torch.ones(())
        >>> hsic1(12 * ones, 36 * ones, 12 * ones, 12 * ones, 4)  # two kernels of ones over four rows share nothing
        tensor(0.)
    """
    return off + sum_a * sum_b / ((n - 1) * (n - 2)) - 2 / (n - 2) * sums_product


def alignment(cross: Tensor, self_a: Tensor, self_b: Tensor) -> Tensor:
    """``cross/sqrt(self_a self_b)``; NaN where one side's product with itself is not above 0.

    >>> alignment(torch.tensor([1.0, 1.0]), torch.tensor([4.0, 0.0]), torch.tensor([1.0, 1.0]))
    tensor([0.5000,    nan])
    """
    return torch.where((self_a > 0) & (self_b > 0), cross / (self_a.sqrt() * self_b.sqrt()), torch.nan)
