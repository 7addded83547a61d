"""``StoreActivations``: the rows of a stream, kept in a store while the model runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key, key_tuple, site_key
from tdgeom.core.process_groups import broadcast_number, gather_numbers, gather_states, rank_and_world
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.core.words import Vocabulary, Words
from tdgeom.core.wrong_objects import site_list
from tdgeom.files.errors import StoreError, StoreLookupError
from tdgeom.store.activation_store import ActivationStore
from tdgeom.store.resume import open_writer, refuse_other_rows
from tdgeom.store.run_description import DETAILS, describe_run
from tdgeom.store.run_ids import id_of, new_id, number_of
from tdgeom.store.run_records import relative_errors
from tdgeom.store.run_writer import RunLock, RunWriter
from tdgeom.store.shard_layout import ShardLayout, entries_of
from tdgeom.store.stored_dtypes import named_dtype

__all__ = ["StoreActivations"]


class StoreActivations(StreamingStage):
    """Appends the rows of a stream, and what ``SelectTokens(also=...)`` carried, to a new run of a store.

    Rows are gathered in buffers of ``shard_bytes`` (all the memory it takes) and written as a shard when these are full.
    The run is complete when the stream has ended: at the end of ``run``, or when ``sync_()`` is called by hand. Until then
    its state is "writing"; if ``run`` ends in an exception or the process dies, its state is "failed", all finished shards
    can be read and the run can be resumed. In a process group every rank writes shards of its own into one run on a file
    system that all ranks see, and ``reset`` is collective.

    Args:
        store: an ``ActivationStore``, or the path of one.
        sites: the sites to keep, such as ``capture.sites``; None for one unnamed site (``"tokens"``).
        also: names carried by ``SelectTokens(also=...)``, such as "document_id" or "category", kept as they come: numbers, or
            words (text, None, lists).
        dtype: what sites are cast to: "bfloat16", "float16", "float32", "float64", "float8" (e4m3fn with a float32 scale a
            row), a ``torch.dtype``, or None: as they come.
        shard_bytes: the size of a shard.
        resume: the id of an unfinished run to go on with; rows that it has already, by their row id, are passed over.
        about: what the run says of itself, as for ``ActivationStore.save``.

    Reads ``("tokens", site)``, ``("carried", name)`` and ``"row_id"``; writes ``("stored", "rows")``, ``("stored", "bytes")``
    (of these rows) and ``("stored", "relative_error")``, √(Σ|x-x̂|² / Σ|x|²) of the site that casting changed most. The
    run's id is ``stage.run_id``.

    Raises:
        StoreError: a value beyond the dtype's range, rows whose width or dtype changes, a full disk, a folder that is gone.
            StoreBusyError: another process writes the run. ValueError: inputs that are not the same rows.

        >>> import tempfile, torch, tdgeom as tg
        >>> store = tg.ActivationStore(tempfile.mkdtemp())
        >>> keep = tg.StoreActivations(store, ["x"], dtype="bfloat16", model="a model")
        >>> result = tg.run(keep, [{"tokens": {"x": torch.ones(4, 8)}}])
        >>> int(result["stored", "rows"]), int(result["stored", "bytes"]), float(result["stored", "relative_error"])
        (4, 96, 0.0)
        >>> again = tg.run(tg.StreamingMean(in_keys=[("tokens", "x")]), store.rows(keep.run_id))
        >>> again["mean", "mean"][:3]
        tensor([1., 1., 1.], dtype=torch.float64)
    """

    takes_complex = True  # rows are kept as they come
    takes_words = frozenset({"carried"})
    # only rows of the same keys in the same store add up; where they went, and what the run says of itself, may differ
    publishing = frozenset(
        {"shard_bytes", "resume", "model", "revision", "dataset", "experiment", "tag", *DETAILS}
    )
    runs: Tensor

    def __init__(
        self,
        store: ActivationStore | str | os.PathLike[str],
        sites: Sequence[str] | None = None,
        *,
        also: Sequence[str] = (),
        dtype: str | torch.dtype | None = None,
        shard_bytes: int = 128 * 2**20,
        resume: str | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
        **about: Any,
    ) -> None:
        if isinstance(sites, str) or isinstance(also, str):
            raise TypeError(
                f"StoreActivations: sites and also are lists of names, got {sites!r} and {also!r}."
            )
        if shard_bytes < 1:
            raise ValueError(f"StoreActivations: shard_bytes must be at least 1, got {shard_bytes}.")
        named = None if sites is None else site_list("StoreActivations", sites)
        rows: list[Key] = ["tokens"] if named is None else [("tokens", *site_key(site)) for site in named]
        rows += [("carried", str(name)) for name in also]
        super().__init__(
            in_keys=in_keys,
            out_keys=out_keys,
            reads=[*rows, "row_id"],
            writes=[("stored", "rows"), ("stored", "bytes"), ("stored", "relative_error")],
        )
        self.store = store if isinstance(store, ActivationStore) else ActivationStore(store)
        self.dtype, self.shard_bytes, self.resume = named_dtype(dtype), shard_bytes, resume
        self._sites = 1 if sites is None else len(sites)
        self._about = describe_run(**about)
        if resume is not None:
            self._refuse_another_model(resume)
        self._agreed: int | None = None  # the number of the run that all ranks will write
        self._writer: RunWriter | None = None
        self._goes_on = False  # the run is one that a checkpoint of this stage's began
        self._layout = ShardLayout()
        self.add_state("runs", torch.int64)

    @property
    def run_id(self) -> str:
        """The id of the run written.

        Raises:
            StoreError: no rows have come yet.
        """
        if self.is_empty:
            raise StoreError("StoreActivations has seen no rows, so it has begun no run.")
        return id_of(int(self.runs[-1]))

    def start(self, *inputs: Any) -> Mapping[str, Tensor]:
        """The run to write."""
        return {"runs": torch.tensor([self._draw() if self._agreed is None else self._agreed])}

    def accumulate(self, *inputs: Any) -> None:
        """Append rows to the run."""
        inputs = (*inputs[:-1], inputs[-1].long())  # row ids
        layout = self._layout_of(inputs)
        vocabulary = Vocabulary() if layout.words else None
        if vocabulary is not None:
            inputs = tuple(vocabulary.encode(one) if isinstance(one, Words) else one for one in inputs)
        if self._writer is None:
            if len(self.runs) > 1:
                raise StoreError(
                    "StoreActivations counts several merged runs: reset() it before it writes another."
                )
            lock = RunLock(self.store.catalogue, self.run_id, rank_and_world()[0])
            self._writer = open_writer(lock, self._about, layout, self.shard_bytes)
            self._layout = layout
        if layout != self._layout:
            refuse_other_rows(self.run_id, self._layout, layout)
        self._writer.append(inputs, vocabulary)

    def combine(self, other: Any) -> None:
        """Count another's runs as well; ranks write one run together."""
        self.runs = torch.unique(torch.cat([self.runs, other.runs.to(self.runs.device)]))

    def fits(self, name: str, value: Tensor) -> bool:
        """There may be more or fewer runs in another's state."""
        return True

    def reset(self) -> None:
        """Forget every row; the next ones begin a new run. A run under way keeps the rows it got and stays unfinished."""
        self._stop()
        self._goes_on = False
        super().reset()
        self._agreed = broadcast_number(self._draw()) if rank_and_world()[1] > 1 else None

    def settle(self) -> None:
        """Write what is held, so that a state that is saved claims no rows that are not on the disk."""
        if self._writer is not None:
            self._writer.flush()

    def begin(self) -> bool:
        """Name the run before it has rows, so that whoever goes on from the checkpoint writes this one."""
        if self.is_empty:
            self.set_state(self.start())
        self._goes_on = True
        return True

    def go_on(self) -> None:
        """The run is this process' to write and to end; a rank that was not there then writes the others' run."""
        if rank_and_world()[1] > 1:
            every = gather_numbers(self.runs.tolist())
            if self.is_empty and any(every):
                self.set_state({"runs": torch.tensor(sorted({run for one in every for run in one}))})
        self._goes_on = not self.is_empty

    def release(self) -> None:
        """The stream broke off: what came is written, and the run, which counts as failed, can be resumed at once."""
        self._stop()

    def sync_(self) -> None:
        """The stream has ended: the last rows are written, and once all ranks have done so, the run is complete."""
        wrote = self._writer is not None or self._goes_on
        rank, world = rank_and_world()
        try:
            self.settle()
            for state in gather_states(self.state()):
                self.merge_(self.with_state(state))
            if rank != 0:
                super().reset()  # the own one is collective
            elif not self.is_empty and (wrote or world > 1) and self._is_begun():
                self.store.catalogue.complete(self.run_id)
            if world > 1:
                broadcast_number(0)  # no rank goes on, or lets go of the run, before it is complete
        finally:
            self._stop()

    def result(self) -> Mapping[str, Tensor]:
        """What the store has of these runs."""
        self.settle()
        rows = size = 0
        shards = []
        for run in map(id_of, self.runs.tolist()):
            found = self.store.catalogue.shards(run)
            count = sum(shard.rows for shard in found)
            rows, size = rows + count, size + count * self.store.catalogue.layout(run).row_bytes
            shards += found
        errors = [error["relative"] for error in relative_errors(shards).values()]
        return {
            "rows": torch.tensor(rows),
            "bytes": torch.tensor(size),
            "relative_error": torch.tensor(max(errors, default=0.0), dtype=torch.float64),
        }

    def _is_begun(self) -> bool:
        """Whether the run has got rows: one that was only named is in no catalogue."""
        try:
            return self.store.catalogue.record(self.run_id) is not None
        except StoreLookupError:
            return False

    def _refuse_another_model(self, run: str) -> None:
        of_run, given = self.store.catalogue.record(run).about.model, self._about.model
        if given not in (None, of_run):
            raise StoreError(f"run {run} is of the model {of_run!r}, so it does not go on with {given!r}.")

    def _draw(self) -> int:
        return number_of(self.resume or new_id())

    def _stop(self) -> None:
        if self._writer is not None:
            self._writer.stop()
        self._writer = None

    def _layout_of(self, inputs: Sequence[Any]) -> ShardLayout:
        count = inputs[-1].shape
        tensors, words = {}, []
        for position, (key, role, value) in enumerate(zip(self.in_keys, self.in_roles, inputs)):
            if value.shape[:1] != count:
                raise ValueError(
                    f"StoreActivations expects {key!r} of shape ({count[0]}, ...) beside {self.in_keys[-1]!r}, got "
                    f"{tuple(value.shape)}. Rows of all sites must come from one selection (SelectTokens)."
                )
            if isinstance(value, Words):
                words.append(key_tuple(role))
                tensors[key_tuple(role)] = (torch.int64, torch.int64, ())
                continue
            if self.dtype is not None and position < self._sites and value.is_complex():
                raise ValueError(
                    f"StoreActivations casts real rows to {self.dtype}, got {value.dtype} at {key!r}. Keep them as they come "
                    f"(dtype=None), or give real and imaginary parts as features (torch.view_as_real)."
                )
            is_cast = position < self._sites and value.is_floating_point()
            stored = self.dtype if self.dtype is not None and is_cast else value.dtype
            tensors[key_tuple(role)] = (value.dtype, stored, value.shape[1:])
        return ShardLayout(entries_of(tensors), words=tuple(words))

    def _save_to_state_dict(self, *args: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._stop()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {**self.__dict__, "_writer": None}  # of two copies only one may write
