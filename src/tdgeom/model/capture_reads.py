"""What both forms of a Capture share: its hooks, the values of a pass under their keys, and sites that never fired."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.model.calls.hooking_context import HookingContext
from tdgeom.model.calls.named_outputs import has_named_output, read_named_outputs
from tdgeom.model.calls.own_hooks import OwnHook
from tdgeom.model.calls.places import Place
from tdgeom.model.calls.read_pass import Pass
from tdgeom.model.calls.reading import Reading
from tdgeom.model.calls.recorded_calls import LastRecord, write_entries
from tdgeom.model.calls.token_axis import is_time_first
from tdgeom.model.sites import Site, token_side
from tdgeom.model.structure import distributed_tensors
from tdgeom.model.structure.resolved_site import ResolvedSite


class CaptureReads(HookingContext):
    """A context that reads: which hooks it has, and what a pass of theirs has given."""

    clone: bool
    direction: str
    callback: Callable[[Site, Tensor], Tensor | None] | None
    cache: TensorDictBase | None
    _all_sites: list[Site]  # those asked for, and behind them what came along
    _leaves: list[Key]  # of all sites, then of the model's outputs
    _last: LastRecord
    _readings: tuple[tuple, Reading, list[OwnHook]] | None
    _recording: Any

    @property
    def resolved(self) -> tuple[ResolvedSite, ...]:
        """The sites with their modules, heads and scales, in execution order."""
        return self._bound.sites

    def _reading(
        self, stop: bool, record: Callable[..., None] | None = None
    ) -> tuple[Reading, list[OwnHook]]:
        """The hooks of one use, of a context with ``record``; made again only where they would not be those of last time."""
        bound, context = self._bound, record is not None
        told = (self.clone, self.keep_graph, self.direction, self.calls, self.threads, self.callback)
        wanted = (bound, stop, context, bound.watched, *told)
        if self._readings is None or self._readings[0] != wanted:
            reading = Reading(
                bound.places,
                stop=stop,
                clone=self.clone,
                keep_graph=self.keep_graph,
                watch=not bound.watched,
                backward=self.direction == "backward",
                calls=self.calls,
                threads=self.threads if context else "own",
                callback=self.callback,
                record=record,
                secure=self._last.secure if context else None,
            )
            hooks = reading.make()
            self._set_plain(_readings=(wanted, reading, hooks))
            return reading, hooks
        return self._readings[1:]

    def _fill_cache(self, values: dict[Key, Tensor]) -> None:
        if self.cache is not None:
            write_entries(self.cache, values, "Capture")

    def _turn(self, done: Pass, tokens: Callable[[str], tuple[int, int] | None]) -> None:
        """Make (B, T, ...) of (T, B, ...), where a model works on that."""
        for entry in self._bound.sites:
            value = done.acts.get(entry.site)
            if value is None or value.ndim < 3:
                continue
            if is_time_first(self.model, entry, value, tokens(token_side(entry.site)), self._bound.sites):
                if self.direction == "backward":
                    raise RuntimeError(
                        f"the site {str(entry.site)!r} is (T, B, D), of which gradients cannot be given as (B, T, D). Remedy: "
                        "direction='forward', or torch.autograd.grad of what it gives with keep_graph=True."
                    )
                done.acts[entry.site] = value.transpose(0, 1)

    def _values(self, done: Pass, output: Any, *, whole: bool = True) -> dict[Key, Tensor]:
        values = {key: done.acts[s] for key, s in zip(self._leaves, self._all_sites) if s in done.acts}
        for key, name in zip(self._leaves[len(self._all_sites) :], self.model_outputs):
            # a part that is called instead of the model (an encoder) need not have all of them
            named = read_named_outputs(output, [name]) if whole or has_named_output(output, name) else {}
            for value in named.values():
                value = self._kept(distributed_tensors.whole(value))
                values[key] = value.clone() if self.clone else value
        return values

    def _refuse_missing(self, read: Iterable[str], fired: Mapping[Place, int] | None = None) -> None:
        have = set(read)
        missing = [site for site in self.sites if site not in have]
        if not missing:
            return
        paths = ", ".join(f"{site!s} ({self.module_paths[site]})" for site in missing[:5])
        if isinstance(self.calls, int) and fired is not None:
            places = [(entry.module_path, entry.side) for entry in self._bound.sites if entry.site in missing]
            raise RuntimeError(
                f"calls={self.calls} means the call after {self.calls} others, but {paths} fired "
                f"{[fired.get(place, 0) for place in places][:5]} times in the pass. Remedy: a smaller number, or 'last'."
            )
        raise RuntimeError(
            f"expected every site to fire, {len(missing)} never did: {paths}. The forward pass did not "
            "run these modules through their __call__ (skipped, compiled, replaced since the Capture "
            "was made, or called by another method). Remedy: leave them out, or make a new Capture "
            "after changing the model."
        )

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_last": LastRecord(self._leaves), "_readings": None, "_recording": None}
        return {**super().__getstate__(), **fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_recording": Lock()})
