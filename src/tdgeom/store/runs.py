"""``Runs``: what a query found, as a table one can act on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import pandas as pd

from tdgeom.core.visible_text import visible
from tdgeom.files.errors import StoreBusyError, StoreLookupError
from tdgeom.files.shown_tables import shown_safely
from tdgeom.store.row_source import RowSource
from tdgeom.store.run_access import RunAccess
from tdgeom.store.run_description import describe_run
from tdgeom.store.run_records import RunRecord
from tdgeom.store.transfer import export_runs

__all__ = ["Runs", "size_text"]

COLUMNS = ("id", "created", "kind", "state", "model", "dataset", "experiment", "tags", "rows", "bytes")
_SHOWN = 60


class Runs:
    """The runs that a query found, oldest first; a snapshot: runs that come later are not in it.

    It has a length, iterates over the runs' metadata, and shows as a table. ``runs[0]`` and ``runs["r1f"]`` give one run's
    metadata (by position, by id, or by the beginning of an id), ``runs[1:3]`` a part. What acts on runs acts on those listed.

        >>> import tempfile, torch, tdgeom as tg
        >>> store = tg.ActivationStore(tempfile.mkdtemp())
        >>> ids = [store.save({"x": torch.ones(2)}, model=name) for name in ("gpt2", "bert")]
        >>> found = store.query(model="gpt2")
        >>> len(found), found.ids == ids[:1], found.load()[0]["x"].tolist()
        (1, True, [1.0, 1.0])
    """

    def __init__(self, store: RunAccess, records: Sequence[RunRecord]) -> None:
        self._store, self._catalogue, self._records = store, store.catalogue, list(records)

    @property
    def ids(self) -> list[str]:
        """The runs' ids."""
        return [record.id for record in self._records]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._catalogue.metadata(record) for record in self._records)

    @overload
    def __getitem__(self, which: slice) -> Runs: ...
    @overload
    def __getitem__(self, which: int | str) -> dict[str, Any]: ...
    def __getitem__(self, which: int | str | slice) -> Runs | dict[str, Any]:
        if isinstance(which, slice):
            return Runs(self._store, self._records[which])
        return self._catalogue.metadata(self._one(which))

    def _one(self, which: int | str | None) -> RunRecord:
        """One run by position, id or the beginning of an id; None: the only one."""
        if which is None:
            found = self._records
        elif isinstance(which, str):
            exact = [record for record in self._records if record.id == which]
            found = exact or [record for record in self._records if which and record.id.startswith(which)]
        elif isinstance(which, int) and not isinstance(which, bool):
            if not -len(self) <= which < len(self):
                raise StoreLookupError(f"there is no run {which}: the query found {len(self)}.")
            found = [self._records[which]]
        else:
            raise TypeError(f"a run is named by position, id or the beginning of an id, got {which!r}.")
        if len(found) == 1:
            return found[0]
        if not len(self):
            raise StoreLookupError("the query found no run: store.query() shows all there are.")
        if not found:
            raise StoreLookupError(f"none of the {len(self)} runs found is {which!r}: {self.ids[:12]}.")
        raise StoreLookupError(
            f"{len(found)} runs match {'the query' if which is None else repr(which)}: {[one.id for one in found[:12]]}. Name "
            f"one by its id or position."
        )

    def load(self, which: int | str | None = None, **options: Any) -> tuple[Any, dict[str, Any]]:
        """(activations, metadata) of one run, see ``ActivationStore.load``; the only one where none is named.

        Raises:
            StoreLookupError: no such run, or several.
        """
        return self._store.load(self._one(which).id, **options)

    def rows(self, which: int | str | None = None, **options: Any) -> RowSource:
        """One run's rows as a data source, see ``ActivationStore.rows``."""
        return self._store.rows(self._one(which).id, **options)

    def paths(self) -> dict[str, list[Path]]:
        """The files of every run, by id."""
        return {
            run: sorted(
                path
                for path in self._catalogue.folder_of(run).rglob("*")
                if path.is_file() and path.suffix != ".lock"
            )
            for run in self.ids
        }

    def delete(self, which: int | str | slice | None = None) -> int:
        """Remove these runs and their files, or one of them (``delete(-1)``, the last), or a part; how many.

        None is removed while one of them is being written.
        """
        chosen = (
            self._records
            if which is None
            else self._records[which]
            if isinstance(which, slice)
            else [self._one(which)]
        )
        runs = [record.id for record in chosen]
        busy = [run for run in runs if self._catalogue.is_being_written(run)]
        if busy:
            raise StoreBusyError(
                f"{busy} are being written: nothing was removed. Stop the writer, or leave them out."
            )
        removed = 0
        for run in runs:
            with suppress(StoreLookupError):  # somebody else removed it since the query
                self._store.remove(run)
                removed += 1
        self._records = [record for record in self._records if record.id not in runs]
        return removed

    def retag(self, add: str | Sequence[str] = (), remove: str | Sequence[str] = ()) -> Runs:
        """Give tags to these runs and take others away."""
        new = describe_run(tag=add).tags
        old = describe_run(tag=remove).tags
        with self._catalogue.changing(self.ids) as connection:
            for run in self.ids:
                connection.executemany(
                    "DELETE FROM tags WHERE run = ? AND tag = ?", [(run, tag) for tag in old]
                )
                connection.executemany(
                    "INSERT OR IGNORE INTO tags VALUES (?, ?)", [(run, tag) for tag in new]
                )
        return self._read_again()

    def rename_experiment(self, experiment: str) -> Runs:
        """Put all these runs into an experiment of this name."""
        return self._moved(self.ids, experiment)

    def move(self, which: int | str | None, experiment: str) -> Runs:
        """Put one of these runs into another experiment."""
        return self._moved([self._one(which).id], experiment)

    def _moved(self, runs: Sequence[str], experiment: str) -> Runs:
        name = describe_run(experiment=experiment).experiment
        with self._catalogue.changing(runs) as connection:
            connection.executemany(
                "UPDATE runs SET experiment = ? WHERE id = ?", [(name, run) for run in runs]
            )
        return self._read_again()

    def _read_again(self) -> Runs:
        known = {record.id: record for record in self._catalogue.records()}
        self._records = [known[run] for run in self.ids if run in known]
        return self

    def export(self, folder: str | Path) -> Path:
        """Copy these runs into a new folder that ``ActivationStore.import_runs`` reads; see ``transfer.export_runs``."""
        return export_runs(self._catalogue, self.ids, Path(folder))

    def to_frame(self) -> pd.DataFrame:
        """One row a run: what the catalogue says of it."""
        table = pd.DataFrame([{name: one[name] for name in COLUMNS} for one in self])
        return shown_safely(table) if len(self) else pd.DataFrame(columns=list(COLUMNS))

    def __repr__(self) -> str:
        if not len(self):
            return "no runs"
        lines = [_line(COLUMNS[:1] + COLUMNS[2:8] + ("size",))]
        lines += [_line(_cells(record)) for record in self._records[:_SHOWN]]
        left = len(self) - _SHOWN
        return visible("\n".join(lines + ([f"... and {left} more"] if left > 0 else [])))

    def _repr_html_(self) -> str:
        return visible(self.to_frame().to_html(max_rows=_SHOWN, show_dimensions=True))


def _cells(record: RunRecord) -> tuple[str, ...]:
    about = record.about
    texts = (record.id, record.kind, record.state, about.model or "-", about.dataset or "-", about.experiment)
    return (*texts, ",".join(about.tags) or "-", size_text(record.bytes))


def _line(cells: Sequence[str]) -> str:
    widths = (13, 11, 9, 24, 16, 14, 18, 9)
    shown = (cell if len(cell) <= width else cell[: width - 1] + "…" for cell, width in zip(cells, widths))
    return "  ".join(_printable(cell).ljust(width) for cell, width in zip(shown, widths)).rstrip()


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def size_text(count: float) -> str:
    """A number of bytes.

    >>> size_text(999), size_text(1500), size_text(2e13)
    ('999 B', '1.5 kB', '20.0 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
