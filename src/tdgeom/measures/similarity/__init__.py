"""Similarity between the representations of two sites.

Comes in: matched rows of two sites, or their cross-moments. Goes out: ``("between", "a->b", name)``.
"""
