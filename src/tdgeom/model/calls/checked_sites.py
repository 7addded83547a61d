"""The sites of a model that hold: found from its structure, and checked against what it computes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.model.calls.local_parts import refuse_heads_apart
from tdgeom.model.calls.structure_check import SiteRefused, checked, moves_choice, refusal
from tdgeom.model.sites import Site, choice_beside
from tdgeom.model.structure.resolve import find_sites, select_sites, site_by_path, sites_meant
from tdgeom.model.structure.resolved_site import ResolvedSite

__all__ = ["available_sites", "choices_beside", "refuse_edits", "resolve_sites"]


@answer_guesses
def available_sites(model: nn.Module) -> list[ResolvedSite]:
    """All sites of a model that have a kind of their own, in execution order, with their module paths.

    Checked by a tiny pass of the model, once, where its inputs can be made up: a kind that is not what its name says in
    some layer is left out there (asking for it says why). Any other place is ``module_input:<path>`` or
    ``module_output:<path>``. What can be read only (``router_choice``) is not among them. The list is empty for a model in
    which no repeated blocks are found.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> [(entry.site, entry.module_path) for entry in available_sites(model)][:2]
    [('embed', '0'), ('residual_input.0', '0')]
    """
    return [entry for entry in checked(model, find_sites(model))[0] if entry.side != "choice"]


def resolve_sites(
    model: nn.Module, sites: str | re.Pattern | Iterable[str | re.Pattern], **choice: Any
) -> list[ResolvedSite]:
    """The sites that ``sites`` names, as :func:`tdgeom.model.structure.resolve.select_sites`, of those that hold.

    Raises ``RuntimeError`` with the reason for a layer, or for a kind at all layers, that does not hold.
    """
    if (entry := site_by_path(model, sites, **choice)) is not None:
        return [entry]  # nothing was concluded of it
    prefix = choice.get("prefix", "")
    wanted = sites_meant(model, sites, prefix)
    if not any(isinstance(name, str) and ":" not in name for name in wanted):
        return select_sites(model, wanted, **choice)
    found = find_sites(model)
    if not found:
        return select_sites(model, wanted, found, **choice)
    held, refused = checked(model, found)
    asked = select_sites(model, wanted, found, **choice)
    wrong = {
        entry.site: refused[plain] for entry in asked if (plain := entry.site.with_prefix("")) in refused
    }
    if not wrong:
        return select_sites(model, wanted, held, **choice)
    held, refused = checked(model, found, again=True)  # weights may have changed since
    wrong = {site: refused[plain] for site in wrong if (plain := site.with_prefix("")) in refused}
    left = {(entry.site.stack, entry.site.kind) for entry in held}
    given = choice.get("layers", "all")
    for site in wrong:
        everywhere = isinstance(given, str) and given.strip() == "all" and not _names(wanted, site)
        if not everywhere or (site.stack, site.kind) not in left:
            refuse_heads_apart(model, [entry for entry in asked if entry.site in wrong])
            raise refusal(
                model, {s: r for s, r in wrong.items() if (s.stack, s.kind) == (site.stack, site.kind)}
            )
    return [entry for entry in select_sites(model, wanted, held, **choice)]


def choices_beside(model: nn.Module, entries: Iterable[ResolvedSite]) -> list[ResolvedSite]:
    """What the routers of ``router_logits`` among ``entries`` have chosen, where that is told and not asked for already."""
    listed = list(entries)
    logits = [entry.site for entry in listed if entry.site.kind == "router_logits"]
    if not logits:
        return []
    held = {entry.site: entry for entry in checked(model, find_sites(model))[0]}
    wanted = [Site(choice_beside(site)) for site in logits]
    known = {entry.site for entry in listed}
    found = [(site, held.get(site.with_prefix(""))) for site in wanted if site not in known]
    return [replace(entry, site=site) for site, entry in found if entry is not None]


def refuse_edits(model: nn.Module, entries: Iterable[ResolvedSite]) -> None:
    """Raise for places where an edit would change nothing but what is read."""
    for entry in entries:
        if entry.side == "choice":
            raise ValueError(
                f"{entry.site!r} is what a router has chosen, read when that is over. Remedy: edit 'router_logits', which come "
                "before it."
            )
        if entry.site.kind == "router_logits" and not moves_choice(model, entry):
            raise SiteRefused(
                f"an edit of {entry.site!r} of {type(model).__name__} cannot be shown to change which experts are chosen: the "
                f"router {entry.module_path!r} did not choose an expert whose logit was raised, or does not tell. Remedy: "
                f"'module_output:{entry.module_path}', knowing what the model does with it."
            )


def _names(wanted: Iterable[Site | re.Pattern], site: Site) -> bool:
    """Whether a concrete name asks for this kind."""
    named = [name for name in wanted if isinstance(name, Site)]
    return any(n.kind == site.kind and n.stack in (None, site.stack) and n.layer is not None for n in named)
