"""A run that is interrupted, even by kill -9, goes on from its checkpoint and ends with the same numbers."""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential

import models
import tdgeom as tg
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.files.shards import Shard
from tdgeom.run.sealed_records import write_record


def loader(batches: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, models.VOCAB, (batches, 3, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 0, 5:] = 0
    labels = torch.randint(0, 2, (batches, 3), generator=generator)
    return [{"input_ids": i, "attention_mask": m, "label": y} for i, m, y in zip(ids, mask, labels)]


def parts(model=None) -> list:
    """Every streaming stage that tdgeom has, behind a model."""
    capture = tg.Capture(models.gpt2() if model is None else model, "residual_input")
    s = capture.sites
    return [
        capture,
        tg.ContextWindow(before=2, after=1),
        tg.SelectTokens(s, also=["label", "context"]),
        tg.ForEach(tg.StreamingCovariance(), s),
        tg.RowSample(s, size=40, also=["label"]),
        tg.Collect(s),
        tg.ForEach(tg.StreamingMean(), s),
        tg.StreamingCrossMoments(s, pairs="all"),
        tg.ForEach(tg.StreamingSketch(k=2, size=4), s),
        tg.ForEach(tg.GroupedCovariance(groups=3, out_keys="grouped"), s),
        tg.ForEach(tg.Replicates(tg.StreamingMean(out_keys="mean_of"), groups=3, out_keys="replicated"), s),
        tg.ForEach(tg.RouterLoad(), s),
        *(tg.MaxActivating(site, k=5) for site in s),
        tg.ForEach(tg.StreamingLabelMoments(), s),
        tg.ForEach(tg.LinearProbe(), s),
        tg.ForEach(tg.LinearProbe(solver="ridge", out_keys="ridge"), s),
        tg.ForEach(tg.MeanDifferenceProbe(out_keys="difference"), s),
        tg.ForEach(tg.SklearnProbe(LogisticRegression(), out_keys="theirs"), s),
        tg.ForEach(tg.TorchProbe(linear_head, epochs=2, out_keys="torch"), s),
        TensorDictModule(lambda x: x[:, :2].contiguous(), [("tokens", s[0])], ["decision"]),
        tg.ProbeScore(in_keys=["decision", ("carried", "label"), "row_id"], out_keys="score"),
        tg.ForEach(tg.EigenSpectrum(), s),
        tg.ForEach(tg.SpectrumMetrics(), s),
    ]


def linear_head(width: int, targets: int) -> torch.nn.Module:
    return torch.nn.Linear(width, targets)


def pipeline(model=None) -> TensorDictSequential:
    return TensorDictSequential(*parts(model))


def few(model=None) -> TensorDictSequential:
    """Enough for what is not about single stages."""
    capture = tg.Capture(models.gpt2() if model is None else model, "residual_input")
    s = capture.sites
    sample = tg.RowSample(s, size=40, also=["label"])
    return TensorDictSequential(
        capture, tg.SelectTokens(s, also=["label"]), tg.ForEach(tg.StreamingCovariance(), s), sample
    )


def test_every_streaming_stage_is_in_the_pipeline() -> None:
    public = {
        name
        for name in tg.__all__
        if inspect.isclass(kind := getattr(tg, name)) and issubclass(kind, StreamingStage)
    }
    used = {type(stage).__name__ for stage in pipeline().modules()}
    assert public - used == {"StreamingStage", "Probe", "StoreActivations"}  # the last is in tests/store


class Interrupted(Exception):
    pass


def until(batches, count):
    for index, batch in enumerate(batches):
        if index == count:
            raise Interrupted
        yield batch


def spoiled(batches, batch: int):
    """A model, and batches that make it give NaN in one of them, at every token of two sequences."""
    model = models.gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[3] = torch.nan
    batches = [{**one, "input_ids": one["input_ids"].clamp(min=4)} for one in batches]
    batches[batch]["input_ids"][1:, 4] = 3
    return model, batches


def same(result: TensorDict, expected: TensorDict) -> None:
    keys = set(expected.keys(True, True))
    assert set(result.keys(True, True)) == keys
    for key in keys:
        value = expected[key]
        if isinstance(value, torch.Tensor) and key[:2] != ("run", "seconds"):
            torch.testing.assert_close(result[key], value, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert result["run", "stopped"] == expected["run", "stopped"]


SETTINGS = [
    {},
    {"max_rows": 150, "block_rows": 64},
    {"block_rows": 10, "nonfinite": "drop"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_interrupted_at_any_batch(tmp_path, settings) -> None:
    data = loader()
    expected = tg.run(pipeline(), data, **settings)
    for count in (1, 2, 6, 11):
        path = tmp_path / f"{count}.state"
        options = {"checkpoint": path, "every": 2, **settings}
        try:
            result = tg.run(pipeline(), until(data, count), **options)
        except Interrupted:
            assert path.exists() == (count >= 2)
            result = tg.run(pipeline(), data, **options)
        same(result, expected)
        assert not path.exists()


@pytest.mark.parametrize("block_rows", [7, 64, 2048])
@pytest.mark.parametrize("max_rows", [60, 61, 150, 10_000])
def test_rows_dropped_and_a_budget_of_rows_together(tmp_path, max_rows, block_rows) -> None:
    for batch in (0, 3):
        model, data = spoiled(loader(), batch)
        settings = {"max_rows": max_rows, "block_rows": block_rows, "nonfinite": "drop"}
        expected = tg.run(few(model), data, **settings)
        dropped = int(expected["run", "dropped_rows"])
        assert dropped == (16 if batch == 0 or max_rows > 100 else 0)
        assert int(expected["run", "rows"]) + dropped == min(max_rows, 270)
        for count in (1, 4, 5):
            path = tmp_path / f"{batch}.{count}"
            try:
                result = tg.run(few(model), until(data, count), checkpoint=path, every=1, **settings)
            except Interrupted:
                result = tg.run(few(model), data, checkpoint=path, every=1, **settings)
            same(result, expected)


def test_interrupted_twice_and_batches_are_run_once(tmp_path) -> None:
    data, path = loader(), tmp_path / "state"
    model = models.gpt2()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    capture = tg.Capture(model, "residual_input")
    stages = [capture, tg.SelectTokens(capture.sites), tg.ForEach(tg.StreamingMean(), capture.sites)]
    for count in (5, 9):
        with pytest.raises(Interrupted):
            tg.run(TensorDictSequential(*stages), until(data, count), checkpoint=path, every=1)
    result = tg.run(TensorDictSequential(*stages), data, checkpoint=path, every=1)
    assert len(calls) == len(data) and int(result["run", "batches"]) == len(data)


def test_rows_that_are_dropped_stay_counted(tmp_path) -> None:
    rows = [{"tokens": torch.randn(5, 3)} for _ in range(6)]
    rows[1]["tokens"][2, 0] = torch.nan
    plain = TensorDictSequential(tg.StreamingCovariance())
    expected = tg.run(plain, rows, nonfinite="drop", block_rows=3)
    options = {"nonfinite": "drop", "block_rows": 3, "checkpoint": tmp_path / "state", "every": 1}
    with pytest.raises(Interrupted):
        tg.run(plain, until(rows, 4), **options)
    result = tg.run(plain, rows, **options)
    same(result, expected)
    assert int(result["run", "dropped_rows"]) == 1


def half_done(path, **settings) -> None:
    with pytest.raises(Interrupted):
        tg.run(few(), until(loader(), 4), checkpoint=path, every=2, **settings)


def test_another_pipeline_or_setting_is_refused_with_the_difference(tmp_path) -> None:
    path = tmp_path / "state"
    half_done(path)
    with pytest.raises(ValueError, match=r"another run: settings.max_rows is None there and 99 here"):
        tg.run(few(), loader(), checkpoint=path, max_rows=99)
    rows = TensorDictSequential(tg.StreamingCovariance())
    with pytest.raises(ValueError, match=r"another run: stages is \[.* there and"):
        tg.run(rows, [{"tokens": torch.ones(2, 2)}], checkpoint=path)
    other = few()
    next(stage for stage in other if isinstance(stage, tg.RowSample)).seed = 5
    with pytest.raises(ValueError, match=r"stages\[\d+\].settings.seed is 0 there and 5 here"):
        tg.run(other, loader(), checkpoint=path)
    assert path.exists()


def trained(model, steps=1):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-4 * steps
    return model


def test_another_model_is_refused_with_the_difference(tmp_path) -> None:
    path = tmp_path / "state"
    half_done(path)
    weights = r"another run: stages\[0\].model.weights.sha256 is \w{64} there and \w{64} here"
    with pytest.raises(ValueError, match=weights):
        tg.run(few(trained(models.gpt2())), loader(), checkpoint=path)
    with pytest.raises(ValueError, match=r"stages\[0\].model.class is GPT2LMHeadModel there and .* here"):
        tg.run(few(models.llama()), loader(), checkpoint=path)
    result = tg.run(few(models.gpt2()), loader(), checkpoint=path)  # another object with the same weights
    same(result, tg.run(few(), loader()))


def test_a_model_behind_an_intervention_and_weights_of_a_stage_count_too(tmp_path) -> None:
    ids = [{"input_ids": batch["input_ids"]} for batch in loader(4)]

    def edited(coefficient):
        model = models.gpt2()
        steer = tg.Intervene(
            model, {"residual_output.0": tg.Steer(torch.ones(models.WIDTH), coefficient=coefficient)}
        )
        rows = tg.SelectTokens(["logits"], in_keys=["logits"])
        return TensorDictSequential(steer, rows, tg.ForEach(tg.StreamingMean(), ["logits"]))

    with pytest.raises(Interrupted):
        tg.run(edited(1.0), until(ids, 2), checkpoint=tmp_path / "state", every=1)
    with pytest.raises(
        ValueError, match=r"stages\[0\].settings.edits.0.coefficient is 1.0 there and 2.0 here"
    ):
        tg.run(edited(2.0), ids, checkpoint=tmp_path / "state")
    same(tg.run(edited(1.0), ids, checkpoint=tmp_path / "state"), tg.run(edited(1.0), ids))


def test_other_results_of_an_earlier_run_are_refused(tmp_path) -> None:
    rows = [{"tokens": torch.randn(5, 3)} for _ in range(4)]

    def second():
        project = TensorDictModule(lambda x, mean: x - mean, ["tokens", ("mean", "mean")], ["moved"])
        return TensorDictSequential(project, tg.StreamingMean(in_keys=["moved"], out_keys="second"))

    first = tg.run(TensorDictSequential(tg.StreamingMean()), rows)
    with pytest.raises(Interrupted):
        tg.run(second(), until(rows, 2), inputs=first, checkpoint=tmp_path / "state", every=1)
    other = tg.run(TensorDictSequential(tg.StreamingMean()), rows[:2])
    with pytest.raises(ValueError, match=r"another run: settings.inputs is \w{64} there and \w{64} here"):
        tg.run(second(), rows, inputs=other, checkpoint=tmp_path / "state")
    same(
        tg.run(second(), rows, inputs=first, checkpoint=tmp_path / "state"),
        tg.run(second(), rows, inputs=first),
    )


def test_what_a_killed_writer_left_beside_the_file_is_cleared_away(tmp_path) -> None:
    half_done(tmp_path / "state[1]")
    (tmp_path / ".state[1].77.draft").write_bytes(b"half")
    (tmp_path / ".state1.77.draft").write_bytes(b"another run's")
    tg.run(few(), loader(), checkpoint=tmp_path / "state[1]")
    assert [path.name for path in tmp_path.iterdir()] == [".state1.77.draft"]


def test_another_loader_is_refused(tmp_path) -> None:
    half_done(tmp_path / "state")
    with pytest.raises(ValueError, match="first batch is not the one of then"):
        tg.run(few(), loader()[::-1], checkpoint=tmp_path / "state")


def test_a_shorter_loader_is_refused(tmp_path) -> None:
    half_done(tmp_path / "state")
    with pytest.raises(
        ValueError, match=r"has seen \d+ batches, but the loader ended after 1: it is not the one of then"
    ):
        tg.run(few(), loader()[:1], checkpoint=tmp_path / "state")


def test_a_damaged_file_is_refused(tmp_path) -> None:
    path = tmp_path / "state"
    half_done(path)
    whole = path.read_bytes()
    draw = random.Random(0)
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 8 + whole[8:], b"PK\x03\x04" + whole, b"{}" * 50):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="checkpoint.*Remove it to start anew"):
            tg.run(few(), loader(), checkpoint=path)
    header = int.from_bytes(whole[:8], "little")
    for _ in range(60):  # any byte of the header: a clear error, or the very same numbers (a changed blank)
        at = 8 + draw.randrange(header)
        path.write_bytes(whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :])
        try:
            tg.run(few(), loader(), checkpoint=path)
        except ValueError as error:
            assert str(error)


def test_a_flipped_bit_in_the_state_is_refused(tmp_path) -> None:
    path = tmp_path / "state"
    half_done(path)
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    for _ in range(30):
        at = draw.randrange(data, len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="checkpoint"):
            tg.run(few(), loader(), checkpoint=path)


def test_rows_that_do_not_fit_are_refused_even_under_a_fitting_hash(tmp_path) -> None:
    path, data = tmp_path / "state", [{"tokens": torch.randn(5, 3)} for _ in range(6)]
    stage = TensorDictSequential(tg.StreamingCovariance())
    with pytest.raises(Interrupted):
        tg.run(stage, until(data, 4), checkpoint=path, every=1, block_rows=7)
    file = Shard(path)
    record = json.loads(bytes(file.whole("record").numpy()))
    record.pop("sha256")
    held = {name: file.whole(name) for name in file.tensors if name != "record"}
    assert held["rows/tokens"].shape == (6, 3)
    longer = {**record, "place": {**record["place"], "origin": [[3, 7]]}}
    changes = [
        ({**held, "rows/other": torch.zeros(6)}, record), ({**held, "rows/tokens": torch.zeros(5, 3)}, record),
        ({name: value for name, value in held.items() if name != "rows/row_id"}, record), (held, longer),
    ]  # fmt: skip
    for tensors, told in changes:
        write_record(path, tensors, told)
        with pytest.raises(
            ValueError,
            match=r"should hold \d rows of \['row_id', 'tokens'\], it holds .*Remove it to start anew",
        ):
            tg.run(stage, data, checkpoint=path, block_rows=7)


def test_what_cannot_be_resumed_says_so(tmp_path) -> None:
    with pytest.raises(ValueError, match="every counts batches"):
        tg.run(few(), loader(), checkpoint=tmp_path / "state", every=0)
    with pytest.raises(ValueError, match="lies in no folder that exists"):
        tg.run(few(), loader(), checkpoint=tmp_path / "no" / "state")
    with pytest.raises(ValueError, match=r"is a folder: name a file .* such as .*state"):
        tg.run(few(), loader(), checkpoint=tmp_path)


PROGRAM = """
import json, sys, time
import torch
from tensordict.nn import TensorDictSequential
import tdgeom as tg

def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        time.sleep(0.01)
        yield {"tokens": torch.randn(50, 16, generator=generator)}

stages = TensorDictSequential(tg.StreamingCovariance(), tg.RowSample(size=64), tg.EigenSpectrum(), tg.SpectrumMetrics())
print("ready", flush=True)
result = tg.run(stages, batches(), checkpoint=sys.argv[1], every=2, block_rows=128)
print(json.dumps([float(result["spectrum", "d_pr"]), int(result["run", "rows"]), result["sample_row_id"].tolist()]))
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path) -> None:
    def start(path):
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    expected = json.loads(whole.communicate(timeout=120)[0].splitlines()[-1])
    assert whole.returncode == 0 and expected[1] == 3000
    draw = random.Random(1)
    path = tmp_path / "state"
    kept = 0
    for _ in range(4):
        process = start(path)
        assert process.stdout.readline() == "ready\n"
        while (
            not path.exists() and process.poll() is None
        ):  # however long a busy machine takes to the first checkpoint
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kept += path.exists()
    last = start(path)
    result = json.loads(last.communicate(timeout=120)[0].splitlines()[-1])
    assert kept > 0 and last.returncode == 0 and not path.exists()
    assert result[0] == pytest.approx(expected[0], rel=1e-12) and result[1:] == expected[1:]


@pytest.mark.parametrize("shard", [(1, 3), (3, 3)])
def test_a_job_of_its_own_goes_on_with_its_part(tmp_path, shard) -> None:
    expected = tg.run(few(), loader(), shard=shard)
    for count in (1, 5, 8, 11):
        options = {"shard": shard, "checkpoint": tmp_path / f"{count}.state", "every": 1}
        with pytest.raises(Interrupted):
            tg.run(few(), until(loader(), count), **options)
        same(tg.run(few(), loader(), **options), expected)
    with pytest.raises(Interrupted):
        tg.run(few(), until(loader(), 8), **options)
    with pytest.raises(ValueError, match=r"another run: settings.shard\[0\] is \d there and 1 here"):
        tg.run(few(), loader(), **{**options, "shard": (2, 3)})


def test_states_of_jobs_that_were_interrupted_add_up(tmp_path) -> None:
    expected = tg.run(few(), loader())
    files = []
    for part in (1, 2):
        files.append(tmp_path / f"part-{part}")
        options = {
            "shard": (part, 2),
            "state": files[-1],
            "checkpoint": tmp_path / f"{part}.state",
            "every": 2,
        }
        with pytest.raises(Interrupted):
            tg.run(few(), until(loader(), 9), **options)
        tg.run(few(), loader(), **options)
    merged = tg.merge_states(files, few())
    for key in expected.keys(True, True):
        if isinstance(expected[key], torch.Tensor) and key[0] != "run":
            torch.testing.assert_close(merged[key], expected[key], rtol=1e-9, atol=1e-12)
    with pytest.raises(Interrupted):
        tg.run(few(), until(loader(), 9), state=tmp_path / "again", checkpoint=tmp_path / "a.state", every=2)
    tg.run(few(), loader(), state=tmp_path / "again", checkpoint=tmp_path / "a.state", every=2)
    tg.run(few(), loader()[:3], state=tmp_path / "first batches")
    with pytest.raises(ValueError, match="sequences in common"):  # those before the interruption count too
        tg.merge_states([tmp_path / "again", tmp_path / "first batches"], few())


def test_another_order_behind_the_first_batch_is_refused(tmp_path) -> None:
    path, data = tmp_path / "state", loader()
    half_done(path)
    with pytest.raises(ValueError, match="has seen 4 batches, but the loader now gives others among them"):
        tg.run(few(), [data[0], data[2], data[1], *data[3:]], checkpoint=path, every=2)
    same(tg.run(few(), data, checkpoint=path, every=2), tg.run(few(), data))


def test_a_checkpoint_is_kept_until_what_the_run_gave_is_safe(tmp_path) -> None:
    def measured():
        batches = [{"tokens": torch.arange(8.0).reshape(4, 2) + i} for i in range(5)]
        return tg.run(tg.StreamingMean(), batches, checkpoint=tmp_path / "state", every=2, progress=False)

    with pytest.raises(OSError, match="full"), tg.checkpoints_kept():
        measured()
        raise OSError("the disk is full")
    assert (tmp_path / "state").exists()
    with tg.checkpoints_kept():
        found = measured()  # goes on where the first had come to
        assert (tmp_path / "state").exists()
    assert not (tmp_path / "state").exists()
    assert torch.equal(found["mean", "mean"], torch.tensor([5.0, 6.0], dtype=torch.float64))


@pytest.mark.parametrize("change", ["more", "fewer", "others"])
def test_a_kept_checkpoint_of_a_run_that_ended_is_of_that_data_alone(tmp_path, change) -> None:
    batches = [{"tokens": torch.arange(8.0).reshape(4, 2) + i} for i in range(5)]

    def measured(data):
        return tg.run(tg.StreamingMean(), data, checkpoint=tmp_path / "state", every=1, progress=False)

    with pytest.raises(OSError, match="full"), tg.checkpoints_kept():
        first = measured(batches)
        raise OSError("the disk is full")
    other = {"more": [*batches, batches[0]], "fewer": batches[:3], "others": [*batches[:3], *batches[:2]]}
    with pytest.raises(ValueError, match=r"resumes from .*the one of then|resumes from .*gives others"):
        measured(other[change])
    again = measured(batches)
    assert torch.equal(again["mean", "mean"], first["mean", "mean"]) and int(again["run", "rows"]) == 20
