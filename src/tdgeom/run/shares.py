"""Who takes what of the data, round by round: each rank at most one batch, each sequence once, all together ``max_rows``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tdgeom.core.process_groups import gather_numbers, rank_and_world

__all__ = ["SeenIds", "Shares", "rows_before"]


class Shares:
    """The rounds of a run: what all ranks say to one another before and after each runs its batch.

    Args:
        split: every rank has a loader of its own.
        once: sequences carry ids that are unique over all ranks, and count once however often they come.
        max_rows: rows over all ranks.
        found_by_ids: nobody said that the loader is split, the ids of the first batches did.
        placed: what ``budget`` is told of the order is known to be that of the whole.
        known: sequences have numbers in the whole data: their ids, or places.
        always: ranks meet in every round, also where nothing is to be said: they run the model together.

    Attributes: ``in_order``, whether rounds have come in the order of the whole, so that a limit takes its first rows;
    ``claimed``, rows of all ranks so far, where a limit counts them; ``reached``, by rank, whether the limit left room for the
    batch of the last round; ``last``, the last id of each rank; ``ascending``, whether every rank's ids have been so far.
    """

    def __init__(
        self,
        *,
        split: bool = False,
        once: bool = False,
        max_rows: int | None = None,
        found_by_ids: bool = False,
        placed: bool = False,
        always: bool = False,
        known: bool = True,
    ) -> None:
        self.rank, self.world = rank_and_world()
        self.placed, self.always = placed, always
        self.split, self.max_rows, self.found_by_ids = split, max_rows, found_by_ids
        self.seen = SeenIds() if once else None
        self.claimed = self.repeated = 0
        self.reached = [True] * self.world
        self.last: list[int | None] = [None] * self.world
        self.ascending = True
        self.in_order = known or not split
        self._highest: int | None = None  # number of a sequence of earlier rounds

    @property
    def spent(self) -> bool:
        """Whether the limit is reached."""
        return self.max_rows is not None and self.claimed >= self.max_rows

    def restore(self, claimed: int, ascending: bool, last: Sequence[int | None]) -> None:
        """Go on where an earlier run stood."""
        self.claimed, self.ascending = claimed, ascending
        self.in_order &= ascending
        self._highest = max((one for one in last if one is not None), default=None)
        if len(last) == self.world:
            self.last = list(last)

    def announce(self, came: int, ids: Sequence[int]) -> tuple[np.ndarray, bool]:
        """(which of this rank's ids are new, whether all ranks are out of batches).

        ``came`` counts the batches that this rank's loader gave in this round. Collective where it must be: all ranks call it
        in step. Of an id that comes twice, the first on the lowest rank counts.

        Raises:
            ValueError: on all ranks: one loader of several gave more than another; sequences of a loader that only its ids say
                is split come on several ranks.
        """
        if self.world == 1 or not (self.split or self.always or self.max_rows is not None):
            return self._new([ids])[0], not came
        every = gather_numbers([came, *ids])
        counts, announced = [one[0] for one in every], [one[1:] for one in every]
        if not self.split and len(set(counts)) > 1:
            raise ValueError(differing_lengths(counts))
        new = self._new(announced)
        came_new = [np.asarray(one, dtype=np.int64)[fresh] for one, fresh in zip(announced, new)]
        for rank, one in enumerate(came_new):
            self._ascend(rank, one)
        if self.split and any(len(one) for one in came_new):
            found = np.concatenate(came_new)
            self.in_order &= self._highest is None or self._highest <= int(found.min())
            highest = int(found.max())
            self._highest = highest if self._highest is None else max(highest, self._highest)
        return new[self.rank], not any(counts)

    def budget(self, counts: Sequence[int], order: Sequence[int]) -> np.ndarray:
        """How many rows this rank may keep of each of its units (sequences, or a batch), that have so many.

        Units of a round come in ascending ``order``, or by rank where the ids of some rank do not ascend. Collective.
        """
        if self.max_rows is None:
            return np.asarray(counts, dtype=np.int64)
        every = gather_numbers([*counts, *order])
        all_counts = [one[: len(one) // 2] for one in every]
        orders = [one[len(one) // 2 :] for one in every]
        if self.world == 1 or not (self.placed or self.ascending):
            orders = [[rank] * len(one) for rank, one in enumerate(orders)]
        left = self.max_rows - self.claimed
        before = rows_before(all_counts, orders)
        self.claimed += min(left, sum(map(sum, all_counts)))
        self.reached = [bool((one < left).any()) for one in before]
        return np.clip(left - before[self.rank], 0, np.asarray(counts, dtype=np.int64))

    def _new(self, announced: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Which ids of each rank are new."""
        if self.seen is None:
            return [np.ones(len(one), dtype=bool) for one in announced]
        new = self.seen.add(np.concatenate([np.asarray(one, dtype=np.int64) for one in announced]))
        self.repeated += int((~new).sum())
        if self.found_by_ids and self.repeated > self.world:
            raise ValueError(
                f"run: the ranks' loaders began with different sequences, so each was taken for a part of the data, but "
                f"{self.repeated} sequences have come again since. Give all ranks one loader in one order (the same seed: run "
                f"shares it out), or disjoint parts. sharded=True takes such loaders, and counts each id once."
            )
        return np.split(new, np.cumsum([len(one) for one in announced])[:-1])

    def _ascend(self, rank: int, ids: np.ndarray) -> None:
        if len(ids):
            before = self.last[rank]
            self.ascending &= bool((np.diff(ids) >= 0).all()) and (before is None or before <= ids[0])
            self.last[rank] = int(ids[-1])


def differing_lengths(counts: Sequence[int]) -> str:
    """The words for loaders that end at different places."""
    ended = [rank for rank, count in enumerate(counts) if count < max(counts)]
    return (
        f"run: the loaders of the ranks differ: those of the ranks {ended} ended before the others. All ranks read one loader, "
        f"the same batches in the same order; where each holds a part of its own, say so: sharded=True."
    )


def rows_before(counts: Sequence[Sequence[int]], orders: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """How many rows come before each of the ranks' units, where units come in ascending order, then by rank.

    >>> [one.tolist() for one in rows_before([[3, 3], [3, 3]], [[0, 2], [1, 3]])]
    [[0, 6], [3, 9]]
    """
    flat = np.concatenate([np.asarray(one, dtype=np.int64) for one in counts])
    place = np.argsort(np.concatenate([np.asarray(one, dtype=np.int64) for one in orders]), kind="stable")
    before = np.empty_like(flat)
    before[place] = np.cumsum(flat[place]) - flat[place]
    return np.split(before, np.cumsum([len(one) for one in counts])[:-1])


class SeenIds:
    """A growing set of int64 ids, 8 bytes each.

    >>> seen = SeenIds()
    >>> seen.add(np.array([3, 4, 3])).tolist(), seen.add(np.array([4, 5])).tolist()
    ([True, True, False], [False, True])
    """

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []  # each at least twice as long as the next

    def ids(self) -> np.ndarray:
        """All of them."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self._sorted])

    def add(self, ids: np.ndarray) -> np.ndarray:
        """Take ids in; which of them were new, of several alike the first."""
        first = np.zeros(len(ids), dtype=bool)
        unique, places = np.unique(ids, return_index=True)
        first[places] = True
        known = np.zeros(len(unique), dtype=bool)
        for held in self._sorted:
            at = np.searchsorted(held, unique).clip(max=len(held) - 1)
            known |= held[at] == unique
        first[places[known]] = False
        added = unique[~known]
        while self._sorted and len(self._sorted[-1]) < 2 * len(added):
            added = np.union1d(self._sorted.pop(), added)
        if len(added):
            self._sorted.append(added)
        return first
