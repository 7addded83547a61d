"""One vocabulary of positions, counted over attended tokens."""

from __future__ import annotations

import json

import pytest
import torch
from tensordict import TensorDict

import tdgeom as tg
from tdgeom.model.positions import (
    Between,
    RandomPositions,
    SpecialTokens,
    partition,
    position_mask,
)

LENGTHS = [6, 4, 5]
IDS = torch.tensor([[9, 10, 7, 11, 8, 12], [9, 7, 10, 8, 0, 0], [7, 9, 10, 8, 11, 0]])


def padded(side):
    """(ids, mask) with 8 columns, padded on one side."""
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, n in enumerate(LENGTHS):
        span = slice(8 - n, 8) if side == "left" else slice(0, n)
        ids[row, span], mask[row, span] = IDS[row, :n], 1
    return ids, mask


def ranks(keep, rank):
    return [rank[row][keep[row]].tolist() for row in range(len(keep))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
        ("first", [[0], [0], [0]]),
        ("cls", [[0], [0], [0]]),
        ("last", [[5], [3], [4]]),
        ("last-0", [[5], [3], [4]]),
        ("last-2", [[3], [1], [2]]),
        ("patches", [[1, 2, 3, 4, 5], [1, 2, 3], [1, 2, 3, 4]]),
        (4, [[4], [], [4]]),
        (-2, [[4], [2], [3]]),
        ([0, -1, 0], [[0, 5], [0, 3], [0, 4]]),
        (range(1, 3), [[1, 2], [1, 2], [1, 2]]),
        (slice(None, None, 2), [[0, 2, 4], [0, 2], [0, 2, 4]]),
        (slice(-2, None), [[4, 5], [2, 3], [3, 4]]),
        (Between(7, 8), [[3], [2], [1, 2]]),
        (Between(7, 8, inclusive=True), [[2, 3, 4], [1, 2, 3], [0, 1, 2, 3]]),
        (Between(None, 7), [[0, 1], [0], []]),
        (Between([10, 7], None), None),
        (SpecialTokens((7, 8)), [[2, 4], [1, 3], [0, 3]]),
    ],
)
def test_words(positions, expected, side):
    ids, mask = padded(side)
    if expected is None:
        with pytest.raises(ValueError, match=r"pivot \[10, 7\] was not found in the sequences \[1, 2\]"):
            position_mask(mask, positions, input_ids=ids)
        return
    assert ranks(*position_mask(mask, positions, input_ids=ids)) == expected


def test_special_and_masks_and_draws():
    ids, mask = padded("left")
    special = torch.zeros_like(ids)
    special[:, 7] = 1
    assert ranks(*position_mask(mask, "special", special=special)) == [[5], [3], [4]]
    chosen = torch.rand(3, 8) > 0.5
    assert torch.equal(position_mask(mask, chosen)[0], chosen & mask.bool())
    drawn = ranks(*position_mask(mask, "random-3"))
    assert [len(set(row)) for row in drawn] == [3, 3, 3]
    assert drawn == ranks(*position_mask(padded("right")[1], "random-3"))
    draws = [tuple(map(tuple, ranks(*position_mask(mask, RandomPositions(2, seed))))) for seed in range(20)]
    assert len(set(draws)) > 5
    assert ranks(*position_mask(mask[:1], "random-3")) == drawn[:1]  # alone or in a batch
    with pytest.raises(ValueError, match="5 attended tokens"):
        position_mask(mask, "random-5")


def test_partition_covers_everything_but_the_pivots():
    ids, mask = padded("right")
    parts = [position_mask(mask, part, input_ids=ids)[0].int() for part in partition([7, 8])]
    assert torch.equal(sum(parts), (mask.bool() & ~torch.isin(ids, torch.tensor([7, 8]))).int())
    assert sum(parts).max() == 1

    class Tokenizer:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"<a>": [7], "<b>": [8]}[text]

    assert partition(["<a>", "<b>"], tokenizer=Tokenizer()) == partition([7, 8])
    with pytest.raises(ValueError, match="needs tokenizer="):
        Between("<a>", None)


@pytest.mark.parametrize("wrong", ["lst", "last-", "random", True, 1.5, [0.5], None, "last--1"])
def test_unknown_words_give_the_vocabulary(wrong):
    with pytest.raises(ValueError, match="not understood: use one of all, last, first.*random-N.*Between"):
        position_mask(torch.ones(1, 3), wrong)
    with pytest.raises(ValueError, match="vocabulary|not understood"):
        tg.Steer(torch.ones(2), positions=wrong)


def test_cached_tokens_count():
    mask = torch.ones(2, 6)
    ids = torch.tensor([[7], [9]])  # the newest tokens only
    assert position_mask(mask, SpecialTokens((7,)), input_ids=ids)[0].int().tolist() == [
        [0] * 5 + [1],
        [0] * 6,
    ]


@pytest.mark.parametrize(
    "positions",
    [
        "last-2",
        3,
        [0, -1],
        slice(1, None),
        range(2, 5),
        Between([1, 2], None),
        SpecialTokens((3,)),
        RandomPositions(2, 5),
    ],
)
def test_json(positions):
    assert through_json(positions) == positions
    mask = torch.tensor([[True, False]])
    assert torch.equal(through_json(mask), mask)


def through_json(positions):
    settings = tg.Scale(2.0, positions=positions).settings()
    return tg.Scale.from_settings(json.loads(json.dumps(settings))).positions


def test_select_tokens_speaks_it():
    ids, mask = padded("left")
    x = torch.randn(3, 8, 2)
    batch = TensorDict({"acts": {"x": x}, "attention_mask": mask, "input_ids": ids})
    for positions in ("last-1", Between(7, 8), SpecialTokens((7,)), [0, 2], "random-2"):
        td = tg.SelectTokens(["x"], positions=positions)(batch.copy())
        keep, _ = position_mask(mask, positions, input_ids=ids)
        assert torch.equal(td["tokens", "x"], x[keep])
