"""The end of a run: every stage whose inputs are finished, side by side where that is safe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from threadpoolctl import threadpool_limits

from tdgeom.core.for_each import Renamed
from tdgeom.core.keys import as_key, key_tuple
from tdgeom.core.stage import Stage
from tdgeom.run.plan import describe, touches

__all__ = ["call", "run_end"]


def call(unit: TensorDictModuleBase, td: TensorDict) -> None:
    """A stage may write into ``td`` or return a TensorDict of its own, as in a TensorDictSequential."""
    out = unit(td)
    if out is not td:
        td.update(out)


def run_end(
    units: Sequence[TensorDictModuleBase],
    td: TensorDict,
    inputs: TensorDictBase | None,
    keep: Sequence[str] | None,
) -> None:
    """Run the end stages in order on ``td``, dropping what ``keep`` does not name after its last reader."""
    last_reader = {key_tuple(key): unit for unit in units for key in unit.in_keys}
    for group in _groups(units):
        for unit in group:
            for key in unit.in_keys:
                if inputs is not None and td.get(key, None) is None and inputs.get(key, None) is not None:
                    td.set(key, inputs.get(key))
        if len(group) > 1:
            _side_by_side(group, td)
        else:
            call(group[0], td)
        for unit in group:
            missing = [key for key in unit.out_keys if td.get(key, None) is None]
            if missing:
                raise ValueError(
                    f"{describe(unit)} declares {missing} in its out_keys but did not write them."
                )
            for key in unit.in_keys if keep is not None else ():
                parts = key_tuple(key)
                done = parts[0] not in keep and last_reader[parts] is unit
                if done and td.get(as_key(parts), None) is not None:
                    td.del_(as_key(parts))


def _groups(units: Sequence[TensorDictModuleBase]) -> Iterator[list[TensorDictModuleBase]]:
    """Runs of units that are pure stages at single sites and read nothing of each other; every other unit alone."""
    group: list[TensorDictModuleBase] = []
    for unit in units:
        written = [key_tuple(key) for one in group for key in one.out_keys]
        reads = any(touches(key_tuple(key), other) for key in unit.in_keys for other in written)
        if group and (reads or not (_may_share(unit) and _may_share(group[-1]))):
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


def _may_share(unit: TensorDictModuleBase) -> bool:
    pure = isinstance(unit, Renamed) and isinstance(unit.module, Stage) and unit.module.one_thread_a_site
    return pure and not unit._forward_hooks


def _in_turn(group: Sequence[Renamed]) -> list[Renamed]:
    """One unit of each stage in turn: some solvers hold Python's lock, others run beside them."""
    by_stage: dict[int, list[Renamed]] = {}
    for unit in group:
        by_stage.setdefault(id(unit.module), []).append(unit)
    return [unit for row in zip_longest(*by_stage.values()) for unit in row if unit is not None]


def _side_by_side(group: Sequence[Renamed], td: TensorDict) -> None:
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
            call(unit, td)
        return
    grad = torch.is_grad_enabled()

    def one(unit: Renamed) -> TensorDictBase:
        with torch.set_grad_enabled(grad):
            return unit.inner(td)

    try:
        # torch counts threads by itself; NumPy's and SciPy's LAPACK is told by threadpoolctl
        pool = ThreadPoolExecutor(min(threads, len(group)), initializer=torch.set_num_threads, initargs=(1,))
        with threadpool_limits(1, user_api="blas"), pool:
            in_turn = _in_turn(group)
            for unit, inner in zip(in_turn, pool.map(one, in_turn)):
                unit.outward(inner, td)
    finally:
        torch.set_num_threads(threads)
