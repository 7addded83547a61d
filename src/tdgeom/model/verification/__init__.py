"""The check of a model's sites that a user asks for.

Comes in: a model and a batch. Goes out: a table, a line for each site and check, of how far what is read there is from the
model's own, whether an edit took effect, and what could not be checked. Uses the rooms of ``model`` above it.
"""
