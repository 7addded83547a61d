"""What a model would say if it ended at a layer.

Comes in: activations of a site. Goes out: logits, probabilities, tokens.
Uses: ``model.structure``, ``model.calls``, ``model.capture``.
"""
