"""Tables whose text comes from a file: the values stay as they are, and printing them commands no terminal."""

from __future__ import annotations

from typing import Any, cast

import pandas as pd

from tdgeom.core.visible_text import visible

__all__ = ["shown_safely"]


class _ShownColumn(pd.Series):
    """A column that prints what has no glyph as its escape."""

    @property
    def _constructor(self) -> Any:
        return _ShownColumn

    @property
    def _constructor_expanddim(self) -> Any:
        return _ShownTable

    def to_string(self, *args: Any, **kwargs: Any) -> Any:
        """As pandas', in visible text where it is returned."""
        return _visible(super().to_string(*args, **kwargs))

    def __repr__(self) -> str:
        return visible(super().__repr__())

    __str__ = __repr__


class _ShownTable(pd.DataFrame):
    """A frame that prints what has no glyph as its escape; what is taken from it does too."""

    @property
    def _constructor(self) -> Any:
        return _ShownTable

    @property
    def _constructor_sliced(self) -> Any:
        return _ShownColumn

    def to_string(self, *args: Any, **kwargs: Any) -> Any:
        """As pandas', in visible text where it is returned."""
        return _visible(super().to_string(*args, **kwargs))

    def __repr__(self) -> str:
        return visible(super().__repr__())

    __str__ = __repr__

    def _repr_html_(self) -> Any:
        return _visible(cast(Any, super())._repr_html_())


def shown_safely(table: pd.DataFrame) -> pd.DataFrame:
    r"""The table itself where all its text has glyphs; else one of the same values that prints escapes of those that have none.

    >>> print(shown_safely(pd.DataFrame({"site": ["a\x1b[2J"]})).to_string(header=False, index=False))
    a\x1b[2J
    """
    names = [*map(str, table.columns), *map(str, table.columns.names)]
    text = (cell for name in table.columns if table[name].dtype.kind not in "biufcM" for cell in table[name])
    if all(visible(one) == one for one in (*names, *(cell for cell in text if isinstance(cell, str)))):
        return table
    return _ShownTable(table)


def _visible(text: Any) -> Any:
    return visible(text) if isinstance(text, str) else text
