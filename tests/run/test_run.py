"""run: one pass over any loader, exact to the row, with nothing left behind."""

from __future__ import annotations

import gc
import io
import math
import sys
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

import models
import tdgeom as tg

ROWS = torch.randn(100, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def measures(sites=None):
    """Moments, sample and everything behind them; of rows in ``tokens``."""
    if sites is None:
        return TensorDictSequential(
            tg.StreamingCovariance(),
            tg.RowSample(size=12),
            tg.Collect(),
            tg.EigenSpectrum(k=2),
            tg.SpectrumMetrics(),
        )
    return TensorDictSequential(
        tg.ForEach(tg.StreamingCovariance(), sites),
        tg.RowSample(sites, size=12),
        tg.ForEach(tg.EigenSpectrum(k=2), sites),
        tg.ForEach(tg.SpectrumMetrics(), sites),
        tg.ForEach(tg.NormalizationAblation(variants=["raw", "token_l2"]), sites),
        tg.ForEachPair(tg.LinearCKA(), sites),
    )


def batches(rows=ROWS, size=7):
    return [{"tokens": part} for part in rows.split(size)]


def run(*args, **options):
    return tg.run(*args, **{"progress": False, **options})


def assert_same(found, expected, rtol=1e-9, atol=1e-11):
    """Equal results; eigenvectors as the subspace of the eigenvalues that are there."""
    keys = {key for key in expected.keys(True, True) if key[0] != "run"}
    assert keys == {key for key in found.keys(True, True) if key[0] != "run"}
    for key in keys:
        a, b = found[key].double(), expected[key].double()
        if key == "eigenvectors" or key[0] == "eigenvectors":
            weights = [
                r["eigenvalues" if key == "eigenvectors" else ("eigenvalues", *key[1:])]
                for r in (found, expected)
            ]
            a, b = ((v * w[: v.shape[-1]]) @ v.mT for v, w in zip((a, b), weights))
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=str(key))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(scope="module")
def gpt2():
    return models.gpt2()


