"""Moments of rows, a block at a time, and how two sets' moments become one.

A set of rows x is held as count n, mean x̄, scatter S = Σ(x-x̄)(x-x̄)ᵀ, norm2_x = Σ|x-x̄|²(x-x̄) and norm4 = Σ|x-x̄|⁴, all in
float64. Nothing is ever summed about the origin: a block is centred about the running mean that includes it, so an offset of
the data costs no digits, and neither does its scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tdgeom.numerics.products import add_gram, factors

__all__ = ["Moments", "about_running_mean", "add_rows", "merge_moments", "moments_about"]

Moments: TypeAlias = "dict[str, Tensor]"


def about_running_mean(rows: Sequence[Tensor], mean: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block of n rows of several sites, side by side, about the mean of all rows so far.

    Args:
        rows: (n, D_i) of each site. mean: (ΣD,) float64 of the ``count`` rows before.

    Returns:
        y (n+1, ΣD) float64: the centred rows, and as its last row √count·δ, whose products move what was summed before to
        the new mean; that mean, and δ (ΣD,), its step.

        >>> y, mean, step = about_running_mean(
        ...     [torch.ones(1, 2)], torch.zeros(2, dtype=torch.float64), torch.tensor(1)
        ... )
        >>> y.tolist(), mean.tolist(), step.tolist()
        ([[0.5, 0.5], [0.5, 0.5]], [0.5, 0.5], [0.5, 0.5])
    """
    widths, n = [x.shape[1] for x in rows], rows[0].shape[0]
    y = torch.empty(n + 1, sum(widths), dtype=torch.float64, device=rows[0].device)
    block = y[:-1]
    for x, part in zip(rows, block.split(widths, dim=1)):
        part.copy_(x)
    own = block.mean(0)
    block -= own
    if any(x.dtype == torch.float64 or not x.is_floating_point() for x in rows):
        # A float64 mean of float64 rows is rounded; one of float32 rows is not, but for what no digit of theirs shows.
        rest = block.mean(0)
        block -= rest
        own = own + rest
    before = count.double()
    step = (own - mean) * (n / (before + n))
    block -= mean + step - own
    y[-1] = step * before.sqrt()
    return y, mean + step, step


def add_rows(state: Moments, rows: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Add a block of rows (N, D), N >= 1, to ``state`` (count, mean, scatter, norm2_x, norm4), in place but for ``norm4``.

    ``dtype``: what the products of ``scatter`` are taken in; everything else is float64.
    """
    y, mean, step = about_running_mean([rows], state["mean"], state["count"])
    norm2_x, norm4 = moments_about(state, -step)
    squared = y[:-1].square().sum(-1)
    add_gram(state["scatter"], factors(y, dtype))
    state["norm2_x"].copy_(norm2_x + squared @ y[:-1])
    state["norm4"] = (
        norm4 + squared.square().sum()
    )  # a new tensor: compiled code drops in-place updates of 0-dim buffers
    state["mean"].copy_(mean)
    state["count"].add_(rows.shape[0])


def moments_about(moments: Moments, shift: Tensor) -> tuple[Tensor, Tensor]:
    """norm2_x and norm4 of the same rows about a centre at ``mean - shift``; needs count, scatter, norm2_x, norm4."""
    n, trace = moments["count"].double(), moments["scatter"].diagonal().sum()
    turned = moments["scatter"] @ shift
    size, cubic = shift @ shift, moments["norm2_x"]
    return (
        cubic + 2 * turned + (trace + n * size) * shift,
        moments["norm4"] + 4 * (turned @ shift) + 4 * (cubic @ shift) + size * (2 * trace + n * size),
    )


def merge_moments(state: Moments, other: Moments) -> None:
    """Add another state's moments to ``state``, in place but for ``norm4``; either may be empty (count 0, zeros)."""
    n_a, n_b = state["count"].double(), other["count"].double()
    delta = other["mean"] - state["mean"]
    total = n_a + n_b
    norm2_x_a, norm4_a = moments_about(state, -delta * (n_b / total))
    norm2_x_b, norm4_b = moments_about(other, delta * (n_a / total))
    state["scatter"].add_(other["scatter"]).addr_(delta * (n_a * n_b / total), delta)
    state["norm2_x"].copy_(norm2_x_a + norm2_x_b)
    state["norm4"] = norm4_a + norm4_b  # a new tensor: compiled code drops in-place updates of 0-dim buffers
    state["mean"].add_(delta * (n_b / total))
    state["count"].add_(other["count"])
