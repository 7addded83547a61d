"""States of runs that shared nothing, added up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from transformers import GPT2Config, GPT2Model

import tdgeom as tg

SITES = ["x", "y"]


def batches(count: int = 7, *, ids: bool = False, seed: int = 0) -> list[TensorDict]:
    """Two related sites, some padding, five sequences a batch."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        x = torch.randn(5, 6, 4, generator=generator)
        mask = torch.ones(5, 6, dtype=torch.int64)
        mask[0, 4:] = 0
        td = TensorDict(
            {
                "acts": {"x": x, "y": x + 0.5 * torch.randn(x.shape, generator=generator)},
                "attention_mask": mask,
            }
        )
        if ids:
            td["sequence_id"] = torch.arange(5) + 100 * number
        found.append(td)
    return found


def streams(**settings: Any) -> list[torch.nn.Module]:
    return [
        tg.ForEach(tg.StreamingCovariance(), SITES),
        tg.RowSample(SITES, size=settings.get("size", 40)),
        tg.StreamingCrossMoments(SITES),
        tg.ForEach(tg.EigenSpectrum(k=2), SITES),
        tg.ForEachPair(tg.LinearCKA(source="moments"), SITES),
        tg.ForEach(tg.TwoNN(), SITES),
    ]


def pipeline(**settings: Any) -> TensorDictSequential:
    return TensorDictSequential(tg.SelectTokens(SITES), *streams(**settings))


def states(folder: Path, parts: int, data: Any = None, **options: Any) -> list[Path]:
    """What jobs leave, each with a pipeline of its own."""
    files = [folder / f"part-{number}" for number in range(1, parts + 1)]
    for number, file in enumerate(files, 1):
        left = tg.run(
            pipeline(), batches() if data is None else data, shard=(number, parts), state=file, **options
        )
        assert set(left.keys()) == {"run"}, "a part has no results"
    return files


def assert_same(found: TensorDict, expected: TensorDict) -> None:
    assert set(found.keys(True, True)) == set(expected.keys(True, True))
    for key in expected.keys(True, True):
        if isinstance(key, tuple) and key[0] == "run":
            continue
        torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_parts_add_up_to_the_run_over_everything(tmp_path: Path, parts: int) -> None:
    expected = tg.run(pipeline(), batches())
    found = tg.merge_states(states(tmp_path, parts), pipeline())
    assert_same(found, expected)
    assert int(found["run", "rows"]) == int(expected["run", "rows"]) == 7 * 28
    assert int(found["run", "padding_rows"]) == int(expected["run", "padding_rows"])
    assert found["run", "loader"] == f"{parts} jobs"


def test_the_end_needs_neither_the_selection_nor_the_model(tmp_path: Path) -> None:
    files = states(tmp_path, 3)
    found = tg.merge_states(files, TensorDictSequential(*streams()))
    assert_same(found, tg.run(pipeline(), batches()))


def test_the_order_of_the_files_changes_nothing(tmp_path: Path) -> None:
    files = states(tmp_path, 3)
    assert_same(tg.merge_states(files[::-1], pipeline()), tg.merge_states(files, pipeline()))


def test_parts_of_their_own_loaders_are_numbered_apart(tmp_path: Path) -> None:
    """Each job holds its part only: the moments are those of all, the sample is one of all rows."""
    data = batches()
    files = [tmp_path / "a", tmp_path / "b"]
    for number, (file, own) in enumerate(zip(files, (data[:3], data[3:])), 1):
        tg.run(pipeline(), own, shard=f"{number}/2", sharded=True, state=file)
    found, expected = tg.merge_states(files, pipeline()), tg.run(pipeline(), data)
    torch.testing.assert_close(found["moments"], expected["moments"], rtol=1e-10, atol=1e-12)
    rows = {tuple(row.tolist()) for td in data for row in td["acts", "x"].flatten(0, 1)}
    assert {tuple(row.tolist()) for row in found["sample", "x"]} <= rows


def test_ids_of_ones_own_need_no_shard(tmp_path: Path) -> None:
    data = batches(ids=True)
    files = [tmp_path / "a", tmp_path / "b"]
    for file, own in zip(files, (data[:3], data[3:])):
        tg.run(pipeline(), own, state=file)
    assert_same(tg.merge_states(files, pipeline()), tg.run(pipeline(), data))


def test_a_state_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    tg.run(pipeline(), batches(8), state=few)
    tg.run(pipeline(), batches(80), state=many)
    assert many.stat().st_size < few.stat().st_size + 24 * 2048  # the sequences that are compared


