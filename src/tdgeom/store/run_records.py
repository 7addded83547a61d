"""What the catalogue says of a run and of its shards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tdgeom.store.run_description import RunDescription

__all__ = ["RUN_KINDS", "RUN_STATES", "RunRecord", "ShardRecord", "first_gap", "relative_errors"]

RUN_STATES = ("writing", "complete", "failed", "removing")
RUN_KINDS = ("activations", "capture", "analysis")


@dataclass(frozen=True)
class RunRecord:
    """A run as the catalogue has it.

    ``kind``: "activations" (rows from a pipeline), "capture" (saved from memory) or "analysis". ``state``: "writing",
    "complete", "failed" (``reason`` says why) or "removing". ``created``, ``updated``: seconds since 1970.
    """

    id: str
    kind: str
    state: str
    reason: str | None
    created: float
    updated: float
    about: RunDescription
    shards: int
    rows: int
    bytes: int


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard of a run; ``rounding``: by tensor Σ|x-x̂|², Σ|x|² and max |x-x̂|/|x|, where rows were cast."""

    rank: int
    number: int
    rows: int
    bytes: int
    sha256: str
    rounding: Mapping[str, Sequence[float]]

    @classmethod
    def checked(cls, told: Any) -> ShardRecord:
        """A record from its values, which may be hostile.

        Raises:
            ValueError: they are none.
        """
        if isinstance(told, list) and len(told) == 6:
            *numbers, sha256, rounding = told
            naturals = all(type(one) is int and 0 <= one < 2**48 for one in numbers)
            parts = list(rounding.values()) if isinstance(rounding, dict) else [None]
            if naturals and isinstance(sha256, str) and all(map(_is_rounding, parts)):
                return cls(*told)
        raise ValueError(f"a shard is listed that is none: {str(told)[:80]}")

    @property
    def name(self) -> str:
        """The file's name, from numbers alone."""
        return f"rank-{self.rank:05d}-{self.number:08d}.safetensors"


def _is_rounding(part: Any) -> bool:
    numbers: list[Any] = part if isinstance(part, list) and len(part) == 3 else [None]
    return all(type(one) in (int, float) and math.isfinite(one) and one >= 0 for one in numbers)


def first_gap(shards: Sequence[ShardRecord]) -> ShardRecord | None:
    """The first shard, by rank and number, whose predecessor is missing."""
    for before, shard in zip([None, *shards], shards):
        if shard.number != (before.number + 1 if before is not None and before.rank == shard.rank else 0):
            return shard
    return None


def relative_errors(shards: Sequence[ShardRecord]) -> dict[str, dict[str, float]]:
    """What casting cost, by tensor: ``relative`` = √(Σ|x-x̂|² / Σ|x|²) over all rows, ``worst_row`` = max |x-x̂|/|x|."""
    found = {}
    for name in dict.fromkeys(name for shard in shards for name in shard.rounding):
        parts = [shard.rounding[name] for shard in shards if name in shard.rounding]
        gap, size = (sum(part[i] for part in parts) for i in (0, 1))
        worst = max(part[2] for part in parts)
        found[name] = {"relative": math.sqrt(gap / size) if size else 0.0, "worst_row": worst}
    return found
