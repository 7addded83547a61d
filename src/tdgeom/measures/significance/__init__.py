"""Significance: what a similarity would be by chance, and how many eigenvalues noise alone would give.

Comes in: matched rows, moments or a spectrum. Goes out: null means, z-scores, p-values, calibrated values.
Uses: core, numerics, similarity. Rows of one document are not exchangeable: nulls move whole documents.
"""