def text(n=6, length=8, seed=0, pad=None):
    """Ids and a mask with texts of several lengths, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, models.VOCAB, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(n):
        short = i % 4
        if pad and short:
            mask[i, :short] = 0
            if pad == "right":
                mask[i] = mask[i].flip(0)
                ids[i] = ids[i].roll(-short)
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def model_pipeline(model, **select):
    capture = tg.Capture(model, "residual_input")
    return TensorDictSequential(capture, tg.SelectTokens(capture.sites, **select), measures(capture.sites))


# ------------------------------------------------------------------------------------------ rows and blocks


@given(st.integers(1, 40), st.integers(1, 60), st.one_of(st.none(), st.integers(8, 130)))
@settings(max_examples=40)
def test_max_rows_is_exact_for_any_split_and_block(size, block_rows, max_rows):
    found = run(measures(), batches(size=size), block_rows=block_rows, max_rows=max_rows)
    kept = ROWS[:max_rows]
    assert_same(found, run(measures(), [{"tokens": kept}]))
    assert int(found["run", "rows"]) == int(found["moments", "count"]) == len(kept)
    torch.testing.assert_close(found["moments", "covariance"], torch.cov(kept.T))
    assert torch.equal(found["collected"], kept)


def test_nothing_beyond_max_rows_is_read():
    read = []

    def loader():
        for i, batch in enumerate(batches(size=10)):
            read.append(i)
            yield batch

    result = run(measures(), loader(), max_rows=30)
    assert read == [0, 1, 2] and int(result["run", "batches"]) == 3 and result["run", "stopped"] == "max_rows"
    assert run(measures(), batches())["run", "stopped"] == "end of data"


def test_direct_calls_and_run_agree():
    pipeline = measures()
    for i, part in enumerate(ROWS.split(20)):
        ids = torch.arange(20 * i, 20 * i + len(part)) << 20
        td = pipeline(TensorDict({"tokens": part, "row_id": ids}))
        assert int(td["moments", "count"]) == 20 * (i + 1), "a direct call gives the values so far"
        torch.testing.assert_close(td["moments", "mean"], ROWS[: 20 * (i + 1)].mean(0))
    result = run(measures(), batches())
    for key in pipeline.out_keys:
        torch.testing.assert_close(td[key], result[key], rtol=1e-9, atol=1e-11, equal_nan=True, msg=str(key))


def test_run_starts_anew_and_the_state_stays_mergeable():
    pipeline = measures()
    first = run(pipeline, batches(ROWS[:60]))
    again = run(pipeline, batches(ROWS[:60]))
    assert_same(again, first, rtol=0)
    other = measures()
    later = [{"tokens": part, "sequence_id": torch.arange(60, 100)[s]} for part, s in zip(
        ROWS[60:].split(9), torch.arange(40).split(9))]  # fmt: skip
    run(other, later)
    whole = run(measures(), batches())
    for mine, theirs in zip(pipeline.module[:3], other.module[:3]):
        mine.merge_(theirs)
        merged = mine.publish(TensorDict({}))
        for key in mine.out_keys:
            torch.testing.assert_close(merged[key], whole[key], rtol=1e-9, atol=1e-11)


def test_state_survives_a_state_dict_after_a_run():
    pipeline = measures()
    run(pipeline, batches())
    fresh = measures()
    fresh.load_state_dict(pipeline.state_dict())
    for mine, theirs in zip(fresh.module[:3], pipeline.module[:3]):
        found, expected = mine.publish(TensorDict({})), theirs.publish(TensorDict({}))
        for key in mine.out_keys:
            assert torch.equal(found[key], expected[key])


def test_many_small_batches_call_the_stages_as_often_as_a_few_large_ones():
    class Counting(tg.StreamingMean):
        def accumulate(self, rows):
            calls.append(len(rows))
            super().accumulate(rows)

    for size in (1, 50):
        calls = []
        run(TensorDictSequential(Counting()), batches(size=size), block_rows=32)
        assert calls == [32, 32, 32, 4]


def test_a_large_batch_is_cut_in_time_linear_in_its_rows():
    calls = []

    class Counting(tg.StreamingMean):
        def accumulate(self, rows):
            calls.append(len(rows))
            super().accumulate(rows)

    run(TensorDictSequential(Counting()), [{"tokens": torch.zeros(200_000, 1)}], block_rows=256)
    assert len(calls) == math.ceil(200_000 / 256)


# ------------------------------------------------------------------------------------------ batches


def as_kinds(batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {
        "dict": dict(batch),
        "BatchEncoding": BatchEncoding(dict(batch)),
        "TensorDict": TensorDict(dict(batch)),
        "TensorDict of batch size [B]": TensorDict(dict(batch), batch_size=[len(ids)]),
        "tuple": (ids, mask),
        "list": [ids, mask],
        "lists in a dict": {key: value.tolist() for key, value in batch.items()},
        "numpy": {key: value.numpy() for key, value in batch.items()},
    }


@pytest.mark.parametrize("kind", list(as_kinds(text())))
def test_every_kind_of_batch(gpt2, kind):
    loader = [text(seed=0, pad="left"), text(4, seed=1, pad="left")]
    expected = run(model_pipeline(gpt2), loader)
    found = run(
        model_pipeline(gpt2), [as_kinds(b)[kind] for b in loader], in_keys=["input_ids", "attention_mask"]
    )
    assert_same(found, expected)


def test_a_tensor_is_the_one_input_that_the_pipeline_needs(gpt2):
    ids = text()["input_ids"]
    assert_same(run(model_pipeline(gpt2), [ids]), run(model_pipeline(gpt2), [{"input_ids": ids}]))
    loader = DataLoader(TensorDataset(ROWS), batch_size=30)
    assert_same(run(measures(), loader), run(measures(), batches()))


def test_a_users_tensordict_is_never_altered(gpt2):
    batch = TensorDict(
        {**text(), "meta": TensorDict({"deep": {"x": torch.arange(6)}}, batch_size=[6])}, batch_size=[6]
    )
    batch.set_non_tensor("name", "a text")
    before, ids = set(batch.keys(True)), batch["input_ids"].clone()
    locked = batch.clone().lock_()
    capture = tg.Capture(gpt2, "residual_input.0")
    select = tg.SelectTokens(capture.sites, also=[("meta", "deep", "x")])
    mean = tg.StreamingMean(in_keys=[("carried", "x")])
    result = run(TensorDictSequential(capture, select, mean), [batch, locked])
    assert (
        set(batch.keys(True)) == before and batch.batch_size == (6,) and torch.equal(batch["input_ids"], ids)
    )
    assert batch["meta"].batch_size == (6,) and batch["meta", "deep"].batch_size == (6,)
    assert float(result["mean", "mean"]) == 2.5 and int(result["mean", "count"]) == 96


def test_strings_none_and_nested_values_in_a_batch(gpt2):
    batch = {
        **text(),
        "text": ["a"] * 6,
        "name": "x",
        "nothing": None,
        "meta": {"language": torch.arange(6) % 2, "source": ["web"] * 6},
        "label": [1, 2, 3, 4, 5, 6],
    }
    capture = tg.Capture(gpt2, "residual_input.0")
    select = tg.SelectTokens(capture.sites, positions="last", also=["label", ("meta", "language")])
    keep = tg.Collect([], also=["label", "language"])
    result = run(TensorDictSequential(capture, select, keep), [batch])
    assert result["collected_carried", "label"].tolist() == [1, 2, 3, 4, 5, 6]
    assert result["collected_carried", "language"].tolist() == [0, 1, 0, 1, 0, 1]


def test_refused_batches():
    with pytest.raises(ValueError, match=r"run was given texts: give tokenizer= as well"):
        run(measures(), ["text"])
    with pytest.raises(TypeError, match=r"got int\. Give the loader a collate_fn"):
        run(measures(), [3])
    with pytest.raises(ValueError, match=r"batch of 2 unnamed value\(s\): name them with in_keys="):
        run(measures(), [(ROWS, ROWS)])
    for single in (TensorDict(tokens=ROWS), {"tokens": ROWS}, ROWS, "text"):
        with pytest.raises(
            TypeError, match=r"iterable of batches, got one .*put it in a list, run\(pipeline, \[batch\]\)"
        ):
            run(measures(), single)
    with pytest.raises(
        KeyError, match=r"the streaming stages read 'tokens', .*there is \['rows', 'sequence_id'\].*in_keys="
    ):
        run(measures(), [{"rows": ROWS}])
    with pytest.raises(
        ValueError, match=r"first dimension is that of 'row_id' \(100\), but 'label' has shape \(5,\)"
    ):
        run(
            TensorDictSequential(measures(), tg.StreamingMean(in_keys="label")),
            [{"tokens": ROWS, "label": torch.ones(5)}],
        )


def test_bad_settings():
    for options, match in (
        ({"nonfinite": "ignore"}, "nonfinite takes 'raise' or 'drop', got 'ignore'"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"block_rows": 0}, "block_rows must be at least 1, got 0"),
        ({"keep": "spectrum"}, "keep is a list"),
        ({"keep": ["spectra"]}, r"keep names \['spectra'\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            run(measures(), batches(), **options)


def test_steps_of_generate_count_their_own_positions():
    """A cached step computes one position a sequence; its mask spans all of them."""
    prompt = {"input_ids": torch.full((2, 3), 9), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    capture = tg.Capture(models.gpt2(), "residual_input")
    with capture as calls:
        generated = capture.model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 7) and len(calls) == 4
    sites = capture.sites
    pipeline = TensorDictSequential(
        tg.SelectTokens(sites, in_keys=[("acts", site) for site in sites]),
        tg.ForEach(tg.StreamingMean(), sites),
    )
    result = run(pipeline, calls)
    # five prompt tokens, then three steps of one token for each of two sequences
    assert {name: int(result["run", name]) for name in ("rows", "tokens", "padding_rows")} == {
        "rows": 11,
        "tokens": 11,
        "padding_rows": 1,
    }


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_end_stages_side_by_side_give_what_they_give_in_turn(threads):
    sites = [f"x.{i}" for i in range(5)]
    rows = torch.randn(300, 5, 160, generator=torch.Generator().manual_seed(3))
    parts = rows.split(64)
    loader = [TensorDict({"tokens": {site: part[:, i] for i, site in enumerate(sites)}}) for part in parts]
    ends = [tg.EigenSpectrum(k=4), tg.SampleSpectrum(), tg.SpectrumMetrics(), tg.NormalizationAblation()]
    pipeline = TensorDictSequential(
        tg.ForEach(tg.StreamingCovariance(), sites),
        tg.RowSample(sites, size=200),
        *(tg.ForEach(stage, sites) for stage in ends),
    )
    results = []
    for count in (1, 3):
        threads(count)
        results.append(run(pipeline, loader))
    assert torch.get_num_threads() == 3
    assert_same(*results)


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_of_a_stage_beside_others_names_its_site(threads, count):
    class Picky(tg.Stage):
        reads, writes, one_thread_a_site = {"sample": "N D"}, [("picked", "least")], True

        def compute(self, sample):
            if bool((sample < 0).any()):
                raise ValueError("Picky takes no negative numbers")
            return sample.amin((-2, -1))

    sites = ["x.0", "x.1", "x.2"]
    rows = {"x.0": torch.ones(4, 2), "x.1": -torch.ones(4, 2), "x.2": torch.ones(4, 2)}
    threads(count)
    with pytest.raises(ValueError, match=r"Picky takes no negative numbers \[at x.1\]"):
        run(
            TensorDictSequential(tg.RowSample(sites, size=9), tg.ForEach(Picky(), sites)),
            [TensorDict({"tokens": rows})],
        )
    assert torch.get_num_threads() == count


def test_empty_loader_and_used_up_generator():
    with pytest.raises(ValueError, match=r"run got no rows: 0 batches.*a generator already used up\?"):
        run(measures(), [])
    loader = iter(batches())
    run(measures(), loader)
    with pytest.raises(ValueError, match="run got no rows"):
        run(measures(), loader)
    with pytest.raises(ValueError, match="run got no rows: 1 batches"):
        run(measures(), [{"tokens": ROWS[:0]}])


# ------------------------------------------------------------------------------------------ padding and the model


def test_padding_on_either_side_gives_the_same_results(gpt2):
    left, right = (run(model_pipeline(gpt2), [text(8, pad=side)]) for side in ("left", "right"))
    assert_same(left, right, rtol=1e-5, atol=1e-5)
    assert torch.equal(left["sample_row_id"], right["sample_row_id"])
    one_by_one = []
    batch = text(8, pad="left")
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        one_by_one.append({"input_ids": ids[mask.bool()][None]})
    assert_same(run(model_pipeline(gpt2), one_by_one), left, rtol=1e-5, atol=1e-5)
    assert (
        int(left["run", "rows"])
        == int(left["run", "tokens"])
        == int(text(8, pad="left")["attention_mask"].sum())
    )
    assert int(left["run", "padding_rows"]) == 64 - int(left["run", "rows"])


def test_a_batch_of_padding_only_changes_nothing(gpt2):
    empty = {
        "input_ids": torch.zeros(3, 8, dtype=torch.long),
        "attention_mask": torch.zeros(3, 8, dtype=torch.long),
    }
    first, second = text(seed=0), text(seed=1)
    with_ids = [{**b, "sequence_id": torch.arange(6) + 6 * i} for i, b in enumerate((first, second))]
    found = run(
        model_pipeline(gpt2), [with_ids[0], {**empty, "sequence_id": torch.arange(90, 93)}, with_ids[1]]
    )
    assert_same(found, run(model_pipeline(gpt2), with_ids))
    assert int(found["run", "batches"]) == 3 and int(found["run", "padding_rows"]) == 24
    with pytest.raises(ValueError, match="0 attended tokens.*leave nothing"):
        run(model_pipeline(gpt2), [empty])


def test_max_rows_in_the_middle_of_a_padded_batch(gpt2):
    loader = [text(6, seed=i, pad="left") for i in range(3)]
    full = run(TensorDictSequential(model_pipeline(gpt2), tg.Collect(["residual_input.1"])), loader)
    found = run(
        TensorDictSequential(model_pipeline(gpt2), tg.Collect(["residual_input.1"])),
        loader,
        max_rows=50,
        block_rows=16,
    )
    assert torch.equal(found["collected", "residual_input.1"], full["collected", "residual_input.1"][:50])
    assert torch.equal(found["collected_row_id"], full["collected_row_id"][:50])
    assert int(found["run", "rows"]) == 50 == int(found["moments", "residual_input.0", "count"])


def test_an_interrupt_leaves_the_model_clean_and_usable(gpt2):
    before, training = hooks(gpt2), gpt2.training

    def loader():
        yield text()
        raise KeyboardInterrupt

    class Stop(tg.StreamingMean):
        def accumulate(self, rows):
            raise KeyboardInterrupt

    pipeline = model_pipeline(gpt2)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, loader())
    with pytest.raises(KeyboardInterrupt):
        run(TensorDictSequential(pipeline, Stop(in_keys=[("tokens", "residual_input.0")])), [text()])

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = gpt2.transformer.h[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, [text()])
    handle.remove()
    assert hooks(gpt2) == before and gpt2.training == training
    assert gpt2(**text()).logits.isfinite().all()
    assert_same(run(pipeline, [text()]), run(model_pipeline(gpt2), [text()]), rtol=0)


def test_training_mode_and_gradients_of_the_model_stay_as_they_were():
    model = models.gpt2().train()
    run(model_pipeline(model), [text()])
    assert model.training and all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------ NaN and Inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_an_error_that_names_site_batch_and_sequence(bad):
    sites = ["x.0", "x.1"]
    rows = {site: ROWS.clone() for site in sites}
    rows["x.1"][45, 2] = bad
    loader = [{"tokens": {s: rows[s][i : i + 10] for s in sites}} for i in range(0, 100, 10)]
    for block_rows in (7, 2048):
        with pytest.raises(
            ValueError,
            match=r"\('tokens', 'x.1'\) holds NaN or Inf in 1 of \d+ rows, first in batch 4 \(row id \d+: sequence 45, "
            r"position 0\).*nonfinite='drop'",
        ):
            run(measures(sites), loader, block_rows=block_rows)
    found = run(measures(sites), loader, nonfinite="drop", block_rows=16)
    keep = torch.arange(100) != 45
    clean = [{"tokens": {s: ROWS[keep] for s in sites}, "sequence_id": torch.arange(100)[keep]}]
    assert_same(found, run(measures(sites), clean))
    assert int(found["run", "dropped_rows"]) == 1 and int(found["run", "rows"]) == 99
    assert int(found["moments", "x.0", "count"]) == 99, "dropped at all sites"


def test_float64_rows_beyond_float32_are_finite():
    rows = ROWS * 1e200
    assert int(run(TensorDictSequential(tg.StreamingMean()), [{"tokens": rows}])["mean", "count"]) == 100


def test_all_rows_dropped():
    with pytest.raises(ValueError, match="run got no rows.*100 rows dropped"):
        run(measures(), [{"tokens": torch.full_like(ROWS, math.nan)}], nonfinite="drop")


def test_nan_at_padding_is_no_error():
    acts, mask = torch.randn(4, 5, 3), torch.ones(4, 5)
    mask[:, 3:] = 0
    acts[:, 3:] = math.nan
    pipeline = TensorDictSequential(tg.SelectTokens(["x"]), tg.ForEach(tg.StreamingMean(), ["x"]))
    result = run(pipeline, [{"acts": {"x": acts}, "attention_mask": mask}])
    torch.testing.assert_close(result["mean", "x", "mean"], acts[:, :3].double().mean((0, 1)))
    assert int(result["run", "dropped_rows"]) == 0


# ------------------------------------------------------------------------------------------ results


def test_what_the_result_holds():
    result = run(measures(), batches())
    assert result.batch_size == ()
    roots = {
        "moments",
        "sample",
        "sample_row_id",
        "collected",
        "collected_row_id",
        "eigenvalues",
        "eigenvectors",
    }
    assert set(result.keys()) == roots | {"spectrum", "run"}
    assert {"rows", "tokens", "padding_rows", "dropped_rows", "batches", "seconds", "stopped"} <= set(
        result["run"].keys()
    )
    assert int(result["run", "rows"]) == 100 and int(result["run", "batches"]) == 15
    assert all(float(result["run", "seconds", name]) >= 0 for name in ("load", "batch", "stream", "finish"))


def test_keep_drops_what_it_does_not_name():
    expected = run(measures(), batches())
    found = run(measures(), batches(), keep=["spectrum"])
    assert set(found.keys()) == {"spectrum", "run"}
    for key in found["spectrum"].keys():
        assert float(found["spectrum", key]) == pytest.approx(float(expected["spectrum", key]), nan_ok=True)
    assert set(run(measures(), batches(), keep=["moments", "sample"]).keys()) == {"moments", "sample", "run"}


def test_keep_frees_large_results_after_their_last_reader():
    alive = []

    class Watch(tg.Stage):
        reads = {"eigenvalues": "D"}
        writes = ["watched"]

        def compute(self, eigenvalues):
            gc.collect()
            alive.append([ref() is not None for ref in seen])
            return eigenvalues.sum()

    seen = []

    class Covariance(tg.StreamingCovariance):
        def result(self):
            outputs = super().result()
            seen.append(weakref.ref(outputs["covariance"]))
            return outputs

    for keep in (["watched"], None):
        seen.clear()
        run(TensorDictSequential(Covariance(), tg.EigenSpectrum(), Watch()), batches(), keep=keep)
    assert alive == [[False], [True]]


def test_select_out_keys_of_the_pipeline():
    pipeline = measures()
    expected = run(measures(), batches())
    pipeline.select_out_keys(("spectrum", "d_pr"), "eigenvalues")
    result = run(pipeline, batches())
    assert set(result.keys(True, True)) - {("run", k) for k in result["run"].keys()} >= {("spectrum", "d_pr")}
    assert set(result.keys()) == {"spectrum", "eigenvalues", "run"}
    assert set(result["spectrum"].keys()) == {"d_pr"}
    assert float(result["spectrum", "d_pr"]) == pytest.approx(float(expected["spectrum", "d_pr"]))


def test_select_subsequence_runs_only_what_is_needed():
    part = measures(["x.0", "x.1"]).select_subsequence(out_keys=[("spectrum", "x.1", "d_pr")])
    result = run(part, [{"tokens": {"x.1": ROWS}}])
    assert set(result["moments"].keys()) == {"x.1"} and "sample" not in result.keys()
    assert float(result["spectrum", "x.1", "d_pr"]) == pytest.approx(
        float(run(measures(), batches())["spectrum", "d_pr"])
    )


def test_a_second_pass_reads_the_first_result():
    first = run(measures(), batches())

    def project(rows, mean, vectors):
        return (rows - mean) @ vectors

    low = TensorDictModule(project, in_keys=["tokens", ("moments", "mean"), "eigenvectors"], out_keys=["low"])
    ratio = TensorDictModule(
        lambda v, e: v / e[:2], in_keys=[("mean", "variance"), "eigenvalues"], out_keys=["ratio"]
    )
    before = set(first.keys(True, True))
    second = run(TensorDictSequential(low, tg.StreamingMean(in_keys="low"), ratio), batches(), inputs=first)
    torch.testing.assert_close(second["ratio"], torch.ones(2, dtype=torch.float64), rtol=1e-9, atol=0)
    assert set(second.keys()) == {"mean", "ratio", "run"} and set(first.keys(True, True)) == before


def test_a_declared_output_that_was_not_written():
    class Lazy(TensorDictModuleBase):
        def __init__(self):
            super().__init__()
            self.in_keys, self.out_keys = ["eigenvalues"], ["one", "two"]

        def forward(self, tensordict):
            return tensordict.set("one", tensordict["eigenvalues"])

    with pytest.raises(ValueError, match=r"Lazy declares \['two'\] in its out_keys but did not write them"):
        run(TensorDictSequential(tg.StreamingCovariance(), tg.EigenSpectrum(), Lazy()), batches())


# ------------------------------------------------------------------------------------------ stages of one's own


class Largest(tg.StreamingStage):
    """A user's own streaming stage, with a setting in a buffer."""

    reads = {"tokens": "N D"}
    writes = ["largest"]

    def __init__(self, weight=None, **keys):
        super().__init__(**keys)
        self.register_buffer("weight", torch.ones(4) if weight is None else weight)
        self.add_state("top", torch.float64)

    def start(self, tokens):
        return {"top": torch.full(tokens.shape[-1:], -torch.inf, dtype=torch.float64)}

    def accumulate(self, tokens):
        self.top = torch.maximum(self.top, (tokens * self.weight).double().amax(0))

    def combine(self, other):
        self.top = torch.maximum(self.top, other.top)

    def result(self):
        return self.top.clone()


