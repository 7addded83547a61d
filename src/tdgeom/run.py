"""``run``: stream a dataloader through a pipeline in bounded memory, then finish."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor
from tqdm import tqdm

from tdgeom._batches import Buffer, as_batch, batch_length, iterate
from tdgeom._finish import call, run_end
from tdgeom._plan import Plan, make_plan
from tdgeom._ranks import Repeats, rank_and_world, sum_over_ranks
from tdgeom.checkpoint import Checkpoint, fingerprint
from tdgeom.hooks import Capture
from tdgeom.stage import Key, as_key, key_tuple, rows_finite
from tdgeom.tokens import POSITION_BITS, SelectTokens

__all__ = ["run"]


def run(
    pipeline: TensorDictModuleBase,
    dataloader: Iterable[Any],
    *,
    max_rows: int | None = None,
    inputs: TensorDictBase | None = None,
    keep: Sequence[str] | None = None,
    block_rows: int = 2048,
    nonfinite: str = "raise",
    in_keys: Sequence[Key] | None = None,
    device: torch.device | str | None = None,
    sharded: bool = False,
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: bool | None = None,
) -> TensorDict | None:
    """Stream a dataloader through a pipeline and return every result in one TensorDict.

    Stages up to the streaming ones run once a batch, streaming stages gather rows, and every stage whose inputs they
    write runs once at the end; which is which follows from the keys. Rows reach the streaming stages in blocks of
    ``block_rows``, cut exactly at ``max_rows`` in stream order and checked once for NaN and Inf.

    Args:
        pipeline: a TensorDictSequential of stages. Its streaming state is reset first and stays afterwards.
        dataloader: an iterable of dicts, BatchEncodings, TensorDicts, or (with ``in_keys``) tensors and tuples.
        max_rows: stop after this many rows.
        inputs: results of an earlier run that stages here may read (the second pass of a two-pass analysis).
        keep: roots to keep, such as ["spectrum"]; default all streaming and end results.
        block_rows: rows gathered before the streaming stages see them; small batches then cost what large ones do.
        nonfinite: "raise" names site and batch of a NaN or Inf; "drop" leaves such rows out at all sites and counts them.
        in_keys: names for the entries of tuple batches; default the first inputs that the pipeline needs.
        device: where batches go; default the model's device.
        sharded: the loader already holds this rank's share; batches carry ``sequence_id``, repeats count once.
        checkpoint: a file that keeps the state of the run. Where it exists the run goes on from it: batches already seen are
            read from the loader, which must give the same ones in the same order, and skipped. Removed when the run ends.
            For one process.
        every: batches between two writes of the checkpoint.
        progress: a progress bar; default only on a terminal.

    Returns:
        A TensorDict of batch size [] with the results and ``("run", ...)``: rows, tokens, padding and dropped rows,
        batches, seconds by phase, and why it stopped. In a process group the result is on rank 0, None elsewhere.

    Raises:
        ValueError: a pipeline that cannot be split (the message names the stage and the remedy), an empty loader, rows that
            are not finite. KeyboardInterrupt passes through; the model is left as it was.

        >>> import torch, tdgeom as tg
        >>> from tensordict.nn import TensorDictSequential
        >>> pipeline = TensorDictSequential(tg.StreamingCovariance(), tg.EigenSpectrum(), tg.SpectrumMetrics())
        >>> result = tg.run(pipeline, [{"tokens": torch.eye(4)}])
        >>> round(float(result["spectrum", "d_pr"]), 3), int(result["run", "rows"])
        (3.0, 4)
    """
    if nonfinite not in ("raise", "drop"):
        raise ValueError(f"run: nonfinite takes 'raise' or 'drop', got {nonfinite!r}.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"run: max_rows must be at least 1, got {max_rows}.")
    if block_rows < 1:
        raise ValueError(f"run: block_rows must be at least 1, got {block_rows}.")
    plan = make_plan(pipeline, [] if inputs is None else inputs.keys(True, True))
    if keep is not None:
        _check_keep(keep, plan)
    if not plan.stream:
        raise ValueError(
            "run found no streaming stage in the pipeline, so nothing would be kept. Put one behind the per-batch stages "
            "(StreamingCovariance, RowSample, StreamingMean, Collect), or call the pipeline on a TensorDict directly."
        )
    stream = _Stream(plan, inputs, max_rows, block_rows, nonfinite, in_keys, device, sharded)
    if checkpoint is not None:
        settings = {"max_rows": max_rows, "block_rows": block_rows, "nonfinite": nonfinite}
        stream.resume(Checkpoint(checkpoint, every, plan, settings))
    with tqdm(total=max_rows, unit=" rows", unit_scale=True, disable=not _show(progress), leave=False) as bar:
        bar.update(stream.claimed)
        stream.read(dataloader, bar)
    result = stream.finish(pipeline, keep)
    if stream.checkpoint is not None:
        stream.checkpoint.remove()
    return result


def _check_keep(keep: Sequence[str], plan: Plan) -> None:
    if isinstance(keep, str):
        raise TypeError(f"run: keep is a list of roots, such as ['spectrum'], got {keep!r}.")
    roots = {key_tuple(key)[0] for unit in (*plan.stream, *plan.end) for key in unit.out_keys}
    unknown = [root for root in keep if root not in roots]
    if unknown:
        raise ValueError(f"run: keep names {unknown}, the pipeline's results are {sorted(roots)}.")


def _device_of(unit: TensorDictModuleBase) -> torch.device | None:
    """Where a per-batch stage wants its batches: with its parameters, or (a Capture) with its model."""
    unit = getattr(unit, "_orig_mod", unit)
    first = next(unit.parameters(), None)
    if first is not None or isinstance(unit, TensorDictModule):  # whose .device is "cpu" for any function
        return None if first is None else first.device
    return getattr(unit, "device", None)


def _show(progress: bool | None) -> bool:
    return sys.stderr.isatty() if progress is None else progress


class _Stream:
    """One pass: what has been counted so far, and the steps from batch to blocks."""

    def __init__(
        self,
        plan: Plan,
        inputs: TensorDictBase | None,
        max_rows: int | None,
        block_rows: int,
        nonfinite: str,
        in_keys: Sequence[Key] | None,
        device: torch.device | str | None,
        sharded: bool,
    ) -> None:
        self.plan, self.inputs, self.max_rows, self.nonfinite, self.sharded = (
            plan,
            inputs,
            max_rows,
            nonfinite,
            sharded,
        )
        self.selects = [unit for unit in plan.batch if isinstance(unit, SelectTokens)]
        for select in self.selects:
            select.pad_id = _pad_id(plan) if select.pad_id is None else select.pad_id
        places = [place for unit in plan.batch if (place := _device_of(unit)) is not None]
        self.device = torch.device(device) if device is not None else places[0] if places else None
        self.in_keys = in_keys if in_keys is not None else self._wanted()
        self.buffer = Buffer(list(dict.fromkeys([*plan.stream_keys, "row_id"])), block_rows)
        self.repeats = Repeats() if sharded else None
        self.rank, self.world = rank_and_world()
        self.counts = dict.fromkeys(
            ("rows", "tokens", "padding_rows", "dropped_rows", "repeated_rows", "batches"), 0
        )
        self.seconds = dict.fromkeys(("load", "batch", "stream", "finish"), 0.0)
        self.claimed = 0  # rows of all ranks' batches so far: the budget
        self.sequences = 0
        self.rows_by_shape: dict[object, int] = {}
        self.countable: bool | None = None  # whether batches show their number of rows without the model
        self.stopped = "end of data"
        self.checkpoint: Checkpoint | None = None
        self.skipped = 0  # batches of the loader that an earlier run has seen
        self.first_batch: str | None = None
        for unit in (*plan.stream, *self.selects):
            unit.reset()

    def _wanted(self) -> list[Key]:
        """Inputs that no stage writes: what an unnamed tensor in a batch must be."""
        written: set[tuple[str, ...]] = set()
        wanted: list[Key] = []
        for unit in (*self.plan.batch, *self.plan.stream):
            wanted += [
                key
                for key in unit.in_keys
                if key_tuple(key) not in written and key not in (*wanted, "row_id")
            ]
            written |= {key_tuple(key) for key in unit.out_keys}
        return wanted

    @contextmanager
    def _timed(self, phase: str) -> Any:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - begin

    def resume(self, checkpoint: Checkpoint) -> None:
        """Keep this checkpoint from now on, and go on from what it holds."""
        if self.world > 1 or self.sharded:
            raise ValueError(
                f"run: checkpoint= is for one process, got {self.world} ranks{' and sharded=True' if self.sharded else ''}. Run "
                f"each shard by itself, or leave the checkpoint out."
            )
        self.checkpoint = checkpoint
        found = checkpoint.load(self.device)
        if found is None:
            return
        rows, place = found
        keys = {"/".join(key_tuple(key)): key for key in self.buffer.keys}
        self.buffer.restore({keys[name]: value for name, value in rows.items()}, place["origin"])
        self.counts.update(place["counts"])
        self.seconds.update(place["seconds"])
        self.claimed, self.sequences = int(place["claimed"]), int(place["sequences"])
        self.skipped, self.first_batch = int(place["batches"]), place["first_batch"]

    def _keep_place(self, batches: int) -> None:
        if self.checkpoint is None or batches % self.checkpoint.every:
            return
        rows, origin = self.buffer.held()
        place = {"batches": batches, "first_batch": self.first_batch, "origin": origin, "counts": self.counts}
        place |= {"seconds": self.seconds, "claimed": self.claimed, "sequences": self.sequences}
        self.checkpoint.save({"/".join(key_tuple(key)): value for key, value in rows.items()}, place)

    def _seen_before(self, td: TensorDict, index: int) -> bool:
        """Whether an earlier run has had this batch; the first must be the one that it started with."""
        if self.checkpoint is not None and index == 0:
            found = fingerprint(td)
            if self.first_batch is not None and found != self.first_batch:
                raise ValueError(
                    f"run resumes from {self.checkpoint.path}, but the loader's first batch is not the one of then: its order or "
                    f"its data changed (shuffle=True?). Give the same loader, or remove the file to start anew."
                )
            self.first_batch = found
        return index < self.skipped

    def read(self, dataloader: Iterable[Any], bar: tqdm) -> None:
        """Batches to blocks to updates, until the data or the budget ends."""
        batches = enumerate(iterate(dataloader))
        while True:
            with self._timed("load"):
                index, batch = next(batches, (None, None))
                td = None if index is None else as_batch(batch, self.in_keys, self.device)
            if self.repeats is not None:
                fresh, everyone_done = self.repeats.step(None if td is None else self._sequence_ids(td))
                if everyone_done:
                    break
            elif td is None:
                break
            if td is None or (self.max_rows is not None and self.claimed >= self.max_rows):
                continue  # only a sharded loader comes here: others still announce their batches
            if self._seen_before(td, index):
                continue
            self._number(td)
            self._take(td, index, fresh if self.repeats is not None else None, bar)
            if self.max_rows is not None and self.claimed >= self.max_rows:
                self.stopped = "max_rows"
                if self.repeats is None:
                    break
            self._keep_place(index + 1)
        for block, origin in self.buffer.flush():
            self._update(block, origin)

    def _sequence_ids(self, td: TensorDict) -> Tensor:
        ids = td.get("sequence_id", None)
        if ids is None:
            raise KeyError(
                "run(sharded=True) needs 'sequence_id' (B,) in every batch, unique over all ranks: an index in the stream "
                "would number different documents alike on different ranks."
            )
        return ids

    def _number(self, td: TensorDict) -> None:
        if td.get("sequence_id", None) is None:
            length = batch_length(td)
            td.set("sequence_id", torch.arange(self.sequences, self.sequences + length))
            self.sequences += length

    def _take(self, td: TensorDict, index: int, fresh: Tensor | None, bar: tqdm) -> None:
        mine = self.sharded or index % self.world == self.rank
        if not mine:
            count = self._count_elsewhere(td) if self.max_rows is not None else 0
            self.claimed += count
            return
        with self._timed("batch"):
            rows, count = self._rows(td)
        if fresh is not None:
            rows, count = self._without_repeats(rows, count, fresh)
        self._count_padding(td)
        if self.max_rows is not None and self.claimed + count > self.max_rows:
            count = self.max_rows - self.claimed
            rows = {key: value[:count] for key, value in rows.items()}
        self.claimed += count
        self.counts["batches"] += 1
        for block, origin in self.buffer.add(rows, count, index):
            self._update(block, origin)
        if not bar.disable:
            bar.update(count)
            elapsed = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{self.counts['tokens'] / elapsed:,.0f} tokens/s")

    def _rows(self, td: TensorDict) -> tuple[dict[Key, Tensor], int]:
        shape = self._shape_key(td)
        counted = self._countable_rows(td) if self.world > 1 else None
        for unit in self.plan.batch:
            for key in unit.in_keys:
                if (
                    self.inputs is not None
                    and td.get(key, None) is None
                    and self.inputs.get(key, None) is not None
                ):
                    td.set(key, self.inputs.get(key))
            call(unit, td)
        first = next((td.get(key, None) for key in self.buffer.keys if td.get(key, None) is not None), None)
        row_id = td.get("row_id", None)
        if row_id is None and first is not None:
            row_id = self._own_row_id(td, first)
            td.set("row_id", row_id)
        rows = {}
        for key in self.buffer.keys:
            value = td.get(key, None)
            if value is None:
                raise KeyError(
                    f"the streaming stages read {key!r}, which neither the batch nor a stage before them holds; there is "
                    f"{sorted(td.keys(True, True), key=str)[:12]}. Name the right key with in_keys=, or add the stage that "
                    f"writes it (SelectTokens writes ('tokens', site), also= carries further values)."
                )
            if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != row_id.shape[0]:
                raise ValueError(
                    f"a streaming stage reads rows, tensors whose first dimension is that of 'row_id' ({row_id.shape[0]}), "
                    f"but {key!r} has shape {tuple(getattr(value, 'shape', ()))}. Carry it to rows with "
                    f"SelectTokens(also=[...])."
                )
            rows[key] = value.detach()
        count = row_id.shape[0]
        self.rows_by_shape[shape] = count
        self.countable = counted == count and self.countable is not False
        return rows, count

    @staticmethod
    def _own_row_id(td: TensorDict, rows: Tensor) -> Tensor:
        """Ids of rows that no SelectTokens numbered: one a sequence, or counted on from the batch's first sequence."""
        sequence = td.get("sequence_id").to(rows.device).long()
        if sequence.shape == rows.shape[:1]:
            return sequence << POSITION_BITS
        return (sequence[:1] << POSITION_BITS) + torch.arange(rows.shape[0], device=rows.device)

    @staticmethod
    def _shape_key(td: TensorDict) -> object:
        values = [(key, td.get(key)) for key in td.keys(True, True)]
        return frozenset((key, tuple(value.shape)) for key, value in values if isinstance(value, Tensor))

    def _count_elsewhere(self, td: TensorDict) -> int:
        """How many rows another rank's batch gives: from its mask where that has proved right, else by its shapes."""
        if not self.plan.batch:
            return td.get(self.plan.stream_keys[0]).shape[0]
        if self.countable and (count := self._countable_rows(td)) is not None:
            return count
        shape = self._shape_key(td)
        if shape not in self.rows_by_shape:
            self._rows(td)
        return self.rows_by_shape[shape]

    def _countable_rows(self, td: TensorDict) -> int | None:
        return self.selects[0].count_rows(td) if self.selects else None

    @staticmethod
    def _in_sequences(row_id: Tensor, sequences: Tensor) -> Tensor:
        return torch.isin(row_id >> POSITION_BITS, sequences.to(row_id.device))

    def _without_repeats(
        self, rows: dict[Key, Tensor], count: int, fresh: Tensor
    ) -> tuple[dict[Key, Tensor], int]:
        new = self._in_sequences(rows["row_id"], fresh)
        left = int(new.sum())
        if left == count:
            return rows, count
        self.counts["repeated_rows"] += count - left
        return {key: value[new] for key, value in rows.items()}, left

    def _count_padding(self, td: TensorDict) -> None:
        mask = td.get(self.selects[0].mask_key if self.selects else "attention_mask", None)
        ids = td.get("input_ids", None)
        if mask is not None:
            attended = int(mask.bool().sum())
            self.counts["padding_rows"] += mask.numel() - attended
            self.counts["tokens"] += attended
        else:
            self.counts["tokens"] += ids.numel() if ids is not None else td.get("row_id").shape[0]

    def _update(self, block: dict[Key, Tensor], origin: list[int]) -> None:
        with self._timed("stream"):
            block = self._checked(block, origin)
            count = block["row_id"].shape[0]
            if count:
                self.counts["rows"] += count
                td = TensorDict(block, batch_size=[])
                for unit in self.plan.stream:
                    unit.update(td)

    def _checked(self, block: dict[Key, Tensor], origin: list[int]) -> dict[Key, Tensor]:
        good = torch.ones(block["row_id"].shape[0], dtype=torch.bool, device=block["row_id"].device)
        for key, value in block.items():
            finite = rows_finite(value).to(good.device)
            if self.nonfinite == "raise" and not bool(finite.all()):
                bad = int((~finite).nonzero()[0])
                raise ValueError(
                    f"{key!r} holds NaN or Inf in {int((~finite).sum())} of {len(finite)} rows, first in batch {origin[bad]} "
                    f"(row id {int(block['row_id'][bad])}: sequence {int(block['row_id'][bad]) >> POSITION_BITS}, position "
                    f"{int(block['row_id'][bad]) & ((1 << POSITION_BITS) - 1)}). Half precision that overflows is the usual "
                    f"cause; nonfinite='drop' leaves such rows out at all sites and counts them."
                )
            good &= finite
        if bool(good.all()):
            return block
        self.counts["dropped_rows"] += int((~good).sum())
        return {key: value[good.to(value.device)] for key, value in block.items()}

    def finish(self, pipeline: TensorDictModuleBase, keep: Sequence[str] | None) -> TensorDict | None:
        """Merge ranks, publish, run the end stages, drop what nobody keeps."""
        with self._timed("finish"):
            for unit in self.plan.stream:
                unit.sync_()
            self.counts = sum_over_ranks(self.counts)
            if self.rank != 0:
                return None
            if not self.counts["rows"]:
                raise ValueError(
                    f"run got no rows: {self.counts['batches']} batches with {self.counts['tokens']} attended tokens, "
                    f"{self.counts['dropped_rows']} rows dropped. Is the loader empty (a generator already used up?), or does "
                    f"the selection (positions=, skip_first=, skip_special=) leave nothing?"
                )
            td = TensorDict({}, batch_size=[])
            for unit in self.plan.stream:
                unit.publish(td)
            run_end(self.plan.end, td, self.inputs, keep)
        written = [key_tuple(key) for unit in (*self.plan.stream, *self.plan.end) for key in unit.out_keys]
        selected = _selected(pipeline)
        result = TensorDict({}, batch_size=[])
        for key in written:
            kept = (keep is None or key[0] in keep) and (selected is None or as_key(key) in selected)
            if kept and td.get(as_key(key), None) is not None:
                result.set(as_key(key), td.get(as_key(key)))
        for name, value in self.counts.items():
            result.set(("run", name), torch.tensor(value))
        for name, value in self.seconds.items():
            result.set(("run", "seconds", name), torch.tensor(value, dtype=torch.float64))
        result.set(("run", "stopped"), NonTensorData(self.stopped))
        return result


def _pad_id(plan: Plan) -> int | None:
    """The padding id that a captured model's configuration names."""
    configs = [getattr(unit.model, "config", None) for unit in plan.batch if isinstance(unit, Capture)]
    return next(
        (pad for config in configs if isinstance(pad := getattr(config, "pad_token_id", None), int)), None
    )


def _selected(pipeline: TensorDictModuleBase) -> set[Key] | None:
    """What ``select_out_keys`` on the whole pipeline left, if it was called."""
    if isinstance(pipeline, TensorDictSequential) and getattr(pipeline, "_select_before_return", False):
        return {as_key(key_tuple(key)) for key in pipeline.out_keys}
    return None
