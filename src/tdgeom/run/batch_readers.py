"""Which ranks read batches of their own: all of them, or one of each group that holds parts of one model's layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDict

from tdgeom.core.process_groups import from_rank, gather_numbers, gather_texts, rank_and_world
from tdgeom.model.calls.shared_model import SharedModel

__all__ = ["Readers"]


class Readers:
    """The readers of a run, agreed upon by all ranks. Collective.

    Args:
        shared: how this rank shares its models.

    Attributes: ``place`` of this rank's reader among ``count`` readers; ``leads``, whether this rank's rows count (of ranks that
    run the same batches, those of the first); ``leaders``, the ranks whose rows do; ``collective``, whether all ranks run every
    forward together, or some do (``in_step``); ``waits``, the process groups in which they then wait for one another.

    Raises:
        ValueError: on all ranks, where they do not share the model alike.
    """

    def __init__(self, shared: SharedModel | None = None) -> None:
        self.rank, self.world = rank_and_world()
        shared = shared or SharedModel()
        own: dict[str, Any] = {"collective": shared.collective, "peers": shared.peers, "by": shared.by}
        every = [json.loads(text) for text in gather_texts(json.dumps(own))] if self.world > 1 else [own]
        if len({(one["collective"], one["by"]) for one in every}) > 1:
            told = "; ".join(f"rank {rank}: {one['by'] or 'not shared'}" for rank, one in enumerate(every))
            raise ValueError(
                f"run: the ranks share the model in different ways ({told}). Shard or parallelize it alike on every rank."
            )
        groups = [tuple(one["peers"]) or (rank,) for rank, one in enumerate(every)]
        if any(
            rank not in group or groups[peer] != group for rank, group in enumerate(groups) for peer in group
        ):
            raise ValueError(
                f"run: the ranks that hold parts of the model's layers do not agree on who they are: {groups}. Parallelize it "
                f"over one mesh on every rank."
            )
        self.collective, self.by, self.group = bool(own["collective"]), shared.by, groups[self.rank]
        self.leaders = sorted({group[0] for group in groups})
        self.place, self.count = self.leaders.index(self.group[0]), len(self.leaders)
        self.in_step, self.waits = self.collective or self.count < self.world, shared.waits
        self.leads = self.group[0] == self.rank
        self._groups = groups

    def spare(self, batch: TensorDict | None) -> TensorDict | None:
        """A batch for ranks that have none, and must run along with others all the same. Collective.

        That of the first rank that has one, where some have and some have not; where it does not matter, none.
        """
        if not self.collective:
            return None
        sent = self.first_of(batch, unless_all=True)
        return sent if batch is None else None

    def first_of(self, batch: TensorDict | None, *, unless_all: bool = False) -> TensorDict | None:
        """The batch of the first rank that gives one, on every rank; None where none does. Collective."""
        has = [bool(one) for (one,) in gather_numbers([int(batch is not None)])]
        if not any(has) or (unless_all and all(has)):
            return None
        source = has.index(True)
        return from_rank(batch.cpu() if batch is not None and self.rank == source else None, source)

    def of_leaders(
        self, every: Sequence[Mapping[str, Any]], compared: Sequence[str]
    ) -> list[Mapping[str, Any]]:
        """The records of the ranks that count, once those of the others are known to say the same under ``compared``."""
        for rank, group in enumerate(self._groups):
            if any(every[rank][name] != every[group[0]][name] for name in compared):
                raise ValueError(
                    f"run: the ranks {list(group)} hold parts of one model's layers ({self.by}) and must be given the same "
                    f"batches, but rank {rank} got others than rank {group[0]}. Give them one loader, or the same part: "
                    f"num_replicas={self.count} and rank={self.leaders.index(group[0])} for {list(group)}."
                )
        return [every[rank] for rank in self.leaders]
