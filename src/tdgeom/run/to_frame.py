"""``to_frame``: results as tidy tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from tensordict import NonTensorStack, TensorDictBase, is_leaf_nontensor, is_non_tensor, is_tensor_collection
from torch import Tensor

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.keys import key_tuple
from tdgeom.core.process_groups import rank_and_world
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.run.site_places import SiteParts, site_places

__all__ = ["to_frame"]

# What the level between the site and the metric is called, where a root has one.
LEVELS = {"ablation": "variant", "dimension": "estimator"}


@answer_guesses
def to_frame(result: TensorDictBase, root: str) -> pd.DataFrame:
    """The results under one root as a DataFrame: one row a site, one column a metric.

    A root whose first level is pairs (``"a->b"``) has one row a pair, with columns ``a`` and ``b``; a root with a level
    between site and metric has one row for each (the ablation's ``variant``, the dimension family's ``estimator``).
    Scalars become numbers; vectors stay NumPy arrays in their cell. Site names also come apart into ``kind``, ``layer``,
    ``stack``; every site has a layer, see ``site_places``: ``embed`` 0, ``final_norm`` one after the last block. Carried values
    ("collected_carried", "sample_carried") have a row a row, with ``row_id``, ``sequence`` and ``position``: text is text there.

    Args:
        result: what ``run`` returned.
        root: the first part of the results' keys, such as "spectrum" or "between".

    Raises:
        KeyError: no such root; the message lists those there are.

        >>> import torch
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"spectrum": {"residual_input.0": {"d_pr": torch.tensor(2.0)}}})
        >>> to_frame(td, "spectrum")[["site", "layer", "d_pr"]].values.tolist()
        [['residual_input.0', 0, 2.0]]
    """
    if result is None and (rank := rank_and_world()[0]):
        raise ValueError(
            f"to_frame: this is rank {rank}; the result is on rank 0, run returns None elsewhere. Remedy: `if result is not "
            f"None:`."
        )
    branch = result.get(root, None)
    if branch is not None and is_tensor_collection(branch) and root.endswith("carried"):
        return _row_table(result, root, branch)
    if branch is None or not is_tensor_collection(branch):
        have = sorted(str(key) for key in result.keys() if is_tensor_collection(result.get(key)))
        raise KeyError(f"to_frame: the result has nothing under {root!r}; there is {have}.")
    rows: dict[tuple[str, ...], dict[str, object]] = {}
    for path, value in leaves(branch):
        where, name = path[:-1], path[-1]
        if len(path) == 1:  # a vector a site, such as ("eigenvalues", site), or a result of no site
            where, name = ((name,), root) if np.ndim(value) else ((), name)
        rows.setdefault(where, {})[name] = cell(value)
    width = max((len(where) for where in rows), default=0)
    level = [LEVELS.get(root, "part"), *(f"part_{i}" for i in range(2, width))]
    places = site_places(site for where in rows for site in _sites(where))
    table = [{**_place(where, level, places), **cells} for where, cells in rows.items()]
    return whole_numbers(pd.DataFrame(table), "layer", "layer_a", "layer_b")


def _row_table(result: TensorDictBase, root: str, branch: TensorDictBase) -> pd.DataFrame:
    """Carried values, a row a row and a column a name; which row it is, where the ids lie beside them."""
    ids = result.get(f"{root.removesuffix('carried')}row_id", None)
    columns: dict[str, Any] = {}
    if isinstance(ids, Tensor):
        columns["row_id"] = ids.cpu().numpy()
        columns["sequence"] = columns["row_id"] >> POSITION_BITS
        columns["position"] = columns["row_id"] & ((1 << POSITION_BITS) - 1)
    for path, value in leaves(branch):
        column = cell(value)
        columns["/".join(path)] = list(column) if np.ndim(column) > 1 else column
    return pd.DataFrame(columns)


def whole_numbers(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The table with these columns as integers, where they are there and have no gap."""
    full = [column for column in columns if column in table and table[column].notna().all()]
    return table.astype(dict.fromkeys(full, int))


def leaves(branch: TensorDictBase) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every tensor and every list of words below a branch, with its path."""
    for key, value in branch.items(include_nested=True, leaves_only=True, is_leaf=is_leaf_nontensor):
        if is_non_tensor(value):
            held: Any = value.tolist() if isinstance(value, NonTensorStack) else value.data
        else:
            held = value
        if isinstance(held, Tensor | list):
            yield key_tuple(key), held


def cell(value: Any) -> Any:
    """A tensor as a table's cell: a Python number, or a NumPy array; words as an array of objects."""
    if isinstance(value, list):
        found = np.empty(len(value), dtype=object)
        found[:] = value
        return found
    value = value.detach().cpu()
    if value.ndim:
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    return value.item()


def _sites(where: tuple[str, ...]) -> list[str]:
    return where[0].split("->", 1) if where else []


def _place(where: tuple[str, ...], level: list[str], places: Mapping[str, SiteParts]) -> dict[str, object]:
    if not where:
        return {}
    name, *rest = where
    if "->" in name:
        a, b = _sites(where)
        place: dict[str, object] = {"pair": name, "a": a, "b": b}
        place |= {"layer_a": places[a]["layer"], "layer_b": places[b]["layer"]}
    else:
        place = {"site": name, **places[name]}
    return {**place, **dict(zip(level, rest))}
