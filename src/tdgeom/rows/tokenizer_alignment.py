"""The rows of two models that belong together, where their tokenizers cut the same text differently."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.stage import Stage
from tdgeom.numerics.centring import upcast
from tdgeom.rows.same_documents import SAME_DOCUMENT
from tdgeom.rows.text import padded

__all__ = ["AlignedRows", "PairedTexts", "cut_alike", "matched_ends"]


def matched_ends(
    spans_a: Sequence[tuple[int, int]], spans_b: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Positions of the tokens of both sides that end at the same character: (position in a, position in b).

    At such a place both models have read exactly the same text. Spans of no width (special tokens) match nothing; of several
    tokens that end at one character (the bytes of one letter) the last counts.

    Args:
        spans_a, spans_b: (first character, one past the last) of each token, a tokenizer's ``offset_mapping``.

        >>> matched_ends([(0, 0), (0, 5), (6, 11)], [(0, 2), (2, 5), (6, 9), (9, 11)])
        [(1, 1), (2, 3)]
    """
    ends_a, ends_b = (
        {end: position for position, (start, end) in enumerate(spans) if end > start}
        for spans in (spans_a, spans_b)
    )
    return [(ends_a[end], ends_b[end]) for end in sorted(ends_a.keys() & ends_b.keys())]


def cut_alike(a: Any, b: Any) -> bool:
    """Whether two Hugging Face tokenizers give the same ids for every text.

    They do if they have one vocabulary and one procedure. Fast tokenizers tell their procedure; where one is slow, both cut
    a text made of words and pieces of their vocabulary, in small and large letters, alone and run together.
    """
    if a is b:
        return True
    vocabulary = a.get_vocab()
    if vocabulary != b.get_vocab():
        return False
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (a, b)]
    if None not in backends:
        first, second = (_procedure(backend) for backend in backends)
        return first == second
    return all(_ids(a, text) == _ids(b, text) for text in _texts_of(vocabulary))


def _procedure(backend: Any) -> dict[str, Any]:
    told = json.loads(backend.to_str())
    return {name: told.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "model")}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]  # no warning that the text is long


