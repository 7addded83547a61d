"""Capture's context form: a record of every call that the user makes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdgeom.model.calls.call_info import CallInfo
from tdgeom.model.calls.call_paths import is_inside
from tdgeom.model.calls.read_pass import Pass
from tdgeom.model.calls.reading import Reading
from tdgeom.model.calls.recorded_calls import write_entries
from tdgeom.model.capture_reads import CaptureReads
from tdgeom.model.gradients import await_gradients


class CaptureCalls(CaptureReads):
    """The context form: the user's calls are read and recorded, and nothing about them is changed."""

    def __enter__(self) -> list[TensorDictBase]:
        self._refuse_entered()
        self._bound.refuse_compiled(self)
        session, hooks = self._reading(stop=False, record=self._record)
        session.open(hooks)
        self._use(session)
        return session.calls

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        session = self._session
        self._use(None)
        if not isinstance(session, Reading):
            return
        try:
            if kind is None:
                session.flush()
        finally:
            session.close()
        if kind is not None:
            return
        calls, session.calls, session.part = session.calls, [], None
        if calls and self.direction == "forward":
            self._bound.watched = True
            read = {key for call in calls for key in call.keys(True)}
            self._refuse_missing(site for site, key in zip(self._all_sites, self._leaves) if key in read)
        elif not session.called:
            self._refuse_foreign(session)
            warnings.warn(
                f"no call of {self._bound.name} was seen in this Capture's block. Compiled code (a torch.compile around the "
                "model, called before) and copies of the model run without hooks. Remedy: call the model that Capture was "
                "given.",
                stacklevel=2,
            )

    @contextmanager
    def disable_hooks(self) -> Iterator[None]:
        """Inside, calls of the model are neither read nor listed (this Capture must be entered)."""
        session = self._session
        if not isinstance(session, Reading):
            raise RuntimeError(
                "disable_hooks() expects an entered Capture. Remedy: call it inside the with block."
            )
        before, session.disabled = session.disabled, True
        try:
            yield
        finally:
            session.disabled = before

    def _record(
        self,
        session: Reading,
        done: Pass,
        module: nn.Module | None,
        args: tuple,
        kwargs: dict,
        output: Any,
    ) -> None:
        with self._recording:
            whole = module is not None and not done.path
            info = done.told.get(done.path) or CallInfo()
            self._turn(done, info.tokens)
            values, td = self._values(done, output, whole=whole), self._part_of(session, done)
            for name, value in info.recorded(done.acts.values(), self._bound.inputs.recorded).items():
                # the caller may fill the same tensors again for the next call
                td.set(name, value if not isinstance(value, Tensor) or value.requires_grad else value.clone())
            if self.direction == "backward":
                leaves = dict(zip(self._all_sites, self._leaves))
                await_gradients(done, self._bound.sites, leaves, td, clone=self.clone)
                values = {k: v for k, v in values.items() if k in self._leaves[len(self._all_sites) :]}
            values = self._last.own(values)
            write_entries(td, values, "Capture")
            self._last.keep(td)
            self._fill_cache(values)
            session.part = None if whole else (done, td)

    def _part_of(self, session: Reading, done: Pass) -> TensorDictBase:
        """A new entry, or the one of a part that ran on its own right before a call of the whole that did not run it."""
        calls, part = session.calls, session.part
        if part is not None and calls and calls[-1] is part[1]:
            inside = is_inside(part[0].path, done.path)
            if inside and part[0].acts.keys().isdisjoint(done.acts):
                return part[1]
        calls.append(TensorDict({}, batch_size=[]))
        return calls[-1]
