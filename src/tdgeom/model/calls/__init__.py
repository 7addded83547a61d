"""What a model is called with, when a pass begins and ends, and what is read on the way.

Comes in: a model whose sites are known, and the entries of a TensorDict or the user's own arguments. Goes out: what each
call held. The check that a model is made as ``model.structure`` concludes is a call of it, and so stands here.
Uses: ``model.structure``.
"""
