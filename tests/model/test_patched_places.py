"""Which places one cell patches: positions of the vocabulary, heads, neurons, sites with a length of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import nn

import models
import tdgeom as tg

LENGTHS = (6, 4)


def texts(seed, lengths=LENGTHS, side="right", width=7):
    """Texts of given lengths; token 7 at position 1 of the first, and 2 of the second."""
    ids = torch.randint(
        10, models.VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        span = slice(width - length, width) if side == "left" else slice(0, length)
        mask[row, span] = 1
        ids[row, span.start + 1 + row] = 7
    return {"input_ids": ids * mask, "attention_mask": mask}


def patched_by_hand(model, module: nn.Module, base, other, change: Callable, argument=True):
    """The logits at each text's last token where ``change(own, other)`` is what a module is given, or gives."""
    seen = {}

    def put(m, args, output=None):
        given = args[0] if argument else (output[0] if isinstance(output, tuple) else output)
        if "x" not in seen:
            seen["x"] = given
            return None
        new = change(given.clone(), seen["x"])
        return (new, *args[1:]) if argument else new

    hang = module.register_forward_pre_hook if argument else module.register_forward_hook
    handle = hang(put)
    with torch.no_grad():
        model(**other)
        logits = model(**base).logits
    handle.remove()
    places = (base["attention_mask"] * torch.arange(logits.shape[1])).argmax(1)
    return logits[torch.arange(len(logits)), places].double()


def only(where):
    """Own values, those of the other run where a mask is true."""
    return lambda own, other: torch.where(
        where.reshape(*where.shape, *[1] * (own.ndim - where.ndim)), other, own
    )


