"""Answers as token ids: numbers, words of a tokenizer, differences of two, one for every text or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Token = int | str
Side = Token | Sequence[Token] | Tensor  # of a difference: one token, or one for each text
Answer = Token | tuple[Side, Side]
Answers = Answer | Sequence[Answer] | Tensor


def answer_tokens(
    answers: Answers, texts: int, *, tokenizer: Any = None, per_text: bool | None = None
) -> tuple[Tensor, Tensor, list[list[str]]]:
    """Token ids (B, K), the answers as sums of them (A, K), and their names, A for each of B texts.

    An answer is an id or a word, or a tuple of two: the first less the second, each one token, or a list, array or tensor of
    one for each text. A list holds several answers, which every text is asked; with ``per_text`` one for each text. A tensor or
    array (B,) holds one for each text, (B, A) several.

    Raises ``ValueError`` for words of more than one token, and for a list as long as there are texts that could be either.

    >>> answer_tokens([5, (5, 7)], 1)
    (tensor([[5, 5, 7]]), tensor([[ 1,  0,  0],
            [ 0,  1, -1]]), [['5', '5 - 7']])
    """
    asked: list[list[Any]]
    answers = _as_tensor(answers)
    if isinstance(answers, Tensor):
        if (
            answers.is_floating_point()
            or answers.dtype == torch.bool
            or answers.ndim > 2
            or (answers.ndim and len(answers) != texts)
        ):
            raise ValueError(
                f"answers= as a tensor holds ids, (B,) or (B, A) for the {texts} texts, got {answers.dtype} of shape "
                f"{tuple(answers.shape)}."
            )
        own = answers.long().reshape(texts if answers.ndim else 1, -1)
        asked = [list(map(int, row)) for row in own.expand(texts, -1)]
    elif isinstance(answers, list):
        if not answers:
            raise ValueError("answers= names no answer.")
        if per_text is None and len(answers) == texts > 1:
            raise ValueError(
                f"answers= lists {len(answers)} answers for {texts} texts. Remedy: per_text=True, one for each text, or "
                "per_text=False, all of them for every text."
            )
        if per_text and len(answers) != texts:
            raise ValueError(f"per_text=True needs one answer for each of {texts} texts, got {len(answers)}.")
        asked = [[answer] for answer in answers] if per_text else _of_each_text(answers, texts)
    else:
        if per_text:
            raise ValueError(f"per_text=True needs a list with an answer for each text, got {answers!r}.")
        asked = _of_each_text([answers], texts)
    known: dict[str, int] = {}
    pairs = [[_pair(answer, tokenizer, known) for answer in row] for row in asked]
    shapes = {tuple(len(pair) for pair in row) for row in pairs}
    if len(shapes) > 1:
        raise ValueError("answers= mixes tokens and differences from text to text: give all texts one form.")
    ids = torch.tensor([[token for pair in row for token in pair] for row in pairs], device="cpu")
    weights = torch.zeros(len(pairs[0]), ids.shape[1], dtype=torch.long, device="cpu")
    column = 0
    for index, pair in enumerate(pairs[0]):
        for sign in (1, -1)[: len(pair)]:
            weights[index, column] = sign
            column += 1
    return ids, weights, [_told_apart([_name(answer, tokenizer) for answer in row], row) for row in asked]


def _as_tensor(given: Any) -> Any:
    if not isinstance(given, np.ndarray):
        return given
    if given.dtype.kind not in "iu":
        raise ValueError(
            f"answers= as an array holds token ids, integers, got {given.dtype} of shape {given.shape}. Remedy: a list."
        )
    return torch.as_tensor(given.astype(np.int64))


def _of_each_text(answers: Sequence[Any], texts: int) -> list[list[Any]]:
    """Every text's answers: of the sides of a difference that hold a token for each text, its own."""
    told = [tuple(map(_as_tensor, one)) if isinstance(one, tuple) else _as_tensor(one) for one in answers]
    return [
        [tuple(_own(side, text, texts) for side in one) if isinstance(one, tuple) else one for one in told]
        for text in range(texts)
    ]


def _own(side: Any, text: int, texts: int) -> Any:
    if not isinstance(side, list) and not (isinstance(side, Tensor) and side.ndim):
        return side
    if len(side) != texts or (isinstance(side, Tensor) and side.ndim > 1):
        got = f"{len(side)}" if isinstance(side, list) else f"a tensor of shape {tuple(side.shape)}"
        raise ValueError(
            f"a side of a difference in answers= is a token, or one for each of the {texts} texts, got {got}. Remedy: a list of "
            "tuples, where several differences are meant."
        )
    return side[text]


def _pair(answer: Any, tokenizer: Any, known: dict[str, int]) -> list[int]:
    if isinstance(answer, tuple):
        if len(answer) != 2 or any(isinstance(one, tuple) for one in answer):
            raise ValueError(
                f"a tuple in answers= is a difference of two tokens, got {answer!r}. Remedy: a list of several answers."
            )
        return [_token(one, tokenizer, known) for one in answer]
    return [_token(answer, tokenizer, known)]


def _token(token: Any, tokenizer: Any, known: dict[str, int]) -> int:
    if isinstance(token, str):
        if token not in known:
            known[token] = _id_of(token, tokenizer)
        return known[token]
    whole = hasattr(token, "__index__") and not isinstance(token, bool)
    if whole and isinstance(token, Tensor):
        whole = not (token.ndim or token.is_floating_point() or token.dtype == torch.bool)
    if not whole:
        raise ValueError(f"an answer is a token id, a word, or a tuple of two of these, got {token!r}.")
    if token < 0:
        raise ValueError(
            f"an answer is a token id from 0 on, got {int(token)} (labels mark what has none with -100)."
        )
    return int(token.__index__())


def _id_of(word: str, tokenizer: Any) -> int:
    if tokenizer is None:
        raise ValueError(f"the answer {word!r} is text: tokenizer= says which token that is.")
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        pieces = [tokenizer.decode([one]) for one in ids]
        raise ValueError(
            f"an answer is one token, and {word!r} is {len(ids)}: {pieces}. Remedy: a word that is one token (many tokenizers "
            "have one with a space before it), the first of these, or a token's id."
        )
    if ids[0] == getattr(tokenizer, "unk_token_id", None) and word != getattr(tokenizer, "unk_token", None):
        raise ValueError(
            f"the tokenizer does not know the word {word!r}: its token would be {tokenizer.unk_token!r}, as for any other."
        )
    return int(ids[0])


def _told_apart(names: list[str], answers: Sequence[Any]) -> list[str]:
    """The names of several answers; those that read alike with their ids behind them, and no answer twice."""
    if len(set(names)) == len(names):
        return names
    told = [f"{name} [{answer}]" if names.count(name) > 1 else name for name, answer in zip(names, answers)]
    if len(set(told)) < len(told):
        raise ValueError(f"answers= holds an answer twice: {told}.")
    return told


def _name(answer: Any, tokenizer: Any) -> str:
    if isinstance(answer, tuple):
        return " - ".join(_name(one, tokenizer) for one in answer)
    if isinstance(answer, str):
        return answer
    return str(int(answer)) if tokenizer is None else str(tokenizer.decode([int(answer)]))
