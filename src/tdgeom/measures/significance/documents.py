"""Which rows may change places: documents, whole ones."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["document_shuffles", "first_of_each", "sequence_of"]


def sequence_of(row_id: Tensor) -> Tensor:
    """The sequence that a row is of: the upper part of its id."""
    return row_id >> 20


def first_of_each(document: Tensor) -> Tensor:
    """Where each document first occurs, ascending: (N,) -> (documents,) int64.

    >>> first_of_each(torch.tensor([7, 3, 7, 5]))
    tensor([0, 1, 3])
    """
    _, index = torch.unique(document, return_inverse=True)
    places = torch.arange(len(document), device=document.device)
    first = torch.full((int(index.max()) + 1,), len(document), dtype=torch.int64, device=document.device)
    return first.scatter_reduce(0, index, places, "amin").sort().values


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
