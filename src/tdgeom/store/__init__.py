"""Keeping activations and runs: shards in a folder, a catalogue beside them.

Comes in: rows while a model runs, captures, bundles. Goes out: the same rows as a loader, and bundles.
Uses: every room up to run; its files are those of ``files``.
"""
