"""Neighbourhoods: who is near whom, and whether two sets of rows agree on it."""

from tdgeom.neighbors.knn import NearestNeighbors, Neighbors, distinct_neighbors, nearest_neighbors

__all__ = ["NearestNeighbors", "Neighbors", "distinct_neighbors", "nearest_neighbors"]
