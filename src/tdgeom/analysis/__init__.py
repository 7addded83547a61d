"""The default analysis of a model: its pipeline, its pass over a model, its tables."""
