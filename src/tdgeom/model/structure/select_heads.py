"""``heads=``: the query heads that are read at sites with heads, for all layers or layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tdgeom.model.sites import HEAD_KINDS
from tdgeom.model.structure.resolved_site import ResolvedSite

HeadSpec = int | Sequence[int] | Mapping[int, int | Sequence[int]] | None


def listed_heads(heads: HeadSpec) -> list[int] | dict[int, list[int]] | None:
    """``heads=`` with each choice as a list; anything else is a ``TypeError``.

    >>> listed_heads({0: 3, 1: [0, 2]})
    {0: [3], 1: [0, 2]}
    """
    if heads is None:
        return None
    if isinstance(heads, Mapping):
        if not heads or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in heads):
            raise TypeError(f"heads= as a mapping goes from layers (int) to heads, got {heads!r}.")
        return {layer: _listed(own) for layer, own in heads.items()}
    return _listed(heads)


def _listed(heads: object) -> list[int]:
    listed = (
        [heads] if isinstance(heads, int) else list(heads) if isinstance(heads, Sequence | range) else None
    )
    if not listed or any(isinstance(head, bool) or not isinstance(head, int) for head in listed):
        raise TypeError(
            f"heads= takes an int, a list of ints, or a mapping from layers to these, got {heads!r}."
        )
    return listed


def heads_of_layer(
    heads: list[int] | dict[int, list[int]], layer: int | None, layers: Sequence[int]
) -> list[int] | None:
    """The choice for one of ``layers``; negative keys of a mapping count from the end, ``None`` where none is meant."""
    if not isinstance(heads, dict):
        return heads
    last = max(layers, default=0)
    return {key if key >= 0 else last + 1 + key: own for key, own in heads.items()}.get(
        -1 if layer is None else layer
    )


def with_heads(entries: list[ResolvedSite], heads: HeadSpec) -> list[ResolvedSite]:
    """Sites that read these heads only; those without an axis of heads as they are.

    Raises ``IndexError`` for a head or layer that is not there, ``ValueError`` where no site has heads, or where a mapping
    says nothing of a layer that is read.
    """
    chosen = listed_heads(heads)
    own = [entry for entry in entries if entry.head_count]
    if chosen is None:
        return entries
    if not any(entry.site.kind in HEAD_KINDS for entry in own):
        raise ValueError(
            f"heads= needs a site with heads ({', '.join(HEAD_KINDS)}), got {[e.site for e in entries]}."
        )
    if isinstance(chosen, dict):
        _check_layers(chosen, own)
    layers = [entry.site.layer or 0 for entry in own]
    return [
        entry
        if entry.view is None
        else _of_heads(entry, heads_of_layer(chosen, entry.site.layer, layers) or [])
        for entry in entries
    ]


def _check_layers(heads: Mapping[int, Sequence[int]], entries: Sequence[ResolvedSite]) -> None:
    stacks = {entry.site.stack for entry in entries}
    if len(stacks) > 1:
        raise ValueError(
            f"heads= as a mapping from layers needs sites of one stack, got {sorted(map(str, stacks))}. Remedy: one "
            "Capture a stack."
        )
    read = sorted({entry.site.layer or 0 for entry in entries})
    named = {layer if layer >= 0 else read[-1] + 1 + layer for layer in heads}
    if unknown := sorted(named - set(read)):
        raise IndexError(f"heads= names the layers {unknown}, the sites with heads are of the layers {read}.")
    if silent := sorted(set(read) - named):
        raise ValueError(
            f"heads= says nothing of the layers {silent}, which are read too. Remedy: layers={sorted(named)}, or heads "
            "for them."
        )


def _of_heads(entry: ResolvedSite, heads: Sequence[int]) -> ResolvedSite:
    count = entry.head_count
    for head in heads:
        if not -count <= head < count:
            raise IndexError(f"head {head!r} is out of range: {str(entry.site)!r} has {count} query heads.")
    return replace(entry, heads=tuple(head % count // entry.groups for head in heads))
