"""Concepts: the directions a representation is made of, and erasing what they say."""

from tdgeom.concepts.bases import ConceptBasis, FisherBasis, concept_basis, fisher_basis
from tdgeom.concepts.coordinates import Interpolate, Project, Reconstruct, interpolate, project, reconstruct
from tdgeom.concepts.erasure import LEACE, Erase, erase, leace
from tdgeom.concepts.examples import token_context, top_activating

__all__ = [
    "LEACE",
    "ConceptBasis",
    "Erase",
    "FisherBasis",
    "Interpolate",
    "Project",
    "Reconstruct",
    "concept_basis",
    "erase",
    "fisher_basis",
    "interpolate",
    "leace",
    "project",
    "reconstruct",
    "token_context",
    "top_activating",
]
