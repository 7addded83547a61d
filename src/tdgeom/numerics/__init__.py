"""Arithmetic on tensors that no key has a part in: products, moments, eigenvalues, copies, hashes.

Comes in: tensors. Goes out: tensors, with their rounding known.
Uses: core (its warnings, and the surroundings in which a number is computed).
"""
