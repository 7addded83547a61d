"""Writes the corpus of hostile files beside this script: `python tests/data/hostile/make.py`.

One folder a kind of file; ``tests/test_hostile.py`` gives every file to the loader of its kind.
"""

from __future__ import annotations

import io
import json
import pickle
import sqlite3
import struct
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CANARY = "tdgeom-hostile-file-was-executed"


class Bomb:
    """Unpickled, it leaves a file in the working directory."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (CANARY, "w")


def shard(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: object) -> dict[str, object]:
    """A good entry of a safetensors header, changed."""
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}


def archive(**members: bytes) -> bytes:
    """A zip file."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name.replace("__", "."), content)
    return held.getvalue()


def array(descr: str, shape: str, data: bytes = bytes(64)) -> bytes:
    """A .npy file with any header."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (64 - (10 + len(text) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def catalogue(*statements: str) -> bytes:
    """A SQLite file."""
    connection = sqlite3.connect(":memory:")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    return bytes(connection.serialize())


PICKLE = pickle.dumps(Bomb())
PICKLED_ARRAY = io.BytesIO()
np.save(PICKLED_ARRAY, np.array([Bomb()], dtype=object), allow_pickle=True)
TRIGGER = (
    "CREATE TABLE runs (id TEXT)",
    "CREATE TRIGGER t AFTER INSERT ON runs BEGIN DELETE FROM runs; END",
    "PRAGMA application_id=1952737133",
    "PRAGMA user_version=1",
)
FILES = {
    "shards": {
        "header-longer-than-the-file": shard(b"{}", length=1 << 62),
        "header-of-two-gigabytes": shard(b"{}", length=1 << 31),
        "header-is-a-list": shard(b"[]"),
        "header-nested-deep": shard(b'{"a":' * 3000 + b"1" + b"}" * 3000),
        "name-twice": shard(b'{"a": 1, "a": 2}'),
        "dtype-object": shard({"a": entry(dtype="OBJECT")}),
        "negative-size": shard({"a": entry(shape=[-2, -2])}),
        "huge-shape": shard({"a": entry(shape=[1 << 40, 1 << 40, 0], data_offsets=[0, 0])}),
        "offsets-outside": shard({"a": entry(data_offsets=[16, 32])}),
        "offsets-overlap": shard({"a": entry(), "b": entry()}),
        "pickle": PICKLE,
        "empty": b"",
    },
    "catalogues": {
        "trigger": catalogue(*TRIGGER),
        "view": catalogue("CREATE VIEW runs AS SELECT 1 AS id", *TRIGGER[2:]),
        "another-application": catalogue("CREATE TABLE runs (id TEXT)"),
        "later-format": catalogue(*TRIGGER[:1], TRIGGER[2], "PRAGMA user_version=99"),
        "no-database": b"SQLite format 3\x00" + b"\xff" * 512,
        "pickle": PICKLE,
    },
    "metadata": {  # a bundle's metadata.json
        "path-up": b'{"artifact_schema_version": "1.0", "files": {"../metrics.csv": "00"}}',
        "path-absolute": b'{"artifact_schema_version": "1.0", "files": {"/etc/passwd": "00"}}',
        "deep": b"[" * 20_000,
        "files-is-a-list": b'{"artifact_schema_version": "1.0", "files": []}',
        "later-schema": b'{"artifact_schema_version": "9.0", "files": {}}',
        "not-text": b"\xff\xfe\x00",
        "pickle": PICKLE,
    },
    "arrays": {  # a bundle's eigenvalues.npz, with a hash that fits
        "pickled-array": archive(layer_00__npy=PICKLED_ARRAY.getvalue()),
        "huge-shape": archive(layer_00__npy=array("'<f8'", "(1099511627776,)")),
        "dtype-object": archive(layer_00__npy=array("'|O'", "(8,)")),
        "decompression-bomb": archive(layer_00__npy=array("'<f8'", "(4000000,)", bytes(32_000_000))),
        "no-archive": b"PK\x03\x04" + bytes(64),
        "pickle": PICKLE,
    },
    "checkpoints": {
        "no-record": shard({"a": entry()}),
        "record-is-no-json": shard(
            {"record": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}}, b"x" * 16
        ),
        "header-longer-than-the-file": shard(b"{}", length=1 << 62),
        "pickle": PICKLE,
        "empty": b"",
    },
    "specs": {
        "list": b"[]",
        "unknown-entry": b'{"sites": ["x"], "__class__": "os.system"}',
        "deep": b'{"row_groups":' * 5000,
        "sites-are-numbers": b'{"sites": [1, 2]}',
        "not-json": b"import os",
    },
    "exports": {  # an exported run's run.json
        "another-id": b'{"format": 1, "id": "../../outside", "kind": "capture"}',
        "later-format": b'{"format": 99}',
        "deep": b"[" * 20_000,
        "pickle": PICKLE,
    },
}

if __name__ == "__main__":
    for kind, files in FILES.items():
        (HERE / kind).mkdir(exist_ok=True)
        for name, content in files.items():
            (HERE / kind / f"{name}.bin").write_bytes(content)
