"""A TensorDict of results as arrays and words, which a bundle keeps, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase, is_non_tensor
from torch import Tensor

from tdgeom.core.keys import key_tuple
from tdgeom.files.json_text import plain

__all__ = ["pack", "unpack"]

Words = dict[str, Any]


def pack(result: TensorDictBase | None) -> tuple[dict[str, np.ndarray], Words]:
    """Tensors as arrays, and what is no tensor as plain JSON, each by key; a key is a JSON list, for names may hold anything.

    bfloat16 becomes float32, for NumPy has none; sampled rows' neighbour numbers (``index``) take 32 bits.
    """
    arrays: dict[str, np.ndarray] = {}
    words: Words = {}
    for path, value in () if result is None else _parts(result, ()):
        name = json.dumps(path)
        if not isinstance(value, Tensor):
            words[name] = plain(value.tolist() if hasattr(value, "tolist") else value)
            continue
        value = value.detach().cpu()
        value = value.float() if value.dtype is torch.bfloat16 else value
        arrays[name] = (value.int() if path[-1] == "index" else value).numpy()
    return arrays, words


def unpack(arrays: Mapping[str, np.ndarray], words: Any = None) -> TensorDictBase | None:
    """The TensorDict that was packed; None of nothing.

    Raises:
        ValueError: an entry's name is no key.
    """
    words = words if isinstance(words, Mapping) else {}
    if not arrays and not words:
        return None
    result = TensorDict({}, batch_size=[])
    for name, value in {**arrays, **words}.items():
        try:
            key = tuple(json.loads(name)) if name.startswith("[") else json.loads(name)
            if not isinstance(value, np.ndarray):
                result.set_non_tensor(key, value)
            else:
                tensor = torch.from_numpy(value)
                result.set(key, tensor.long() if key_tuple(key)[-1] == "index" else tensor)
        except (ValueError, TypeError, KeyError, RecursionError, IndexError) as error:
            raise ValueError(
                f"AnalysisResults.load: an archive holds an entry {name[:80]!r} that is no key: {error}"
            ) from error
    return result


def _parts(result: TensorDictBase, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value below, words too, with its key."""
    for key in result.keys():
        value = result.get(key)
        if isinstance(value, TensorDictBase) and not is_non_tensor(value):
            yield from _parts(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value
