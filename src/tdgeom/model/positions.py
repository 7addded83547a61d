"""Positions: one vocabulary for what is captured, edited and turned into rows.

Positions are counted over attended tokens, sequence by sequence, so padding on either side changes nothing. In a step of
``generate`` with a cache they are counted over the whole sequence so far: ``positions=3`` edits the fourth token when it
is computed and nothing in later steps; ``"last"`` is the newest token of every step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.stage_settings import Configured
from tdgeom.model.padding_masks import UNCOUNTED, refuse_unknown
from tdgeom.model.sites import is_pattern
from tdgeom.numerics.hashing import hash_ids

VOCABULARY = (
    "one of all, last, first, cls (the first), last-N (N before the last), patches (of an image; all but the first of a text), "
    "registers, special, random-N, an int, a list of ints, a range, a slice, Between(start, stop), SpecialTokens(ids), "
    "RandomPositions(n, seed) or a boolean (B, T) mask"
)
_NO_IDS = (
    "Remedy: a call with 'input_ids'; of a part that is given embeddings, a call around it whose ids these embeddings are; or "
    "positions= as numbers or a boolean mask."
)
_WORDS = re.compile(r"all|first|cls|last(-\d+)?|patches|registers|special|random-\d+")


@dataclass(frozen=True)
class Between(Configured):
    """The tokens between two pivots: after the first ``start`` and before the next ``stop``.

    A pivot is a token id, a list of ids, or text (with a ``tokenizer``); ``None`` is the beginning or the end.
    ``inclusive`` takes the pivots too. A sequence without the pivot is an error.

    >>> ids = torch.tensor([[5, 7, 1, 2, 9, 3]])
    >>> position_mask(torch.ones_like(ids), Between(7, 9), input_ids=ids)[0].int()
    tensor([[0, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """

    start: tuple[int, ...] | None
    stop: tuple[int, ...] | None
    inclusive: bool = False

    def __init__(
        self,
        start: int | str | Sequence[int] | None,
        stop: int | str | Sequence[int] | None,
        *,
        tokenizer: Any = None,
        inclusive: bool = False,
    ) -> None:
        object.__setattr__(self, "start", _pivot(start, tokenizer))
        object.__setattr__(self, "stop", _pivot(stop, tokenizer))
        object.__setattr__(self, "inclusive", inclusive)
        object.__setattr__(self, "tokenizer", None)  # texts are ids from here on, in the settings too


@answer_guesses
def partition(pivots: Sequence[int | str | Sequence[int]], *, tokenizer: Any = None) -> list[Between]:
    """The parts into which pivots cut a text: before the first, between each two, behind the last.

    >>> [(part.start, part.stop) for part in partition([7, 9])]
    [(None, (7,)), ((7,), (9,)), ((9,), None)]
    """
    edges = [None, *pivots, None]
    return [Between(a, b, tokenizer=tokenizer) for a, b in pairwise(edges)]


@dataclass(frozen=True)
class SpecialTokens(Configured):
    """Special tokens, by their ids; without ids, what ``special_tokens_mask`` in the batch says."""

    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class RandomPositions(Configured):
    """``n`` attended positions drawn without replacement: the same for sequences of one length and one seed."""

    n: int
    seed: int = 0


Positions = str | int | slice | range | Sequence[int] | Between | SpecialTokens | RandomPositions | Tensor


def is_position(value: object) -> bool:
    """Whether a value belongs to the vocabulary.

    >>> is_position("last-2"), is_position("latst")
    (True, False)
    """
    if isinstance(value, str):
        return bool(_WORDS.fullmatch(value))
    if isinstance(value, Tensor):
        return not value.is_floating_point()
    if isinstance(value, list | tuple):
        return all(isinstance(v, int) and not isinstance(v, bool) for v in value) and bool(value)
    return isinstance(
        value, int | slice | range | Between | SpecialTokens | RandomPositions
    ) and not isinstance(value, bool)


def check_positions(value: Any) -> Any:
    """The value, or an error that gives the vocabulary."""
    if not is_position(value):
        raise ValueError(f"positions={value!r} is not understood: use {VOCABULARY}.")
    return value


def needs_ids(value: Any) -> bool:
    """Whether positions are told by the tokens themselves.

    >>> needs_ids(SpecialTokens((5,))), needs_ids("special"), needs_ids("last")
    (True, False, False)
    """
    return isinstance(value, Between) or (isinstance(value, SpecialTokens) and bool(value.ids))


def position_groups(value: Any) -> list[Positions] | None:
    """The groups of a list or mapping of positions; ``None`` for what is one set of positions itself.

    >>> position_groups(("last", (2, 5))), position_groups({"end": "last-1"}), position_groups([2, 5])
    (['last', (2, 5)], ['last-1'], None)
    """
    if is_position(value) or not isinstance(value, list | tuple | Mapping) or not value:
        return None
    return [check_positions(group) for group in (value.values() if isinstance(value, Mapping) else value)]


def position_mask(
    mask: Tensor,
    positions: Positions = "all",
    *,
    input_ids: Tensor | None = None,
    special: Tensor | None = None,
    image: Any = None,
) -> tuple[Tensor, Tensor]:
    """Which positions are meant, and each position's rank among attended tokens: two (B, T) tensors.

    Args:
        mask: (B, T), true where a token is attended.
        positions: a word of the vocabulary; numbers are counted over attended tokens, negative from the end.
        input_ids: (B, T), for pivots and special ids; shorter where the earlier tokens are cached.
        special: (B, T), true at special tokens.
        image: what a site knows of the tokens before an image's patches (``site.image`` of a site that a context has found);
            without, "patches" is all but the first.

    Raises ``ValueError`` for anything else, with the vocabulary, and for tokens that an image does not have.

    >>> mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    >>> position_mask(mask, "last")[0].int().tolist()
    [[0, 0, 1], [0, 1, 0]]
    """
    check_positions(positions)
    if needs_ids(positions):
        _check_ids(positions, input_ids, mask.shape, image=image)
    attended = mask.bool()
    rank = attended.cumsum(-1) - 1
    length = attended.sum(-1, keepdim=True)
    if isinstance(positions, str):
        keep = _word(positions, attended, rank, length, input_ids, special, image)
    elif isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.shape != attended.shape:
            raise ValueError(
                f"positions= expected a boolean mask of shape {tuple(attended.shape)}, got {positions.dtype} of shape "
                f"{tuple(positions.shape)}."
            )
        keep = attended & positions.to(attended.device)
    elif isinstance(positions, slice):
        keep = attended & _in_slice(rank, length, positions)
    elif isinstance(positions, Between):
        keep = attended & _between(attended, input_ids, positions)
    elif isinstance(positions, SpecialTokens):
        keep = attended & _special(attended, input_ids, special, positions.ids)
    elif isinstance(positions, RandomPositions):
        keep = _random(attended, rank, length, positions)
    else:
        numbers = [positions] if isinstance(positions, int) else list(positions)
        keep = torch.zeros_like(attended)
        for number in numbers:
            keep = keep | (attended & (rank == (number if number >= 0 else length + number)))
    return keep, rank


def _check_ids(
    positions: Positions, ids: Tensor | None, shape: Sequence[int], *, fewest: int = 0, image: Any = None
) -> None:
    """Raise where token ids are not those of a site's places (B, S); fewer columns: the earlier tokens are cached."""
    if image:
        raise ValueError(
            f"positions={positions!r} looks for token ids, and this site's places are those of an image. Remedy: 'patches', "
            "numbers or a boolean mask."
        )
    if ids is not None and not (ids.shape[0] == shape[0] and fewest <= ids.shape[1] <= shape[1]):
        raise ValueError(
            f"positions={positions!r} looks for token ids, and 'input_ids' {tuple(ids.shape)} are not those of the site's places "
            f"{(shape[0], fewest or shape[1])}. Remedy: numbers or a boolean mask."
        )


def attended_tokens(mask: Any, value: Tensor) -> Tensor:
    """The mask as booleans beside an activation (B, T, ...); everything is attended where there is none.

    Raises ``ValueError`` where there is a mask that is not known.
    """
    if mask is None:
        return value.new_ones(value.shape[:2], dtype=torch.bool)
    refuse_unknown(mask, "positions are counted over attended tokens")
    return mask.bool().to(value.device)


def selected_tokens(
    value: Tensor,
    positions: Positions,
    mask: Any,
    *,
    input_ids: Tensor | None = None,
    special: Tensor | None = None,
    image: Any = None,
    owner: object,
) -> Tensor:
    """(B, T), true at the positions meant in an activation (B, T, ...), the last T of the S that ``mask`` (B, S) tells.

    ``owner`` is who asks: errors begin with its class.

    >>> selected_tokens(torch.zeros(1, 1, 4), "last-1", torch.tensor([[1, 1]]), owner=None)
    tensor([[False]])
    """
    who = type(owner).__name__
    if (
        positions == "last"
        and value.ndim > 2
        and value.shape[1] == 1
        and getattr(mask, "data", None) == UNCOUNTED
    ):
        return value.new_ones(value.shape[:2], dtype=torch.bool)  # the newest token, however many came before
    if value.ndim < 3:
        raise ValueError(
            f"{who}: positions={positions!r} needs an activation (B, T, ...), got {tuple(value.shape)}: this site has no "
            "positions. Remedy: positions='all'."
        )
    whole = attended_tokens(mask, value)
    if whole.ndim != 2 or whole.shape[0] != value.shape[0] or whole.shape[1] < value.shape[1]:
        raise ValueError(
            f"{who}: positions={positions!r} needs an attention mask (B, S) for the activation {tuple(value.shape)}, got "
            f"{tuple(whole.shape)}. Remedy: call the model with its (B, S) padding mask."
        )
    if isinstance(positions, Tensor) and value.shape[1] < whole.shape[1] > positions.shape[1]:
        # a step with a cache: a mask of the prompt says nothing of the tokens after it
        positions = torch.nn.functional.pad(positions, (0, whole.shape[1] - positions.shape[1]))
    if needs_ids(positions):
        _check_ids(positions, input_ids, whole.shape, fewest=value.shape[1], image=image)
    keep, _ = position_mask(whole, positions, input_ids=input_ids, special=special, image=image)
    return keep[:, whole.shape[1] - value.shape[1] :]


def positions_second(acts: Tensor, site: str | None) -> Tensor:
    """Scores and patterns (B, H, Tq, Tk) as (B, Tq, H, Tk), and back; activations of other sites as they are."""
    return acts.transpose(1, 2) if is_pattern(site) else acts


def _word(
    word: str, attended: Tensor, rank: Tensor, length: Tensor, ids: Any, special: Any, image: Any
) -> Tensor:
    if word == "all":
        return attended
    if word in ("patches", "registers", "cls"):
        begin, end = _of_an_image(word, image)
        return attended & (rank >= begin) & (rank < (attended.shape[1] if end is None else end))
    if word == "first":
        return attended & (rank == 0)
    if word == "special":
        return attended & _special(attended, ids, special, ())
    name, _, number = word.partition("-")
    if name == "random":
        return _random(attended, rank, length, RandomPositions(int(number)))
    return attended & (rank == length - 1 - int(number or 0))


def _of_an_image(word: str, image: Any) -> tuple[int, int | None]:
    """From which rank on, and before which, the tokens are that a word means."""
    if not image:
        if word == "registers":
            raise ValueError(
                "positions='registers' needs the sites of a model of images, as a Capture's sites are. Remedy: a slice, such as "
                "slice(1, 5)."
            )
        return (0, 1) if word == "cls" else (1, None)
    front = image.front()
    if front is None:
        raise ValueError(
            f"positions={word!r} asks which tokens of an image are patches, and no image can be made up for the model to see it. "
            "Remedy: a slice, such as slice(1, None)."
        )
    others = front.count - front.registers
    if (word == "cls" and not others) or (word == "registers" and not front.registers):
        raise ValueError(
            f"positions={word!r}: the model has {others} class tokens and {front.registers} registers before its patches. "
            "Remedy: 'patches', 'first' or a number."
        )
    return {"cls": (0, 1), "registers": (others, front.count), "patches": (front.count, None)}[word]


def _in_slice(rank: Tensor, length: Tensor, positions: slice) -> Tensor:
    step = 1 if positions.step is None else positions.step
    if step < 1:
        raise ValueError(f"positions={positions} needs a positive step: rows keep the order of the text.")
    start = _bound(positions.start, length, torch.zeros_like(length))
    stop = _bound(positions.stop, length, length)
    return (rank >= start) & (rank < stop) & ((rank - start) % step == 0)


def _bound(bound: int | None, length: Tensor, default: Tensor) -> Tensor:
    if bound is None:
        return default
    return torch.full_like(length, bound) if bound >= 0 else (length + bound).clamp(min=0)


def _aligned(value: Tensor, attended: Tensor) -> Tensor:
    """Earlier tokens, which are cached, count as false or -1."""
    missing = attended.shape[1] - value.shape[1]
    fill = False if value.dtype == torch.bool else -1
    return torch.nn.functional.pad(value.to(attended.device), (missing, 0), value=fill) if missing else value


def _special(attended: Tensor, ids: Tensor | None, special: Tensor | None, chosen: Iterable[int]) -> Tensor:
    chosen = tuple(chosen)
    if chosen and ids is not None:
        return _aligned(torch.isin(ids, torch.tensor(chosen, device=ids.device)), attended)
    if chosen:
        raise ValueError(
            f"positions=SpecialTokens({chosen}) looks for token ids, and the model's call has none that are known to be those of "
            f"this site. {_NO_IDS}"
        )
    if special is None:
        raise ValueError(
            "positions='special' needs special_tokens_mask in the batch, or SpecialTokens(ids) with input_ids in the model's "
            "call. Remedy: positions=SpecialTokens(tokenizer.all_special_ids)."
        )
    return _aligned(special.bool(), attended)


def _random(attended: Tensor, rank: Tensor, length: Tensor, positions: RandomPositions) -> Tensor:
    if bool((length < positions.n).any()):
        raise ValueError(
            f"'random-{positions.n}' needs {positions.n} attended tokens in every sequence, got {int(length.min())}."
        )
    score = hash_ids(rank.clamp(min=0), positions.seed).masked_fill(~attended, torch.iinfo(torch.int64).max)
    chosen = score.argsort(dim=-1, stable=True)[:, : positions.n]
    return torch.zeros_like(attended).scatter(1, chosen, True)


def _between(attended: Tensor, ids: Tensor | None, positions: Between) -> Tensor:
    if ids is None:
        raise ValueError(
            "Between(...) looks for pivots in 'input_ids', and the model's call has none that are known to be those of this "
            f"site. {_NO_IDS}"
        )
    ids = _aligned(ids, attended)
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    low, after = torch.full_like(ids[:, :1], -1), torch.full_like(ids[:, :1], 0)
    if positions.start is not None:
        low = _find(ids, positions.start, after, attended)
        after = low + len(positions.start)
        low = low - 1 if positions.inclusive else after - 1
    high = torch.full_like(low, ids.shape[1])
    if positions.stop is not None:
        high = _find(ids, positions.stop, after, attended)
        high = high + len(positions.stop) if positions.inclusive else high
    return (place > low) & (place < high)


def _find(ids: Tensor, pivot: tuple[int, ...], after: Tensor, attended: Tensor) -> Tensor:
    found = torch.zeros_like(attended)
    if ids.shape[1] >= len(pivot):
        windows = ids.unfold(1, len(pivot), 1)
        match = (windows == torch.tensor(pivot, device=ids.device)).all(-1)
        found[:, : match.shape[1]] = match
    found &= attended & (torch.arange(ids.shape[1], device=ids.device) >= after)
    missing = (~found.any(-1)).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"the pivot {list(pivot)} was not found in the sequences {missing[:8]} of the batch (behind the pivot before "
            f"it). Remedy: another pivot, or positions counted in tokens."
        )
    return found.int().argmax(-1, keepdim=True)


def _pivot(value: Any, tokenizer: Any) -> tuple[int, ...] | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return None if value is None else (value,)
    if isinstance(value, str):
        if tokenizer is None:
            raise ValueError(f"Between: the text pivot {value!r} needs tokenizer=.")
        return tuple(tokenizer.encode(value, add_special_tokens=False))
    return tuple(int(v) for v in value)
