"""The places of sites that were asked for before: kept with the model, for the next context."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tdgeom.model.calls.bound_model import refuse_compiled
from tdgeom.model.calls.channel_axis import attach_channels
from tdgeom.model.calls.image_tokens import attach_images
from tdgeom.model.calls.places import Places
from tdgeom.model.calls.verified import verified
from tdgeom.model.structure.resolved_site import ResolvedSite

_MOST = 64  # sets of sites of one model


def known_places(model: nn.Module, entries: Sequence[ResolvedSite]) -> Places:
    """Where the hooks of some sites go: as another context has found it, unless a module on the way is another one since.

    >>> from tdgeom.model.sites import Site
    >>> model, entry = nn.Sequential(nn.Linear(2, 2)), ResolvedSite(Site("module_output:0"), "0", "output")
    >>> places = known_places(model, [entry])
    >>> known_places(model, [entry]) is places
    True
    >>> model[0] = nn.Linear(2, 2)
    >>> known_places(model, [entry]) is places
    False
    """
    kept: dict[tuple[ResolvedSite, ...], Places] = verified(model).setdefault("places", {})
    key = tuple(entries)
    places = kept.get(key)
    if places is not None and places.is_as_found():
        return places  # compiled code and images were looked for then
    attach_images(model, entries)
    attach_channels(model, entries)
    places = Places(model, entries)
    refuse_compiled(model, places.paths, places.insides())
    if places.can_be_kept():
        for oldest in list(kept)[: len(kept) + 1 - _MOST]:
            kept.pop(oldest, None)
        kept[key] = places
    return places
