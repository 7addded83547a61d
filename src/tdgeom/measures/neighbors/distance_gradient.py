"""The distances of a neighbour table as functions of the rows, so that they have a gradient behind any search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["directions", "found_by"]


def directions(rows: Tensor) -> Tensor:
    """Rows of unit length, in float64."""
    return rows.double() / torch.linalg.vector_norm(rows.double(), dim=-1, keepdim=True)


def found_by(operator: Any, x: Tensor, p: float, cosine: bool, *settings: Any) -> Any:
    """The leaves that an operator finds among rows (*B, N, D); both distances carry gradients to ``x``.

    In a compiled graph they carry none, and asking for one is an error of torch's.
    """
    if (
        torch.compiler.is_compiling()
    ):  # whose tracer knows no forward-mode derivative of a function of one's own
        return operator(x, p, cosine, *settings)
    return _Found.apply(operator, x, p, cosine, *settings)


class _Found(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, x: Tensor, *settings: Any) -> tuple[Tensor, ...]:
        return operator(x, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, x, ctx.p, ctx.cosine, *further = inputs
        _, index, distinct, among, *others = output
        ctx.mark_non_differentiable(index, among, *others)
        ctx.set_materialize_grads(False)
        kept = (x, index, among, torch.isfinite(distinct))
        ctx.save_for_backward(*kept), ctx.save_for_forward(*kept)
        ctx.unused = len(others), 2 + len(further)

    @staticmethod
    def backward(
        ctx: Any, of_all: Tensor | None, _: None, of_distinct: Tensor | None, *rest: None
    ) -> tuple[Any, ...]:
        x, index, among, known = ctx.saved_tensors
        total = torch.zeros_like(x)
        for gradient, at, counts in ((of_all, index, None), (of_distinct, among, known)):
            if gradient is not None:
                gradient = gradient if counts is None else gradient.where(counts, 0.0)
                total = total + torch.func.vjp(_distances_at(ctx, at), x)[1](gradient)[0]
        return (None, total, *[None] * ctx.unused[1])

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, *settings: None) -> tuple[Any, ...]:
        x, index, among, known = ctx.saved_tensors
        slopes = []
        for at in (index, among):
            found = torch.func.jvp(_distances_at(ctx, at), (x,), (tangent,))
            slopes.append(found[1].where(found[0] > 0, 0.0))  # of copies: as ``backward`` has it
        return (slopes[0], None, slopes[1].where(known, 0.0), None, *[None] * ctx.unused[0])


def _distances_at(ctx: Any, index: Tensor) -> Any:
    """Distances from every row of (*B, N, D) to the rows at ``index`` (*B, N, k), as a function of the rows."""

    def distances(x: Tensor) -> Tensor:
        rows = directions(x) if ctx.cosine else x.double()
        near = rows.gather(-2, index.flatten(-2).unsqueeze(-1).expand(*index.shape[:-2], -1, x.shape[-1]))
        apart = torch.linalg.vector_norm(rows.unsqueeze(-2) - near.view(*index.shape, -1), ord=ctx.p, dim=-1)
        return apart.square() / 2 if ctx.cosine else apart

    return distances
