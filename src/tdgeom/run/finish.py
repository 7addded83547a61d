"""The end of a run: every stage whose inputs are finished, side by side where that is safe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from threadpoolctl import threadpool_limits

from tdgeom.compose import Renamed
from tdgeom.keys import as_key, key_tuple
from tdgeom.run.plan import describe
from tdgeom.stage import Stage

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


def _groups(units: Sequence[TensorDictModuleBase]) -> Iterator[list[Renamed]]:
    """Runs of units that are one pure stage at several sites; every other unit alone."""
    group: list[Renamed] = []
    for unit in units:
        same = group and isinstance(unit, Renamed) and unit.module is group[-1].module and _may_share(unit)
        if group and not same:
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


def _may_share(unit: Renamed) -> bool:
    return isinstance(unit.module, Stage) and unit.module.one_thread_a_site and not unit._forward_hooks


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
            for unit, inner in zip(group, pool.map(one, group)):
                unit.outward(inner, td)
    finally:
        torch.set_num_threads(threads)
