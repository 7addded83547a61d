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

from tdgeom.numerics.products import add_upper, factors, upper_times

__all__ = ["Moments", "about_running_mean", "add_rows", "merge_moments", "moments_about", "row_parts"]

Moments: TypeAlias = "dict[str, Tensor]"

_CACHED = 2**22  # bytes of rows in float64 that are centred, measured and multiplied before the next
_FEWEST = 512  # rows: products of fewer wait for the memory of their sum


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

    ``dtype``: what the products of ``scatter`` are taken in; everything else is float64. Of ``scatter`` the upper triangle
    counts (``mirror`` makes it whole).
    """
    before, n = state["count"].double(), rows.shape[0]
    parts = row_parts(rows)
    held = torch.empty(parts[0].shape[0] + 1, rows.shape[1], dtype=torch.float64, device=rows.device)
    own = _mean(parts, held)
    step = (own - state["mean"]) * (n / (before + n))
    norm2_x, norm4 = moments_about(state, -step)
    state["mean"].add_(step)
    largest = _largest(rows, state["mean"], step * before.sqrt()) if dtype == torch.float32 else None
    for i, part in enumerate(parts):
        m = part.shape[0]
        y = held[:m].copy_(part).sub_(state["mean"])
        squared = torch.linalg.vector_norm(y, dim=-1).square()
        norm2_x, norm4 = norm2_x + squared @ y, norm4 + squared @ squared
        if i == 0:  # one row more moves what was summed before to the new mean
            held[m] = step * before.sqrt()
            y = held[: m + 1]
        add_upper(state["scatter"], factors(y, dtype, largest))
    state["norm2_x"].copy_(norm2_x)
    state["norm4"] = norm4  # a new tensor: compiled code drops in-place updates of 0-dim buffers
    state["count"].add_(n)


def row_parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows that stay in a CPU's cache as float64; on other devices, and in a graph, all of them at once."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return (rows,)
    most = max(_FEWEST, _CACHED // (8 * max(1, rows.shape[1])))
    return rows.tensor_split(
        max(1, round(rows.shape[0] / most))
    )  # alike: a last one of few rows costs what all of them do


def _largest(rows: Tensor, centre: Tensor, shift: Tensor) -> Tensor:
    """(D,) the size of the largest value of the centred rows and the shift."""
    apart = torch.maximum(rows.amax(0).double() - centre, centre - rows.amin(0).double())
    return torch.maximum(apart, shift.abs())


def _mean(parts: Sequence[Tensor], held: Tensor) -> Tensor:
    """The mean (D,) of all parts in float64, each copied to ``held``; of float64 rows and whole numbers to the last bit."""
    n = sum(part.shape[0] for part in parts)
    ones = held.new_ones(held.shape[0])

    def about(centre: Tensor | None) -> Tensor:
        total = torch.zeros_like(held[0])
        for part in parts:
            y = held[: part.shape[0]].copy_(part)
            y = y if centre is None else y.sub_(centre)
            total = total + ones[: part.shape[0]] @ y
        return total / n

    mean = about(None)
    exact = parts[0].is_floating_point() and parts[0].dtype != torch.float64
    # A float64 mean of float64 rows is rounded; one of float32 rows is not, but for what no digit of theirs shows.
    return mean if exact else mean + about(mean)


def moments_about(moments: Moments, shift: Tensor) -> tuple[Tensor, Tensor]:
    """norm2_x and norm4 of the same rows about a centre at ``mean - shift``; needs count, scatter, norm2_x, norm4."""
    n, trace = moments["count"].double(), moments["scatter"].diagonal().sum()
    turned = upper_times(moments["scatter"], shift)
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
