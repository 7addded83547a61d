"""The rows that drive a unit most, whatever the order of the stream."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import models
import tdgeom as tg
from tdgeom.stream.exemplars import describe_exemplars, top_rows


def brute(values, ids, k):
    """Sort everything by (-value, id)."""
    out = []
    for column in values.T.tolist():
        order = sorted(range(len(column)), key=lambda i: (-column[i], int(ids[i])))[:k]
        out.append(order)
    return torch.tensor(out).T


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 8), st.integers(0, 1000))
def test_top_rows_is_a_sort(n, units, k, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 4, (n, units), generator=generator).float()  # many ties
    ids = torch.randperm(n, generator=generator)
    assert torch.equal(top_rows(values, ids, k), brute(values, ids, min(k, n)))


def rows(n=200, units=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 30, (n, units), generator=generator).float()
    return TensorDict(
        {
            ("tokens", "x"): x,
            ("carried", "context"): torch.arange(n)[:, None] + torch.tensor([-1, 0, 1]),
            "row_id": torch.randperm(n, generator=generator),
        }
    )


def take(td, index):
    return TensorDict({key: td[key][index] for key in td.keys(True, True)})


def test_any_order_any_split_any_shards():
    td = rows()
    stage = tg.MaxActivating("x", k=7)
    whole = stage(td.copy())["exemplars", "x"]
    best = brute(td["tokens", "x"], td["row_id"], 7)
    assert torch.equal(whole["values"], td["tokens", "x"].gather(0, best).T)
    assert torch.equal(whole["row_id"], td["row_id"][best].T)
    assert torch.equal(whole["context"], td["carried", "context"][best].transpose(0, 1))
    order = torch.randperm(200)
    parts = [tg.MaxActivating("x", k=7) for _ in range(3)]
    for part, index in zip(parts, order.split([3, 97, 100])):
        for piece in index.split(41):
            part.update(take(td, piece))
    twin = copy.deepcopy(parts[2])
    twin.load_state_dict(parts[2].state_dict())
    merged = parts[0].merge_(parts[1]).merge_(twin)
    again = merged.publish(TensorDict({}))["exemplars", "x"]
    for name in ("values", "row_id", "context"):
        assert torch.equal(whole[name], again[name]), name
    few = tg.MaxActivating("x", k=500)(td.copy())["exemplars", "x"]
    assert few["values"].shape == (5, 200)
    with pytest.raises(ValueError, match="same"):
        parts[0].merge_(tg.MaxActivating("x", k=8))


def test_units_directions_and_the_smallest():
    td = rows()
    x = td["tokens", "x"]
    chosen = tg.MaxActivating("x", k=3, units=[4, 1])(td.copy())["exemplars", "x", "values"]
    assert torch.equal(chosen, x[:, [4, 1]].sort(0, descending=True).values[:3].T)
    direction = torch.randn(5, 2)
    projected = tg.MaxActivating("x", k=3, directions=direction)(td.copy())["exemplars", "x", "values"]
    torch.testing.assert_close(projected, (x @ direction).sort(0, descending=True).values[:3].T)
    low = tg.MaxActivating("x", k=3, smallest=True)(td.copy())["exemplars", "x", "values"]
    assert torch.equal(low, x.sort(0).values[:3].T)
    with pytest.raises(ValueError, match="not both"):
        tg.MaxActivating("x", units=[0], directions=direction)
    with pytest.raises(ValueError, match="at least 1"):
        tg.MaxActivating("x", k=0)


def test_through_a_run_with_text():
    model, ids = models.gpt2(), models.text_batch(6, 9)["input_ids"]
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    batches = [
        {"input_ids": ids[:4], "attention_mask": mask[:4]},
        {"input_ids": ids[4:], "attention_mask": mask[4:]},
    ]
    capture = tg.Capture(model, "mlp_act.1")
    pipeline = TensorDictSequential(
        tg.ContextWindow(before=2, after=1),
        capture,
        tg.SelectTokens(capture.sites, also=["context"]),
        tg.MaxActivating("mlp_act.1", k=4),
    )
    found = tg.run(pipeline, batches)["exemplars", "mlp_act.1"]
    acts = capture(TensorDict({"input_ids": ids, "attention_mask": mask}))["acts", "mlp_act.1"]
    acts = acts.masked_fill(~mask.bool().unsqueeze(-1), -torch.inf)
    expected = acts.flatten(0, 1).sort(0, descending=True).values[:4].T
    torch.testing.assert_close(found["values"], expected)
    for unit in (0, 17):
        for row, window in zip(found["row_id"][unit].tolist(), found["context"][unit].tolist()):
            sequence, place = row >> 20, row & (2**20 - 1)
            text = [-1, -1, *ids[sequence][mask[sequence].bool()].tolist(), -1]
            assert window == text[place : place + 4]

    class Tokenizer:
        def decode(self, tokens):
            return f"<{tokens[0]}>"

    line = describe_exemplars(found, Tokenizer(), 0, before=2)[0]
    window = found["context"][0, 0].tolist()
    assert f"[<{window[2]}>]" in line
    assert "-1" not in line.split("  ", 1)[1]


def test_heads_by_the_length_of_their_contribution():
    model = models.llama()
    capture = tg.Capture(model, "head_output", layers=[1], callback=lambda site, x: x.norm(dim=-1))
    texts = [models.text_batch(2, 6), models.text_batch(2, 4)]
    watch = tg.MaxActivating("head_output.1", k=3)
    pipeline = TensorDictSequential(
        capture, tg.ContextWindow(), tg.SelectTokens(capture.sites, also=["context"]), watch
    )
    found = tg.run(pipeline, texts, progress=False)["exemplars", "head_output.1"]
    plain = tg.Capture(model, "head_output", layers=[1])
    rows = [plain(TensorDict(text))["acts", "head_output.1"].norm(dim=-1).flatten(0, 1) for text in texts]
    torch.testing.assert_close(found["values"], torch.cat(rows).topk(3, dim=0).values.T)


def test_memory_does_not_grow():
    stage, x = tg.MaxActivating("x", k=5), torch.randn(512, 64)
    context = torch.zeros(512, 8, dtype=torch.long)
    sizes = []
    for step in range(12):
        batch = TensorDict(
            {
                ("tokens", "x"): x + step,
                ("carried", "context"): context,
                "row_id": torch.arange(512) + 512 * step,
            }
        )
        stage.update(batch)
        sizes.append(sum(b.numel() * b.element_size() for b in stage.buffers()))
    assert len(set(sizes)) == 1