class Spread(tg.Stage):
    reads = {"largest": "D"}
    writes = [("mine", "spread")]

    def compute(self, largest):
        return largest.amax(-1) - largest.amin(-1)


def test_ones_own_stages():
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0])
    top = (ROWS * weight).amax(0)
    pipeline = TensorDictSequential(Largest(weight), Spread())
    for _ in range(2):
        result = run(pipeline, batches(), block_rows=16)
        torch.testing.assert_close(result["largest"], top)
        torch.testing.assert_close(result["mine", "spread"], top.max() - top.min())
    each = TensorDictSequential(tg.ForEach(Largest(weight), ["a", "b"]), tg.ForEach(Spread(), ["a", "b"]))
    result = run(each, [{"tokens": {"a": ROWS, "b": -ROWS}}])
    torch.testing.assert_close(result["largest", "b"], (-ROWS * weight).amax(0))
    a, b = Largest(weight), Largest(weight)
    a.update(TensorDict(tokens=ROWS[:50])), b.update(TensorDict(tokens=ROWS[50:]))
    torch.testing.assert_close(a.merge_(b).publish(TensorDict({}))["largest"], top)
    a.reset()
    assert torch.equal(a.weight, weight) and a.is_empty


def test_a_streaming_stage_that_declares_no_state_says_so():
    class Forgetful(tg.StreamingStage):
        reads = {"tokens": "N D"}
        writes = ["nothing"]

    with pytest.raises(TypeError, match=r"Forgetful declares no state: call self.add_state\(name, dtype\)"):
        run(TensorDictSequential(Forgetful()), batches())


