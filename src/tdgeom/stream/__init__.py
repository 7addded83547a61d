"""Statistics of all rows in one pass: exact, mergeable, in bounded memory.

Comes in: rows, ``("tokens", site)`` and ``"row_id"``. Goes out: moments, samples, collections.
Uses: core, numerics, files, model (names of sites), rows.
"""
