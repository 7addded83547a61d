"""Moments of a block of rows, and how two blocks' moments become one.

A set of rows x is held as count n, mean x̄, scatter S = Σ(x-x̄)(x-x̄)ᵀ, norm2_x = Σ|x-x̄|²(x-x̄) and norm4 = Σ|x-x̄|⁴, all in
float64. Nothing is ever summed about the origin: a block is centred about its own mean before it is multiplied, so an
offset of the data costs no digits.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from tdgeom.numerics.centring import upcast
from tdgeom.numerics.products import gram, in_own_precision

__all__ = ["Moments", "block_moments", "centre_block", "merge_moments", "moments_about"]

Moments: TypeAlias = "dict[str, Tensor]"


def centre_block(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows about a centre that their own precision represents: (y, centre, what is left of y's mean).

    (N, D) in any real dtype; y is float64 for float64 and integer input and float32 otherwise. For |x-c| small against |x| the
    subtraction is exact, so y carries the input's digits and its products need no more than float32 blocks.
    """
    y = upcast(rows)
    centre = y.mean(0)
    y = y - centre
    return y, centre.double(), y.sum(0, dtype=torch.float64) / rows.shape[0]


@in_own_precision
def block_moments(rows: Tensor) -> Moments:
    """The moments of (N, D) rows, N >= 1, with float64 products for float64 and integer rows and float32 products otherwise.

    ``scatter`` comes about the block's centre as ``product`` (in the products' dtype) and ``rest`` (what is left of the
    mean), so that ``merge_moments`` corrects it in the same pass that adds it.
    """
    y, centre, rest = centre_block(rows)
    count = torch.full((), rows.shape[0], dtype=torch.int64, device=rows.device)
    product = gram(y)
    squared = (y * y).sum(-1)
    cubic = (squared @ y).double()
    fourth = squared.double().square().sum()
    trace = squared.sum(dtype=torch.float64)
    n = rows.shape[0]
    norm2_x, norm4 = _shifted(-rest, n, n * rest, trace, -_mv(product, rest), cubic, fourth)
    return {
        "count": count,
        "mean": centre + rest,
        "product": product,
        "rest": rest,
        "trace": trace - n * (rest @ rest),
        "norm2_x": norm2_x,
        "norm4": norm4,
    }


def _mv(matrix: Tensor, vector: Tensor) -> Tensor:
    # ``rest`` is about 1e-7 of the block's spread: a float32 product of it is exact enough and avoids a float64 copy.
    return (matrix @ vector.to(matrix.dtype)).double()


def moments_about(moments: Moments, shift: Tensor) -> tuple[Tensor, Tensor]:
    """norm2_x and norm4 of the same rows about a centre at ``mean - shift``; needs count, scatter, norm2_x, norm4."""
    n, trace = moments["count"].double(), moments["scatter"].diagonal().sum()
    turned = moments["scatter"] @ shift
    return _shifted(shift, n, 0 * shift, trace, turned, moments["norm2_x"], moments["norm4"])


def _shifted(
    shift: Tensor,
    n: Tensor | int,
    first: Tensor,
    trace: Tensor,
    turned: Tensor,
    cubic: Tensor,
    fourth: Tensor,
) -> tuple[Tensor, Tensor]:
    """Σ|z|²z and Σ|z|⁴ of z = y + shift, from Σy, Σ|y|², Σy(y·shift), Σ|y|²y, Σ|y|⁴ of n rows y."""
    size, along = shift @ shift, first @ shift
    return (
        cubic + 2 * turned + trace * shift + size * first + (2 * along + n * size) * shift,
        fourth
        + 4 * (turned @ shift)
        + 4 * (cubic @ shift)
        + 2 * size * trace
        + size * (4 * along + n * size),
    )


def merge_moments(state: Moments, block: Moments) -> None:
    """Add a block (from ``block_moments``, or another state) to ``state``, in place but for ``norm4``.

    ``state`` holds count, mean, scatter, norm2_x, norm4 and may be empty (count 0, zeros).
    """
    n_a, n_b = state["count"].double(), block["count"].double()
    delta = block["mean"] - state["mean"]
    total = n_a + n_b
    shift_a, shift_b = -delta * (n_b / total), delta * (n_a / total)
    norm2_x_a, norm4_a = moments_about(state, shift_a)
    if "scatter" in block:
        norm2_x_b, norm4_b = moments_about(block, shift_b)
        state["scatter"].add_(block["scatter"]).addr_(delta * (n_a * n_b / total), delta)
    else:
        turned = _mv(block["product"], shift_b) - block["rest"] * (n_b * (block["rest"] @ shift_b))
        norm2_x_b, norm4_b = _shifted(
            shift_b, n_b, 0 * shift_b, block["trace"], turned, block["norm2_x"], block["norm4"]
        )
        left = torch.stack((delta * (n_a * n_b / total), -n_b * block["rest"]), dim=1)
        right = torch.stack((delta, block["rest"]))
        state["scatter"].add_(block["product"]).addmm_(left, right)
    state["norm2_x"].copy_(norm2_x_a + norm2_x_b)
    state["norm4"] = norm4_a + norm4_b  # a new tensor: compiled code drops in-place updates of 0-dim buffers
    state["mean"].add_(delta * (n_b / total))
    state["count"].add_(block["count"])
