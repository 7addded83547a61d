"""What a model is called with, and when a pass begins and ends.

Comes in: a model whose sites are known, and the entries of a TensorDict or the user's own arguments. Goes out: what each
call held.
Uses: ``model.structure``.
"""
