"""Which positions become rows: masks, positions, specials, pooling, values carried along."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom import functional as F

POSITION = 2**20 - 1
LENGTHS = (5, 3, 1, 4)
T = 7


def texts(pad, dtype=torch.float32, width=2):
    """The same four texts, padded left, right or on both sides; activations name sequence and place."""
    mask = torch.zeros(len(LENGTHS), T, dtype=torch.int64)
    acts = torch.full((len(LENGTHS), T, width), torch.nan, dtype=dtype)
    ids = torch.zeros(len(LENGTHS), T, dtype=torch.int64)
    for i, length in enumerate(LENGTHS):
        start = {"right": 0, "left": T - length, "both": (T - length) // 2}[pad]
        mask[i, start : start + length] = 1
        acts[i, start : start + length] = (10.0 * i + torch.arange(length))[:, None] * torch.tensor([1, -1])[
            :width
        ]
        ids[i, start : start + length] = 100 + 10 * i + torch.arange(length)
    return TensorDict({"acts": {"x": acts, "y": acts * 2}, "attention_mask": mask, "input_ids": ids})


def select(td, **options):
    stage = tg.SelectTokens(["x", "y"], **options)
    counted = stage.count_rows(td)
    out = stage(td.copy())
    assert counted == out["row_id"].shape[0], "ranks count the rows of others' batches this way"
    assert torch.equal(out["tokens", "y"], out["tokens", "x"] * 2)
    return out


def places(out):
    """(sequence, place) of each row, once from the activations and once from the id: they must agree."""
    value = out["tokens", "x"][:, 0].long().tolist()
    from_acts = [(v // 10, v % 10) for v in value]
    from_ids = [(int(i) >> 20, int(i) & POSITION) for i in out["row_id"]]
    assert from_acts == from_ids
    return from_acts


ALL = [(i, p) for i, length in enumerate(LENGTHS) for p in range(length)]
FORMS = [
    ("all", lambda p, n: True),
    ("last", lambda p, n: p == n - 1),
    ("first", lambda p, n: p == 0),
    ("cls", lambda p, n: p == 0),
    ("patches", lambda p, n: p > 0),
    (0, lambda p, n: p == 0),
    (2, lambda p, n: p == 2),
    (-1, lambda p, n: p == n - 1),
    (-2, lambda p, n: p == n - 2),
    (9, lambda p, n: False),
    (-9, lambda p, n: False),
    (slice(1, 3), lambda p, n: p in range(n)[1:3]),
    (slice(None, None, 2), lambda p, n: p in range(n)[::2]),
    (slice(1, None, 2), lambda p, n: p in range(n)[1::2]),
    (slice(-2, None), lambda p, n: p in range(n)[-2:]),
    (slice(None, -1), lambda p, n: p in range(n)[:-1]),
    (slice(-9, 2), lambda p, n: p in range(n)[-9:2]),
    (slice(2, 1), lambda p, n: False),
]


@pytest.mark.parametrize("pad", ["left", "right", "both"])
@pytest.mark.parametrize(("form", "chosen"), FORMS, ids=[str(form) for form, _ in FORMS])
def test_every_form_of_positions_counts_attended_tokens(form, chosen, pad):
    out = select(texts(pad), positions=form)
    assert places(out) == [(i, p) for i, p in ALL if chosen(p, LENGTHS[i])]


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(-8, 8)),
    st.one_of(st.none(), st.integers(-8, 8)),
    st.integers(1, 3),
)
def test_slices_are_pythons(lengths, start, stop, step):
    mask = torch.tensor([[0] * (7 - n) + [1] * n for n in lengths])
    keep, rank = F.selection_mask(mask, slice(start, stop, step))
    for row, ranks, n in zip(keep, rank, lengths):
        assert ranks[row].tolist() == list(range(n)[start:stop:step])


def test_padding_on_either_side_and_none_give_the_same_rows_and_ids():
    left, right = select(texts("left")), select(texts("right"))
    assert torch.equal(left["tokens", "x"], right["tokens", "x"]) and torch.equal(
        left["row_id"], right["row_id"]
    )
    stage, rows, ids = tg.SelectTokens(["x", "y"]), [], []
    for i, length in enumerate(LENGTHS):  # one text a batch, no padding, no sequence_id
        one = texts("right")
        td = TensorDict({"acts": {s: one["acts", s][i : i + 1, :length] for s in ("x", "y")}})
        out = stage(td)
        rows.append(out["tokens", "x"]), ids.append(out["row_id"])
    assert torch.equal(torch.cat(rows), left["tokens", "x"]) and torch.equal(torch.cat(ids), left["row_id"])


def test_sequence_ids_of_the_batch_are_used_and_reset_starts_again():
    td = texts("left").set("sequence_id", torch.tensor([7, 2**30, 0, 5]))
    out = select(td)
    assert [int(i) >> 20 for i in out["row_id"].unique()] == sorted([7] * 5 + [2**30] * 3 + [0] + [5] * 4)
    stage = tg.SelectTokens(["x"])
    first = stage(texts("left"))["row_id"]
    second = stage(texts("left"))["row_id"]
    assert torch.equal(second, first + (len(LENGTHS) << 20))
    stage.reset()
    assert torch.equal(stage(texts("left"))["row_id"], first)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_a_boolean_mask_of_the_batch_chooses(pad):
    td = texts(pad)
    chosen = torch.rand(4, T, generator=torch.Generator().manual_seed(0)) > 0.5
    td["mine"] = chosen
    out = select(td, positions="mine")
    assert len(out["row_id"]) == int((chosen & td["attention_mask"].bool()).sum()) > 0
    assert len(places(out)) and all(place in ALL for place in places(out))
    nested = TensorDict(
        {"acts": td["acts"], "deep": {"mask": chosen.int()}, "attention_mask": td["attention_mask"]}
    )
    assert torch.equal(select(nested, positions=("deep", "mask"))["row_id"], out["row_id"])


def test_a_renamed_mask_key_is_the_one_that_is_read():
    td = texts("left").set("mine", torch.ones(4, T, dtype=torch.bool)).set("other", torch.zeros(4, T).bool())
    stage = tg.SelectTokens(["x"], positions="mine", in_keys=[("acts", "x"), "other"])
    assert len(stage(td.copy())["row_id"]) == stage.count_rows(td) == 0


@pytest.mark.parametrize("pad", ["left", "right", "both"])
def test_skip_first_and_specials(pad):
    td = texts(pad)
    assert places(select(td, skip_first=2)) == [(i, p) for i, p in ALL if p >= 2]
    assert places(select(td, skip_first=1, positions="last")) == [
        (i, n - 1) for i, n in enumerate(LENGTHS) if n > 1
    ]
    special = (td["input_ids"] % 10 == 1) & td["attention_mask"].bool()
    with_mask = td.copy().set("special_tokens_mask", special.long())
    expected = [(i, p) for i, p in ALL if p != 1]
    assert places(select(with_mask, skip_special=True)) == expected
    assert places(select(td, special_ids=[101, 111, 121, 131])) == expected
    assert places(select(with_mask, positions=1, skip_special=True)) == []


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_mean_pooling_ignores_nan_at_padding(pad, dtype):
    out = select(texts(pad, dtype), pool="mean")
    expected = torch.tensor([10.0 * i + (n - 1) / 2 for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(out["tokens", "x"][:, 0].float(), expected)
    assert out["row_id"].tolist() == [i << 20 for i in range(4)]
    assert out["tokens", "x"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out = select(texts(pad), pool="mean", skip_first=3)
    assert [int(i) >> 20 for i in out["row_id"]] == [0, 3] and out["tokens", "x"][:, 0].tolist() == [3.5, 33]


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_also_carries_values_of_tokens_and_of_sequences(pad, positions):
    td = texts(pad)
    td["label"] = torch.arange(4) * 3
    td["surprise"] = td["input_ids"].float() / 2
    td["meta"] = TensorDict({"vector": torch.arange(8.0).reshape(4, 2)})
    td["logits"] = td["input_ids"][..., None].float() + torch.arange(3)
    out = select(td, positions=positions, also=["label", "surprise", ("meta", "vector"), "logits"])
    at = places(out)
    assert out["carried", "label"].tolist() == [3 * i for i, _ in at]
    assert out["carried", "label"].dtype == torch.int64
    assert out["carried", "surprise"].tolist() == [(100 + 10 * i + p) / 2 for i, p in at]
    assert out["carried", "vector"].tolist() == [[2 * i, 2 * i + 1] for i, _ in at]
    assert out["carried", "logits"].tolist() == [[100 + 10 * i + p + k for k in range(3)] for i, p in at]


def test_also_with_pooling_and_without_padding():
    td = texts("left").set("label", torch.arange(4))
    out = select(td, pool="mean", skip_first=3, also=["label"])
    assert out["carried", "label"].tolist() == [0, 3]
    td["surprise"] = torch.zeros(4, T)
    with pytest.raises(
        ValueError, match=r"pool='mean'\) gives one row a sequence, but 'surprise' has a value a token"
    ):
        select(td, pool="mean", also=["surprise"])
    full = TensorDict({"acts": {"x": torch.ones(2, 3, 1)}, "label": torch.tensor([4, 5])})
    out = tg.SelectTokens(["x"], also=["label"])(full)
    assert out["carried", "label"].tolist() == [4, 4, 4, 5, 5, 5]


def test_one_activation_a_sequence_is_one_row():
    acts = torch.arange(8.0).reshape(4, 2)
    td = TensorDict({"acts": {"x": acts}, "label": torch.arange(4)})
    out = tg.SelectTokens(["x"], also=["label"])(td)
    assert torch.equal(out["tokens", "x"], acts) and out["row_id"].tolist() == [i << 20 for i in range(4)]
    assert out["carried", "label"].tolist() == [0, 1, 2, 3]
    # a mask over tokens says nothing about pooled activations
    td = td.set("attention_mask", torch.zeros(4, 5, dtype=torch.int64))
    assert len(tg.SelectTokens(["x"])(td)["row_id"]) == 4


def test_heads_come_side_by_side_and_patterns_are_no_rows():
    value = torch.randn(2, 3, 4, 5)
    td = TensorDict({"acts": {"z.0": value}, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])})
    rows = tg.SelectTokens(["z.0"])(td)["tokens", "z.0"]
    assert torch.equal(rows, value.flatten(2)[td["attention_mask"].bool()])
    # as many heads as tokens: only the site's name tells
    td = TensorDict({"acts": {"b/attn_pattern.0": torch.rand(2, 3, 3, 3)}})
    with pytest.raises(ValueError, match="attention between positions.*GroupAttention"):
        tg.SelectTokens(["b/attn_pattern.0"])(td)


def test_no_mask_means_all_positions_with_a_warning_where_pad_ids_occur():
    td = texts("left")
    del td["attention_mask"]
    td["acts", "x"] = td["acts", "x"].nan_to_num()
    assert len(tg.SelectTokens(["x"])(td.copy())["row_id"]) == 4 * T
    with pytest.warns(UserWarning, match=r"no 'attention_mask' but its input_ids hold the padding id 0"):
        assert len(tg.SelectTokens(["x"], pad_id=0)(td.copy())["row_id"]) == 4 * T
    assert len(tg.SelectTokens(["x"], pad_id=1)(td.copy())["row_id"]) == 4 * T


@pytest.mark.parametrize("form", ["bool", "float"])
def test_the_padding_mask_of_torchs_encoders_says_where_padding_is(form):
    td = texts("left")
    padding = ~td["attention_mask"].bool()
    additive = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    td["src_key_padding_mask"] = padding if form == "bool" else additive
    del td["attention_mask"]
    assert places(select(td)) == ALL
    assert tg.SelectTokens(["x"]).count_rows(td) == len(ALL)
    td["src_key_padding_mask"] = padding.mT
    with pytest.raises(ValueError, match=r"'src_key_padding_mask', \(7, 4\), got \(4, 7\).*batch_first=True"):
        tg.SelectTokens(["x"])(td)
    td["tgt"] = torch.zeros(4, 3, 2)  # an encoder-decoder: whose positions these are is not known
    assert len(tg.SelectTokens(["x"])(td)["row_id"]) == 4 * T


def test_feature_maps_are_no_rows():
    site = "module_output:conv"
    maps = TensorDict({"acts": {site: torch.rand(2, 3, 5, 5)}})
    with pytest.raises(
        ValueError, match=r"\(2, 3, 5, 5\), and nothing says which axis counts channels.*channels='first'"
    ):
        tg.SelectTokens([site])(maps)
    heads = maps.set(
        "input_ids", torch.zeros(2, 3, dtype=torch.int64)
    )  # the ids tell that these are three positions
    assert tg.SelectTokens([site])(heads)["tokens", site].shape == (6, 25)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU())
    capture = tg.Capture(model, "module_output:*", callback=lambda site, x: x.mean((2, 3)))
    pipeline = TensorDictSequential(
        capture, tg.SelectTokens(capture.sites), tg.RowSample(capture.sites, size=9)
    )
    assert tg.run(pipeline, [torch.rand(4, 1, 6, 6)])["sample", "module_output:0"].shape == (4, 3)


def test_the_mask_may_have_another_name_and_type():
    td = texts("left")
    td["decoder_mask"] = td["attention_mask"].float()
    del td["attention_mask"]
    assert places(select(td, mask_key="decoder_mask")) == ALL
    td["deep"] = TensorDict({"mask": td["decoder_mask"].bool()})
    assert places(select(td, mask_key=("deep", "mask"))) == ALL


def test_a_batch_of_padding_only_gives_no_rows():
    td = texts("left")
    td["attention_mask"].zero_()
    td["label"] = torch.arange(4)
    for options in ({}, {"pool": "mean"}, {"positions": "last"}):
        out = select(td, also=["label"], **options)
        assert out["tokens", "x"].shape == (0, 2) and out["row_id"].shape == (0,)
        assert out["row_id"].dtype == torch.int64


def test_steps_of_generate_with_a_cache_are_numbered_on():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    step = TensorDict(
        {
            "acts": {"x": torch.tensor([[[2.0]], [[3.0]]])},
            "input_ids": torch.tensor([[5], [6]]),
            "attention_mask": mask,
            "sequence_id": torch.arange(2),
        }
    )
    out = tg.SelectTokens(["x"])(step)
    assert [int(i) & POSITION for i in out["row_id"]] == [2, 3] and out["tokens", "x"].flatten().tolist() == [
        2,
        3,
    ]


def test_keys():
    stage = tg.SelectTokens(["x", "layer.1"], also=["label", ("meta", "score")], positions="mine")
    told = [
        "attention_mask",
        "src_key_padding_mask",
        "tgt",
        "sequence_id",
        "input_ids",
        "special_tokens_mask",
        "document_id",
        ("tdgeom", "document"),
    ]
    assert stage.in_keys == [("acts", "x"), ("acts", "layer.1"), "label", ("meta", "score"), "mine", *told]
    assert stage.optional_in_keys == told
    rows = [("tokens", "x"), ("tokens", "layer.1"), ("carried", "label"), ("carried", "score")]
    assert stage.out_keys == [*rows, ("carried", "document_id"), "row_id"]
    assert tg.SelectTokens(["x"], also=["input_ids"]).in_keys.count("input_ids") == 1
    stage = tg.SelectTokens(["x"], in_keys=["hidden"], out_keys=["rows", "ids"])
    out = stage(TensorDict({"hidden": torch.ones(2, 3, 1)}))
    assert out["rows"].shape == (6, 1) and out["ids"].shape == (6,)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"positions": True}, ValueError, r"positions=True is not understood: use one of all, last, first"),
        ({"positions": 1.5}, ValueError, r"positions=1.5 is not understood"),
        ({"positions": slice(None, None, -1)}, ValueError, r"needs a positive step"),
        ({"positions": "lats"}, KeyError, r"reads \['lats'\]"),
        ({"also": ["lable"]}, KeyError, r"reads \['lable'\]"),
        ({"skip_special": True}, KeyError, r"'special_tokens_mask' in the batch .*special_ids="),
        (
            {"positions": "input_float"},
            ValueError,
            r"expects a boolean mask of shape \(4, 7\), got torch.float32",
        ),
        (
            {"positions": "wrong_shape"},
            ValueError,
            r"boolean mask of shape \(4, 7\), got torch.bool of shape \(4, 2\)",
        ),
        ({"also": ["scalar"]}, ValueError, r"also=\['scalar'\]\) expects a value a token, \(4, 7\) first"),
        ({"also": ["wrong_batch"]}, ValueError, r"a value a sequence, \(4,\) first; got \(3,\)"),
        ({"also": ["wrong_batch"], "pool": "mean"}, ValueError, r"\(4,\) first; got \(3,\)"),
        ({"mask_key": "bias"}, ValueError, r"'bias' of shape \(B, T\), got \(4, 1, 7, 7\)"),
    ],
)
def test_errors_on_a_batch(options, error, text):
    td = texts("left")
    td["input_float"] = torch.ones(4, T)
    td["wrong_shape"] = torch.ones(4, 2, dtype=torch.bool)
    td["scalar"] = torch.tensor(1)
    td["wrong_batch"] = torch.arange(3)
    td["bias"] = torch.ones(4, 1, T, T)
    with pytest.raises(error, match=text):
        tg.SelectTokens(["x"], **options)(td)


def test_errors_of_shape():
    td = texts("left").set("sequence_id", torch.arange(3))
    with pytest.raises(ValueError, match=r"'sequence_id' of shape \(4,\), got \(3,\)"):
        tg.SelectTokens(["x"])(td)
    one = {"acts": {"x": torch.ones(1, 7, 2)}, "input_ids": torch.arange(7), "sequence_id": torch.arange(7)}
    with pytest.raises(
        ValueError, match=r"input_ids are \(7,\), expected \(B, T\). One sequence is ids\[None\]"
    ):
        tg.SelectTokens(["x"])(TensorDict(one))
    td = texts("left")
    td["acts", "y"] = torch.ones(4, 3, 2)
    with pytest.raises(
        ValueError, match=re.escape("('acts', 'y') of shape (4, 7, D) to fit 'attention_mask'")
    ):
        tg.SelectTokens(["x", "y"])(td)
    td = texts("left").set("attention_mask", torch.ones(4, 9))
    del td["input_ids"]
    with pytest.raises(ValueError, match=r"\('acts', 'x'\) of shape \(4, 9, D\).*got \(4, 7, 2\)"):
        tg.SelectTokens(["x"])(td)
    td = texts("left")
    del td["input_ids"]
    with pytest.raises(KeyError, match=r"special_ids=\[3\]\) needs 'input_ids'"):
        tg.SelectTokens(["x"], special_ids=[3])(td)
    with pytest.raises(ValueError, match=r"up to 2\^20 positions, got T=1048576"):
        tg.SelectTokens(["x"])(TensorDict({"acts": {"x": torch.zeros(1, 1 << 20, 1)}}))


def test_errors_of_settings():
    for options, error, text in (
        ({"pool": "max"}, ValueError, "pool takes 'mean' or None, got 'max'"),
        ({"skip_first": -1}, ValueError, "skip_first must be 0 or more, got -1"),
        ({"also": "label"}, TypeError, "sites and also are lists"),
    ):
        with pytest.raises(error, match=text):
            tg.SelectTokens(["x"], **options)
    with pytest.raises(TypeError, match="sites and also are lists, got 'x'"):
        tg.SelectTokens("x")
    with pytest.raises(ValueError, match="at least one site"):
        tg.SelectTokens([])


def test_a_carried_name_may_be_a_site_s():
    td = TensorDict({"acts": {"label": torch.ones(2, 3, 1)}, "label": torch.tensor([4, 5])})
    out = tg.SelectTokens(["label"], also=["label"])(td)
    assert out["tokens", "label"].shape == (6, 1) and out["carried", "label"].tolist() == [4, 4, 4, 5, 5, 5]


@pytest.mark.parametrize("documents", [torch.tensor([0.5, 1.5]), torch.tensor([True, False])])
def test_document_ids_are_whole_numbers(documents) -> None:
    td = TensorDict(
        {"acts": {"x": torch.randn(2, 3, 4)}, "attention_mask": torch.ones(2, 3), "document_id": documents},
        [],
    )
    with pytest.raises(ValueError, match="expects whole numbers as 'document_id'"):
        tg.SelectTokens(["x"], documents=True)(td)
