"""What is missing of the usual pipeline where a stage does not find what it reads, as the line to write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from tdgeom.core.keys import Key, key_tuple

__all__ = ["USUAL_WRITERS", "as_written", "below", "missing_part", "usual_writer"]

# root of a key -> the stage that writes it, from the model to the measures
USUAL_WRITERS = {
    "acts": "tg.Capture(model, sites)",
    "grads": "tg.Capture(model, sites, direction='backward', target=...)",
    "tokens": "tg.SelectTokens(sites)",
    "row_id": "tg.SelectTokens(sites)",
    "sample": "tg.RowSample(sites)",
    "sample_row_id": "tg.RowSample(sites)",
    "moments": "tg.ForEach(tg.StreamingCovariance(), sites)",
    "cross_moments": "tg.StreamingCrossMoments(sites, pairs=...)",
    "eigenvalues": "tg.ForEach(tg.EigenSpectrum(), sites)",
    "eigenvectors": "tg.ForEach(tg.EigenSpectrum(), sites)",
    "neighbors": "tg.ForEach(tg.NearestNeighbors(k), sites)",
    "mean": "tg.StreamingMean()",
    "collected": "tg.Collect(sites)",
}
_CARRIED = {
    "carried": "tg.SelectTokens(sites, also=[{name!r}])",
    "sample_carried": "tg.SelectTokens(sites, also=[{name!r}]) and tg.RowSample(sites, also=[{name!r}])",
}
# what the writer itself needs
_BEFORE = {"tokens": "acts", "sample": "tokens", "moments": "tokens", "cross_moments": "tokens", "eigenvalues": "moments",
           "eigenvectors": "moments", "neighbors": "sample"}  # fmt: skip


def usual_writer(root: str) -> str | None:
    """The stage that usually writes keys of a root.

    >>> usual_writer("sample")
    'tg.RowSample(sites)'
    """
    return USUAL_WRITERS.get(root)


def as_written(stage: object) -> str:
    """The class of a stage as one writes it."""
    made = type(stage)
    return f"tg.{made.__name__}" if made.__module__.partition(".")[0] == "tdgeom" else made.__name__


def below(key: Key, have: Iterable[Key]) -> list[str]:
    """What lies one step under a key.

    >>> below("tokens", [("tokens", "embed"), "row_id"])
    ['embed']
    """
    parts = key_tuple(key)
    others = [key_tuple(other) for other in have]
    return list(
        dict.fromkeys(str(o[len(parts)]) for o in others if len(o) > len(parts) and o[: len(parts)] == parts)
    )


def missing_part(stage: str, missing: Sequence[Key], have: Iterable[Key], *, pair: bool = False) -> str:
    """The remedy where ``stage`` reads ``missing`` and there is ``have``; "" where nothing is known.

    >>> missing_part("tg.TwoNN", ["sample"], [("sample", "embed"), ("sample", "final_norm")])
    "'sample' holds the sites ['embed', 'final_norm']. For all of them: tg.ForEach(tg.TwoNN(...), sites)."
    >>> missing_part("tg.TwoNN", [("sample", "embed")], [("tokens", "embed")])
    'Put tg.RowSample(sites) before it.'
    """
    known = list(have)
    for key in missing:
        root, *rest = key_tuple(key)
        sites = below(root, known)
        if pair and rest and rest[0] in ("a", "b") and sites and not set(sites) & {"a", "b"}:
            return f"{root!r} holds the sites {sites[:6]}. For pairs of them: tg.ForEachPair({stage}(...), sites)."
        if sites and (
            not rest or any(rest == list(key_tuple(k)[2:]) for k in known if key_tuple(k)[0] == root)
        ):
            return f"{root!r} holds the sites {sites[:6]}. For all of them: tg.ForEach({stage}(...), sites)."
        if sites and rest and rest[0] not in sites and root in USUAL_WRITERS:
            near = get_close_matches(rest[0], sites, n=1, cutoff=0.6)
            meant = f" Did you mean {near[0]!r}?" if near else " Name the sites as capture.sites does."
            return f"Under {root!r} there is {sites[:6]}.{meant}"
        if root in _CARRIED and rest:
            return f"What batches hold is carried along: {_CARRIED[root].format(name=rest[-1])}."
        if root in USUAL_WRITERS:
            return f"Put {_with_what_it_needs(root, known)} before it."
    return ""


def _with_what_it_needs(root: str, known: Sequence[Key]) -> str:
    """The usual writer of a root, and in front of it the writers of what that reads, as far as they are missing."""
    made = {key_tuple(key)[0] for key in known}
    chain = [root]
    while made and (before := _BEFORE.get(chain[0])) is not None and before not in made:
        chain.insert(0, before)
    return ", ".join(USUAL_WRITERS[one] for one in chain)
