"""One pass over a loader: what is read, what counts against the budget, and which blocks the streaming stages get."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from tdgeom.core.keys import Key
from tdgeom.core.process_groups import Repeats, rank_and_world
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.streaming_stage import rows_finite
from tdgeom.core.words import put
from tdgeom.rows.batches import iterate
from tdgeom.run.batch_stages import BatchStages
from tdgeom.run.checkpoint import Checkpoint
from tdgeom.run.gathered_rows import BLOCK_ROWS, GatheredRows
from tdgeom.run.identity import tensors_sha256
from tdgeom.run.plan import Plan

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
        sharded: bool = False,
    ) -> None:
        self.plan, self.batch_stages = plan, batch_stages
        self.max_rows, self.drop_nonfinite, self.sharded = max_rows, drop_nonfinite, sharded
        self.blocks = {ids: GatheredRows(block_rows) for ids in batch_stages.keys}
        self.readers = {
            ids: [unit for unit in plan.stream if set(unit.in_keys) <= set(keys)]
            for ids, keys in batch_stages.keys.items()
        }
        if len(self.blocks) > 1 and (max_rows is not None or sharded):
            raise ValueError(
                f"run: max_rows and sharded count the rows of one selection, this pipeline has those of {list(self.blocks)}. Run "
                f"one pipeline a selection."
            )
        self.repeats = Repeats() if sharded else None
        self.rank, self.world = rank_and_world()
        self.counts = dict.fromkeys(
            ("rows", "tokens", "padding_rows", "dropped_rows", "repeated_rows", "batches"), 0
        )
        self.seconds = dict.fromkeys(("load", "batch", "stream", "finish"), 0.0)
        self.claimed = 0  # rows of all ranks' batches so far: the budget
        self.stopped = "end of data"
        self.checkpoint: Checkpoint | None = None
        self.skipped = 0  # batches of the loader that an earlier run has seen
        self.first_batch: str | None = None
        self.data = hashlib.sha256()  # of every batch read, in order
        self.ended = False  # an earlier run has read the whole stream
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
        bar.update(self.claimed)
        batches, given = enumerate(iterate(dataloader)), 0
        if (
            self.ended
        ):  # what comes after the stream is left to do; the data must be those of then all the same
            for index, batch in islice(batches, 1):
                given = index + 1
                self._seen_before(self.batch_stages.td(batch), index)
            self._refuse_shorter(given, least=1)
            return
        while True:
            with self.timed("load"):
                index, batch = next(batches, (-1, None))
                td = None if index < 0 else self.batch_stages.td(batch)
            fresh = None
            if self.repeats is not None:
                fresh, everyone_done = self.repeats.step(None if td is None else _sequence_ids(td))
                if everyone_done:
                    break
            elif td is None:
                self._refuse_shorter(given)
                break
            given += td is not None
            if td is None or self._spent():
                continue  # only a sharded loader comes here: others still announce their batches
            if self._seen_before(td, index):
                continue
            self.take(td, index, fresh, bar)
            if self._spent():
                self.stopped = "max_rows"
                if self.repeats is None:
                    break
            self._keep_place(index + 1)
        self.flush()
        if self.first_batch is not None:
            self._write_place(given, self.stopped)

    def data_sha256(self) -> str:
        """Of all batches read here in their order; empty where others were read elsewhere or in an earlier, interrupted run."""
        return "" if self.skipped or self.sharded else self.data.hexdigest()

    def flush(self) -> None:
        """The rows that fill no block to the streaming stages."""
        for ids, blocks in self.blocks.items():
            for block, origin in blocks.flush():
                self._update(ids, block, origin)

    def _spent(self) -> bool:
        return self.max_rows is not None and self.claimed >= self.max_rows

    def take(self, td: TensorDict, index: int, fresh: Tensor | None = None, bar: tqdm | None = None) -> None:
        """One batch: counted, or run and its rows handed on; ``fresh`` are the sequences that no rank has had before."""
        self.data.update(tensors_sha256(td).encode())
        self.batch_stages.number(td)
        if not self.sharded and index % self.world != self.rank:
            self.claimed += self.batch_stages.count(td) if self.max_rows is not None else 0
            return
        with self.timed("batch"):
            rows, count = self.batch_stages.rows(td)
        main = self.batch_stages.main
        if fresh is not None:
            rows[main], count = self._without_repeats(rows[main], count, fresh)
        tokens, padding = self.batch_stages.tokens_and_padding(td)
        self.counts["tokens"] += tokens
        self.counts["padding_rows"] += padding
        self.counts["batches"] += 1
        if self.max_rows is not None and self.claimed + count > self.max_rows:
            count = self.max_rows - self.claimed
            rows[main] = {key: value[:count] for key, value in rows[main].items()}
        self.claimed += count
        for ids, blocks in self.blocks.items():
            for block, origin in blocks.add(rows[ids], rows[ids][ids].shape[0], index):
                self._update(ids, block, origin)
        if bar is not None and not bar.disable:
            bar.update(count)
            elapsed = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{self.counts['tokens'] / elapsed:,.0f} tokens/s")

    def _without_repeats(self, rows: dict[Key, Any], count: int, fresh: Tensor) -> tuple[dict[Key, Any], int]:
        sequences = rows[self.batch_stages.main] >> POSITION_BITS
        new = torch.isin(sequences, fresh.to(sequences.device))
        left = int(new.sum())
        if left == count:
            return rows, count
        self.counts["repeated_rows"] += count - left
        return {key: value[new] for key, value in rows.items()}, left

    # ------------------------------------------------------------------------------------------------ streaming

    def _update(self, ids: Key, block: dict[Key, Any], origin: list[int]) -> None:
        with self.timed("stream"):
            block = self._finite(ids, block, origin)
            count = block[ids].shape[0]
            if count:
                self.counts["rows"] += count if ids == self.batch_stages.main else 0
                td = TensorDict({}, batch_size=[])
                for key, value in block.items():
                    put(td, key, value)
                for unit in self.readers[ids]:
                    unit.update(td)

    def _finite(self, ids: Key, block: dict[Key, Any], origin: list[int]) -> dict[Key, Any]:
        """The block's rows that are finite at every site; or an error that names the first that is not."""
        row_id = block[ids]
        good = torch.ones(row_id.shape[0], dtype=torch.bool, device=row_id.device)
        for key, value in block.items():
            finite = rows_finite(value).to(good.device)
            if not self.drop_nonfinite and not bool(finite.all()):
                bad = int((~finite).nonzero()[0])
                where = int(row_id[bad])
                raise ValueError(
                    f"{key!r} holds NaN or Inf in {int((~finite).sum())} of {len(finite)} rows, first in batch {origin[bad]} "
                    f"(row id {where}: sequence {where >> POSITION_BITS}, position {where & ((1 << POSITION_BITS) - 1)}). "
                    f"Half precision that overflows is the usual cause; nonfinite='drop' leaves such rows out at all sites "
                    f"and counts them."
                )
            good &= finite
        if bool(good.all()):
            return block
        self.counts["dropped_rows"] += int((~good).sum())
        return {key: value[good.to(value.device)] for key, value in block.items()}

    # ------------------------------------------------------------------------------------------------ resuming

    def resume(self, checkpoint: Checkpoint) -> None:
        """Keep this checkpoint from now on, and go on from what it holds."""
        if len(self.blocks) > 1:
            raise ValueError(
                f"run: checkpoint= keeps the rows of one selection, got those of {list(self.blocks)}. Run one pipeline for "
                f"each."
            )
        if self.world > 1 or self.sharded:
            raise ValueError(
                f"run: checkpoint= is for one process, got {self.world} ranks{' and sharded=True' if self.sharded else ''}. Run "
                f"each shard by itself, or leave the checkpoint out."
            )
        self.checkpoint = checkpoint
        found = checkpoint.load(self.batch_stages.device)
        if found is None:
            return
        rows, place = found
        self.blocks[self.batch_stages.main].restore(rows, place["origin"])
        self.counts.update(place["counts"])
        self.seconds.update(place["seconds"])
        self.claimed, self.batch_stages.sequences = int(place["claimed"]), int(place["sequences"])
        self.skipped, self.first_batch = int(place["batches"]), place["first_batch"]
        if place.get("stopped"):
            self.ended, self.stopped = True, place["stopped"]

    def _keep_place(self, batches: int) -> None:
        if self.checkpoint is not None and batches % self.checkpoint.every == 0:
            self._write_place(batches)

    def _write_place(self, batches: int, stopped: str | None = None) -> None:
        """Write the checkpoint; ``stopped`` says that the stream has ended, and why."""
        if self.checkpoint is None:
            return
        rows, origin = self.blocks[self.batch_stages.main].held()
        place = {
            "batches": batches,
            "first_batch": self.first_batch,
            "origin": origin,
            "counts": self.counts,
            "seconds": self.seconds,
            "claimed": self.claimed,
            "sequences": self.batch_stages.sequences,
            "stopped": stopped,
        }
        self.checkpoint.save(rows, place)

    def _seen_before(self, td: TensorDict, index: int) -> bool:
        """Whether an earlier run has had this batch; the first must be the one that it started with."""
        if self.checkpoint is not None and index == 0:
            found = tensors_sha256(td)
            if self.first_batch is not None and found != self.first_batch:
                raise ValueError(
                    f"run resumes from {self.checkpoint.path}, but the loader's first batch is not the one of then: its order or "
                    f"its data changed (shuffle=True?). Give the same loader, or remove the file to start anew."
                )
            if self.first_batch is None:
                self.first_batch = found
                if any([stage.begin() for stage in self.checkpoint.stages]):
                    self._write_place(0)  # before they have rows: what they begin is known to whoever goes on
        return index < self.skipped

    def _refuse_shorter(self, given: int, least: int | None = None) -> None:
        if self.checkpoint is not None and given < (self.skipped if least is None else least):
            raise ValueError(
                f"run resumes from {self.checkpoint.path}, which has seen {self.skipped} batches, but the loader ended after "
                f"{given}: it is not the one of then. Give the same loader, or remove the file to start anew."
            )


def _sequence_ids(td: TensorDict) -> Tensor:
    ids = td.get("sequence_id", None)
    if ids is None:
        raise KeyError(
            "run(sharded=True) needs 'sequence_id' (B,) in every batch, unique over all ranks: an index in the stream "
            "would number different documents alike on different ranks."
        )
    return ids