def test_a_part_without_rows_says_so_and_adds_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="this part has no rows"):
        files = states(tmp_path, 3, batches(2))
    assert_same(tg.merge_states(files, pipeline()), tg.run(pipeline(), batches(2)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda files, folder: files[:2], "2 of 3 parts; missing: \\[3\\]"),
        (lambda files, folder: [*files, files[0]], "part-1 twice"),
        (lambda files, folder: [files[0], _copied(files[0], folder), files[1]], "are both part 1/3"),
        (lambda files, folder: [*files[:2], states(_made(folder / "more"), 4)[2]], "different divisions"),
        (
            lambda files, folder: [*files[:2], _changed(folder)],
            r"do not belong together: settings.max_rows is None there and 50",
        ),
        (
            lambda files, folder: [*files[:2], _others(folder, batches(seed=1))],
            "began with different batches",
        ),
        (
            lambda files, folder: [*files[:2], _others(folder, batches()[:3] + batches()[:2:-1])],
            "gave other batches, or another order, before the batch 4",
        ),
        (
            lambda files, folder: [*files[:2], _others(folder, batches(6))],
            "ended after 7 and after 6 batches",
        ),
        (lambda files, folder: [], "got no files"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tg.merge_states(change(states(tmp_path, 3), tmp_path), pipeline())


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _copied(file: Path, folder: Path) -> Path:
    copy = folder / "copy"
    copy.write_bytes(file.read_bytes())
    return copy


def _changed(folder: Path) -> Path:
    tg.run(pipeline(), batches(), shard=(3, 3), state=folder / "other", max_rows=50)
    return folder / "other"


def _others(folder: Path, given: list[TensorDict]) -> Path:
    tg.run(pipeline(), given, shard=(3, 3), state=folder / "other")
    return folder / "other"


def test_the_last_batches_are_compared_too_and_jobs_that_stop_early_fit(tmp_path: Path) -> None:
    swapped = batches()
    swapped[-1], swapped[-2] = swapped[-2], swapped[-1]
    with pytest.raises(ValueError, match="another order, before the batch 7"):
        tg.merge_states([*states(tmp_path, 3)[:2], _others(tmp_path, swapped)], pipeline())
    early = states(_made(tmp_path / "early"), 3, max_rows=30)
    assert int(tg.merge_states(early, pipeline())["run", "rows"]) == 90


def test_missing_parts_can_be_left_out_and_are_named(tmp_path: Path) -> None:
    files = states(tmp_path, 3)
    found = tg.merge_states(files[:2], pipeline(), partial=True)
    assert found["run", "loader"] == "2 jobs, without [3]"


def test_rows_that_two_files_share_are_refused(tmp_path: Path) -> None:
    data = batches(ids=True)
    for name, own in (("a", data[:4]), ("b", data[3:])):
        tg.run(pipeline(), own, state=tmp_path / name)
    with pytest.raises(ValueError, match="have sequences in common"):
        tg.merge_states([tmp_path / "a", tmp_path / "b"], pipeline())
    for name in ("c", "d"):  # numbered from 0 by both, since neither says which part it is
        tg.run(pipeline(), batches(2, seed=ord(name)), state=tmp_path / name)
    with pytest.raises(ValueError, match="shard='K/N', or a 'sequence_id'"):
        tg.merge_states([tmp_path / "c", tmp_path / "d"], pipeline())


def test_another_pipeline_or_other_weights_are_refused(tmp_path: Path) -> None:
    files = states(tmp_path, 2)
    with pytest.raises(ValueError, match="pipeline is not the one of .*size is 40 there and 30 here"):
        tg.merge_states(files, pipeline(size=30))
    models = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)) for _ in range(2)]
    data = [{"x": torch.randn(4, 3), "sequence_id": torch.arange(4) + 4 * i} for i in range(2)]
    for number, model in enumerate(models):
        capture = tg.Capture(model, "module_output:0", in_keys=["x"])
        sites = capture.sites
        part = TensorDictSequential(capture, tg.SelectTokens(sites), tg.ForEach(tg.StreamingMean(), sites))
        tg.run(part, [data[number]], state=tmp_path / f"m{number}")
    end = TensorDictSequential(tg.ForEach(tg.StreamingMean(), sites))
    with pytest.raises(ValueError, match="do not belong together: batch_stages.*sha256"):
        tg.merge_states([tmp_path / "m0", tmp_path / "m1"], end)


def test_damage_is_seen(tmp_path: Path) -> None:
    files = states(tmp_path, 2)
    whole = bytearray(files[1].read_bytes())
    whole[-3] ^= 1
    files[1].write_bytes(whole)
    with pytest.raises(ValueError, match="part-2 cannot be read: its SHA-256"):
        tg.merge_states(files, pipeline())
    with pytest.raises(FileNotFoundError, match="no file"):
        tg.merge_states([tmp_path / "nowhere"], pipeline())


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b", (1, 2, 3)])
def test_a_shard_is_one_of_n(shard: Any) -> None:
    with pytest.raises(ValueError, match="shard is 'K/N', part K of N counted from 1"):
        tg.run(pipeline(), batches(), shard=shard)


