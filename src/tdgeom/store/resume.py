"""Opening a run for writing: a new one, or one whose writer ended early, which then goes on behind its last shard."""

from __future__ import annotations

import numpy as np

from tdgeom.files.errors import StoreError
from tdgeom.store.row_source import RowSource
from tdgeom.store.run_description import RunDescription
from tdgeom.store.run_writer import RunLock, RunWriter
from tdgeom.store.shard_layout import ShardLayout, StoredTensor

__all__ = ["open_writer", "refuse_other_rows"]

_ID_ROWS = 1 << 20


def open_writer(lock: RunLock, about: RunDescription, layout: ShardLayout, shard_bytes: int) -> RunWriter:
    """A writer for the lock's run, which passes over rows that it has; enters it if the catalogue does not have it.

    Raises:
        StoreError: it is complete, or holds other rows than these.
    """
    catalogue, run = lock.catalogue, lock.run
    try:
        catalogue.add_run(run, "activations", about, layout)
        state = catalogue.record(run).state
        if state in ("complete", "removing"):
            raise StoreError(
                f"run {run} is {state}, so nothing is added to it. Begin a new run: reset() the stage."
            )
        refuse_other_rows(run, catalogue.layout(run), layout)
        if state == "failed":
            catalogue.set_state(run, "writing")
        lock.clear(every_rank=False)
        source = RowSource(catalogue, run, layout.of_rows([]), _ID_ROWS)
        known = [batch["row_id"].numpy() for batch in source]
        return RunWriter(lock, layout, shard_bytes, np.concatenate([np.zeros(0, np.int64), *known]))
    except BaseException:
        lock.release()
        raise


def refuse_other_rows(run: str, held: ShardLayout, given: ShardLayout) -> None:
    """Raise a ``StoreError`` that names what differs, unless nothing does."""
    if held == given:
        return
    differing = [
        f"{key!r} is {_said(held.by_key.get(key))} in the run and {_said(given.by_key.get(key))} now"
        for key in dict.fromkeys([*held.by_key, *given.by_key])
        if held.by_key.get(key) != given.by_key.get(key)
    ]
    differing += [
        f"{key[-1]!r} holds words in one and numbers in the other"
        for key in sorted({*held.words} ^ {*given.words})
    ]
    raise StoreError(
        f"run {run} holds other rows than come now: {'; '.join(differing[:6])}. Use one stage for each kind of rows."
    )


def _said(entry: StoredTensor | None) -> str:
    if entry is None:
        return "absent"
    cast = "" if entry.stored == entry.dtype else f" kept as {entry.stored}"
    return f"{entry.dtype}{cast} of shape {entry.shape} a row"
