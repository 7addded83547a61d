"""What all ranks must have in common, compared before the first batch and behind the last, and how the data lie with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tdgeom.core.process_groups import gather_texts, rank_and_world
from tdgeom.core.split_loaders import SplitLoader
from tdgeom.core.stage_settings import differences
from tdgeom.files.json_text import canonical_json
from tdgeom.run.batch_readers import Readers

__all__ = ["Beginning", "Division", "compare_ends", "compare_runs", "divide"]


@dataclass(frozen=True)
class Beginning:
    """What a rank's loader begins with: the hash of its first batch ("" without one), the ids that it brings, and the rest.

    ``sharded`` is what the caller said of it, ``found`` what the loader itself says; ``placed``: its batches are those that the
    sampler has dealt out.
    """

    first: str
    ids: Sequence[int] | None
    sharded: bool | None
    found: SplitLoader | None
    placed: bool = False

    def record(self) -> dict[str, Any]:
        """As plain data."""
        found = self.found
        told = None if found is None else [found.by, found.part, found.parts, dict(found.alike)]
        ids = None if self.ids is None else [int(one) for one in self.ids]
        return {
            "first": self.first,
            "ids": ids,
            "sharded": self.sharded,
            "found": told,
            "placed": self.placed,
        }


@dataclass(frozen=True)
class Division:
    """How the data lie with the ranks: ``split`` or not, whether a sampler's places number them, and both in words."""

    split: bool
    placed: bool = False
    by_ids: bool = False
    words: str = "one process"


def compare_runs(record: Callable[[], Mapping[str, Any]], what: str = "") -> None:
    """Raise on all ranks where the ranks' records (of stages, settings, weights) are not the same. Collective.

    Only hashes travel; the records follow where these differ.
    """
    world = rank_and_world()[1]
    if world == 1:
        return
    own = json.loads(canonical_json(record()))
    hashes = gather_texts(hashlib.sha256(canonical_json(own).encode()).hexdigest())
    if len(set(hashes)) == 1:
        return
    records = [json.loads(text) for text in gather_texts(json.dumps(own))]
    other = next(number for number in range(world) if hashes[number] != hashes[0])
    found = _rank_words(differences(records[0], records[other]), other)
    raise ValueError(
        f"run: the ranks do not do the same{what}. {_models(found)}{'; '.join(found[:4])}{'; ...' if len(found) > 4 else ''}. "
        f"Every rank needs the same model (one checkpoint, or one seed before it is made), the same stages and the same settings."
    )


def divide(own: Beginning, readers: Readers) -> Division:
    """Whether all ranks have one loader or each a part, or an error on all of them. Collective.

    Ranks that hold parts of one model's layers count as one, and must have been given the same.

    Raises:
        ValueError: parts that do not fit together, loaders that begin differently without saying why, settings that differ.
    """
    world = rank_and_world()[1]
    if world == 1:
        return Division(split=bool(own.sharded))
    every = [json.loads(text) for text in gather_texts(json.dumps(own.record()))]
    every = readers.of_leaders(every, ["first", "ids", "sharded", "found", "placed"])
    world = len(every)
    told = [one["sharded"] for one in every]
    if any(one != told[0] for one in told):
        raise ValueError(f"run: the ranks were given different sharded=: {told}. Give all of them the same.")
    found = [one["found"] for one in every]
    firsts = [one["first"] for one in every]
    if any(one is not None for one in found):
        return _of_known(found, every, told[0])
    alike = len(set(firsts)) == 1
    ids = [one["ids"] for one in every if one["first"]]
    has_ids = bool(ids) and all(one is not None for one in ids)
    if world == 1:
        return Division(split=bool(told[0]))
    if told[0]:
        if alike and firsts[0] and not has_ids:
            raise ValueError(
                f"run(sharded=True): all {world} ranks begin with the same batch, so every sequence would count {world} times. "
                f"Leave sharded out where all read one loader, or give each rank a part of its own."
            )
        return Division(split=True, words=_split_words(world, "sharded=True", has_ids))
    if alike:
        return Division(split=False, words=f"one loader, shared out among {world} ranks batch by batch")
    if told[0] is None and has_ids and len(ids) > 1 and _disjoint(ids):
        return Division(split=True, by_ids=True, words=_split_words(world, "their ids", True))
    same = firsts.index(firsts[0], 1) if firsts.count(firsts[0]) > 1 else None
    other = next(number for number in range(world) if firsts[number] != firsts[0])
    empty = [number for number, first in enumerate(firsts) if not first]
    how = (
        f"rank(s) {empty} got no batch, others did"
        if empty
        else f"the first batch of rank {other} is another than that of rank 0"
        + (f" and rank {same}" if same else "")
    )
    raise ValueError(
        f"run: the loaders of the ranks differ: {how}. Where each rank holds a part of the data (a sampler or data set that is "
        f"split by rank; split_dataset_by_node of a map-style data set leaves no trace to find), say so: sharded=True. Else give "
        f"all ranks one loader, in one order: the same seed, no shuffling by rank; run shares its batches out."
    )


