"""Neighbourhoods: who is near whom, and whether two sets of rows agree on it.

Comes in: a sample of rows. Goes out: ``("neighbors", site, ...)`` and the measures that read such tables.
Uses: core, numerics. Functions and stages run under ``torch.vmap``, ``torch.compile`` and ``torch.export``; distances have
gradients, in both modes.
"""
