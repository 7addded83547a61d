"""Two processes give the numbers of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

import rank_programs
from tdgeom.run.shares import SeenIds, rows_before

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("activations")
    return {name: dict(rank_programs.flat(td)) for name, td in rank_programs.results(0, 1, folder).items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_ranks"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):  # the workers of one run share the result
        if not (folder / "out.pt").exists():
            _run_two(folder)
    return torch.load(folder / "out.pt", weights_only=True)


def _run_two(folder):
    paths = [str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    program = [sys.executable, str(TESTS / "rank_programs.py")]
    workers = [
        subprocess.Popen(
            [*program, str(rank), str(folder / "store"), str(folder / "out.pt")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)


@pytest.mark.parametrize("case", [*rank_programs.CASES, "stored"])
def test_two_ranks_give_the_numbers_of_one(case, one, two):
    found, expected = two[case], one[case]
    assert set(found) == set(expected)
    assert int(found["run", "rows"]) == int(expected["run", "rows"]) > 0
    single = any(value.dtype == torch.float32 for value in expected.values())
    rtol, atol = (1e-4, 1e-5) if single else (1e-8, 1e-9)
    for key in expected:
        if key[0] == "run":
            continue
        if key[0] in ("sample", "collected", "sample_row_id", "collected_row_id"):
            assert torch.equal(found[key], expected[key]), key
        a, b = found[key].double(), expected[key].double()
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=f"{case}: {key}")


@pytest.mark.parametrize("case", ["model", "acts_max_rows", "uneven", "raw", "dropped"])
def test_what_was_read_is_counted_once_over_ranks(case, one, two):
    for name in ("tokens", "padding_rows", "batches", "dropped_rows"):
        assert int(two[case]["run", name]) == int(one[case]["run", name]), name


def test_the_sample_is_the_same_rows_and_their_labels(one, two):
    assert len(two["sharded"]["sample_row_id"]) == 12
    assert torch.equal(two["sharded"]["sample_carried", "label"], one["sharded"]["sample_carried", "label"])


def test_documents_that_a_sampler_repeats_count_once(one, two):
    assert int(two["sharded"]["run", "repeated_rows"]) > 0 == int(one["sharded"]["run", "repeated_rows"])
    assert len(two["sharded"]["collected_row_id"].unique()) == len(two["sharded"]["collected_row_id"])


def test_a_cut_falls_in_the_middle_of_a_batch(one):
    assert int(one["model_max_rows"]["run", "rows"]) == 43
    assert int(one["acts_max_rows"]["run", "rows"]) == 31
    whole = [int(rank_programs.text(3, s)["attention_mask"].sum()) for s in range(6)]
    assert 43 not in [sum(whole[:i]) for i in range(7)]


def test_ids_that_come_again_are_seen():
    generator = np.random.default_rng(0)
    seen, known = SeenIds(), set()
    for _ in range(30):
        ids = generator.integers(0, 200, generator.integers(0, 40))
        expected = []
        for one in ids.tolist():
            expected.append(one not in known)
            known.add(one)
        assert seen.add(ids).tolist() == expected


def test_rows_before_a_unit_are_those_of_lower_order_on_any_rank():
    counts, orders = [[2, 5], [3, 0, 4]], [[0, 3], [1, 2, 4]]
    assert [one.tolist() for one in rows_before(counts, orders)] == [[0, 5], [2, 5, 10]]


def test_a_sharded_loader_needs_no_ids():
    batches = [{"tokens": {"x": torch.arange(12.0, dtype=torch.float64).reshape(3, 4).square()}}] * 2
    result = rank_programs.tg.run(
        rank_programs.tg.ForEach(rank_programs.tg.StreamingMean(), ["x"]),
        batches,
        sharded=True,
        progress=False,
    )
    assert int(result["run", "rows"]) == 6


def test_ids_count_once_in_one_process():
    batch = {"tokens": torch.arange(12.0).reshape(3, 4), "sequence_id": torch.tensor([4, 9, 4])}
    rows = {"tokens": torch.ones(2, 4), "row_id": torch.tensor([7, 8])}
    for loader, left in (([batch, batch], 2), ([rows, rows], 2)):
        result = rank_programs.tg.run(rank_programs.tg.StreamingMean(), loader, sharded=True, progress=False)
        assert int(result["run", "rows"]) == left
