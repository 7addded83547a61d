"""A run under a checkpoint that stores rows goes on from any kill: the numbers of an undisturbed run, each row stored once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "killed_runs.py"


@pytest.mark.slow
@pytest.mark.parametrize("step", [1])
def test_a_run_goes_on_from_a_kill_before_any_operation_of_the_disk(step) -> None:
    done = subprocess.run([sys.executable, PROGRAM, str(step)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["blocks"] for line in said] == ["small blocks", "one block"], said
    assert all(line["kills"] * step > 30 for line in said)


@pytest.mark.slow
def test_runs_killed_at_random_moments_alone_and_as_ranks_go_on() -> None:
    program = [sys.executable, PROGRAM.with_name("killed_at_random.py"), "6", "4"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said[-1]["kills"] == 6 and said[-1]["wrong"] == 0, said
    assert said[-1]["checkpoint left"] >= 1  # else nothing went on
