"""Chance of linear CKA where rows come in documents: every two rows of different documents count, no two of one document."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.numerics.centring import centre

__all__ = ["FEWEST", "DocumentSide", "document_pairs", "document_side", "sign_draws"]

FEWEST = 8  # documents, in effect, below which no law of large numbers has begun


class DocumentSide(NamedTuple):
    """One side's inner products, (..., N, N): of centred rows, scaled to norm 1; and of rows about the other documents' mean."""

    products: Tensor
    between: Tensor


def document_side(x: Tensor, index: Tensor, counts: Tensor) -> DocumentSide:
    r"""Inner products of rows in documents d and e about the mean of all *other* documents, 0 inside a document.

    h_ij = x_i·x_j - x_i·m - x_j·m + q, q the mean inner product of rows of any two further documents f and g, and m the mean of
    the rows f of these: nothing that is added to all rows changes h, and its expectation is 0 whatever varies together inside
    a document.

    Args:
        x: (\*B, N, D) rows. index: (N,) which document each is of, 0 to G-1. counts: (G,) rows of each.
    """
    rows = centre(x.double()).rows
    products = rows @ rows.mT
    size = torch.linalg.vector_norm(products, dim=(-2, -1), keepdim=True)
    products = products / torch.where(size > 0, size, torch.nan)
    n = counts.double()
    to_document = _summed(products, index, len(counts), -1)
    among = _summed(to_document, index, len(counts), -2)
    own, all_of = among.diagonal(dim1=-2, dim2=-1), to_document.sum(-1)
    left = n.sum() - n[:, None] - n
    ways = left.square() - (n.square().sum() - n.square()[:, None] - n.square())
    own_part = to_document.gather(-1, index[:, None].expand(*to_document.shape[:-1], 1))
    weighted = (to_document * n).sum(-1, keepdim=True) - n[index, None] * own_part - n * to_document
    mean = (left[index] * (all_of[..., None] - own_part - to_document) - weighted) / ways[index]
    whole, row = among.sum((-2, -1))[..., None, None], among.sum(-1)
    outside = (
        whole - 2 * (row[..., None] + row[..., None, :]) + own[..., None] + own[..., None, :] + 2 * among
    )
    alone = own.sum(-1)[..., None, None] - own[..., None] - own[..., None, :]
    apart = (outside - alone) / ways
    across = mean[..., index]
    between = products - across - across.mT + apart[..., index, :][..., index]
    return DocumentSide(products, between.masked_fill(index[:, None] == index, 0.0))


def _summed(values: Tensor, index: Tensor, documents: int, dim: int) -> Tensor:
    """Sums over the rows of each document."""
    shape = list(values.shape)
    shape[dim] = documents
    return values.new_zeros(shape).index_add(dim, index, values)


def document_pairs(a: DocumentSide, b: DocumentSide, index: Tensor, documents: int) -> Tensor:
    """(..., G, G): what each two documents add to the alignment of the sides, 0 on the diagonal."""
    return _summed(_summed(a.between * b.between, index, documents, -2), index, documents, -1)


def sign_draws(pairs: Tensor, draws: int, seed: int = 0) -> Tensor:
    """(..., draws): Σ s_d s_e M_de with signs s drawn anew, the same for every pair of sides (wild bootstrap).

    Without likeness of the sides the sum of M has mean 0, as these have: Chwialkowski, Sejdinovic and Gretton 2014.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 2, (pairs.shape[-1], draws), generator=generator, device="cpu")
    signs = (2 * drawn - 1).to(pairs.device, pairs.dtype)
    return (signs * (pairs @ signs)).sum(-2)
