"""The tokens around a token: windows for rows, and their text."""

from __future__ import annotations

import pytest
import torch

import tdgeom as tg
from tdgeom import functional as F


def test_windows():
    ids = torch.tensor([[5, 6, 7], [8, 9, 3]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    out = tg.ContextWindow(before=1, after=2)(input_ids=ids, attention_mask=mask)
    assert out.shape == (2, 3, 4)
    assert out[1].tolist() == [[-1, -1, 9, 3], [-1, 9, 3, -1], [9, 3, -1, -1]]
    with pytest.raises(ValueError, match="0 or more"):
        tg.ContextWindow(before=-1)


def test_context_of_a_position_that_is_not_there():
    with pytest.raises(ValueError, match="attended tokens"):
        F.token_context(5, [[1, 2]], str)
    assert (
        F.token_context((1 << 20) | 0, [[1], [2, 3, 4]], lambda ids: "-".join(map(str, ids)), window=1)
        == "[[2]] 3"
    )