def _texts_of(vocabulary: dict[str, int], count: int = 600) -> Iterator[str]:
    pieces = [re.sub(r"[\W_]", "", piece) for piece in sorted(vocabulary)]
    pieces = [piece for piece in pieces if piece]
    pieces = pieces[:: max(1, len(pieces) // count)]
    words = " ".join(pieces)
    yield from (words, words.lower(), words.upper(), words.title())
    yield " ".join(x + y for x, y in pairwise(pieces))
    yield " ".join(x + y + z for x, y, z in zip(pieces, pieces[1:], pieces[2:]))
    yield "Na\u00efve caf\u00e9\u2014\uff13,141 don't;  two\tspaces\n\nand \u6771\u4eac \ud55c\uad6d <b>\U0001f642</b>"


class PairedTexts:
    """Documents as batches for two tokenizers, with what matches their tokens.

    Every document is one sequence a side, cut off at ``max_length`` tokens, with one warning. Each batch is a dict with ``"a"``
    and ``"b"`` (``input_ids``, ``attention_mask`` and what else the tokenizer makes), ``document_id`` (B,), and under
    ``"aligned"``: for "characters" ``a`` and ``b`` (B, M) int64, the matched positions, -1 beyond the last; for "document"
    ``a`` (B, Ta) and ``b`` (B, Tb) bool, the positions that are averaged (special tokens are not).

    Args:
        texts: documents; iterable again if the loader is to be read twice.
        tokenizer_a, tokenizer_b: Hugging Face tokenizers; "characters" needs fast ones, whose tokens know their place.
        align: "characters" or "document".
        batch_size: documents a batch. max_length: longest sequence, special tokens included.

    Raises:
        ValueError: "characters" with a slow tokenizer. TypeError: one string instead of documents, or no strings.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer_a: Any,
        tokenizer_b: Any,
        *,
        align: str = "characters",
        batch_size: int = 8,
        max_length: int = 256,
    ) -> None:
        if isinstance(texts, str):
            raise TypeError("PairedTexts expects an iterable of documents, got one string: put it in a list.")
        if align not in ("characters", "document"):
            raise ValueError(f"PairedTexts: align takes 'characters' or 'document', got {align!r}.")
        slow = [t for t in (tokenizer_a, tokenizer_b) if not getattr(t, "is_fast", False)]
        if align == "characters" and slow:
            raise ValueError(
                f"PairedTexts: align='characters' needs tokenizers that know where each token stands in the text (fast ones), "
                f"got {type(slow[0]).__name__}. Take align='document'."
            )
        self.texts, self.tokenizers, self.align = texts, (tokenizer_a, tokenizer_b), align
        self.batch_size, self.max_length = batch_size, max_length
        self.part = (0, 1)  # see DataSource

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._told = False
        part, parts = self.part
        numbered = (
            (index * parts + part, text) for index, text in enumerate(self.texts) if _document(text).strip()
        )
        while group := list(islice(numbered, self.batch_size)):
            yield self._batch([index for index, _ in group], [text for _, text in group])

    def _batch(self, numbers: list[int], texts: list[str]) -> dict[str, Any]:
        sides = [self._tokenized(tokenizer, texts) for tokenizer in self.tokenizers]
        if self.align == "characters":
            matched = [matched_ends(a, b) for a, b in zip(*(spans for _, _, spans in sides))]
            longest = max(map(len, matched), default=0)
            places = torch.full((2, len(texts), longest), -1, device="cpu")
            for row, pairs in enumerate(matched):
                matches = torch.tensor(pairs, dtype=torch.int64, device="cpu").reshape(-1, 2)
                places[:, row, : len(pairs)] = matches.T
            aligned = {"a": places[0], "b": places[1]}
        else:
            aligned = {side: words for side, (_, words, _) in zip("ab", sides)}
        batch = {side: inputs for side, (inputs, _, _) in zip("ab", sides)}
        return {**batch, "aligned": aligned, "document_id": torch.tensor(numbers, device="cpu")}

    def _tokenized(
        self, tokenizer: Any, texts: list[str]
    ) -> tuple[dict[str, Tensor], Tensor, list[list[tuple[int, int]]]]:
        """Inputs of the model, which positions are words of the text, and each token's span of characters."""
        spans = self.align == "characters"
        made = tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length,
            return_special_tokens_mask=True,
            return_offsets_mapping=spans,
        )
        self._warn_of_cuts(tokenizer, texts, made["input_ids"])
        fields = ("input_ids", "token_type_ids", "special_tokens_mask")
        batch = padded({name: made[name] for name in fields if name in made}, tokenizer)
        words = batch.pop("special_tokens_mask") == 0
        return batch, words & batch["attention_mask"].bool(), made["offset_mapping"] if spans else []

    def _warn_of_cuts(self, tokenizer: Any, texts: list[str], ids: list[list[int]]) -> None:
        for text, row in zip(texts, ids):
            if not self._told and len(row) == self.max_length < len(_ids(tokenizer, text)):
                self._told = True
                warnings.warn(
                    f"PairedTexts: a document has {len(_ids(tokenizer, text)):,} tokens: here and in others what is beyond "
                    f"max_length={self.max_length} is left out. "
                    f"Split long documents, or raise max_length where the models take more.",
                    stacklevel=2,
                )


def _document(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(
            f"PairedTexts needs documents as strings, got {type(text).__name__}: give the texts themselves, not their batches."
        )
    return text


class AlignedRows(Stage):
    """Rows of two models' activations that belong together: matched tokens, or the means of documents.

    Args:
        sites_a, sites_b: the sites of either model.
        align: "characters" takes the tokens at the positions in ``("aligned", "a" | "b")`` (B, M), -1 for none;
            "document" the mean over the positions where ``("aligned", "a" | "b")`` (B, T) is True.
        documents: write ``("carried", "document_id")`` (N,) too: the sequence, and of a copy the first that is the same, where
            ``run`` has found it to be one.

    Reads ``("acts", site)`` (B, T, D), ``("aligned", side)`` and ``"sequence_id"`` (B,); writes ``("tokens", site)`` (N, D)
    and ``"row_id"``: sequence << 20 | number of the match.

        >>> from tensordict import TensorDict
        >>> acts = {"a/x": torch.arange(3.0).reshape(1, 3, 1), "b/x": torch.arange(4.0).reshape(1, 4, 1)}
        >>> places = {"a": torch.tensor([[1, 2, -1]]), "b": torch.tensor([[1, 3, -1]])}
        >>> td = TensorDict({"acts": acts, "aligned": places, "sequence_id": torch.tensor([7])})
        >>> td = AlignedRows(["a/x"], ["b/x"])(td)
        >>> td["tokens", "a/x"].flatten().tolist(), td["tokens", "b/x"].flatten().tolist()
        ([1.0, 2.0], [1.0, 3.0])
    """

    def __init__(
        self,
        sites_a: Sequence[str],
        sites_b: Sequence[str],
        *,
        align: str = "characters",
        documents: bool = False,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        names = [*map(str, sites_a), *map(str, sites_b)]
        carried: list[Key] = [("carried", "document_id")] if documents else []
        same = [SAME_DOCUMENT] if documents else []
        acts: list[Key] = [("acts", name) for name in names]
        super().__init__(
            reads=[*acts, ("aligned", "a"), ("aligned", "b"), "sequence_id", *same],
            optional=same,
            writes=[*(("tokens", name) for name in names), *carried, "row_id"],
            in_keys=in_keys,
            out_keys=out_keys,
        )
        self.align, self.documents = align, documents
        self._sides = ["a"] * len(sites_a) + ["b"] * len(sites_b)

    def compute(self, *inputs: Tensor) -> list[Tensor]:
        """The rows of every site, and their ids."""
        acts = inputs[: len(self._sides)]
        place_a, place_b, sequence, *same = inputs[len(self._sides) :]
        places = {"a": place_a.to(acts[0].device), "b": place_b.to(acts[0].device)}
        sequence = sequence.to(acts[0].device).long()
        if self.align == "document":
            used = places["a"].any(-1) & places["b"].any(-1)
            rows = [_means(value, places[side])[used] for value, side in zip(acts, self._sides)]
            return [*rows, *self._documents(same, sequence, used), (sequence << POSITION_BITS)[used]]
        sample, number = (places["a"] >= 0).nonzero(as_tuple=True)
        rows = [value[sample, places[side][sample, number]] for value, side in zip(acts, self._sides)]
        ids = (sequence[sample] << POSITION_BITS) | number
        return [*rows, *self._documents(same, sequence, sample), ids]

    def _documents(self, same: Sequence[Tensor | None], sequence: Tensor, chosen: Tensor) -> list[Tensor]:
        """Each row's document, where that is asked for."""
        told = next((one for one in same if one is not None), None)
        return [(sequence if told is None else told.to(sequence.device))[chosen]] if self.documents else []


def _means(value: Tensor, where: Tensor) -> Tensor:
    value = upcast(value)
    total = torch.where(where.unsqueeze(-1), value, torch.zeros_like(value)).sum(1)
    return total / where.sum(-1, keepdim=True).clamp(min=1)
