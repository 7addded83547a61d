"""Under torchrun, loaders of every kind give the numbers of one process, or are refused on all ranks with what differs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, DistributedSampler

import split_programs
from tdgeom.core.split_loaders import find_split

TESTS = Path(__file__).parent.parent
PROGRAM = str(TESTS / "split_programs.py")
LAUNCHED = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
WORDS = {
    "lengths": r"gave \[10, .*\] batches on the ranks",
    "lengths, cut": "those of the ranks .* ended before the others",
    "seeds": "first batch of rank 1 is another than that of rank 0.*sharded=True",
    "own data": "first batch of rank 1 is another than that of rank 0",
    "another batch later": "rank 1 got other batches than rank 0, though both began with the same",
    "seeds with ids": "sequences have come again since",
    "part without a word": "first batch of rank 1 is another.*say so: sharded=True",
    "the same part": "all . ranks begin with the same batch",
    "sampler of other ranks": "part 0 of . on rank 0, part 1 of . on rank 1.*but there are",
    "sampler of one rank": "part 0 of . on rank 0, part 0 of . on rank 1",
    "sampler seeds": r"DistributedSampler\): seed is 0 on rank 0 and 1 on rank 1",
    "sampler on one rank": r"those of the ranks \[0\] are not split by rank",
    "sharded=False": r"split by rank \(DistributedSampler\)",
    "sharded on one": r"different sharded=: \[True, False",
    "weights": "weights of their models differ.*on rank 0 and .* on rank 1",
    "weights that change": "something changed while they ran.*weights",
    "settings": "size is 8 on rank 0 and 9 on rank 1",
    "limits": "max_rows is 20 on rank 0 and 21 on rank 1",
    "halves without a word": "split_dataset_by_node of a map-style data set leaves no trace.*sharded=True",
    "TunedLens": "trains in one process.*DistributedSampler",
    "no group": "no process group.*init_process_group",
}
# how much was read, and what came twice, may depend on the batches; the way in which the data lay does
READ = ("tokens", "repeated", "loader")


def run(folder, world=1):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
        ),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "TDGEOM_TEST_FOLDER": str(folder),
    }
    command = [sys.executable] if world == 1 else [*LAUNCHED, str(world)]
    done = subprocess.run(
        [*command, PROGRAM, str(folder), ""], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    return run(tmp_path_factory.mktemp(f"ranks{request.param}"), request.param)


def same(found, expected, where):
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for name in expected:
            if name not in READ:
                same(found[name], expected[name], f"{where} {name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, pair in enumerate(zip(found, expected)):
            same(*pair, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-7, nan_ok=True), where
    else:
        assert found == expected, where


@pytest.mark.slow
def test_ranks_give_the_numbers_of_one_process_or_refuse(one, ranks):
    world = len(ranks)
    for name in split_programs.CHECKS:
        assert all(rank[name] == {"result": None} for rank in ranks[1:]), (name, ranks[1][name])
        expected, found = one[name]["result"], ranks[0][name].get("result")
        assert found is not None, (name, ranks[0][name])
        if name in ("told", "halves"):  # numbered by rank and index, and that is said
            assert f"only runs on {world} ranks" in found["loader"]
            same(found["covariance"], expected["covariance"], name)
            continue
        if name in ("halves, cut", "halves with ids, cut"):
            assert "took of every part in turn, not the first rows of the whole" in found["loader"]
            assert found["rows"] == expected["rows"] == 20
            continue
        assert "in turn" not in str(found), name
        same(found, expected, name)
    for name, words in WORDS.items():
        errors = {rank[name].get("error") for rank in ranks}
        assert len(errors) == 1 or name in ("TunedLens", "no group"), (name, errors)
        for error in errors:
            assert error is not None, name
            assert re.search(words, error), (name, error)
    assert set(WORDS) - {"no group"} == set(split_programs.REFUSED) - {"profile of nothing"}
    assert "this is rank 1" in ranks[1]["profile of nothing"]["error"]


@pytest.mark.slow
def test_what_is_known_of_loaders_is_said(ranks):
    def words(name):
        return ranks[0][name]["result"]["loader"]

    assert words("one loader") == f"one loader, shared out among {len(ranks)} ranks batch by batch"
    assert "(DistributedSampler); sequences are numbered by their place" in words("sampler")
    assert "(BatchSamplerShard); sequences are numbered by their place" in words("accelerate")
    assert "(split_dataset_by_node); sequences are numbered by rank and index" in words("split_by_node")
    assert "(their ids); sequences have the ids that they bring" in words("ids")
    repeated = -47 % len(ranks)
    assert ranks[0]["sampler"]["result"]["repeated"] == repeated


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(("n", "parts", "size"), [(47, 2, 5), (47, 3, 4), (12, 4, 3), (2, 4, 2), (9, 2, 16)])
def test_places_are_where_the_sampler_takes_its_elements_from(n, parts, size, drop):
    data = list(range(n))
    for part in range(parts):
        sampler = DistributedSampler(data, parts, part, shuffle=False, drop_last=drop)
        loader = DataLoader(data, batch_size=size, sampler=sampler)
        found, before = find_split(loader), 0
        assert (found.part, found.parts, found.repeats) == (part, parts, not drop)
        for number, batch in enumerate(loader):
            assert found.fits(before, number, len(batch))
            places = found.places(before, number, len(batch))
            assert (places % n).tolist() == batch.tolist()  # behind the end they begin again
            before += len(batch)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("n", "parts", "size"), [(47, 2, 4), (47, 3, 6), (12, 2, 2), (9, 3, 6)])
def test_places_of_batches_are_where_accelerate_takes_them_from(n, parts, size, split):
    from accelerate.data_loader import prepare_data_loader

    data = list(range(n))
    for part in range(parts):
        loader = prepare_data_loader(
            DataLoader(data, batch_size=size), num_processes=parts, process_index=part,
            split_batches=split, put_on_device=False,
        )  # fmt: skip
        found, before = find_split(loader), 0
        for number, batch in enumerate(loader):
            assert found.fits(before, number, len(batch))
            assert (found.places(before, number, len(batch)) % n).tolist() == batch.tolist()
            before += len(batch)


def test_loaders_that_are_not_split_say_nothing():
    data = list(range(8))
    for loader in (data, DataLoader(data), DataLoader(data, shuffle=True), iter(data), None):
        assert find_split(loader) is None
    assert find_split(DataLoader(data, sampler=DistributedSampler(data, 1, 0))) is None


def test_batches_of_another_length_do_not_fit_a_sampler():
    data = list(range(12))
    found = find_split(DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 2, 0)))
    assert found.fits(0, 0, 4) and not found.fits(0, 0, 3) and not found.fits(0, 0, 5)
    assert found.fits(4, 1, 2)  # the last
