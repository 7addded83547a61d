"""One model's whole analysis, and two models side by side: settings, pipeline, pass, tables.

Comes in: models and loaders, or bundles. Goes out: results objects, which plot themselves.
Uses: every room before it.
"""
