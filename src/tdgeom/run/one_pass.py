"""One pass over a loader: what is read, what counts against the budget, and which blocks the streaming stages get."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from tdgeom.core.keys import Key
from tdgeom.core.one_rank import is_alone
from tdgeom.core.process_groups import rank_and_world
from tdgeom.core.rank_failures import check_ranks, forward_together
from tdgeom.core.renamed import stage_of
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.split_loaders import find_split
from tdgeom.core.streaming_stage import refuse_ordered
from tdgeom.core.warnings import tell
from tdgeom.core.words import put
from tdgeom.model.calls.shared_model import SharedModel
from tdgeom.numerics.on_host import on_host, read_together
from tdgeom.rows.batches import batch_length, iterate
from tdgeom.rows.data_sources import DataSource
from tdgeom.run.agreement import Beginning, Division, compare_ends, compare_runs, divide
from tdgeom.run.batch_readers import Readers
from tdgeom.run.batch_stages import BatchStages
from tdgeom.run.checkpoint import Checkpoint
from tdgeom.run.finite_rows import FiniteRows
from tdgeom.run.gathered_rows import BLOCK_ROWS, GatheredRows
from tdgeom.run.identity import batch_digest, pipeline_identity, tensors_sha256
from tdgeom.run.own_rows import OwnRows, Units, first_of_each
from tdgeom.run.plan import Plan
from tdgeom.run.resuming import Resuming
from tdgeom.run.shares import Shares
from tdgeom.run.state_file import LoaderOrder, SequencesMet

__all__ = ["OnePass"]


class OnePass:
    """The place in the stream, and the steps from batch to streaming state.

    Args: those of ``run``, with the plan and its per-batch part. The plan's streaming stages are reset.

    Attributes: ``counts`` (rows, tokens, padding, dropped and repeated rows, batches), ``seconds`` by phase, ``stopped``.
    """

    def __init__(
        self,
        plan: Plan,
        batch_stages: BatchStages,
        *,
        max_rows: int | None = None,
        block_rows: int = BLOCK_ROWS,
        drop_nonfinite: bool = False,
        sharded: bool | None = None,
        agree: Mapping[str, Any] | None = None,
        shard: tuple[int, int] | None = None,
        shared: SharedModel | None = None,
    ) -> None:
        self.plan, self.batch_stages = plan, batch_stages
        self.max_rows, self.sharded = max_rows, sharded
        self.finite = FiniteRows(drop_nonfinite)
        self.agree, self.shard = agree or {}, shard
        self.met: SequencesMet | None = None  # where a state file will tell of them
        self.order: LoaderOrder | None = None  # of a loader of which this job has a part
        self.blocks = {ids: GatheredRows(block_rows) for ids in batch_stages.keys}
        self.units_of = {
            ids: [unit for unit in plan.stream if set(unit.in_keys) <= set(keys)]
            for ids, keys in batch_stages.keys.items()
        }
        if len(self.blocks) > 1 and (max_rows is not None or sharded):
            self._refuse_selections()
        self.rank, self.world = rank_and_world()
        for unit in plan.stream:
            refuse_ordered(stage_of(unit), max(self.world, shard[1] if shard else 1), "run")
        self.readers = Readers(shared)
        self.spare: TensorDict | None = (
            None  # what a rank without a batch runs, where others cannot run without it
        )
        self.division = Division(split=bool(sharded))
        self.once = False  # sequences bring ids, each of which counts once
        self.dealt: int | None = (
            None  # elements that a sampler deals out; what it gives behind them repeats some
        )
        self.shares = Shares(max_rows=max_rows, split=bool(sharded))
        self.counts = dict.fromkeys(
            ("rows", "tokens", "padding_rows", "dropped_rows", "repeated_rows", "batches"), 0
        )
        self.seconds = dict.fromkeys(("load", "batch", "stream", "finish"), 0.0)
        self.stopped = "end of data"
        self.kept: Resuming | None = None  # where a checkpoint is kept
        self.data = hashlib.sha256()  # of every batch read, in order
        self.data_then: str | None = None  # the same of an earlier run that has read the whole stream
        for unit in (*plan.stream, *batch_stages.selects):
            unit.reset()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - begin

    # ------------------------------------------------------------------------------------------------ reading

    def read(self, dataloader: Iterable[Any], bar: tqdm) -> None:
        """Batches to blocks to updates, until the data or the budget ends."""
        compare_runs(self._identity)
        kept, given = self.kept, 0
        if kept is not None:
            kept.load()
        batches, first = self._divided(dataloader)
        if kept is not None:
            given = kept.begin(first, batches)
            if kept.ended:  # what comes after the stream is left to do
                return
        bar.update(self.shares.claimed)
        while not self.shares.spent:
            check_ranks()
            own, hashes = self._load(batches)
            given += len(hashes)
            index, td = own or (-1, None)
            units = self._units(td)
            new, over = self.shares.announce(len(hashes), units.ids if self.readers.leads else [])
            if over:
                break
            self._number_together(td)
            rows = None if td is None or not self.readers.leads else self._rows_of(td, units, new)
            if rows is None:
                self._run_along(td)
            self._hand_on(rows, units, index, bar)
            for number, found in enumerate(hashes):
                if (
                    self.division.split
                    or self.shares.reached[self.readers.leaders[number % self.readers.count]]
                ):
                    self.data.update(found)
            if kept is not None and not self.shares.spent:
                kept.keep(given)
        if self.shares.spent:
            self.stopped = "max_rows"
            if self.division.split and not self.shares.in_order:
                words = f"{self.division.words}; max_rows took of every part in turn, not the first rows of the whole"
                self.division = replace(self.division, words=words)
        self.flush()
        compare_ends(
            given,
            self.data.hexdigest(),
            self._identity,
            split=self.division.split,
            readers=self.readers,
        )
        if kept is not None:
            kept.end(given)

    def _divided(self, dataloader: Iterable[Any]) -> tuple[Iterator[tuple[int, Any]], TensorDict | None]:
        """(the loader's batches, numbered; the first), once all ranks have found out how the data lie with them.

        The first is None where there is none, and where nobody compares it.
        """
        source = dataloader if isinstance(dataloader, DataSource) else None
        found = find_split(dataloader) if self.world > 1 else None
        apart = self.world > 1 and (found is not None or bool(self.sharded))
        if source is not None:  # documents are numbered where they are read
            source.part = (self.readers.place, self.readers.count) if apart else (0, 1)
        numbered = (
            enumerate(iterate(dataloader))
            if self.shard is None
            else self._own_shard(dataloader, source, self.shard)
        )
        alone = self.shard is not None or (self.world == 1 and not self.sharded)
        if alone and is_alone() and (part := find_split(dataloader)) is not None:
            tell(
                f"run: the loader is part {part.part + 1} of {part.parts} ({part.by}), and this rank alone reads it: the "
                f"numbers are those of that part. Give the whole loader, or say that this is meant: sharded=True.",
                UserWarning,
            )
        if alone and self.kept is None:
            return numbered, None
        with self.timed("load"):
            first = list(islice(numbered, 1))
        td = self.batch_stages.td(first[0][1]) if first else None
        batches = chain(first, numbered)
        if alone:
            return batches, td
        ids = None if td is None else self.batch_stages.ids(td)[0]
        made = source is not None and source.makes_documents
        fits = found is not None and (td is None or found.fits(0, 0, batch_length(td)))
        self.division = divided = divide(
            Beginning(
                first="" if td is None else tensors_sha256(td),
                ids=None if ids is None else ids.tolist(),
                sharded=self.sharded,
                found=found,
                placed=fits and not made,
            ),
            self.readers,
        )
        self.spare = self.readers.spare(td)
        if divided.split and len(self.blocks) > 1:
            self._refuse_selections()
        if divided.split and self.world > 1:
            self.batch_stages.part = (self.readers.place, self.readers.count)
        self.once = divided.split and ids is not None
        if found is not None:
            self.batch_stages.places = found if divided.placed else None
            self.dealt = found.length if divided.placed or made else None
            self.once &= found.repeats and self.dealt is None
            if found.repeats and self.dealt is None and ids is None and td is not None:
                warnings.warn(
                    f"{found.by} may repeat sequences to give all ranks as many, and nothing in the batches tells which: they "
                    f"would count twice. Put a 'sequence_id' (B,) that is unique over all ranks into the batches.",
                    stacklevel=3,
                )
        self.shares = Shares(
            split=divided.split,
            once=self.once,
            max_rows=self.max_rows,
            found_by_ids=divided.by_ids,
            placed=divided.placed,
            always=self.readers.in_step,
            known=divided.placed or ids is not None,
        )
        return batches, td

    def _own_shard(
        self, dataloader: Iterable[Any], source: DataSource | None, shard: tuple[int, int]
    ) -> Iterator[tuple[int, Any]]:
        """This job's part: every n-th batch of a loader that all jobs have alike; all batches of one that holds its part only."""
        part, parts = shard
        self.division = Division(split=False, words=f"part {part + 1} of {parts}, a job of its own")
        if self.sharded:
            self.batch_stages.part = shard
            if source is not None:  # documents are numbered where they are read
                source.part = shard
            yield from enumerate(iterate(dataloader))
            return
        self.order = LoaderOrder()
        for index, batch in enumerate(iterate(dataloader)):
            lies = self.batch_stages.where_it_lies(batch)
            self.order.add(batch_digest(lies))
            if index % parts == part:
                yield index, batch
            else:  # counted, for the sequences of all jobs are numbered in one order
                self.batch_stages.number(lies)
        self.order.end()

    def _load(self, batches: Iterator[tuple[int, Any]]) -> tuple[tuple[int, TensorDict] | None, list[bytes]]:
        """(this rank's batch of the next round and its number, the hashes of the batches that came: of one loader all ranks')."""
        own, hashes = None, []
        for place in range(1 if self.division.split else self.readers.count):
            with self.timed("load"):
                index, batch = next(batches, (-1, None))
                if index < 0:
                    break
                td = self.batch_stages.td(batch)
            hashes.append(self.hash(td))
            if not self.division.split:
                self.batch_stages.number(td)
            self.spare = td.copy()
            if self.division.split or place == self.readers.place:
                own = index, td
        return own, hashes

    def _units(self, td: TensorDict | None) -> Units:
        """What of a batch counts by itself: its sequences (or rows) where each rank has a loader, else the batch as a whole."""
        if td is None:
            return Units()
        if not self.division.split:
            return Units(order=[0])
        given, by_row = self.batch_stages.ids(td)
        if given is None and self.once:
            raise ValueError(
                f"run: the first batch brings ids that are unique over all ranks ('sequence_id' or {self.batch_stages.main!r}), "
                f"a later one does not. Put them into every batch, or into none."
            )
        documents, places = td.get("document_id", None), self.batch_stages.number(td)
        ids, length = places if given is None else given, self.dealt
        again = None
        if length is not None and self.division.placed:
            again = places >= length
        elif length is not None and isinstance(documents, Tensor):
            again = on_host(documents) >= length
        return Units(
            ids.tolist(),
            (places if self.division.placed else ids).tolist(),
            by_row,
            None if again is None else again.numpy(),
        )

    def data_sha256(self) -> str:
        """Of all batches read in their order; empty where others were read elsewhere."""
        if self.division.split:
            return ""
        return self.data.hexdigest() if self.data_then is None else self.data_then

    def flush(self) -> None:
        """The rows that fill no block to the streaming stages."""
        for ids, blocks in self.blocks.items():
            for block, origin in blocks.flush():
                self._update(ids, block, origin)
        self.finite.settle()

    def take(self, td: TensorDict, index: int) -> None:
        """One batch that nobody shares out: counted, run, and its rows handed on."""
        self.data.update(self.hash(td))
        self.batch_stages.number(td)
        units = self._units(td)
        self._hand_on(self._rows_of(td, units, np.ones(0, dtype=bool)), units, index)

    def hash(self, td: TensorDict) -> bytes:
        """Of a batch; the host reads all that it wants to know of it, and of the blocks before it, at once."""
        given = [value for value in td.values(True, True) if isinstance(value, Tensor)]
        read_together([*given, *self.finite.flags])
        self.finite.settle()
        return tensors_sha256(td).encode()

    def _rows_of(self, td: TensorDict, units: Units, new: np.ndarray) -> OwnRows:
        """Run a batch; its rows, without those of the units that are not ``new``."""
        with self.timed("batch"), forward_together(self.readers.waits):
            rows, count = self.batch_stages.rows(td)
        main = self.batch_stages.main
        if not self.division.split:
            read = self.batch_stages.tokens_and_padding(td)
            return OwnRows(rows, np.zeros(count, dtype=np.int64), np.full(1, count), read)
        unit = units.of_rows(on_host(rows[main][main]).numpy())
        fresh = new if units.again is None else new & ~units.again
        keep = fresh[unit]
        if len(set(units.ids)) < len(units.ids):  # an id twice in one batch
            keep &= first_of_each(on_host(rows[main][main]).numpy())
        self.counts["repeated_rows"] += int((~keep).sum())
        counted = td if keep.all() and fresh.all() else self.batch_stages.without(td, fresh, keep)
        read = self.batch_stages.tokens_and_padding(counted)
        return OwnRows(rows, unit, np.bincount(unit, minlength=len(units.ids)), read).kept(main, keep)

    def _number_together(self, td: TensorDict | None) -> None:
        """Where a padded batch of one rank needs further passes of a model that runs on all ranks: all make them on it."""
        contexts: list[Any] = [unit for unit in self.plan.batch if hasattr(unit, "is_unnumbered")]
        for _ in range(self.world if contexts and self.readers.collective else 0):
            is_open = td is not None and any(unit.is_unnumbered(td) for unit in contexts)
            sent = self.readers.first_of(td if is_open else None)
            if sent is None:
                return
            with forward_together(self.readers.waits):
                for unit in contexts:
                    unit.number_on_all_ranks(self.batch_stages.td(sent))

    def _run_along(self, td: TensorDict | None) -> None:
        """A forward whose rows count elsewhere, or not at all: for ranks that could not run theirs without it."""
        if td is None and not self.readers.collective:
            return
        td = self.spare if td is None else td
        assert td is not None  # some rank had a batch, which all got
        td = self.batch_stages.td(td.copy())
        if td.get("sequence_id", None) is None:
            td.set("sequence_id", torch.arange(batch_length(td), device="cpu"))
        with self.timed("batch"), forward_together(self.readers.waits):
            self.batch_stages.rows(td)

    def _hand_on(self, own: OwnRows | None, units: Units, index: int, bar: tqdm | None = None) -> None:
        """A round's rows to the blocks, as many of them as the limit leaves. Collective where there is one."""
        before, main = self.shares.claimed, self.batch_stages.main
        allowed = self.shares.budget(
            [] if own is None else own.counts.tolist(), [] if own is None else units.order
        )
        taken = 0
        if own is not None and self.shares.reached[self.rank]:
            for name, count in zip(("tokens", "padding_rows", "batches"), (*own.read, 1)):
                self.counts[name] += count
            own = own.cut(main, allowed)
            taken = len(own.unit)
            for ids in self.blocks:
                self.gather(ids, own.rows[ids], own.rows[ids][ids].shape[0], index)
        if bar is not None and not bar.disable:
            bar.update(taken if self.max_rows is None else self.shares.claimed - before)
            elapsed = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{self.counts['tokens'] / elapsed:,.0f} tokens/s")

    def gather(self, ids: Key, rows: Mapping[Key, Any], count: int, batch: int) -> None:
        """Rows of a batch to those that wait, and blocks that are full to the streaming stages."""
        for block, origin in self.blocks[ids].add(rows, count, batch):
            self._update(ids, block, origin)

    def _identity(self) -> dict[str, Any]:
        """What all ranks must have in common before and after the batches."""
        return {"settings": dict(self.agree), "stages": pipeline_identity(self.plan, end=True)}

    def _refuse_selections(self) -> None:
        raise ValueError(
            f"run: max_rows and sharded count the rows of one selection, this pipeline has those of {list(self.blocks)}. Run "
            f"one pipeline a selection."
        )

    # ------------------------------------------------------------------------------------------------ streaming

    def _update(self, ids: Key, block: dict[Key, Any], origin: list[int]) -> None:
        with self.timed("stream"):
            block, dropped = self.finite.of(ids, block, origin)
            self.counts["dropped_rows"] += dropped
            count = block[ids].shape[0]
            if count:
                self.counts["rows"] += count if ids == self.batch_stages.main else 0
                if self.met is not None:
                    self.met.add(on_host(block[ids]) >> POSITION_BITS)
                td = TensorDict({}, batch_size=[])
                for key, value in block.items():
                    put(td, key, value)
                for unit in self.units_of[ids]:
                    unit.update(td)

    def keep_in(self, checkpoint: Checkpoint) -> None:
        """Keep this checkpoint from now on, and go on from what it holds."""
        if len(self.blocks) > 1:
            raise ValueError(
                f"run: checkpoint= keeps the rows of one selection, got those of {list(self.blocks)}. Run one pipeline for "
                f"each."
            )
        self.kept = Resuming(self, checkpoint)
