"""What a model is made of, found from its modules, and the check that it is so.

Comes in: a model and names of sites. Goes out: the module, tensor and view that each name means.
Uses: the words of ``model`` (sites, positions) and nothing that runs a model but the check.
"""