class Centre(TensorDictModuleBase):
    """A plain hand-written module per batch that returns a TensorDict of its own."""

    def __init__(self):
        super().__init__()
        self.in_keys, self.out_keys = ["tokens"], ["centred"]

    def forward(self, tensordict):
        out = tensordict.copy()
        return out.set("centred", tensordict["tokens"] - 1)


def test_a_plain_module_and_a_wrapped_function_around_the_stream():
    after = TensorDictModule(lambda m: m + 1, in_keys=[("mean", "mean")], out_keys=["back"])
    result = run(TensorDictSequential(Centre(), tg.StreamingMean(in_keys="centred"), after), batches())
    torch.testing.assert_close(result["back"], ROWS.mean(0))
    each = TensorDictSequential(
        tg.ForEach(Centre(), ["a", "b"]), tg.ForEach(tg.StreamingMean(in_keys="centred"), ["a", "b"])
    )
    result = run(each, [{"tokens": {"a": ROWS, "b": 2 * ROWS}}])
    torch.testing.assert_close(result["mean", "b", "mean"], 2 * ROWS.mean(0) - 1)


def test_rows_of_ones_own_without_ids_are_numbered_apart():
    """A stage that makes rows of its own (no SelectTokens) still gives ids that are unique over batches."""
    flatten = TensorDictModule(lambda x: x.flatten(0, 1), in_keys=["series"], out_keys=["tokens"])
    series = ROWS.reshape(10, 10, 4)
    loader = [{"series": part} for part in series.split(3)]
    result = run(TensorDictSequential(flatten, tg.Collect(), tg.RowSample(size=100)), loader)
    assert torch.equal(result["collected"], ROWS) and len(result["sample_row_id"].unique()) == 100


