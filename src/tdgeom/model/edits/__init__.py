"""Changes of an activation while the model runs.

Comes in: a site's tensor and what the running call tells. Goes out: the tensor that the model goes on with.
Uses: ``model.structure``, ``model.calls``.
"""