# ------------------------------------------------------------------------------------------------ another engine's worker

# A process that owns a model and is called from outside, as the workers of serving engines are: only the state leaves it.
WORKER = """
import json, sys
import torch
import tdgeom as tg
from tensordict.nn import TensorDictSequential

torch.set_num_threads(1)
torch.manual_seed(5)
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6))

def measure(rows, part, parts, file):
    capture = tg.Capture(model, "module_output:*", in_keys=["x"])
    s = capture.sites
    stages = TensorDictSequential(capture, tg.SelectTokens(s), tg.ForEach(tg.StreamingCovariance(), s))
    left = tg.run(stages, [{"x": torch.tensor(rows)}], shard=(part, parts), sharded=True, state=file, progress=False)
    return int(left["run", "rows"])

for line in sys.stdin:
    call = json.loads(line)
    print(json.dumps(globals()[call["function"]](*call["arguments"])), flush=True)
"""


def test_workers_that_own_the_model_send_their_state_alone(tmp_path: Path) -> None:
    rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    paths = [str(Path(tg.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "env": environment,
    }
    workers: list[Any] = [subprocess.Popen([sys.executable, "-c", WORKER], **pipes) for _ in range(2)]
    for number, (worker, own) in enumerate(zip(workers, (rows[:25], rows[25:])), 1):
        arguments = [own.tolist(), number, 2, str(tmp_path / f"w{number}")]
        worker.stdin.write(json.dumps({"function": "measure", "arguments": arguments}) + "\n")
        worker.stdin.flush()
    counted = [json.loads(worker.stdout.readline()) for worker in workers]
    for worker in workers:
        worker.communicate(timeout=60)
    assert counted == [25, 35]

    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6))
    s = ["module_output:0", "module_output:1", "module_output:2"]
    end = TensorDictSequential(tg.ForEach(tg.StreamingCovariance(), s), tg.ForEach(tg.EigenSpectrum(), s))
    merged = tg.merge_states([tmp_path / "w1", tmp_path / "w2"], end)
    with torch.no_grad():
        own = torch.linalg.eigvalsh(torch.cov(model(rows).double().T)).flip(0)
    torch.testing.assert_close(merged["eigenvalues", "module_output:2"], own, rtol=1e-5, atol=1e-7)


def test_several_parts_may_be_empty(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="this part has no rows"):
        files = states(tmp_path, 5, batches(3))
    assert_same(tg.merge_states(files, pipeline()), tg.run(pipeline(), batches(3)))


@pytest.mark.filterwarnings("ignore::tdgeom.FewRowsWarning")
def test_parts_under_other_configurations_or_edits_are_refused(tmp_path: Path) -> None:
    """Equal weights are not all that makes a model."""

    def left(name: str, edits: dict[str, Any] | None = None, **settings: Any) -> Path:
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=50, bos_token_id=0, eos_token_id=0, **settings
        )
        model = GPT2Model(config).eval()
        capture = tg.Capture(model, "residual_output")
        stages = TensorDictSequential(
            capture, tg.SelectTokens(capture.sites), tg.ForEach(tg.StreamingMean(), capture.sites)
        )
        data = [{"input_ids": torch.arange(8)[None] + i} for i in range(4)]
        with tg.Intervene(model, edits) if edits else nullcontext():
            tg.run(stages, data, shard=(1 if name == "a" else 2, 2), state=tmp_path / name)
        return tmp_path / name

    first, end = (
        left("a"),
        TensorDictSequential(tg.ForEach(tg.StreamingMean(), ["residual_output.0", "residual_output.1"])),
    )
    assert tg.merge_states([first, left("b")], end)["run", "loader"] == "2 jobs"
    with pytest.raises(ValueError, match="do not belong together: batch_stages.*config_sha256"):
        tg.merge_states([first, left("c", scale_attn_weights=False)], end)
    with pytest.raises(ValueError, match="do not belong together: batch_stages.*hooked"):
        tg.merge_states(
            [first, left("d", {"residual_output.0": tg.Steer(torch.ones(16), coefficient=50.0)})], end
        )


def test_one_path_is_no_list_and_a_shard_no_number(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="takes the list of all parts' files, got one path"):
        tg.merge_states(str(tmp_path / "a"), pipeline())
    with pytest.raises(ValueError, match="shard is 'K/N'"):
        tg.run(pipeline(), batches(), shard=1)
