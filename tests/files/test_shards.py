"""Shards: safetensors files that any reader opens, and hostile ones that ours refuses."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors.torch
import torch

from tdgeom.files.errors import StoreError
from tdgeom.files.shard_writing import write_shard
from tdgeom.files.shards import Shard


def shard_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(**changes):
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}


DAMAGED = "is no shard, or a damaged one"
BAD_HEADERS = {
    "claims more than the file": (b"{}", 1 << 62, "its header claims"),
    "claims 2 GB": (b"{}", 1 << 31, "its header claims"),
    "no JSON": (b"{'a'", None, "not valid JSON"),
    "no object": (b"[]", None, DAMAGED),
    "no UTF-8": (b'{"\xff": 1}', None, "not valid JSON"),
    "deep": (b'{"a":' * 5000 + b"1" + b"}" * 5000, None, "not valid JSON|nested deeper"),
    "a name twice": (b'{"a": 1, "a": 2}', None, "names a key twice"),
    "no entry": ({"a": 3}, None, DAMAGED),
    "another field": ({"a": entry(code="x")}, None, "no shard holds"),
    "unknown dtype": ({"a": entry(dtype="OBJECT")}, None, DAMAGED),
    "dtype is a list": ({"a": entry(dtype=["F32"])}, None, DAMAGED),
    "negative size": ({"a": entry(shape=[-2, -2])}, None, DAMAGED),
    "true as a size": ({"a": entry(shape=[True, 4])}, None, DAMAGED),
    "huge size": ({"a": entry(shape=[1 << 62, 0], data_offsets=[0, 0]), "b": entry()}, None, "no shard holds"),
    "huge product": ({"a": entry(shape=[1 << 40, 1 << 40, 0], data_offsets=[0, 0])}, None, DAMAGED),
    "17 dimensions": ({"a": entry(shape=[2, 2] + [1] * 15)}, None, "no shard holds"),
    "the same entry twice": (
        b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), None, "names a key twice",
    ),
    "a dtype that torch has not": ({"a": entry(dtype="F4", shape=[32])}, None, "no shard holds"),
    "one offset": ({"a": entry(data_offsets=[0])}, None, DAMAGED),
    "offsets backwards": ({"a": entry(data_offsets=[16, 0])}, None, DAMAGED),
    "offsets outside": ({"a": entry(data_offsets=[16, 32])}, None, DAMAGED),
    "another length": ({"a": entry(shape=[2, 3])}, None, DAMAGED),
    "a gap": ({"a": entry(shape=[2], data_offsets=[8, 16])}, None, DAMAGED),
    "overlap": ({"a": entry(), "b": entry()}, None, DAMAGED),
    "a header of 17 MiB": (b" " * (17 << 20) + b"{}", None, "its header claims"),
    "too short": ({"a": entry(shape=[2], data_offsets=[0, 8])}, None, DAMAGED),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_shard_with_a_bad_header_is_refused(tmp_path, name):
    header, length, message = BAD_HEADERS[name]
    with pytest.raises(StoreError, match=message):
        Shard(shard_file(tmp_path / "x.safetensors", header, bytes(16), length))


def test_shards_are_safetensors_files_both_ways(tmp_path):
    tensors = {
        "a/b": torch.randn(3, 5).bfloat16(), "odd": torch.ones(3, dtype=torch.int8), "scalar": torch.tensor(2.5),
        "wide": torch.randn(3, 2, dtype=torch.float64), "empty": torch.zeros(0, 4), "flag": torch.tensor([True, False]),
    }  # fmt: skip
    write_shard(tmp_path / "ours.safetensors", tensors)
    theirs = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours = Shard(tmp_path / "theirs.safetensors")
    assert set(theirs) == set(ours.tensors) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(theirs[name], value) and theirs[name].dtype == value.dtype
        assert torch.equal(ours.whole(name), value) and ours.whole(name).dtype == value.dtype


def test_booleans_that_are_none_are_read_as_true(tmp_path):
    path = shard_file(
        tmp_path / "x", {"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\x00\x01\xff"
    )
    assert Shard(path).whole("a").tolist() == [False, True, True]
