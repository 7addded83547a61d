"""Models that ranks share (FSDP2, tensor parallel) give the numbers of the whole model in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shared_models
from tdgeom.run.identity import weights_identity

TESTS = Path(__file__).parent.parent


def _torchrun(world, folder):
    paths = [str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    program = [sys.executable, *launch, str(TESTS / "shared_models.py"), str(folder)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def alone():
    return {
        name: shared_models.numbers(run()) for name, run in shared_models.runs(shared_models.llama, 1, None)
    }


def _compare(found, alone):
    """The results of rank 0 are those of one process; the others have none."""
    for name, own in found[0].items():
        case = name.partition(": ")[2]
        if case not in alone:
            continue
        expected = alone[case]
        assert set(own) == set(expected)
        for key, value in own.items():
            a, b = torch.tensor(value, dtype=torch.float64), torch.tensor(expected[key], dtype=torch.float64)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
            if "run" in key:
                assert torch.equal(a, b), (name, key)
        assert all(other[name] is None for other in found[1:]), name


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return _torchrun(2, tmp_path_factory.mktemp("two"))


def test_ranks_that_share_a_model_run_it_together(two, alone):
    _compare(two, alone)
    assert sum(name.startswith("fsdp: ") for name in two[0]) == len(alone) == 8
    assert sum(name.startswith("tensor parallel: ") for name in two[0]) == 6


def test_edits_of_a_tensor_parallel_model_are_those_of_the_whole(two):
    expected = [shared_models.edited(model()) for model in (shared_models.llama, shared_models.Blocks)]
    for found in two:
        for own, whole in zip(found["edited"], expected, strict=True):
            a, b = torch.tensor(own["output"]), torch.tensor(whole["output"])
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_parts_that_say_so_are_gathered_and_others_refused(two):
    expected = shared_models.inner(shared_models.Blocks(), "module_output:blocks.0.1")
    for rank, found in enumerate(two):
        gathered = found["tensor parallel: gathered"]["acts"]
        torch.testing.assert_close(
            torch.tensor(gathered), torch.tensor(expected["acts"]), rtol=1e-5, atol=1e-6
        )
        said = {name: one["said"] for name, one in found["refused"].items()}
        assert "is a part of the activation, another on every rank" in said["a part"], rank
        assert "use_local_output=False" in said["a part edited"]
        assert "must be given the same batches" in said["other batches"]
        assert "pipeline parallel" in said["pipeline"] and "context-parallel" in said["context"]
        heads = {name: words for name, words in said.items() if name.startswith("heads")}
        assert len(heads) == 8
        for name, words in heads.items():
            assert "lies in parts on several ranks" in words and "Remedy: 'attn_output'" in words, (
                name,
                words,
            )
        assert max(one["seconds"] for one in found["refused"].values()) < 10


def test_weights_are_known_by_the_whole(two):
    expected = weights_identity(shared_models.llama())
    assert all(one == expected for found in two for one in found["weights"])


def test_a_rank_that_fails_inside_a_shared_forward_ends_the_others(two):
    assert two[1]["failing"]["kind"] == "ArithmeticError"
    assert two[0]["failing"]["kind"] == "RankFailed" and two[0]["failing"]["seconds"] < 10
    assert "rank 1 failed: ArithmeticError: out of range" in two[0]["failing"]["said"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_more_ranks_and_meshes(world, alone, tmp_path):
    found = _torchrun(world, tmp_path)
    _compare(found, alone)
    if world == 4:
        expected = weights_identity(shared_models.llama())
        assert all(one == expected for of_rank in found for one in of_rank["weights"])
