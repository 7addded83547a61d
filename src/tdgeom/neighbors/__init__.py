"""Neighbourhoods: who is near whom, and whether two sets of rows agree on it."""

from tdgeom.neighbors._table import Neighbors
from tdgeom.neighbors.approximate import approximate_neighbors
from tdgeom.neighbors.imbalance import InformationImbalance, conditional_ranks, information_imbalance
from tdgeom.neighbors.knn import NearestNeighbors, distinct_neighbors, nearest_neighbors
from tdgeom.neighbors.label_overlap import LabelOverlap, label_overlap, label_overlap_of
from tdgeom.neighbors.overlap import (
    JaccardKNN,
    NeighborhoodOverlap,
    common_neighbors,
    jaccard_knn,
    neighborhood_overlap,
)

__all__ = [
    "InformationImbalance",
    "JaccardKNN",
    "LabelOverlap",
    "NearestNeighbors",
    "NeighborhoodOverlap",
    "Neighbors",
    "approximate_neighbors",
    "common_neighbors",
    "conditional_ranks",
    "distinct_neighbors",
    "information_imbalance",
    "jaccard_knn",
    "label_overlap",
    "label_overlap_of",
    "nearest_neighbors",
    "neighborhood_overlap",
]
