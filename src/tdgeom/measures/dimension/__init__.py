"""Intrinsic dimension: how many coordinates a set of rows needs, at which scale, and how sure that is.

Comes in: a sample of rows, a neighbour table or moments. Goes out: ``("dimension", site, estimator, ...)``.
Uses: core, numerics, neighbors. Functions and stages run under ``torch.vmap``, ``torch.compile`` and ``torch.export``.
"""
