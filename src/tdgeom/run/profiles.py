"""Profiles: intrinsic dimension and neighbourhood overlap over the layers of a run, as tidy tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from tensordict import TensorDictBase, is_tensor_collection

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.keys import Key
from tdgeom.core.process_groups import rank_and_world
from tdgeom.measures.dimension.estimate import DimensionEstimate
from tdgeom.run.several_models import as_one_table, by_model
from tdgeom.run.site_places import relative_depths, site_places
from tdgeom.run.to_frame import cell, whole_numbers

__all__ = ["intrinsic_dimension_profile", "overlap_profile", "scale_name"]

OVERLAPS = (
    "neighborhood_overlap",
    "jaccard_knn",
    "information_imbalance_ab",
    "information_imbalance_ba",
)


@answer_guesses
def intrinsic_dimension_profile(result: Any) -> pd.DataFrame:
    """Every estimate of intrinsic dimension in a result, one row for each site, estimator and scale.

    Columns: ``site``, ``kind``, ``layer``, ``stack``, ``relative_depth``, ``estimator`` (the key part under which the stage
    wrote), ``step`` (0 for the finest scale; estimators that give one number have only that), ``rank`` (Gride's n at that
    step; NaN of estimators without), ``estimate`` (and, of an analysis with errors, ``estimate_se``, over documents),
    ``standard_error`` (the estimator's own, of independent rows), ``scale`` (the distance the estimate looks at),
    ``rows`` used, ``duplicates`` dropped first and ``near_duplicates`` among them (-1 where unknown). Gride has a row for
    every n, the decimation profile one for every subset size. Of an analysis with an untrained baseline both, told apart by
    ``weights``; of several models all, by ``model``. Every site has a ``layer``, see ``to_frame``.

    Relative depth runs from 0 (the input of the first block, or the embedding) to 1 (the last site of the stack: the final
    norm stands one layer after the last block's input).

    Args:
        result: what ``run`` returned, or ``AnalysisResults``, fresh or loaded; or a list or mapping (by name) of several.

    Raises:
        KeyError: no estimates in it. ValueError: a bundle of an earlier version, which kept tables only.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> sites = ["attn_input.0", "attn_input.1"]
        >>> rows = TensorDict({("sample", site): torch.rand(400, 2) @ torch.rand(2, 9) for site in sites})
        >>> frame = intrinsic_dimension_profile(tg.ForEach(tg.TwoNN(), sites)(rows))
        >>> frame[["layer", "relative_depth", "estimator"]].values.tolist()
        [[0, 0.0, 'twonn'], [1, 1.0, 'twonn']]
    """
    return _of_each(
        "intrinsic_dimension_profile", result, _dimension_rows, "under 'dimension'", "ForEach", "TwoNN"
    )


@answer_guesses
def overlap_profile(result: Any) -> pd.DataFrame:
    """Every neighbourhood measure in a result, one row for each site or pair of sites.

    Columns: ``measure`` (``neighborhood_overlap``, ``jaccard_knn``, ``information_imbalance_ab``, ``..._ba`` of two sites;
    ``label_overlap`` of one, or the name under which the stage wrote), ``site`` (the first of a pair), ``other`` (the
    second, None for labels), ``kind``, ``layer``, ``stack`` and ``relative_depth`` of the first, ``other_layer`` and
    ``other_relative_depth`` of the second, ``value`` (and, of an analysis with errors, ``value_se``); with a baseline also
    ``weights``, of several models ``model``.

    Args:
        result: what ``run`` returned, or ``AnalysisResults``, fresh or loaded; or a list or mapping (by name) of several.

    Raises:
        KeyError: no overlaps in it. ValueError: a bundle of an earlier version, which kept tables only.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> sites = ["attn_input.0", "attn_input.1"]
        >>> rows = TensorDict({("sample", site): torch.rand(50, 4) for site in sites})
        >>> frame = overlap_profile(tg.ForEachPair(tg.NeighborhoodOverlap(k=5), sites)(rows))
        >>> frame[["measure", "site", "other"]].values.tolist()
        [['neighborhood_overlap', 'attn_input.0', 'attn_input.1']]
    """
    what = f"of {', '.join(sorted(OVERLAPS))}"
    return _of_each("overlap_profile", result, _overlap_rows, what, "ForEachPair", "NeighborhoodOverlap")


def scale_name(row: Mapping[Any, Any]) -> str:
    """What a step of an estimator is called: its number, and the rank where the table knows it.

    >>> scale_name({"step": 2, "rank": 4})
    'scale 3 (n = 4)'
    """
    rank = row.get("rank")
    return f"scale {row['step'] + 1}" + ("" if rank is None or rank != rank else f" (n = {int(rank)})")


def _of_each(
    caller: str,
    result: Any,
    rows: Callable[[TensorDictBase, Mapping[str | None, int]], Iterator[dict[str, Any]]],
    what: str,
    over: str,
    stage: str,
) -> pd.DataFrame:
    """The rows of a result, and of its untrained baseline where it has one; those of every model where several are given."""
    if result is None and (rank := rank_and_world()[0]):
        raise ValueError(
            f"{caller}: this is rank {rank}; the result is on rank 0, run and analyze_model return None elsewhere. Remedy: `if "
            f"result is not None:`."
        )
    if by_model(result) is not None:
        return as_one_table(result, lambda one: _of_each(caller, one, rows, what, over, stage))
    found = []
    blocks = _blocks(result)
    for weights, one in _results(caller, result):
        for row in rows(one, blocks):
            found.append(row if weights is None else {"weights": weights, **row})
    if not found:
        have = sorted(map(str, _results(caller, result)[0][1].keys()))
        raise KeyError(
            f"{caller}: the result has nothing {what}; there is {have}. Put tg.{over}(tg.{stage}(), sites) in the pipeline, or "
            f"tg.{stage}() into the metrics= of analyze_model."
        )
    return whole_numbers(
        pd.DataFrame(found), "layer", "other_layer", "rank", "rows", "duplicates", "near_duplicates"
    )


def _results(caller: str, result: Any) -> list[tuple[str | None, TensorDictBase]]:
    if is_tensor_collection(result):
        return [(None, result)]
    own, baseline = getattr(result, "result", None), getattr(result, "baseline", None)
    if own is None:
        raise ValueError(
            f"{caller} takes what run() returned, or AnalysisResults that hold it in .result; got {type(result).__name__} "
            f"without a result. A bundle of an earlier version has its tables in .metrics and, saved with neighbors=True, "
            f"neighbour tables in .neighbors: run the estimators on those with source='neighbors'."
        )
    both = [(None, own)] if baseline is None else [("trained", own), ("untrained", baseline.result)]
    return [(weights, stack) for weights, one in both for stack in _by_stack(one)]


def _by_stack(result: TensorDictBase) -> list[TensorDictBase]:
    """A model with several stacks has a pass, and so a result, for each."""
    return [result] if "run" in result.keys() else [result.get(stack) for stack in result.keys()]


def _blocks(result: Any) -> dict[str | None, int]:
    """How many blocks each stack of the model has, where an analysis wrote it down."""
    counted = {} if is_tensor_collection(result) else getattr(result, "metadata", {}).get("num_blocks")
    return dict(counted) if isinstance(counted, Mapping) else {} if counted is None else {None: counted}


def _dimension_rows(result: TensorDictBase, blocks: Mapping[str | None, int]) -> Iterator[dict[str, Any]]:
    sites = _branches(result, "dimension")
    places, depths = site_places(sites, blocks), relative_depths(sites)
    for site in sites:
        for estimator, leaves in _branches(result, ("dimension", site)).items():
            if "estimate" in leaves.keys():
                place = {**places[site], "relative_depth": depths[site], "estimator": estimator}
                yield from ({"site": site, **place, **scale} for scale in _scales(leaves))


def _scales(leaves: TensorDictBase) -> Iterator[dict[str, Any]]:
    given = {
        name: cell(leaves.get(name))
        for name in ("rank", "estimate", "estimate_se", *DimensionEstimate._fields[1:])
        if name in leaves.keys()
    }
    named = {"rank": np.nan, **given}  # estimate_se: over documents, where errors were asked for
    steps = np.size(named["estimate"])
    columns = {name: np.broadcast_to(np.atleast_1d(value), (steps,)) for name, value in named.items()}
    for step in range(steps):
        yield {"step": step, **{name: column[step].item() for name, column in columns.items()}}


def _overlap_rows(result: TensorDictBase, blocks: Mapping[str | None, int]) -> Iterator[dict[str, Any]]:
    labels = _branches(result, "neighborhood")
    pairs = {
        tuple(pair.split("->", 1)): one for pair, one in _branches(result, "between").items() if "->" in pair
    }
    sites = [*labels, *(site for pair in pairs for site in pair)]
    places, depths = site_places(sites, blocks), relative_depths(sites)

    def row(measure: str, leaves: TensorDictBase, site: str, other: str | None = None) -> dict[str, Any]:
        value, error = leaves.get(measure), leaves.get(f"{measure}_se", None)
        return {
            "measure": measure,
            "site": site,
            **places[site],
            "relative_depth": depths[site],
            "other": other,
            "other_layer": None if other is None else places[other]["layer"],
            "other_relative_depth": float("nan") if other is None else depths[other],
            "value": cell(value),
            **({} if error is None else {"value_se": cell(error)}),
        }

    for pair, leaves in pairs.items():
        yield from (row(name, leaves, *pair) for name in leaves.keys() if name in OVERLAPS)
    for site, leaves in labels.items():
        yield from (row(name, leaves, site) for name in leaves.keys() if not name.endswith("_se"))


def _branches(result: TensorDictBase, root: Key) -> Mapping[str, TensorDictBase]:
    """What stands below a root, single values aside."""
    branch = result.get(root, None)
    if branch is None or not is_tensor_collection(branch):
        return {}
    return {name: branch.get(name) for name in branch.keys() if is_tensor_collection(branch.get(name))}
