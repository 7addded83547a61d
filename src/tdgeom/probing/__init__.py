"""Probes: what is linearly (or not) in a representation.

Comes in: rows and labels, ``("carried", name)``. Goes out: fitted probes, their predictions and scores.
Uses: every room up to run.
"""