def compare_ends(
    batches: int, data: str, record: Callable[[], Mapping[str, Any]], *, split: bool, readers: Readers
) -> None:
    """Raise on all ranks where one loader gave them different batches, or a model changed on one of them. Collective."""
    world = rank_and_world()[1]
    if world == 1:
        return
    told = [json.loads(text) for text in gather_texts(json.dumps({"batches": batches, "data": data}))]
    readers.of_leaders(told, ["batches", "data"] if split else [])
    every = [(one["batches"], one["data"]) for one in told]
    counts = [count for count, _ in every]
    if not split and len(set(counts)) > 1:
        raise ValueError(
            f"run: the loaders of the ranks differ: they gave {counts} batches on the ranks 0 to {world - 1}, though they begin "
            f"alike. All ranks read one loader, the same batches in the same order; where each holds a part of its own, say so: "
            f"sharded=True."
        )
    if not split and len({found for _, found in every}) > 1:
        other = next(number for number in range(world) if every[number] != every[0])
        raise ValueError(
            f"run: the loaders of the ranks differ: rank {other} got other batches than rank 0, though both began with the same "
            f"one. Give all ranks one loader in one order (the same seed for whatever draws at random), or parts of their own "
            f"with sharded=True."
        )
    compare_runs(record, " any more: something changed while they ran")


def _of_known(found: Sequence[Any], every: Sequence[Mapping[str, Any]], sharded: bool | None) -> Division:
    """Of loaders that say themselves how they are split."""
    world = len(found)
    if sharded is False:
        by = next(one for one in found if one is not None)[0]
        raise ValueError(
            f"run(sharded=False): the loader is split by rank ({by}). Leave sharded out, or give all ranks the whole loader."
        )
    missing = [rank for rank, one in enumerate(found) if one is None]
    if missing:
        raise ValueError(
            f"run: the loaders of the ranks differ: those of the ranks {missing} are not split by rank, the others are "
            f"({next(one for one in found if one is not None)[0]}). Give all ranks a part, or all of them the whole."
        )
    places = sorted((part, parts) for _, part, parts, _ in found)
    if places != [(rank, world) for rank in range(world)]:
        told = ", ".join(
            f"part {part} of {parts} on rank {rank}" for rank, (_, part, parts, _) in enumerate(found)
        )
        raise ValueError(
            f"run: the loaders ({found[0][0]}) hold {told}, but there are {world} ranks, each of which takes another of {world} "
            f"parts. Make them with num_replicas={world} and rank=torch.distributed.get_rank()."
        )
    alike = [one[3] for one in found]
    for rank, one in enumerate(alike):
        if one != alike[0]:
            named = "; ".join(_rank_words(differences(alike[0], one), rank))
            raise ValueError(
                f"run: the loaders of the ranks differ, so their parts do not make up the whole ({found[0][0]}): {named}. Make "
                f"them alike on all ranks (set_epoch too), all but the rank."
            )
    placed = all(one["placed"] for one in every)
    ids = all(one["ids"] is not None for one in every if one["first"])
    return Division(split=True, placed=placed, words=_split_words(world, found[0][0], ids, placed))


def _split_words(world: int, by: str, ids: bool, placed: bool = False) -> str:
    numbered = (
        "sequences have the ids that they bring"
        if ids
        else "sequences are numbered by their place in the whole"
        if placed
        else f"sequences are numbered by rank and index: only runs on {world} ranks give the same sample"
    )
    return f"split over {world} ranks ({by}); {numbered}"


def _disjoint(ids: Sequence[Sequence[int]]) -> bool:
    return len({one for rank in ids for one in set(rank)}) == sum(len(set(rank)) for rank in ids)


def _rank_words(found: Sequence[str], rank: int) -> list[str]:
    return [
        one.replace(" there and ", " on rank 0 and ").removesuffix(" here") + f" on rank {rank}"
        for one in found
    ]


def _models(found: Sequence[str]) -> str:
    """What is first to say where weights differ, and not only their hash."""
    return "The weights of their models differ: " if any("weights" in one for one in found) else ""
