"""Captures that stay small, and the specification that says how."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import models
import tdgeom as tg
from tdgeom.model.aggregate import aggregate_positions, group_attention
from tdgeom.model.capture import Capture


def padded():
    ids, mask = models.text_batch()["input_ids"], torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_means_leave_padding_out():
    model, batch = models.llama(), padded()
    capture = Capture(model, ["residual_output", "z", "attn_pattern"], layers=1)
    whole = capture(TensorDict(batch))["acts"]
    td = tg.AggregateActs(capture.sites, reduce="mean")(capture(TensorDict(batch)))["acts"]
    expected = [whole["residual_output.1"][i][batch["attention_mask"][i].bool()].mean(0) for i in range(3)]
    torch.testing.assert_close(td["residual_output.1"], torch.stack(expected))
    assert td["z.1"].shape == (3, 4, 4)
    patterns = [whole["attn_pattern.1"][i][:, batch["attention_mask"][i].bool()].mean(1) for i in range(3)]
    torch.testing.assert_close(td["attn_pattern.1"], torch.stack(patterns))
    td = tg.AggregateActs(capture.sites, positions=[0, -1])(capture(TensorDict(batch)))["acts"]
    torch.testing.assert_close(td["residual_output.1"][1], whole["residual_output.1"][1][[3, 6]])
    torch.testing.assert_close(td["attn_pattern.1"][1], whole["attn_pattern.1"][1][:, [3, 6]])
    td = tg.AggregateActs(["residual_output.1"], positions="last", reduce="sum", over_examples="mean")(
        capture(TensorDict(batch))
    )["acts"]
    torch.testing.assert_close(td["residual_output.1"], whole["residual_output.1"][:, -1].mean(0))
    with pytest.raises(ValueError, match=r"select \[7, 4, 7\] tokens.*reduce='mean'"):
        tg.AggregateActs(capture.sites)(capture(TensorDict(batch)))


def test_averages_over_texts_never_mix_tokens_with_padding():
    model, batch = models.llama(), padded()
    for kind in ("residual_output", "attn_pattern"):
        with pytest.raises(
            ValueError, match=r"select \[7, 4, 7\] tokens|same column is another token.*GroupAttention"
        ):
            tg.CaptureSpec(kind, over_examples="mean").build(model)(TensorDict(batch))
    spec = tg.CaptureSpec("attn_pattern", positions="last", over_examples="sum")
    with pytest.raises(ValueError, match="same column is another token"):
        spec.build(model)(TensorDict(batch))
    groups = {"row_groups": {"last": "last"}, "column_groups": {"first": "first"}}
    found = tg.CaptureSpec("attn_pattern", over_examples="mean", **groups).build(model)(TensorDict(batch))
    whole = Capture(model, "attn_pattern")(TensorDict(batch))["acts", "attn_pattern.1"]
    expected = torch.stack(
        [whole[i, :, -1, int(batch["attention_mask"][i].argmax())] for i in range(3)]
    ).mean(0)
    torch.testing.assert_close(found["acts", "attn_pattern.1"].flatten(), expected)


def test_the_mean_of_no_positions_is_no_number():
    found = aggregate_positions(torch.ones(2, 3, 1), torch.tensor([[1, 0, 0], [0, 0, 0]]).bool(), "mean")
    assert found[0].item() == 1.0 and found[1].isnan().all()


def test_the_decoder_has_padding_of_its_own():
    model, batch = models.t5(), padded()
    decoder = {
        "decoder_input_ids": batch["input_ids"][:, :4],
        "decoder_attention_mask": torch.ones(3, 4).long(),
    }
    decoder["decoder_attention_mask"][1, 2:] = 0
    capture = Capture(model, ["encoder.residual_output.1", "decoder.residual_output.1"])
    whole = capture(TensorDict({**batch, **decoder}))["acts"]
    td = tg.AggregateActs(capture.sites, reduce="mean")(capture(TensorDict({**batch, **decoder})))["acts"]
    for site, mask in zip(
        capture.sites, (batch["attention_mask"], decoder["decoder_attention_mask"]), strict=True
    ):
        expected = [value[keep.bool()].mean(0) for value, keep in zip(whole[site], mask)]
        torch.testing.assert_close(td[site], torch.stack(expected))


def test_nan_at_padding_reaches_no_mean():
    value = torch.tensor([[[1.0], [torch.nan]]])
    assert aggregate_positions(value, torch.tensor([[True, False]]), "mean").item() == 1.0
    half = aggregate_positions(torch.full((1, 4000, 1), 60.0).half(), torch.ones(1, 4000).bool(), "sum")
    assert half.item() == 240_000


def test_groups_of_attention():
    pattern = torch.rand(2, 3, 5, 5).softmax(-1)
    rows = [torch.rand(2, 5) > 0.3 for _ in range(2)]
    cut = torch.rand(2, 5) > 0.5
    out = group_attention(pattern, rows, [cut, ~cut])
    for b in range(2):
        for r, mask in enumerate(rows):
            expected = pattern[b][:, mask[b]][:, :, cut[b]].sum(-1).mean(-1)
            torch.testing.assert_close(out[b, :, r, 0], expected)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 3, 2))
    model, batch = models.llama(), padded()
    capture = Capture(model, "attn_pattern")
    stage = tg.GroupAttention(capture.sites, {"last": "last"}, {"first": "first", "rest": "patches"})
    td = stage(capture(TensorDict(batch)))["acts"]
    whole = capture(TensorDict(batch))["acts", "attn_pattern.2"]
    assert td["attn_pattern.2"].shape == (3, 4, 1, 2)
    torch.testing.assert_close(td["attn_pattern.2"][1, :, 0, 0], whole[1, :, -1, 3])
    torch.testing.assert_close(td["attn_pattern.2"].sum(-1), torch.ones(3, 4, 1))


def test_groups_of_positions_in_one_aggregation():
    """The last token, and the mean of the third and the sixth, counted over attended tokens; in a list or by name."""
    model, batch = models.llama(), padded()
    batch["attention_mask"][1, :3] = torch.tensor([0, 1, 1])
    capture = Capture(model, ["residual_output", "attn_pattern"], layers=1)
    whole = capture(TensorDict(batch))["acts"]
    for positions in (("last", (2, 5)), ["last", [2, 5]], {"end": "last", "two": (2, 5)}):
        td = tg.AggregateActs(capture.sites, positions=positions, reduce="mean")(capture(TensorDict(batch)))[
            "acts"
        ]
        for i, start in enumerate([0, 1, 0]):
            x, a = whole["residual_output.1"][i], whole["attn_pattern.1"][i]
            expected = torch.stack([x[-1], (x[start + 2] + x[start + 5]) / 2])
            torch.testing.assert_close(td["residual_output.1"][i], expected)
            pattern = torch.stack([a[:, -1], (a[:, start + 2] + a[:, start + 5]) / 2], 1)
            torch.testing.assert_close(td["attn_pattern.1"][i], pattern)
    sums = tg.AggregateActs(
        ["residual_output.1"], positions=["first", "all"], reduce="sum", over_examples="mean"
    )
    td = sums(capture(TensorDict(models.text_batch())))["acts", "residual_output.1"]
    whole = capture(TensorDict(models.text_batch()))["acts", "residual_output.1"]
    torch.testing.assert_close(td, torch.stack([whole[:, 0], whole.sum(1)], 1).mean(0))
    spec = tg.CaptureSpec("residual_output", positions=["last", (2, 5)], reduce="mean")
    assert spec.build(model)(TensorDict(batch))["acts", "residual_output.0"].shape == (3, 2, models.WIDTH)
    with pytest.raises(ValueError, match="reduce='mean' or 'sum'"):
        tg.AggregateActs(capture.sites, positions=["last", (2, 5)])
    with pytest.raises(ValueError, match="one of all, last"):
        tg.AggregateActs(capture.sites, positions=["last", "frist"], reduce="mean")
    listed = tg.GroupAttention(["attn_pattern.1"], ["last", (2, 5)], ["all"])
    named = tg.GroupAttention(["attn_pattern.1"], {"end": "last", "two": (2, 5)}, {"all": "all"})
    batch = TensorDict(models.text_batch())
    found = [stage(capture(batch.copy()))["acts", "attn_pattern.1"] for stage in (listed, named)]
    assert torch.equal(*found)
    assert found[0].shape == (3, 4, 2, 1)
    with pytest.raises(ValueError, match="rows are groups"):
        tg.GroupAttention(["attn_pattern.1"], [2, 5])


def test_a_spec_says_it_all():
    model, batch = models.llama(), TensorDict(padded())
    spec = tg.CaptureSpec(
        ["residual_output", "attn_pattern"],
        layers=[0, -1],
        positions=tg.Between(None, None),
        reduce="mean",
        row_groups={"last": "last", "late": slice(-2, None)},
        column_groups={"first": "first"},
        model_outputs="logits",
    )
    twin = tg.CaptureSpec.from_json(spec.to_json(indent=1))
    assert twin == spec
    td = twin.build(model)(batch.copy())
    assert td["acts", "residual_output.2"].shape == (3, models.WIDTH)
    assert td["acts", "attn_pattern.0"].shape == (3, 4, 2, 1)
    assert td["logits"].shape == (3, 7, models.VOCAB)
    plain = tg.CaptureSpec("z", heads=1, layers=slice(1, None))
    assert tg.CaptureSpec.from_dict(plain.to_dict()) == plain
    td = plain.build(model)(batch.copy())
    assert td["acts"].keys() == {"z.1", "z.2"}
    assert td["acts", "z.1"].shape == (3, 7, 1, 4)
    batch = TensorDict(models.text_batch())
    over = tg.CaptureSpec("attn_pattern", over_examples="mean").build(model)(batch.copy())[
        "acts", "attn_pattern.0"
    ]
    torch.testing.assert_close(
        over, Capture(model, "attn_pattern.0")(batch.copy())["acts", "attn_pattern.0"].mean(0)
    )
    for settings, match in (
        ({"positions": "lst"}, "one of all, last"),
        ({"reduce": "max"}, "'mean', 'sum' or None"),
    ):
        with pytest.raises(ValueError, match=match):
            tg.CaptureSpec(**settings)
    with pytest.raises(ValueError, match="has no \\['site'\\]"):
        tg.CaptureSpec.from_dict({"site": "z"})


@pytest.mark.parametrize("over_rows", ["mean", "sum"])
@pytest.mark.parametrize("over_columns", ["mean", "sum"])
def test_groups_as_means_and_sums_also_in_a_run(over_rows, over_columns):
    """Against loops over rows and columns; the stage in a run, and the spec that builds it, give the same batch by batch."""
    model = models.gpt2()
    loader = [models.text_batch(2, 5), models.text_batch(3, 7)]
    loader[1]["attention_mask"][0, 5:] = 0
    how, site = {"over_rows": over_rows, "over_columns": over_columns}, "attn_pattern.1"
    rows, columns = {"end": "last", "late": slice(2, None)}, {"first": [0, 1], "rest": slice(2, None)}
    expected = []
    for batch in loader:
        patterns = tg.Capture(model, site)(TensorDict(batch))["acts", site].double()
        for pattern, length in zip(patterns, batch["attention_mask"].sum(1).tolist(), strict=True):
            cells = []
            for chosen in ([length - 1], range(2, length)):
                for keys in ([0, 1], range(2, length)):
                    mass = torch.stack([pattern[:, q, k] for q in chosen for k in keys], -1).sum(-1)
                    mass = mass / (len(chosen) if over_rows == "mean" else 1)
                    cells.append(mass / (len(keys) if over_columns == "mean" else 1))
            expected.append(torch.stack(cells, -1).reshape(-1, 2, 2))
    right = torch.stack(expected).mean(0)
    spec = tg.CaptureSpec([site], row_groups=rows, column_groups=columns, **how)
    assert tg.CaptureSpec.from_json(spec.to_json()) == spec
    stages = [tg.Capture(model, site), tg.GroupAttention([site], rows, columns, **how)]
    for pipeline in (stages, list(spec.build(model))):
        mean = tg.StreamingMean(in_keys=[("acts", site)])
        found = tg.run(TensorDictSequential(*pipeline, mean), loader, progress=False)["mean", "mean"]
        torch.testing.assert_close(found.reshape(right.shape), right, rtol=1e-5, atol=1e-7)
    for wrong in (how | {"over_rows": "max"}, how | {"over_columns": None}):
        for make in (tg.GroupAttention, lambda sites, r, **w: tg.CaptureSpec(sites, row_groups=r, **w)):
            with pytest.raises(ValueError, match="over_rows= and over_columns= expect 'mean' or 'sum'"):
                make([site], rows, **wrong)
        masks = [torch.ones(1, 2).bool()]
        with pytest.raises(ValueError, match="expects 'mean' or 'sum'"):
            group_attention(torch.ones(1, 1, 2, 2), masks, masks, **wrong)
    with pytest.raises(ValueError, match="columns of attention go with row_groups="):
        tg.CaptureSpec([site], column_groups=columns)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_reduced_activations_are_rows_of_a_run(reduce):
    """One row a text into a covariance: what reducing batch by batch and joining gives."""
    model, site = models.gpt2(), "residual_output.1"
    loader = [models.text_batch(3, 5), models.text_batch(4, 7)]
    loader[1]["attention_mask"][:, 5:] = 0
    make = lambda: [
        tg.Capture(model, site),
        tg.AggregateActs([site], positions=slice(1, None), reduce=reduce),
    ]
    by_hand = []
    for batch in loader:
        acts = tg.Capture(model, site)(TensorDict(batch))["acts", site].double()
        weight = batch["attention_mask"].clone()
        weight[:, 0] = 0
        total = (acts * weight[..., None]).sum(1)
        by_hand.append(total / weight.sum(1, keepdim=True) if reduce == "mean" else total)
    rows = torch.cat(by_hand)
    pipeline = [*make(), tg.SelectTokens([site]), tg.ForEach(tg.StreamingCovariance(), [site])]
    found = tg.run(TensorDictSequential(*pipeline), loader, progress=False)["moments", site]
    torch.testing.assert_close(found["mean"], rows.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["covariance"], rows.T.cov(), rtol=1e-4, atol=1e-6)
    assert int(found["count"]) == len(rows)
