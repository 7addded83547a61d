"""What each place of a model carries, found by taking its activation from another run.

Comes in: two runs paired example by example, and metrics of what the model gives. Goes out: a grid of them, layers by places.
Uses: ``model.capture``, ``model.intervene``, ``model.lens``.
"""
