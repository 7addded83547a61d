"""A stored run by its id: loaded whole, streamed row by row, removed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict

from tdgeom.files.atomic import explain
from tdgeom.files.errors import StoreBusyError, StoreError
from tdgeom.store.capture_tree import unpack
from tdgeom.store.catalogue import Catalogue
from tdgeom.store.row_source import RowSource
from tdgeom.store.run_records import RunRecord
from tdgeom.store.run_shards import read_tensors

__all__ = ["load_run", "readable", "remove_run", "rows_of_run"]

_ROOM_FOR_A_MARK = 1 << 20  # bytes, many times what SQLite asks for


def readable(catalogue: Catalogue, run: str, partial: bool = False) -> RunRecord:
    """What the catalogue has of a run that is complete, or with ``partial`` of any."""
    record = catalogue.record(run)
    if record.state != "complete" and not partial:
        why = f" ({record.reason})" if record.reason else ""
        raise StoreError(
            f"run {run} is not complete: its state is {record.state}{why}. partial=True reads its "
            f"{record.shards} finished shards."
        )
    if record.state == "complete" and record.kind != "analysis" and not record.shards:
        raise StoreError(f"run {run} has lost its shards: the catalogue is damaged.")
    return record


def load_run(
    catalogue: Catalogue, run: str, *, partial: bool = False
) -> tuple[TensorDict | list[TensorDict], dict[str, Any]]:
    """(activations, metadata) of a run, see ``ActivationStore.load``."""
    record = readable(catalogue, run, partial)
    if record.kind == "analysis":
        raise StoreError(f"run {run} is an analysis: load it with store.load_analysis.")
    layout = catalogue.layout(run)
    return unpack(layout, read_tensors(catalogue, run, layout)), catalogue.metadata(record)


def rows_of_run(
    catalogue: Catalogue,
    run: str,
    *,
    sites: Sequence[str] | None = None,
    also: Sequence[str] = (),
    batch_rows: int = 2048,
    partial: bool = False,
    verify: bool = False,
) -> RowSource:
    """The rows of a run as a data source, see ``ActivationStore.rows``."""
    readable(catalogue, run, partial)
    layout = catalogue.layout(run)
    row_id = layout.by_key.get("row_id")
    if not layout.rows or row_id is None or row_id.dtype != torch.int64 or row_id.shape:
        raise StoreError(f"run {run} holds no rows: it was saved from memory, load it with store.load.")
    if batch_rows < 1:
        raise ValueError(f"batch_rows must be at least 1, got {batch_rows}.")
    names = None if sites is None else [str(name) for name in (*sites, *also)]
    return RowSource(catalogue, run, layout.of_rows(names), batch_rows, verify)


def remove_run(catalogue: Catalogue, run: str) -> None:
    """Delete a run and its files, see ``ActivationStore.remove``."""
    record = catalogue.record(run)
    folder = catalogue.folder_of(run)
    if catalogue.is_being_written(run):
        raise StoreBusyError(f"run {run} is being written: stop its writer, then remove it.")
    try:
        catalogue.set_state(run, "removing")
    except StoreError:
        # on a full disk nothing can be marked before something is removed: then the files of a large run go first
        if shutil.disk_usage(catalogue.folder).free > _ROOM_FOR_A_MARK or record.bytes < _ROOM_FOR_A_MARK:
            raise
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass  # an earlier removal got this far
    except OSError as error:
        raise explain(error, f"removing {folder}") from error
    catalogue.drop_run(run)
