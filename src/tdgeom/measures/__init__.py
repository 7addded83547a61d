"""The measures: what moments, spectra, samples and neighbours say of a representation.

Comes in: what streams publish, or tensors. Goes out: numbers with a name.
Uses: core, numerics, and the rooms before it where a measure reads their words.
"""
