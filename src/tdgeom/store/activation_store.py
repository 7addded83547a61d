"""``ActivationStore``: a folder of runs and its catalogue."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from tdgeom.files.atomic import explained
from tdgeom.files.bundle import Bundle, read_bundle
from tdgeom.files.errors import StoreError
from tdgeom.files.shard_writing import write_shard
from tdgeom.store.capture_tree import Captured, pack
from tdgeom.store.catalogue import BUNDLE, Catalogue
from tdgeom.store.integrity import Damage, find_damage
from tdgeom.store.journals import Journal
from tdgeom.store.query import condition, names
from tdgeom.store.run_access import RunAccess
from tdgeom.store.run_description import RunDescription, describe_run
from tdgeom.store.run_ids import new_id
from tdgeom.store.run_records import RUN_STATES, ShardRecord
from tdgeom.store.run_writer import RunLock, reason_of
from tdgeom.store.runs import Runs
from tdgeom.store.shard_layout import ShardLayout
from tdgeom.store.transfer import import_runs

__all__ = ["ActivationStore"]

VARIABLE = "TDGEOM_STORE"


class Analysis(Protocol):
    """What ``save_analysis`` keeps: anything that writes itself into a folder as a bundle, such as ``AnalysisResults``."""

    metadata: Mapping[str, Any]

    def save(self, save_dir: Path, /) -> Any:
        """Write the bundle."""


class ActivationStore(RunAccess):
    """A folder that keeps activations and analyses, and finds them again.

    Beside the runs' folders lies one SQLite file, the catalogue: what each run is, in which state, and which finished
    shards belong to it. Shards are safetensors files, written whole or not at all and hashed. Nothing is pickled, and no
    name or metadata ever becomes a path.

    Args:
        path: the folder; made if it is not there.
        journal: how the catalogue survives a crash: "wal" (readers and writers do not wait for one another, on one machine) or
            "rollback" (for network file systems). Kept in the file. Default: a catalogue that is there stays as it is; a new
            one has a log, except on a file system that is known to be one of a network.

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

    def __init__(self, path: str | os.PathLike[str], *, journal: Journal | None = None) -> None:
        self.path = Path(path).absolute()
        super().__init__(Catalogue(self.path))
        with explained(f"opening the store {self.path}"):
            is_there = self.catalogue.path.exists()
        if not is_there:
            with explained(f"making the store {self.path}"):
                self.path.mkdir(parents=True, exist_ok=True)
        self.catalogue.create_unless_whole(journal)

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
        description = describe_run(**about)
        layout, tensors = pack(activations)
        with self._new_run("capture", description, layout) as lock:
            path = lock.folder / ShardRecord(0, 0, 0, 0, "", {}).name
            self.catalogue.add_shard(lock.run, ShardRecord(0, 0, 0, *write_shard(path, tensors), {}))
        return lock.run

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
        states = RUN_STATES if state is None else names(state, "state")
        if unknown := set(states) - set(RUN_STATES):
            raise ValueError(
                f"query: there is no state {sorted(unknown)[0]!r}; a run is one of {list(RUN_STATES)}."
            )
        sql, values, fits = condition(**wanted)
        found = self.catalogue.records(sql, values)
        return Runs(self, [one for one in found if one.state in states and fits(one.about.details)])

    def delete(self, which: int | str | slice) -> int:
        """Remove one run and its files, by position among all runs (-1 is the last one made), id or the beginning of an id.

        Raises:
            StoreLookupError: no such run, or several. StoreBusyError: it is being written.

            >>> import tempfile, torch
            >>> store = ActivationStore(tempfile.mkdtemp())
            >>> ids = [store.save({"x": torch.ones(2)}, model=name) for name in ("gpt2", "bert")]
            >>> store.delete(-1), store.query().ids == ids[:1]
            (1, True)
        """
        return self.query().delete(which)

    def import_runs(self, folder: str | os.PathLike[str]) -> Runs:
        """Take in the runs of a folder that ``Runs.export`` made.

        Raises:
            StoreError: no such folder, or one that was changed.
        """
        taken = import_runs(self.catalogue, Path(folder))
        return Runs(self, [self.catalogue.record(run) for run in taken])

    def save_analysis(self, results: Analysis, **about: Any) -> str:
        """Keep an analysis as a bundle in this store; the new run's id. ``load_analysis`` gives it back.

        Args:
            results: what ``analyze_model`` or ``compare`` returned.
            about: as for ``save``; model, dataset and capture are the analysis' own where they are not given.
        """
        own = {"model": results.metadata.get("model_id"), "dataset": results.metadata.get("dataset")}
        own |= {"capture": results.metadata.get("capture"), "config": results.metadata.get("model_config")}
        description = describe_run(**{name: value for name, value in own.items() if value} | about)
        with self._new_run("analysis", description, ShardLayout()) as lock:
            copy.copy(results).save(lock.folder / BUNDLE)  # saving notes the folder on what is saved
        return lock.run

    def load_analysis(self, run: str) -> Bundle:
        """The bundle that ``save_analysis`` kept, the hash of every file checked: its tables, arrays and metadata.

        ``tg.AnalysisResults.load(store.load_analysis(run))`` makes the results object of it.

        Raises:
            StoreLookupError: no such run. StoreError: it is no analysis, or not complete. ValueError: a file has changed.
        """
        record = self._readable(run)
        if record.kind != "analysis":
            raise StoreError(f"run {run} holds {record.kind}, no analysis: load it with store.load.")
        return read_bundle(self.catalogue.folder_of(run) / BUNDLE)

    def verify(self, run: str | None = None) -> list[Damage]:
        """Check every shard of a run (of all runs) against its hash, and the catalogue; an empty list: all is well."""
        return find_damage(self.catalogue, run)

    @contextmanager
    def _new_run(self, kind: str, about: RunDescription, layout: ShardLayout) -> Iterator[RunLock]:
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

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.path)!r})"
