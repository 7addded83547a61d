"""Hooking contexts: named places of a model, read and edited around the user's calls or as a stage of a pipeline."""

from tdgeom.hooks.ablation import Ablate
from tdgeom.hooks.aggregate import AggregateActs, GroupAttention
from tdgeom.hooks.attention_edits import BlockAttention
from tdgeom.hooks.blocks import find_stacks
from tdgeom.hooks.capture import Capture
from tdgeom.hooks.edits import Edit, ProjectOnto, ProjectOut, Scale, Steer
from tdgeom.hooks.hidden import hidden_state_sites
from tdgeom.hooks.intervene import Intervene
from tdgeom.hooks.other_runs import ActivationAddition, Patch
from tdgeom.hooks.positions import Between, RandomPositions, SpecialTokens, partition, position_mask
from tdgeom.hooks.resolve import ResolvedSite, available_sites, resolve_sites
from tdgeom.hooks.sites import KINDS, Site, select_layers
from tdgeom.hooks.spec import CaptureSpec

__all__ = [
    "KINDS",
    "Ablate",
    "ActivationAddition",
    "AggregateActs",
    "Between",
    "BlockAttention",
    "Capture",
    "CaptureSpec",
    "Edit",
    "GroupAttention",
    "Intervene",
    "Patch",
    "ProjectOnto",
    "ProjectOut",
    "RandomPositions",
    "ResolvedSite",
    "Scale",
    "Site",
    "SpecialTokens",
    "Steer",
    "available_sites",
    "find_stacks",
    "hidden_state_sites",
    "partition",
    "position_mask",
    "resolve_sites",
    "select_layers",
]
