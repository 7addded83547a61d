"""A run under a checkpoint that stores rows goes on from any kill: the numbers of an undisturbed run, each row stored once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "killed_runs.py"


@pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_goes_on_from_a_kill_before_any_operation_of_the_disk(step) -> None:
    done = subprocess.run([sys.executable, PROGRAM, str(step)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["blocks"] for line in said] == ["small blocks", "one block"], said
    assert all(line["kills"] * step > 30 for line in said)
