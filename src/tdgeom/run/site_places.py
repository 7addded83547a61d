"""Where sites stand: kind, layer and stack of each, and depth in a stack, so that a table places every one of its rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from tdgeom.model.sites import BLOCK_KINDS, MODULE_KINDS, STACK_KINDS, Site

__all__ = ["SiteParts", "blocks_met", "relative_depths", "site_parts", "site_places"]

Stack = tuple[str, str | None]
"""A prefix (of one of several models) and a stack's name: what depths are counted in."""


class SiteParts(TypedDict):
    """The columns that say where a site stands."""

    kind: str
    layer: int | None
    stack: str | None


def site_parts(name: str) -> SiteParts:
    """``kind``, ``layer`` and ``stack`` that a site's name itself says; a name of the user's own is its own kind."""
    site = _site(name)
    if site is None:
        return {"kind": name, "layer": None, "stack": None}
    return {"kind": site.kind, "layer": site.layer, "stack": site.stack}


def site_places(sites: Iterable[str], blocks: Mapping[str | None, int] | None = None) -> dict[str, SiteParts]:
    """``kind``, ``layer`` and ``stack`` of every site: what its name says, and a layer also where the name has none.

    ``embed`` stands at 0, ``final_norm`` one after the last block (of the stack's number of ``blocks``, or of the blocks among
    the sites). Modules of one list (``module_output:h.3.mlp``) stand at their number in it; other modules, and names of one's
    own, one after the site before them in the order given, the first at 0.

        >>> [part["layer"] for part in site_places(["embed", "residual_input.3", "final_norm"]).values()]
        [0, 3, 4]
        >>> [part["layer"] for part in site_places(["module_output:h.2", "module_output:h.5"]).values()]
        [2, 5]
        >>> [part["layer"] for part in site_places(["module_output:stem", "module_output:head"]).values()]
        [0, 1]
    """
    names = list(dict.fromkeys(map(str, sites)))
    places = {name: site_parts(name) for name in names}
    for (_, stack), members in _by_stack(names).items():
        counted = blocks_met(members) if blocks is None else blocks.get(stack, blocks_met(members))
        listed = _numbers_in_one_list([name for name in members if places[name]["kind"] in MODULE_KINDS])
        before = -1
        for name in members:
            part = places[name]
            nameless = {"embed": 0, "final_norm": counted}.get(part["kind"], listed.get(name, before + 1))
            before = part["layer"] = nameless if part["layer"] is None else part["layer"]
    return places


def blocks_met(sites: Iterable[str]) -> int:
    """One more than the last block among sites of one stack; 0 without blocks."""
    layers = [part["layer"] for part in map(site_parts, sites) if part["kind"] in BLOCK_KINDS]
    return max((layer for layer in layers if layer is not None), default=-1) + 1


def relative_depths(sites: Iterable[str]) -> dict[str, float]:
    """Where each site stands in its stack, from 0 to 1; NaN for one without a layer in its name that stands alone.

    Beside the inputs of blocks a block's output stands where the next block's input does.

    >>> relative_depths(["attn_input.0", "attn_input.1", "final_norm"])
    {'attn_input.0': 0.0, 'attn_input.1': 0.5, 'final_norm': 1.0}
    """
    names = list(dict.fromkeys(map(str, sites)))
    depths = dict.fromkeys(names, float("nan"))
    for members in _by_stack(names).values():
        places = _depths(members)
        last = max(places.values())
        if len(members) > 1 or site_parts(members[0])["kind"] in (*BLOCK_KINDS, *STACK_KINDS):
            depths |= {name: place / max(last, 1) for name, place in places.items()}
    return depths


def _depths(members: Sequence[str]) -> dict[str, int]:
    """The layers of the sites of one stack as a sequence that meets each place once."""
    places = site_places(members)
    inputs = any(part["kind"] in BLOCK_KINDS and part["kind"].endswith("_input") for part in places.values())
    found = {
        name: (part["layer"] or 0) + (inputs and part["kind"] == "residual_output")
        for name, part in places.items()
    }
    last = max((place for name, place in found.items() if places[name]["kind"] != "final_norm"), default=0)
    return {name: last + 1 if places[name]["kind"] == "final_norm" else at for name, at in found.items()}


def _by_stack(names: Sequence[str]) -> dict[Stack, list[str]]:
    groups: dict[Stack, list[str]] = {}
    for name in names:
        site = _site(name)
        groups.setdefault(("", None) if site is None else (site.prefix, site.stack), []).append(name)
    return groups


def _numbers_in_one_list(modules: Sequence[str]) -> dict[str, int]:
    """Each module's number where all lie in one list of modules ("h.0.mlp", "h.1.mlp"); nothing where they do not."""
    found = {name: re.search(r"(?:^|\.)(\d+)(?=\.|\[|$)", name.partition(":")[2]) for name in modules}
    lists = {match and name.partition(":")[2][: match.start(1)] for name, match in found.items()}
    if len(lists) > 1:
        return {}
    return {name: int(match[1]) for name, match in found.items() if match is not None}


def _site(name: str) -> Site | None:
    try:
        return Site(name)
    except ValueError:
        return None
