"""Which document each sequence of a stream is of, copies of one counted as one: independent draws, for errors and splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdgeom.core.keys import Key, key_tuple
from tdgeom.numerics.hashing import fingerprint
from tdgeom.numerics.on_host import on_host

__all__ = ["SAME_DOCUMENT", "SameDocuments", "contents_of_ids", "sequence_contents", "whole_numbers"]

SAME_DOCUMENT: Key = (
    "tdgeom",
    "document",
)  # where run says it, (B,) int64; not at the top, where a model may have an entry
SHORTEST = 4  # tokens: shorter sequences come twice by chance
MOST = 1 << 20  # contents held: about 200 MB


class SameDocuments:
    """Numbers documents in the order of the stream; a document that begins with the content of an earlier one is that one.

    A loader that is read three times, and a corpus with duplicates, hold no more documents than one reading of each: copies are
    no further draws. About 200 bytes are held a sequence, of the first 2²⁰.

    >>> same = SameDocuments()
    >>> same.of([0, 1], [11, 12]).tolist(), same.of([2, 2, 3], [12, 13, 14]).tolist()
    ([0, 1], [1, 1, 3])
    """

    def __init__(self) -> None:
        self.by_name: dict[int, int] = {}
        self.by_content: dict[int, int] = {}
        self.copies = 0  # documents that turned out to be another

    def of(self, names: Sequence[int], contents: Sequence[int] | None) -> Tensor:
        """The document of each sequence: by what the batch calls it, and its content (0: too short to tell)."""
        found = []
        for place, name in enumerate(names):
            content = 0 if contents is None else contents[place]
            own = self.by_name.get(name, name)
            if name not in self.by_name and len(self.by_name) < MOST:
                own = self.by_name[name] = self.by_content.get(content, name) if content else name
                self.copies += own != name
            if content and len(self.by_content) < MOST:
                self.by_content.setdefault(content, own)
            found.append(own)
        return torch.tensor(found, dtype=torch.int64, device="cpu")


def contents_of_ids(ids: Tensor, attended: Tensor | None = None) -> list[int]:
    """A number for the attended token ids of each sequence, (B, T) -> B of them; 0 for sequences too short to know again.

    >>> a, b, c = contents_of_ids(torch.tensor([[0, 5, 6, 7, 8], [5, 6, 7, 8, 0], [5, 6, 7, 9, 0]]))
    >>> a == b
    False
    >>> ids = torch.tensor([[0, 5, 6, 7, 8], [5, 6, 7, 8, 0], [5, 6, 7, 9, 0]])
    >>> a, b, c = contents_of_ids(ids, ids != 0)
    >>> a == b, a == c
    (True, False)
    """
    kept = torch.ones_like(ids, dtype=torch.bool) if attended is None else attended
    found = fingerprint(ids.long().unsqueeze(-1), kept)
    return torch.where(kept.sum(-1) >= SHORTEST, torch.where(found == 0, 1, found), 0).tolist()


def sequence_contents(td: TensorDictBase, count: int, keys: Iterable[Key], mask_key: Key) -> list[int] | None:
    """A number for what each of ``count`` sequences holds, padding left out; None where nothing tells.

    Of ``input_ids`` where a batch has them (see ``contents_of_ids``), and of what else a model is called with that no text tells:
    images, sounds, the other side of an encoder-decoder. Without ids of the tensors under ``keys`` together.
    """
    ids = td.get("input_ids", None)
    if isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) == count and not ids.is_floating_point():
        own = contents_of_ids(on_host(ids), _mask(td, mask_key, ids.shape))
        beside = _of_tensors(td, count, [key for key in keys if _says_more(td.get(key, None), key)], mask_key)
        return (
            own
            if beside is None
            else [one and (31 * one + other) % 2**62 + 1 for one, other in zip(own, beside)]
        )
    return _of_tensors(td, count, keys, mask_key)


def _says_more(value: object, key: Key) -> bool:
    name = str(key_tuple(key)[-1])
    floats = isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name
    return floats or name == "decoder_input_ids"


def _of_tensors(td: TensorDictBase, count: int, keys: Iterable[Key], mask_key: Key) -> list[int] | None:
    total: Tensor | None = None
    for key in keys:
        value = td.get(key, None)
        if not isinstance(value, Tensor) or value.shape[:1] != (count,) or value.element_size() > 8:
            continue
        value = value.detach()
        blocks = value.flatten(2) if value.ndim > 2 else value.reshape(count, -1, 1)
        kept = _mask(td, (*key_tuple(key)[:-1], *key_tuple(mask_key)[-1:]), value.shape[:2])
        found = fingerprint(blocks.contiguous(), None if kept is None else kept.to(value.device)).cpu()
        total = found if total is None else total * 31 + found
    return None if total is None else torch.where(total == 0, 1, total).tolist()


def _mask(td: TensorDictBase, key: Key, shape: Sequence[int]) -> Tensor | None:
    """The attention mask beside an entry, where it fits."""
    mask = td.get(key, None)
    fits = isinstance(mask, Tensor) and tuple(mask.shape) == tuple(shape)
    return on_host(mask) != 0 if fits else None


def whole_numbers(documents: Tensor) -> Tensor:
    """Numbers of documents as int64; anything else is refused."""
    if documents.is_floating_point() or documents.is_complex() or documents.dtype == torch.bool:
        raise ValueError(
            f"SelectTokens expects whole numbers as 'document_id', got {documents.dtype} of shape {tuple(documents.shape)}: "
            f"numbers cut off would make one document of several. Number documents first: pandas.factorize(names)[0]."
        )
    return documents.long()
