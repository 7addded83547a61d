"""Over training: a model watched while it learns, and its checkpoints side by side.

Comes in: a model in training and a loader (or its own batches), or checkpoints. Goes out: tables over steps, values for a log.
Uses: every room before it.
"""
