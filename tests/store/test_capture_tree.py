"""Captures taken apart into named tensors, and put together again, whatever their keys are."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from tdgeom.files.errors import StoreError
from tdgeom.store.capture_tree import pack, unpack
from tdgeom.store.shard_layout import ShardLayout

# names that clash once joined by slashes, and those that shards use themselves
NAMES = st.sampled_from(["a", "b", "a/b", "a#scale", "__metadata__", "a#1", "0", "μ.0", ""])
TENSORS = st.integers(0, 3).map(lambda n: torch.arange(n, dtype=torch.int16))
LEAVES = st.one_of(TENSORS, st.sampled_from(["text", 3, None, True, [1, "x"], 2.5]))
TREES = st.dictionaries(
    NAMES, st.recursive(LEAVES, lambda leaf: st.dictionaries(NAMES, leaf, min_size=1), max_leaves=6)
)


def has_tensor(tree):
    return isinstance(tree, torch.Tensor) or (isinstance(tree, dict) and any(map(has_tensor, tree.values())))


def leaves(tree, key=()):
    if isinstance(tree, dict):
        return [leaf for name, part in tree.items() for leaf in leaves(part, (*key, name))]
    return [(key, tree)]


def read_back(layout):
    return ShardLayout.from_json(json.dumps(json.loads(layout.to_json())), "the layout")


@given(TREES.filter(has_tensor))
def test_any_tree_comes_back(tree):
    layout, tensors = pack(tree)
    assert "__metadata__" not in tensors and len(tensors) == len(layout.entries)
    found = unpack(read_back(layout), tensors)
    for key, value in leaves(tree):
        if isinstance(value, torch.Tensor):
            assert torch.equal(found.get(key), value)
        else:
            assert found[key] == value


@given(st.lists(TREES.filter(has_tensor), min_size=1, max_size=4))
def test_any_list_comes_back(trees):
    layout, tensors = pack([TensorDict(tree) for tree in trees])
    found = unpack(read_back(layout), tensors)
    assert len(found) == len(trees)
    for one, tree in zip(found, trees):
        assert all(
            torch.equal(one.get(key), value) for key, value in leaves(tree) if isinstance(value, torch.Tensor)
        )


@pytest.mark.parametrize("name", ["first", "9" * 5000, "-1", "1.5"])
def test_positions_that_are_none_are_refused(name):
    layout, tensors = pack({name: {"a": torch.ones(2)}})
    broken = ShardLayout(layout.entries, rows=False, several=True)
    with pytest.raises(StoreError, match="begins with no position in a list"):
        unpack(broken, tensors)


def test_a_batch_size_that_does_not_fit_is_refused():
    layout, tensors = pack({"a": torch.ones(2)})
    with pytest.raises(StoreError, match=r"batch size \[3\] does not fit its tensors"):
        unpack(ShardLayout(layout.entries, rows=False, batch_size=(3,)), tensors)
