"""Which rows may change places: documents, whole ones."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["document_shuffles", "rows_alike", "sequence_of"]


def sequence_of(row_id: Tensor) -> Tensor:
    """The sequence that a row is of: the upper part of its id."""
    return row_id >> 20


def rows_alike(document: Tensor) -> Tensor:
    """Rows of which every document left has as many, the most rows that this leaves: (N,) -> (n,) int64, ascending.

    Of each the first; documents with fewer are left out.

    >>> rows_alike(torch.tensor([0, 1, 0, 1, 0, 2]))
    tensor([0, 1, 2, 3])
    """
    _, index, counts = torch.unique(document, return_inverse=True, return_counts=True)
    lengths = torch.unique(counts)
    left = lengths * (counts >= lengths[:, None]).sum(1)
    size = lengths[left.argmax()]
    order = torch.argsort(index, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[index[order]]
    return ((place < size) & (counts[index] >= size)).nonzero().flatten()


def document_shuffles(document: Tensor, repeats: int, seed: int = 0) -> Tensor:
    """Orders of rows in which whole documents have changed places with others of as many rows: (N,) -> (repeats, N) int64.

    Row i of one side is then beside row ``order[i]`` of the other. Documents of equal numbers of rows are exchangeable whatever
    is alike inside them; a document whose number of rows no other has stays where it is.

    Raises:
        ValueError: more than half of the rows are of documents that no other can change places with.

    >>> document_shuffles(torch.tensor([0, 0, 1, 1, 2]), 3).tolist()[0][4]
    4
    """
    _, index, counts = torch.unique(document, return_inverse=True, return_counts=True)
    by_document = torch.argsort(index, stable=True)
    starts = counts.cumsum(0) - counts
    orders = torch.arange(len(document), device=document.device).repeat(repeats, 1)
    generator = torch.Generator().manual_seed(seed)
    fixed = 0
    for size in torch.unique(counts).tolist():
        members = (counts == size).nonzero().flatten()
        if len(members) == 1:
            fixed += size
            continue
        rows = by_document[starts[members].unsqueeze(1) + torch.arange(size, device=document.device)]
        drawn = torch.rand(repeats, len(members), generator=generator, dtype=torch.float64, device="cpu")
        changed = rows[drawn.argsort(1).to(document.device)]
        orders[:, rows.flatten()] = changed.flatten(1)
    if 2 * fixed > len(document):
        raise ValueError(
            f"document_shuffles: {fixed} of {len(document)} rows are of documents whose number of rows no other document has, so "
            f"that they cannot change places. Take one row a document (positions='last', pool='mean'), or more documents."
        )
    return orders
