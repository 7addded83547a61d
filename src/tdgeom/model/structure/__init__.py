"""What a model is made of, found from its modules.

Comes in: a model and names of sites. Goes out: the module, tensor and view that each name means.
Uses: ``model.sites`` and nothing that runs a model. The check that it is so runs one, and so stands in ``model.calls``.
"""
