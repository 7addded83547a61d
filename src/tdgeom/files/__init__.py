"""Bytes and tables on disk: written whole or not at all, hashed, read with suspicion.

Comes in: named tensors, frames, plain values. Goes out: the same, from files that may be damaged or hostile.
Uses: core.
"""
