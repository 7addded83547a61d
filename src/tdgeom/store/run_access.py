"""Stored runs by their ids: loaded whole, streamed row by row, removed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from tensordict import TensorDict

from tdgeom.files.atomic import explained
from tdgeom.files.errors import StoreBusyError, StoreError
from tdgeom.store.capture_tree import unpack
from tdgeom.store.catalogue import Catalogue
from tdgeom.store.row_source import RowSource
from tdgeom.store.run_records import RunRecord
from tdgeom.store.run_shards import read_tensors

__all__ = ["RunAccess"]

_ROOM_FOR_A_MARK = 1 << 20  # bytes, many times what SQLite asks for


class RunAccess:
    """What a store does with one run, named by its id."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    def load(
        self, run: str, *, partial: bool = False
    ) -> tuple[TensorDict | list[TensorDict], dict[str, Any]]:
        """(activations, metadata) of a run, all in memory, every shard checked against its hash; for large runs see ``rows``.

        Args:
            run: its id.
            partial: load the finished shards of a run that is not complete.

        Raises:
            StoreLookupError: no such run. StoreError: it is not complete, or its files are damaged.
        """
        record = self._readable(run, partial)
        if record.kind == "analysis":
            raise StoreError(f"run {run} is an analysis: load it with store.load_analysis.")
        layout = self.catalogue.layout(run)
        return unpack(layout, read_tensors(self.catalogue, run, layout)), self.catalogue.metadata(record)

    def rows(
        self,
        run: str,
        *,
        sites: Sequence[str] | None = None,
        also: Sequence[str] = (),
        batch_rows: int = 2048,
        partial: bool = False,
        verify: bool = False,
    ) -> RowSource:
        """The rows of a stored run as a data source: ``tg.run(pipeline, store.rows(run))``.

        Args:
            run: its id.
            sites: the sites to read; default all, with every carried value.
            also: carried values to read beside the sites given. Runs made before these had a root of their own keep them among
                the sites: named here, they come as ``("carried", name)``.
            batch_rows: rows a batch.
            partial: read the finished shards of a run that is not complete.
            verify: check every shard against its hash before the first of its rows is read, which reads it once more; else
                sizes and headers are checked.

        Raises:
            StoreLookupError: no such run, or no such site in it. StoreError: not complete, or it holds no rows.
        """
        self._readable(run, partial)
        layout = self.catalogue.layout(run)
        row_id = layout.by_key.get("row_id")
        if not layout.rows or row_id is None or row_id.dtype != torch.int64 or row_id.shape:
            raise StoreError(f"run {run} holds no rows: it was saved from memory, load it with store.load.")
        if batch_rows < 1:
            raise ValueError(f"batch_rows must be at least 1, got {batch_rows}.")
        about = self.catalogue.record(run).about.told()
        return RowSource(
            self.catalogue, run, layout.of_rows(sites, also), batch_rows, verify, about, layout.words
        )

    def metadata(self, run: str) -> dict[str, Any]:
        """Everything the catalogue says of a run, as JSON values."""
        return self.catalogue.metadata(self.catalogue.record(run))

    def remove(self, run: str) -> None:
        """Delete a run and its files; one that was being removed when the process died is removed for good.

        Raises:
            StoreBusyError: it is being written. StoreLookupError: no such run. StoreError: the disk refused.
        """
        record, folder = self.catalogue.record(run), self.catalogue.folder_of(run)
        if self.catalogue.is_being_written(run):
            raise StoreBusyError(f"run {run} is being written: stop its writer, then remove it.")
        try:
            self.catalogue.set_state(run, "removing")
        except StoreError:
            # on a full disk nothing can be marked before something is removed: then the files of a large run go first
            free = shutil.disk_usage(self.catalogue.folder).free
            if free > _ROOM_FOR_A_MARK or record.bytes < _ROOM_FOR_A_MARK:
                raise
        with explained(f"removing {folder}"), suppress(FileNotFoundError):  # an earlier removal got this far
            shutil.rmtree(folder)
        self.catalogue.drop_run(run)

    def _readable(self, run: str, partial: bool = False) -> RunRecord:
        """What the catalogue has of a run that is complete, or with ``partial`` of any."""
        record = self.catalogue.record(run)
        self.catalogue.refuse_changed(run)
        if record.state != "complete" and not partial:
            why = f" ({record.reason})" if record.reason else ""
            raise StoreError(
                f"run {run} is not complete: its state is {record.state}{why}. partial=True reads its "
                f"{record.shards} finished shards."
            )
        if record.state == "complete" and record.kind != "analysis" and not record.shards:
            raise StoreError(f"run {run} has lost its shards: the catalogue is damaged.")
        return record
