"""From texts and activations to rows: one row a token (or a sequence), padding left out.

Comes in: texts, loaders, ``("acts", site)`` (B, T, D). Goes out: ``("tokens", site)`` (N, D), ``("carried", name)`` (N, ...),
``"row_id"`` (N,).
Uses: core, numerics, files, model (sites and positions).
"""
