"""The end of a run: every stage whose inputs are finished, side by side where that is safe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_leaf_nontensor
from tensordict.nn import TensorDictModuleBase
from threadpoolctl import threadpool_limits

from tdgeom.core.keys import NOT_WRITTEN, KeyTable, key_tuple
from tdgeom.core.rank_failures import check_ranks
from tdgeom.core.renamed import Renamed, describe, stage_of
from tdgeom.core.stage import Stage
from tdgeom.core.surroundings import steady
from tdgeom.core.warnings import from_line, gathered, gathering, users_line

__all__ = ["call", "give", "run_end"]


def call(unit: TensorDictModuleBase, td: TensorDict) -> None:
    """A stage may write into ``td`` or return a TensorDict of its own, as in a TensorDictSequential."""
    out = unit(td)
    if out is not td:
        td.update(out)


def give(unit: TensorDictModuleBase, inputs: TensorDictBase | None, td: TensorDict) -> None:
    """What a stage reads of an earlier run's results, where nothing newer is there."""
    if inputs is None:
        return
    for key in unit.in_keys:
        if td.get(key, None) is None and inputs.get(key, None) is not None:
            td.set(key, inputs.get(key))


def run_end(
    units: Sequence[TensorDictModuleBase],
    td: TensorDict,
    inputs: TensorDictBase | None,
    keep: Sequence[str] | None,
) -> None:
    """Run the end stages in order on ``td``, dropping what ``keep`` does not name after its last reader."""
    left = list(units)
    for group in _groups(units):
        check_ranks()
        for unit in group:
            give(unit, inputs, td)
        if len(group) > 1:
            _side_by_side(group, td)
        else:
            call(group[0], td)
        for unit in group:
            missing = [key for key in unit.out_keys if key != NOT_WRITTEN and td.get(key, None) is None]
            if missing:
                raise ValueError(
                    f"{describe(unit)} declares {missing} in its out_keys but did not write them."
                )
        left = left[len(group) :]
        if keep is not None:
            _drop(td, keep, group, left)


def _drop(
    td: TensorDict,
    keep: Sequence[str],
    group: Sequence[TensorDictModuleBase],
    left: Sequence[TensorDictModuleBase],
) -> None:
    """Delete what these stages have read or written, where nothing is left to read it; a parent key reads all its leaves."""
    later = KeyTable(key for unit in left for key in unit.in_keys)
    done = {key_tuple(key)[0] for unit in group for key in (*unit.in_keys, *unit.out_keys)} - set(keep)
    for key in list(td.keys(True, True, is_leaf=is_leaf_nontensor)):
        if key_tuple(key)[0] in done and not later.touching(key):
            td.del_(key)


def _groups(units: Sequence[TensorDictModuleBase]) -> Iterator[list[TensorDictModuleBase]]:
    """Runs of units that are pure stages at single sites and touch nothing of each other; every other unit alone."""
    group: list[TensorDictModuleBase] = []
    read, written = KeyTable(), KeyTable()
    for unit in units:
        apart = any(map(written.touching, (*unit.in_keys, *unit.out_keys))) or any(
            map(read.touching, unit.out_keys)
        )
        if group and (apart or not (_may_share(unit) and _may_share(group[-1]))):
            yield group
            group, read, written = [], KeyTable(), KeyTable()
        group.append(unit)
        for key in unit.in_keys:
            read.add(key)
        for key in unit.out_keys:
            written.add(key)
    if group:
        yield group


def _may_share(unit: TensorDictModuleBase) -> bool:
    stage = stage_of(unit)
    pure = isinstance(unit, Renamed) and isinstance(stage, Stage) and stage.one_thread_a_site
    return pure and not (unit._forward_hooks or unit._forward_pre_hooks)


def _in_turn(group: Sequence[Renamed]) -> list[Renamed]:
    """One unit of each stage in turn: some solvers hold Python's lock, others run beside them."""
    by_stage: dict[tuple[str, str], list[Renamed]] = {}
    for unit in group:
        by_stage.setdefault((type(stage_of(unit)).__name__, key_tuple(unit.out_keys[0])[0]), []).append(unit)
    return [unit for row in zip_longest(*by_stage.values()) for unit in row if unit is not None]


def _side_by_side(group: Sequence[Any], td: TensorDict) -> None:
    """One site a thread: LAPACK's eigensolvers gain little from two threads on one matrix, and all from two matrices."""
    threads = torch.get_num_threads()
    on_cpu = all(
        td.get(key).device.type == "cpu"
        for unit in group
        for key in unit.in_keys
        if td.get(key, None) is not None
    )
    if threads == 1 or not on_cpu:
        for unit in group:
            check_ranks()
            call(unit, td)
        return
    grad, line, told = torch.is_grad_enabled(), users_line(), gathering()

    def one(unit: Renamed) -> TensorDictBase:
        with torch.set_grad_enabled(grad), from_line(line), gathered(told):
            check_ranks()
            return unit.inner(td)

    try:
        # torch counts threads by itself; NumPy's and SciPy's LAPACK is told by threadpoolctl
        pool = ThreadPoolExecutor(min(threads, len(group)), initializer=torch.set_num_threads, initargs=(1,))
        with threadpool_limits(1, user_api="blas"), steady(torch.device("cpu")), pool:
            in_turn = _in_turn(group)
            for unit, inner in zip(in_turn, pool.map(one, in_turn)):
                unit.outward(inner, td)
    finally:
        torch.set_num_threads(threads)
