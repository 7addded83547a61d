"""Every file of the hostile corpus, given to the loader of its kind: refused in words, nothing executed."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom.files.errors import StoreError
from tdgeom.files.shards import Shard

CORPUS = Path(__file__).parent / "data" / "hostile"
CANARY = "tdgeom-hostile-file-was-executed"


def load_shard(path: Path, folder: Path) -> None:
    Shard(path)


def load_catalogue(path: Path, folder: Path) -> None:
    shutil.copy(path, folder / "catalogue.sqlite")
    store = tg.ActivationStore(folder)
    store.query()


def bundle(folder: Path) -> Path:
    results = tg.AnalysisResults(
        metrics=pd.DataFrame({"site": ["x.0"], "d_pr": [1.5]}),
        novelty=pd.DataFrame({"a": ["x.0"], "b": ["x.1"]}),
        eigenvalues={"layer_00": np.ones(2)},
    )
    return results.save(folder / "run")


def load_metadata(path: Path, folder: Path) -> None:
    made = bundle(folder)
    shutil.copy(path, made / "metadata.json")
    tg.AnalysisResults.load(made)


def load_arrays(path: Path, folder: Path) -> None:
    made = bundle(folder)
    shutil.copy(path, made / "eigenvalues.npz")
    metadata = json.loads((made / "metadata.json").read_text())
    metadata["files"]["eigenvalues.npz"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (made / "metadata.json").write_text(json.dumps(metadata))
    tg.AnalysisResults.load(made)


def load_checkpoint(path: Path, folder: Path) -> None:
    shutil.copy(path, folder / "state")
    tg.run(
        TensorDictSequential(tg.StreamingMean()), [{"tokens": torch.ones(2, 2)}], checkpoint=folder / "state"
    )


def load_spec(path: Path, folder: Path) -> None:
    tg.CaptureSpec.from_json(path.read_text())


def load_export(path: Path, folder: Path) -> None:
    run = folder / "moved" / "r0123456789ab"
    run.mkdir(parents=True)
    shutil.copy(path, run / "run.json")
    tg.ActivationStore(folder / "store").import_runs(folder / "moved")


LOADERS = {
    "shards": (load_shard, StoreError),
    "catalogues": (load_catalogue, StoreError),
    "metadata": (load_metadata, ValueError),
    "arrays": (load_arrays, ValueError),
    "checkpoints": (load_checkpoint, ValueError),
    "specs": (load_spec, ValueError),
    "exports": (load_export, StoreError),
}
FILES = sorted(CORPUS.glob("*/*.bin"))


def test_the_corpus_is_whole() -> None:
    assert {path.parent.name for path in FILES} == set(LOADERS) and len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_hostile_file_is_refused(path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    load, error = LOADERS[path.parent.name]
    with pytest.raises(error) as refused:
        load(path, tmp_path)
    assert len(str(refused.value)) > 10
    assert not (tmp_path / CANARY).exists()


def mutated(data: st.DataObject, raw: bytes) -> bytes:
    """A few bytes changed, or the end cut off; places as shares of the length, which differs from run to run."""
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.floats(0, 1, exclude_max=True))
        changed[int(at * len(changed))] = data.draw(st.integers(0, 255))
    return bytes(changed[: int(data.draw(st.sampled_from([1.0, 0.999, 0.5])) * len(changed))])


def stored(folder: Path) -> tuple[tg.ActivationStore, str]:
    store = tg.ActivationStore(folder)
    run = store.save({"acts": torch.arange(6.0).reshape(2, 3)}, model="m", tag="t", capture={"layers": [1]})
    return store, run


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_mutated_shard_is_refused_or_reads_as_tensors(data, tmp_path_factory) -> None:
    store, run = stored(tmp_path_factory.mktemp("shard"))
    path = next((store.path / run).glob("*.safetensors"))
    path.write_bytes(mutated(data, path.read_bytes()))
    damaged = path.read_bytes()
    try:
        activations, _ = store.load(run)
    except StoreError as error:
        assert str(error)
    else:
        assert isinstance(activations["acts"], torch.Tensor) and activations["acts"].shape == (2, 3)
    assert store.verify(run) or hashlib.sha256(damaged).hexdigest() == store.catalogue.shards(run)[0].sha256


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_mutated_catalogue_is_refused_or_read(data, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("catalogue")
    stored(folder)
    path = folder / "catalogue.sqlite"
    with sqlite3.connect(path) as connection:  # everything into the one file
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    for beside in folder.glob("catalogue.sqlite-*"):
        beside.unlink()
    path.write_bytes(mutated(data, path.read_bytes()))
    try:
        found = tg.ActivationStore(folder).query()
        assert all(isinstance(one["id"], str) for one in found) and repr(found)
    except StoreError as error:
        assert str(error)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_mutated_export_is_refused_or_taken_whole(data, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("export")
    store, run = stored(folder / "store")
    moved = store.query().export(folder / "moved")
    path = sorted((moved / run).iterdir())[data.draw(st.integers(0, 1))]
    path.write_bytes(mutated(data, path.read_bytes()))
    other = tg.ActivationStore(folder / "other")
    try:
        other.import_runs(moved)
    except StoreError as error:
        assert str(error) and len(other.query()) == 0
    else:
        assert other.verify() == []


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_mutated_checkpoint_is_refused(data, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("checkpoint") / "state"
    rows = [{"tokens": torch.full((2, 3), float(i))} for i in range(4)]

    def broken_off():
        yield from rows[:3]
        raise InterruptedError

    stages = TensorDictSequential(tg.StreamingMean())
    with pytest.raises(InterruptedError):
        tg.run(stages, broken_off(), checkpoint=path, every=1)
    whole = path.read_bytes()
    path.write_bytes(mutated(data, whole))
    if path.read_bytes() == whole:
        return
    try:
        result = tg.run(stages, rows, checkpoint=path)
    except ValueError as error:
        assert str(error)
    else:  # a blank that pads the header
        assert int(result["run", "rows"]) == 8


@given(text=st.text(max_size=200))
def test_any_text_as_a_capture_spec(text) -> None:
    try:
        tg.CaptureSpec.from_json(text)
    except ValueError as error:
        assert str(error)
