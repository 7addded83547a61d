"""Masks of every form say which tokens are attended, or that they do not say it."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from transformers.masking_utils import create_causal_mask

import models
import tdgeom as tg
from tdgeom.model.padding_masks import UNSEEN, token_mask, unknown_mask


def of_lengths(lengths, width, side):
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, slice(width - n, width) if side == "left" else slice(0, n)] = True
    return mask


def causal(mask, past=0, room=0, window=None):
    """(B, 1, Tq, Tk): what queries behind ``past`` tokens may see, with ``room`` for more keys."""
    width = mask.shape[1]
    order = torch.ones(width, width, dtype=torch.bool).tril()
    if window is not None:
        order &= torch.ones(width, width, dtype=torch.bool).triu(1 - window)
    allowed = (order[None] & mask[:, None, :])[:, past:]
    return torch.nn.functional.pad(allowed, (0, room))[:, None]


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    room=st.integers(0, 3),
    window=st.sampled_from([None, 2, 4]),
    form=st.sampled_from(["bool", "additive", "small", "no head axis", "mapping", "open rows"]),
)
def test_a_causal_bias_tells_the_padding(lengths, side, room, window, form):
    mask = of_lengths(lengths, 6, side)
    bias = causal(mask, room=room, window=window)
    if form == "open rows":  # a softmax over nothing is no number, so rows of padding may look everywhere
        bias = bias | ~bias.any(-1, keepdim=True)
    if form in ("additive", "small"):
        lowest = torch.finfo(torch.float32).min if form == "additive" else -1e4
        bias = torch.where(bias, 0.0, lowest)
    bias = bias[:, 0] if form == "no head axis" else bias
    bias = {"full_attention": bias, "other": None} if form == "mapping" else bias
    assert torch.equal(token_mask(bias, len(lengths), 6, 0), mask)
    if room == 0 or side == "left" or 6 in lengths:
        assert torch.equal(
            token_mask(bias, len(lengths), 6), mask
        )  # the newest token tells how many there are


@given(
    lengths=st.lists(st.integers(3, 6), min_size=1, max_size=4),
    past=st.integers(1, 5),
    room=st.integers(0, 3),
)
def test_a_step_with_a_cache_of_fixed_size(lengths, past, room):
    mask = of_lengths(lengths, 6, "left")
    bias = causal(mask, past=past, room=room)
    assert torch.equal(token_mask(bias, len(lengths), 6 - past, past), mask)
    assert torch.equal(token_mask(bias, len(lengths), 6 - past), mask)


def test_masks_of_tokens_and_masks_of_queries():
    mask = of_lengths([2, 4], 4, "right")
    assert torch.equal(token_mask(mask.long(), 2, 4), mask)
    assert torch.equal(token_mask(torch.nn.functional.pad(mask, (0, 3)), 2, 2, past=2), mask)  # room behind
    assert torch.equal(token_mask(torch.where(mask, 0.0, -1e4)[:, None, None], 2, 4), mask)
    assert torch.equal(token_mask(mask[:, None, None].expand(2, 1, 4, 4), 2, 4), mask)


def test_what_does_not_tell_is_none():
    assert token_mask(torch.ones(2, 1, 5, 3).bool(), 2, 5) is None  # a window's keys only
    assert token_mask(torch.ones(1, 1, 5, 5), 1, 5) is None  # ones that allow, or that are added?
    assert token_mask(torch.ones(3, 5), 2, 5) is None and token_mask(torch.ones(5), 2, 5) is None
    assert token_mask(torch.rand(2, 5), 2, 5) is None and token_mask("causal", 2, 5) is None
    assert token_mask(torch.ones(2, 1, 3, 5).bool(), 2, 4) is None  # other queries than tokens


def test_two_texts_in_a_row_are_both_attended():
    two = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()[None, None]
    assert token_mask(two, 1, 5).all() and token_mask(two.tril(), 1, 5).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_masks_that_transformers_makes(implementation):
    config = tf.LlamaConfig(**{**models._LLAMA, "attn_implementation": implementation})
    mask = of_lengths([3, 6, 5], 6, "left")
    bias = create_causal_mask(
        config=config, inputs_embeds=torch.zeros(3, 6, 16), attention_mask=mask.long(), past_key_values=None
    )
    assert torch.equal(token_mask(bias, 3, 6), mask)


def test_an_unknown_mask_is_refused_by_who_needs_one():
    call = {"acts": {"x": torch.zeros(2, 3, 4)}, "attention_mask": unknown_mask(UNSEEN)}
    td = TensorDict(call)
    with pytest.raises(ValueError, match="is padding is not known.*Remedy: the \\(B, T\\) 'attention_mask'"):
        tg.SelectTokens(["x"])(td)
    with pytest.raises(TypeError, match="whether a position is padding is not known"):
        tg.GroupAttention(["attn_pattern.0"], {"a": "last"})(
            td.set(("acts", "attn_pattern.0"), torch.ones(2, 1, 3, 3))
        )
    assert tg.SelectTokens(["x"], mask_key="own")(td.set("own", torch.ones(2, 3)))["row_id"].shape == (6,)
