"""Every file of the hostile corpus, given to the loader of its kind: refused in words, nothing executed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom.store import StoreError
from tdgeom.store.shards import Shard

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
