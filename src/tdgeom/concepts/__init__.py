"""Concepts: the directions a representation is made of, and erasing what they say.

Comes in: moments, or rows and labels. Goes out: bases, coordinates, rows without a concept.
Uses: every room up to run, and probing's moments by label.
"""