def test_row_ids_given_by_the_loader_are_kept():
    ids = torch.randperm(100)
    loader = [{"tokens": ROWS[ids[i : i + 9]], "row_id": ids[i : i + 9]} for i in range(0, 100, 9)]
    assert torch.equal(run(TensorDictSequential(tg.Collect()), loader)["collected"], ROWS)


# ------------------------------------------------------------------------------------------ bar, memory


def test_the_bar_is_off_unless_on_a_terminal(monkeypatch):
    for terminal, progress, shown in (
        (False, None, False),
        (True, None, True),
        (True, False, False),
        (False, True, True),
    ):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        tg.run(measures(), batches(), progress=progress)
        assert ("rows" in stream.getvalue()) is shown, (terminal, progress)


def test_memory_does_not_grow_with_the_number_of_batches():
    """Tensors alive at the end of each batch: at most a block and a batch more than at the start."""
    sizes = []

    def loader():
        for i in range(60):
            if i % 20 == 19:
                gc.collect()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    sizes.append(
                        sum(o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) is torch.Tensor)
                    )
            yield {"tokens": torch.randn(50, 16)}

    pipeline = TensorDictSequential(tg.StreamingCovariance(), tg.RowSample(size=64), tg.EigenSpectrum())
    result = run(pipeline, loader(), block_rows=128)
    assert int(result["run", "rows"]) == 3000
    assert max(sizes) - min(sizes) < 2 * (128 + 50) * 16 * 4 + 4096


