"""Opening a run for writing: a new one, or one whose writer ended early, which then goes on behind its last shard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tdgeom.files.errors import StoreError
from tdgeom.store.about import About
from tdgeom.store.catalogue import Catalogue
from tdgeom.store.reader import RowSource
from tdgeom.store.shard_layout import Entry, Layout
from tdgeom.store.writer import RunLock, RunWriter

__all__ = ["ResumedWriter", "open_writer", "refuse_other_rows"]

_ID_ROWS = 1 << 20


class ResumedWriter:
    """A ``RunWriter`` that passes over the rows that the run has already, by their row id (8 bytes a row in memory)."""

    def __init__(self, writer: RunWriter, row_ids: np.ndarray) -> None:
        self._writer = writer
        self._row_ids = np.sort(row_ids)

    def append(self, values: Sequence[Tensor]) -> None:
        """The rows among these that the run has not; ``row_id`` is the last of the values."""
        row_id = values[-1].cpu().numpy()
        place = np.searchsorted(self._row_ids, row_id).clip(max=len(self._row_ids) - 1)
        is_new = torch.from_numpy(self._row_ids[place] != row_id).to(values[-1].device)
        self._writer.append([value[is_new] for value in values])

    def flush(self) -> None:
        """As for ``RunWriter``."""
        self._writer.flush()

    def stop(self) -> None:
        """As for ``RunWriter``."""
        self._writer.stop()


def open_writer(
    catalogue: Catalogue, run: str, about: About, layout: Layout, *, rank: int, shard_bytes: int
) -> RunWriter | ResumedWriter:
    """A writer for the run; enters it if the catalogue does not have it.

    Raises:
        StoreBusyError: another process writes it. StoreError: it is complete, or holds other rows than these.
    """
    lock = RunLock(catalogue, run, rank)
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
        lock.remove_leftovers()
        writer = RunWriter(lock, layout, shard_bytes)
        source = RowSource(catalogue, run, layout.of_rows([]), _ID_ROWS)
        if not source.rows:
            return writer
        return ResumedWriter(writer, np.concatenate([batch["row_id"].numpy() for batch in source]))
    except BaseException:
        lock.release()
        raise


def refuse_other_rows(run: str, held: Layout, given: Layout) -> None:
    """Raise a ``StoreError`` that names what differs, unless nothing does."""
    if held == given:
        return
    differing = [
        f"{key!r} is {_said(held.by_key.get(key))} in the run and {_said(given.by_key.get(key))} now"
        for key in dict.fromkeys([*held.by_key, *given.by_key])
        if held.by_key.get(key) != given.by_key.get(key)
    ]
    raise StoreError(
        f"run {run} holds other rows than come now: {'; '.join(differing[:6])}. Use one stage for each kind of rows."
    )


def _said(entry: Entry | None) -> str:
    if entry is None:
        return "absent"
    cast = "" if entry.stored == entry.dtype else f" kept as {entry.stored}"
    return f"{entry.dtype}{cast} of shape {entry.shape} a row"
