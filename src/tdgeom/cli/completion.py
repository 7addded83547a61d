"""What the shell completes when Tab is pressed: kinds of sites and names of measures. No torch, so it answers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tdgeom.measures.registry import GROUP, MEASURES, SITE_MEASURES, STEP_MEASURES, StageAt

__all__ = ["ESTIMATORS", "FAMILIES", "completing", "measures", "pair_measures", "site_kinds"]

FAMILIES = ("default", "spectrum", "sample", "novelty", "router")
ESTIMATORS = [
    name
    for name, measure in SITE_MEASURES.items()
    if isinstance(measure.stage, StageAt) and measure.stage.place.startswith("dimension.")
]


def completing(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A completer of comma-separated words.

    >>> completing(lambda: ["spectrum", "sample", "router"])("router,sp")
    ['router,spectrum']
    """

    def complete(incomplete: str) -> list[str]:
        done, comma, last = incomplete.rpartition(",")
        given = done.split(",")
        return [f"{done}{comma}{word}" for word in words() if word.startswith(last) and word not in given]

    return complete


def site_kinds() -> list[str]:
    """The kinds of sites; those read at a module of one's own go on behind a colon."""
    from tdgeom.model.sites import KINDS, MODULE_KINDS

    return [f"{kind}:" if kind in MODULE_KINDS else kind for kind in KINDS]


def measures() -> list[str]:
    """What an analysis knows by name: families, measures, and those of installed packages."""
    return [*FAMILIES, *SITE_MEASURES, *STEP_MEASURES, *pair_measures()]


def pair_measures() -> list[str]:
    """The measures between two models."""
    from importlib.metadata import entry_points

    others: Any = entry_points(group=GROUP)
    return [*MEASURES, *(point.name for point in others if point.name not in SITE_MEASURES)]
