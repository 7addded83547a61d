"""Hooking contexts: named places of a model, read around the user's calls or as a stage of a pipeline."""

from tdgeom.hooks.blocks import find_stacks
from tdgeom.hooks.capture import Capture
from tdgeom.hooks.resolve import ResolvedSite, available_sites, resolve_sites
from tdgeom.hooks.sites import KINDS, Site, select_layers

__all__ = [
    "KINDS",
    "Capture",
    "ResolvedSite",
    "Site",
    "available_sites",
    "find_stacks",
    "resolve_sites",
    "select_layers",
]