def test_state_holds_no_graph_and_no_batch():
    rows = torch.randn(40, 3, requires_grad=True)
    held = weakref.ref(rows)
    pipeline = TensorDictSequential(tg.StreamingCovariance(), tg.RowSample(size=8))
    result = run(pipeline, [{"tokens": rows * 2}])
    assert all(not buffer.requires_grad for buffer in pipeline.buffers())
    assert not result["moments", "mean"].requires_grad and not result["sample"].requires_grad
    del rows
    gc.collect()
    assert held() is None


def test_padding_ids_without_a_mask_are_warned_about() -> None:
    model = models.gpt2()
    model.config.pad_token_id = 0
    capture = tg.Capture(model)
    pipeline = TensorDictSequential(
        capture, tg.SelectTokens(capture.sites), tg.ForEach(tg.StreamingMean(), capture.sites)
    )
    ids = models.text_batch()["input_ids"].clone()
    tg.run(pipeline, [{"input_ids": ids}])  # no padding id among them: no warning
    ids[0, -2:] = 0
    with pytest.warns(UserWarning, match="input_ids hold the padding id 0: every position counts as a row"):
        result = tg.run(pipeline, [{"input_ids": ids}])
    assert int(result["run", "rows"]) == ids.numel()
    tg.run(pipeline, [{"input_ids": ids, "attention_mask": ids != 0}])
