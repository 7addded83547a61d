"""``ActivationStore``: a folder of runs and its catalogue."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from tdgeom.analysis.results import AnalysisResults
from tdgeom.files.atomic import explain
from tdgeom.files.errors import StoreBusyError, StoreError
from tdgeom.files.shard_writing import write_shard
from tdgeom.store.about import About, describe, new_id
from tdgeom.store.capture_tree import Captured, pack, unpack
from tdgeom.store.catalogue import BUNDLE, Catalogue
from tdgeom.store.integrity import Damage, verify
from tdgeom.store.query import condition, names
from tdgeom.store.reader import RowSource, read_tensors
from tdgeom.store.records import STATES, Record, ShardRecord, relative_errors
from tdgeom.store.runs import Runs
from tdgeom.store.shard_layout import Layout
from tdgeom.store.transfer import import_runs
from tdgeom.store.writer import RunLock, reason_of

__all__ = ["ActivationStore"]

VARIABLE = "TDGEOM_STORE"
_ROOM_FOR_A_MARK = 1 << 20  # bytes, many times what SQLite asks for


class ActivationStore:
    """A folder that keeps activations and analyses, and finds them again.

    Beside the runs' folders lies one SQLite file, the catalogue: what each run is, in which state, and which finished
    shards belong to it. Shards are safetensors files, written whole or not at all and hashed. Nothing is pickled, and no
    name or metadata ever becomes a path.

    Args:
        path: the folder; made if it is not there.

    Attributes: ``path``, ``catalogue``.

    Raises:
        StoreError: the folder cannot be made, or holds a catalogue that is not one of tdgeom.

        >>> import tempfile, torch, tdgeom as tg
        >>> store = tg.ActivationStore(tempfile.mkdtemp())
        >>> run = store.save({"acts": torch.ones(2, 3)}, model="gpt2", tag="first")
        >>> activations, metadata = store.load(run)
        >>> activations["acts"].shape, metadata["model"], metadata["tags"]
        (torch.Size([2, 3]), 'gpt2', ['first'])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.catalogue = Catalogue(self.path)
        if not self.catalogue.path.exists():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise explain(error, f"making the store {self.path}") from error
        self.catalogue.create_unless_whole()

    @classmethod
    def from_env(cls) -> ActivationStore:
        """The store in the folder that the environment variable TDGEOM_STORE names."""
        path = os.environ.get(VARIABLE)
        if not path:
            raise StoreError(f"the environment variable {VARIABLE} is not set: put the store's folder there.")
        return cls(path)

    def save(self, activations: Captured, **about: Any) -> str:
        """Keep what is in memory, in one file; the new run's id.

        Args:
            activations: a TensorDict, a (nested) mapping, a tensor (loaded back under "tensor"), or a list of TensorDicts,
                such as the ``calls`` of a ``Capture``. Leaves that are no tensors must be JSON values.
            about: what the run says of itself: ``model`` (a name or the module), ``revision``, ``dataset``, ``experiment``,
                ``tag`` (one or several), ``config``, ``capture`` (JSON values or the ``Capture``), ``interventions``,
                ``positions`` and ``metadata``.

        Raises:
            StoreError: the disk refused; the run is then marked as failed.
        """
        description = describe(**about)
        layout, tensors = pack(activations)
        with self._new_run("capture", description, layout) as lock:
            shard = ShardRecord(0, 0, 0, 0, "", {})
            size, digest = write_shard(lock.folder / shard.name, tensors)
            self.catalogue.add_shard(lock.run, ShardRecord(0, 0, 0, size, digest, {}))
        return lock.run

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
        return unpack(layout, read_tensors(self.catalogue, run, layout)), self.metadata(record)

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
            also: carried values to read beside the sites given.
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
        names = None if sites is None else [str(name) for name in (*sites, *also)]
        return RowSource(self.catalogue, run, layout.of_rows(names), batch_rows, verify)

    def metadata(self, run: str | Record) -> dict[str, Any]:
        """Everything the catalogue says of a run, as JSON values."""
        record = run if isinstance(run, Record) else self.catalogue.record(run)
        about = record.about
        return {
            "id": record.id,
            "kind": record.kind,
            "state": record.state,
            "reason": record.reason,
            "created": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="seconds"),
            "model": about.model,
            "revision": about.revision,
            "dataset": about.dataset,
            "experiment": about.experiment,
            "tags": list(about.tags),
            "shards": record.shards,
            "rows": record.rows,
            "bytes": record.bytes,
            "relative_error": relative_errors(self.catalogue.shards(record.id)),
            **about.details,
        }

    def query(self, **wanted: Any) -> Runs:
        """The runs that fit: ``store.query(model="gpt2", tag="final", capture={"layers": [0, 5]})``.

        Args:
            wanted: model, revision, dataset, experiment, kind, tag, since, until, positions, interventions, capture, config,
                metadata, where; see ``tdgeom.store.query.condition``. And state: one of "writing", "complete", "failed" (with
                runs whose writer ended early) and "removing", or several. None: all runs.

        Raises:
            ValueError: a question that cannot be asked.
        """
        state = wanted.pop("state", None)
        states = STATES if state is None else names(state, "state")
        if unknown := set(states) - set(STATES):
            raise ValueError(
                f"query: there is no state {sorted(unknown)[0]!r}; a run is one of {list(STATES)}."
            )
        found = self.catalogue.records(*condition(**wanted))
        return Runs(self, [record for record in found if record.state in states])

    def import_runs(self, folder: str | os.PathLike[str]) -> Runs:
        """Take in the runs of a folder that ``Runs.export`` made.

        Raises:
            StoreError: no such folder, or one that was changed.
        """
        taken = import_runs(self, Path(folder))
        return Runs(self, [self.catalogue.record(run) for run in taken])

    def save_analysis(self, results: AnalysisResults, **about: Any) -> str:
        """Keep an analysis as a bundle in this store; the new run's id. ``load_analysis`` gives it back.

        Args:
            results: what ``analyze_model`` or ``compare`` returned.
            about: as for ``save``; model, dataset and capture are the analysis' own where they are not given.
        """
        own = {"model": results.metadata.get("model_id"), "dataset": results.metadata.get("dataset")}
        own |= {"capture": results.metadata.get("capture"), "config": results.metadata.get("model_config")}
        description = describe(**{name: value for name, value in own.items() if value} | about)
        with self._new_run("analysis", description, Layout()) as lock:
            replace(results).save(lock.folder / BUNDLE)
        return lock.run

    def load_analysis(self, run: str) -> AnalysisResults:
        """An analysis that ``save_analysis`` kept; the hash of every file is checked.

        Raises:
            StoreLookupError: no such run. StoreError: it is no analysis, or not complete. ValueError: a file has changed.
        """
        record = self._readable(run, False)
        if record.kind != "analysis":
            raise StoreError(f"run {run} holds {record.kind}, no analysis: load it with store.load.")
        return AnalysisResults.load(self.catalogue.folder_of(run) / BUNDLE)

    def remove(self, run: str) -> None:
        """Delete a run and its files; one that was being removed when the process died is removed for good.

        Raises:
            StoreBusyError: it is being written. StoreLookupError: no such run. StoreError: the disk refused.
        """
        record = self.catalogue.record(run)
        folder = self.catalogue.folder_of(run)
        if self.catalogue.is_being_written(run):
            raise StoreBusyError(f"run {run} is being written: stop its writer, then remove it.")
        try:
            self.catalogue.set_state(run, "removing")
        except StoreError:
            # on a full disk nothing can be marked before something is removed: then the files of a large run go first
            if shutil.disk_usage(self.path).free > _ROOM_FOR_A_MARK or record.bytes < _ROOM_FOR_A_MARK:
                raise
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            pass  # an earlier removal got this far
        except OSError as error:
            raise explain(error, f"removing {folder}") from error
        self.catalogue.drop_run(run)

    def verify(self, run: str | None = None) -> list[Damage]:
        """Check every shard of a run (of all runs) against its hash, and the catalogue; an empty list: all is well."""
        return verify(self.catalogue, run)

    @contextmanager
    def _new_run(self, kind: str, about: About, layout: Layout) -> Iterator[RunLock]:
        """A run that is complete when the block ends, and marked as failed where it raises."""
        lock = RunLock(self.catalogue, new_id())
        try:
            self.catalogue.add_run(lock.run, kind, about, layout)
            yield lock
            self.catalogue.complete(lock.run)
        except BaseException as error:
            with suppress(StoreError):  # a run that nobody writes counts as failed without the mark
                self.catalogue.set_state(lock.run, "failed", reason_of(error))
            raise
        finally:
            lock.release()

    def _readable(self, run: str, partial: bool) -> Record:
        record = self.catalogue.record(run)
        if record.state != "complete" and not partial:
            why = f" ({record.reason})" if record.reason else ""
            raise StoreError(
                f"run {run} is not complete: its state is {record.state}{why}. partial=True reads its "
                f"{record.shards} finished shards."
            )
        if record.state == "complete" and record.kind != "analysis" and not record.shards:
            raise StoreError(f"run {run} has lost its shards: the catalogue is damaged.")
        return record

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.path)!r})"
