"""A model opened: its places named, read, edited, and run on from any of them.

Comes in: a model, and batches or the user's own calls. Goes out: ``("acts", site)``, or the model's outputs after an edit.
Uses: core, numerics, files.
"""