FORMS = [
    (2, [[2], [2]], [2]),
    (-1, [[5], [3]], [-1]),
    ("last", [[5], [3]], [0]),
    ("last-1", [[4], [2]], [0]),
    ("first", [[0], [0]], [0]),
    ([3, 0, -2], [[3, 0, 4], [3, 0, 2]], [3, 0, -2]),
    (slice(1, 4, 2), [[1, 3], [1, 3]], [1, 3]),
    (slice(-2, None), [[4, 5], [2, 3]], [0, 1]),
    (range(2, 4), [[2, 3], [2, 3]], [2, 3]),
    (tg.SpecialTokens((7,)), [[1], [2]], [0]),
    (tg.Between(7, None), [[2, 3, 4, 5], [3, None, None, None]], [0, 1, 2, 3]),
    ("special", [[0], [0]], [0]),
    ("marked", [[1], [3]], [0]),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_form_of_positions_is_a_column_each(side):
    model = models.llama()
    clean, corrupted = texts(1, side=side), texts(2, side=side)
    start = 7 - torch.tensor(LENGTHS) if side == "left" else torch.zeros(2, dtype=torch.long)
    special, marked = torch.zeros(2, 7, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.bool)
    special[torch.arange(2), start] = True
    marked[0, start[0] + 1] = marked[1, start[1] + 3] = True
    extra = {"special_tokens_mask": special, "marked": marked}
    settings = {"answers": (5, 9), "layers": 1, "progress": False}
    known = {}
    for positions, ranks, labels in FORMS:
        out = tg.activation_patching(model, clean, {**corrupted, **extra}, positions=positions, **settings)
        assert out["columns", "residual_input"].tolist() == labels, positions
        assert out["positions", "residual_input"].T.tolist() == [
            [-1 if r is None else r for r in row] for row in ranks
        ]
        got = out["per_example", "residual_input"][0]
        for row, own in enumerate(ranks):
            for column, rank in enumerate(own):
                if rank is None:
                    assert got[column, row].isnan()
                    continue
                if (row, rank) not in known:
                    where = torch.zeros(2, 7, dtype=torch.bool)
                    where[row, start[row] + rank] = True
                    logits = patched_by_hand(model, model.model.layers[1], corrupted, clean, only(where))
                    known[row, rank] = logits[row, 5] - logits[row, 9]
                torch.testing.assert_close(got[column, row], known[row, rank], rtol=1e-4, atol=1e-5)
    groups = {"pivot": tg.SpecialTokens((7,)), "end": slice(-2, None)}
    out = tg.activation_patching(model, clean, corrupted, positions=groups, **settings)
    where = torch.zeros(2, 7, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        where[row, start[row] + length - 2 : start[row] + length] = True
    logits = patched_by_hand(model, model.model.layers[1], corrupted, clean, only(where))
    torch.testing.assert_close(
        out["per_example", "residual_input"][0, 1], logits[:, 5] - logits[:, 9], rtol=1e-4, atol=1e-5
    )


def test_positions_outside_and_lengths_that_differ_are_refused():
    model, clean = models.gpt2(), texts(1)
    settings = {"answers": (5, 9), "progress": False, "layers": 0}
    for positions, match in (
        (6, r"no example has the positions 6; their lengths are \[6, 4\]"),
        ([0, -7], "no example has the positions -7"),
        (torch.zeros(2, 7, dtype=torch.bool), "no example has"),
        (torch.zeros(2, 3, dtype=torch.bool), r"boolean mask of shape \(2, 7\)"),
        (tg.Between(9, None), "pivot .9. was not found"),
        ("tokens_of_mine", "is not understood: use one of all"),
        (True, "is not understood"),
    ):
        with pytest.raises(ValueError, match=match):
            tg.activation_patching(model, clean, texts(2), positions=positions, **settings)
    shorter = texts(3, (4, 3))
    for positions in ("all", "last", -1, slice(1, None), tg.SpecialTokens((7,))):
        with pytest.raises(ValueError, match=r"which position is which\? Remedy: align='start'"):
            tg.activation_patching(model, clean, shorter, positions=positions, **settings)
    with pytest.raises(ValueError, match="which position is which"):
        tg.activation_patching(model, clean, shorter, "z", by="head", **settings)
    with pytest.raises(ValueError, match=r"no example has the positions \[5\] of positions=5 in both runs"):
        tg.activation_patching(model, shorter, clean, positions=5, **settings)
    same = tg.activation_patching(model, clean, shorter, positions=[0, 2], **settings)
    start = tg.activation_patching(model, clean, shorter, align="start", **settings)
    assert torch.equal(same["grid", "residual_input"], start["grid", "residual_input"][:, [0, 2]])
    block = model.transformer.h[0]
    moved = tg.activation_patching(model, clean, shorter, positions="last", align="end", **settings)
    mapped = tg.activation_patching(model, clean, shorter, positions="last", align={-1: -1, 0: 1}, **settings)

    def last(own, other):
        own[0, 3], own[1, 2] = other[0, 5], other[1, 3]
        return own

    logits = patched_by_hand(model, block, shorter, clean, last)
    for out in (moved, mapped):
        torch.testing.assert_close(
            out["per_example", "residual_input"][0, 0], logits[:, 5] - logits[:, 9], rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match="no position 9 of align="):
        tg.activation_patching(model, clean, shorter, align={9: 0}, **settings)


def test_heads_neurons_and_whole_layers():
    """Each by hand: a slice of what the projection behind is given."""
    model, clean, corrupted = models.llama(), texts(1), texts(2)
    settings = {"answers": (5, 9), "layers": 1, "progress": False}
    block = model.model.layers[1]
    both = torch.ones(2, 7, dtype=torch.bool) & clean["attention_mask"].bool()
    last = torch.zeros(2, 7, dtype=torch.bool)
    last[0, 5] = last[1, 3] = True

    def part(features, where):
        def change(own, other):
            new = own.clone()
            new[..., features] = other[..., features]
            return only(where)(own, new)

        return change

    for kind, module, by, given, features, where in (
        ("z", block.self_attn.o_proj, "head", {}, slice(8, 12), both),
        ("z", block.self_attn.o_proj, "head", {"positions": "last"}, slice(8, 12), last),
        ("mlp_act", block.mlp.down_proj, "neuron", {"features": [3, 5, 31]}, [31], both),
        ("mlp_act", block.mlp.down_proj, "neuron", {"features": [3, 5, 31], "positions": "last"}, [31], last),
        ("z", block.self_attn.o_proj, "layer", {"heads": [0, 2]}, [*range(4), *range(8, 12)], both),
        ("mlp_act", block.mlp.down_proj, "layer", {}, slice(None), both),
    ):
        out = tg.activation_patching(model, clean, corrupted, kind, by=by, **given, **settings)
        columns = {"head": [0, 1, 2, 3], "neuron": [3, 5, 31], "layer": [0]}[by]
        assert out["columns", kind].tolist() == columns and out["changed", kind].all()
        logits = patched_by_hand(model, module, corrupted, clean, part(features, where))
        torch.testing.assert_close(
            out["per_example", kind][0, min(2, len(columns) - 1)],
            logits[:, 5] - logits[:, 9],
            rtol=1e-4,
            atol=1e-5,
        )
    with pytest.raises(ValueError, match="by='neuron' needs sites with one axis of features"):
        tg.activation_patching(model, clean, corrupted, "z", by="neuron", **settings)
    with pytest.raises(IndexError, match=r"heads=\[4\] is out of range: there are 4"):
        tg.activation_patching(model, clean, corrupted, "z", heads=[4], **settings)
    with pytest.raises(ValueError, match="give one set of them, not 2"):
        tg.activation_patching(model, clean, corrupted, "z", positions=["last", "first"], **settings)


def test_the_columns_of_a_vision_tower_are_its_own():
    text = {**models._LLAMA, "model_type": "llama", "num_hidden_layers": 2}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    vision |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    # the last layer: of earlier ones a hook of the model's reads the output, in front of a hook by hand
    ids_of_images = {"image_token_index": 5, "image_token_id": 5, "vision_feature_layer": -1}
    config = tf.LlavaConfig(text_config=text, vision_config=vision, **ids_of_images)
    model = models._seeded(tf.LlavaForConditionalGeneration, config)
    ids = torch.randint(10, models.VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[:, 1:5] = 5
    made = torch.Generator().manual_seed(4)
    runs = [
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(2, 3, 8, 8, generator=made),
        }
        for _ in range(2)
    ]
    kinds = ["vision_tower.residual_output", "language_model.residual_output"]
    found = tg.Capture(model, "residual_output").sites
    kinds = [kind for kind in kinds if any(str(site).startswith(kind) for site in found)]
    assert len(kinds) == 2, found
    out = tg.activation_patching(model, *runs, kinds, layers=0, answers=(7, 9), progress=False)
    assert out["columns", kinds[0]].tolist() == list(range(5)) and out["columns", kinds[1]].tolist() == list(
        range(9)
    )
    towers = [
        m
        for n, m in model.named_modules()
        if n.endswith("vision_tower.encoder.layers.0") or n.endswith("vision_model.encoder.layers.0")
    ]
    where = torch.zeros(2, 5, dtype=torch.bool)
    where[:, 3] = True
    logits = patched_by_hand(model, towers[0], runs[1], runs[0], only(where), argument=False)
    torch.testing.assert_close(
        out["per_example", kinds[0]][0, 3], logits[:, 7] - logits[:, 9], rtol=1e-4, atol=1e-5
    )
    patches = tg.activation_patching(
        model, *runs, kinds[0], layers=0, answers=(7, 9), positions="patches", progress=False
    )
    assert patches["columns", kinds[0]].tolist() == [1, 2, 3, 4]
    assert torch.equal(patches["grid", kinds[0]], out["grid", kinds[0]][:, 1:])
    # the text before the image is the same in both runs, and cannot see it
    assert not out["changed", kinds[1]][0, 0].any() and out["changed", kinds[1]][0, 1:].all()
