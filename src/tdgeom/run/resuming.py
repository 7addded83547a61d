"""Going on: what a run writes into its checkpoint at a place in the stream, and how a run finds that place again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from tensordict import TensorDict

from tdgeom.core.keys import Key
from tdgeom.core.process_groups import gather_numbers
from tdgeom.run.agreement import Division
from tdgeom.run.batch_readers import Readers
from tdgeom.run.batch_stages import BatchStages
from tdgeom.run.checkpoint import Checkpoint, Kept
from tdgeom.run.finite_rows import FiniteRows
from tdgeom.run.gathered_rows import GatheredRows
from tdgeom.run.identity import tensors_sha256
from tdgeom.run.shares import Shares
from tdgeom.run.state_file import SequencesMet

__all__ = ["Resuming"]


class Pass(Protocol):
    """What of a pass (``OnePass``) is kept, and set where it goes on."""

    world: int
    stopped: str
    counts: dict[str, int]
    seconds: dict[str, float]
    blocks: dict[Key, GatheredRows]
    batch_stages: BatchStages
    division: Division
    readers: Readers
    shares: Shares
    finite: FiniteRows
    met: SequencesMet | None
    spare: TensorDict | None
    data: Any
    data_then: str | None

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Add the seconds spent inside to a phase."""

    def hash(self, td: TensorDict) -> bytes:
        """Of a batch."""

    def gather(self, ids: Key, rows: Mapping[Key, Any], count: int, batch: int) -> None:
        """Hand rows on."""


