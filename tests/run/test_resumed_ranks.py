"""Runs of some ranks that break off go on with as many, more or fewer, and end with the numbers of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import resumed_ranks
import split_programs
import tdgeom as tg

TESTS = Path(__file__).parent.parent
WORDS = {
    "told 2->3": "was reading a loader split over 2 ranks, and now there is one split over 3.*Start as many ranks as then",
    "part of one loader 2->2": "was reading one loader, and now there is one split over 2",
    "another order 2->3": "has seen 8 batches, but the loader now gives others among them",
    "another model 2->3": r"belongs to another run: stages\[0\].model.weights",
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    paths = [str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run(
        [*launched, str(TESTS / "resumed_ranks.py"), str(folder)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.fixture(scope="module")
def undisturbed():
    """The numbers of one process, and rows that need none of ours."""
    torch.set_default_dtype(torch.float64)

    def one(loader, **options):
        found = tg.run(split_programs.pipeline(), loader, progress=False, **options)
        return split_programs.said(found)

    batches, dealt = split_programs.batches, split_programs.sampler_loader
    tables = tg.analyze_model(split_programs.model(), batches(), sites="module_output:2", progress=False)
    compared = tg.compare(
        split_programs.model(), split_programs.model(seed=8), batches(), ["linear_cka", "neighborhood_overlap"],
        sites="module_output:2", progress=False,
    )  # fmt: skip
    whole = one(batches())
    rows = split_programs.model()(torch.stack([one["input"] for one in split_programs.data()]))
    yield {
        "rows": rows.detach().numpy(),
        "one loader": whole,
        "cut": one(batches(), max_rows=37),
        "stored": whole,
        "in the end": whole,
        "ids": whole,
        "uneven": whole,
        "sampler": one(dealt(0, 1)),
        "sampler, cut": one(dealt(0, 1), max_rows=44),
        "accelerate": whole,
        "comparison": resumed_ranks.numbers_of(compared),
        "analysis": tables.metrics.select_dtypes("number").iloc[0].to_dict(),
    }
    torch.set_default_dtype(torch.float32)


def same(found, expected, where):
    for name in ("rows", "sample", "label"):
        assert found[name] == expected[name], (where, name)
    for name in ("mean", "covariance"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-10, atol=1e-12, err_msg=where)


@pytest.mark.slow
def test_runs_go_on_with_as_many_more_or_fewer_ranks(ranks, undisturbed):
    rows = undisturbed["rows"]
    for name, (_, ways) in resumed_ranks.CHECKS.items():
        for before, after in ways:
            where = f"{name} {before}->{after}"
            told = [rank[where] for rank in ranks]
            found = told[0]["second"].get("result")
            assert found is not None, (where, told[0]["second"])
            assert [one["second"] for one in told[1:after]] == [{"result": None}] * (after - 1), where
            kept = [left for left in told[0]["after"] if left not in ("store", "results")]
            assert kept == [], where
            if name == "told, in one go":
                continue
            assert all("error" in one["first"] for one in told[:before]), where
            assert "state" in told[0]["left"], where
            if name in ("analysis", "comparison"):
                for metric, value in undisturbed[name].items():
                    assert found[metric] == pytest.approx(value, rel=1e-6, nan_ok=True), (where, metric)
                continue
            expected = undisturbed.get(name)
            if name == "told":  # numbered by rank and index: those of as many ranks
                expected = ranks[0][where.replace("told", "told, in one go")]["second"]["result"]
            same(found, expected, where)
            if "cut" not in name:
                np.testing.assert_allclose(found["mean"], rows.mean(0), rtol=1e-10, err_msg=where)
            if name in ("stored", "in the end"):
                assert found["state"] == ["complete", 47, 0] and found["files"], where
                assert found["stored"] == [number << 20 for number in range(47)], where
                np.testing.assert_allclose(found["values"], rows.flatten(), rtol=1e-10, err_msg=where)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_on_all_ranks_and_the_checkpoint_stays(ranks):
    assert set(WORDS) == {
        f"{name} {before}->{after}" for name, (_, (before, after)) in resumed_ranks.REFUSED.items()
    }
    for where, words in WORDS.items():
        told = [rank[f"refused: {where}"] for rank in ranks[: int(where[-1])]]
        for one in told:
            assert re.search(words, one["second"]["error"]), one
        assert told[0]["after"] == told[0]["left"] and "state" in told[0]["after"]
