"""Warnings of the package."""

__all__ = ["UndefinedMeasureWarning"]


class UndefinedMeasureWarning(UserWarning):
    """A measure is not defined on its input (no variance, too few rows); its value is NaN."""