class Resuming:
    """The checkpoint of one pass.

    Args:
        one_pass: the pass, whose place is kept.
        checkpoint: where.

    Attributes: ``skipped``, batches of this process' loader that an earlier run has seen (of one loader for all ranks, all of
    them); ``ended``, whether it has read the whole stream.
    """

    def __init__(self, one_pass: Pass, checkpoint: Checkpoint) -> None:
        self.one_pass, self.checkpoint = one_pass, checkpoint
        self.kept: Kept | None = None
        self.skipped, self.ended = 0, False
        self.first_batch = ""
        self.rounds = 0  # batches that all ranks have come to alike
        self._active = False  # whether there is anything to keep

    def load(self) -> None:
        """Read the checkpoint and put the stages where it says. Collective."""
        self.kept = self.checkpoint.load(self.one_pass.batch_stages.device)
        if self.kept is not None:
            self.skipped = int(self.kept.first["batches"])

    def begin(self, first: TensorDict | None, batches: Iterator[tuple[int, Any]]) -> int:
        """Find the place in the loader, whose first batch is ``first``; how many batches it has given. Collective.

        Raises:
            ValueError: the loader is not the one of then, or its data lie otherwise with the ranks.
        """
        self.first_batch = "" if first is None else tensors_sha256(first)
        self._active = any(one for (one,) in gather_numbers([int(first is not None)]))
        if self.kept is None:
            begun = [stage.begin() for stage in self.checkpoint.stages]
            if self._active and any(begun):
                self._write(0)  # before they have rows: what they begin is known to whoever goes on
            return 0
        alike = self._is_divided_alike(self.kept)
        self._restore(self.kept)
        own = self.kept.places[0] if self.one_pass.division.split and alike else self.kept.first
        if not self._active:
            self._refuse_shorter(0)
        if alike:
            self._refuse_other_first(own["first_batch"])
        if self.ended:
            if alike and not self.one_pass.division.split:
                self._skip(batches, own["data"])
                if self.one_pass.stopped == "end of data" and next(batches, (-1, None))[0] >= 0:
                    raise ValueError(
                        f"run resumes from {self.checkpoint.path}, which came to the end after {self.skipped} batches, but the "
                        f"loader has more now: it is not the one of then. Give the same loader, or remove the file to start anew."
                    )
            self.one_pass.data_then = own["data"]
            return 0
        self._skip(batches, own["data"])
        return self.skipped

    def keep(self, given: int) -> None:
        """Write the checkpoint where that is due, after a round in which batches came. Collective."""
        before = self.rounds
        self.rounds = self.rounds + 1 if self.one_pass.division.split else given
        if self.rounds // self.checkpoint.every > before // self.checkpoint.every:
            self._write(given)

    def end(self, given: int) -> None:
        """Write that the stream has ended, and why. Collective."""
        if self._active:
            self._write(given, self.one_pass.stopped)

    # ------------------------------------------------------------------------------------------------ writing

    def _write(self, given: int, stopped: str | None = None) -> None:
        one_pass = self.one_pass
        one_pass.finite.settle()
        rows, origin = one_pass.blocks[one_pass.batch_stages.main].held()
        place = {
            "batches": given,
            "first_batch": self.first_batch,
            "data": one_pass.data.hexdigest(),
            "origin": origin,
            "counts": one_pass.counts,
            "seconds": one_pass.seconds,
        }
        shares = one_pass.shares
        whole = {
            "stopped": stopped,
            "split": one_pass.division.split,
            "ranks": one_pass.world,
            "leaders": one_pass.readers.leaders,
            "rounds": self.rounds,
            "claimed": shares.claimed,
            "ascending": shares.ascending,
            "last": shares.last,
        }
        beside = {} if one_pass.met is None else {"met": torch.from_numpy(one_pass.met.smallest)}
        shared = {} if shares.seen is None else {"seen": torch.from_numpy(shares.seen.ids())}
        self.checkpoint.save(rows, place, whole, beside, shared)

    # ------------------------------------------------------------------------------------------------ going on

    def _restore(self, kept: Kept) -> None:
        """The rows that no stage has had, and every count."""
        one_pass, whole = self.one_pass, kept.whole
        main = one_pass.batch_stages.main
        for place, rows, beside in zip(kept.places, kept.rows, kept.beside):
            begin = 0
            for batch, count in place["origin"]:
                part = {key: value[begin : begin + count] for key, value in rows.items()}
                one_pass.gather(main, part, count, batch)
                begin += count
            for name, number in place["counts"].items():
                one_pass.counts[name] += number
            if one_pass.met is not None and "met" in beside:
                one_pass.met.join(beside["met"].numpy())
        own = kept.places[0] if kept.places else kept.first
        one_pass.seconds.update(own["seconds"] if kept.places else {})
        one_pass.shares.restore(whole["claimed"], whole["ascending"], whole["last"])
        if one_pass.shares.seen is not None and "seen" in kept.shared:
            one_pass.shares.seen.add(kept.shared["seen"].numpy())
        self.rounds, self.ended = int(whole["rounds"]), whole["stopped"] is not None
        if one_pass.division.split and kept.places:
            self.skipped = int(own["batches"])
        if self.ended:
            one_pass.stopped = whole["stopped"]

    def _is_divided_alike(self, kept: Kept) -> bool:
        """Whether the data lie with the ranks as they did: one loader for however many, or the same parts with the same ranks.

        Raises:
            ValueError: they do not, and there is something left to read.
        """
        one_pass, whole = self.one_pass, kept.whole
        split = one_pass.division.split
        if split == whole["split"] and (not split or self._has_ranks_of(whole)):
            return True
        if whole["stopped"] is None:
            then = f"a loader split over {whole['ranks']} ranks" if whole["split"] else "one loader"
            now = f"one split over {one_pass.world}" if split else "one loader"
            raise ValueError(
                f"run resumes from {self.checkpoint.path}, which was reading {then}, and now there is {now}: what the parts of "
                f"now have in common with those of then cannot be told. Start as many ranks as then, with the same parts, or "
                f"remove the file to start anew. (Of one loader that all ranks have alike, any number of ranks goes on.)"
            )
        return False

    def _has_ranks_of(self, whole: Mapping[str, Any]) -> bool:
        return [self.one_pass.world, self.one_pass.readers.leaders] == [whole["ranks"], whole["leaders"]]

    def _skip(self, batches: Iterator[tuple[int, Any]], data: str) -> None:
        """Read the batches of then, which must be the very same."""
        one_pass = self.one_pass
        for given in range(self.skipped):
            with one_pass.timed("load"):
                index, batch = next(batches, (-1, None))
                if index < 0:
                    self._refuse_shorter(given)
                td = one_pass.batch_stages.td(batch)
            one_pass.data.update(one_pass.hash(td))
            one_pass.batch_stages.number(td)
            one_pass.spare = td.copy()
        if one_pass.data.hexdigest() != data:
            raise ValueError(
                f"run resumes from {self.checkpoint.path}, which has seen {self.skipped} batches, but the loader now gives "
                f"others among them: its order or its data changed (a shuffle or an augmentation without a fixed seed?). Give "
                f"the same loader, or remove the file to start anew."
            )

    def _refuse_other_first(self, first_batch: str) -> None:
        if self.first_batch != first_batch:
            raise ValueError(
                f"run resumes from {self.checkpoint.path}, but the loader's first batch is not the one of then: its order or "
                f"its data changed (shuffle=True?). Give the same loader, or remove the file to start anew."
            )

    def _refuse_shorter(self, given: int) -> None:
        raise ValueError(
            f"run resumes from {self.checkpoint.path}, which has seen {self.skipped} batches, but the loader ended after "
            f"{given}: it is not the one of then. Give the same loader, or remove the file to start anew."
        )
