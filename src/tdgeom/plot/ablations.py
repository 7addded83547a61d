"""Pictures of what normalisation changes."""

from __future__ import annotations

from typing import Any

import pandas as pd

from tdgeom.plot.lines import profile

__all__ = ["ablation"]

APART = ("kind", "stack")


def ablation(results: Any, measure: str = "d_pr", ax: Any = None, **style: Any) -> Any:
    """A measure over depth with a line for each normalisation; a line far from the raw one: few rows or features make the number.

    With an untrained baseline in the table the trained model alone is drawn.

    Args:
        results: ``AnalysisResults`` made with ``diagnostics=["normalization_ablation"]``, or that table.
        measure: a column of it.
        ax: matplotlib axes; made if None.
        style: passed to ``ax.errorbar``.

    Returns:
        The axes.

    Raises:
        KeyError: no ablation, or no such measure.

        >>> rows = pd.DataFrame({"layer": [0, 1] * 2, "variant": ["raw"] * 2 + ["token_l2"] * 2, "d_pr": [1.0, 2, 3, 4]})
        >>> [text.get_text() for text in ablation(rows).get_legend().get_texts()]
        ['raw', 'token_l2']
    """
    if isinstance(results, pd.DataFrame):
        table = results
    else:
        table = getattr(results, "diagnostics", {}).get("normalization_ablation", pd.DataFrame())
    if "variant" not in table:
        raise KeyError(
            "plot.ablation finds no ablation: analyze with diagnostics=['normalization_ablation'], or give its table."
        )
    if "weights" in table:
        table = table[table["weights"] == "trained"]
    several = [column for column in APART if column in table and table[column].nunique(dropna=False) > 1]
    named = table.assign(
        line=[", ".join(map(str, row)) for row in table[["variant", *several]].itertuples(index=False)]
    )
    ax = profile(named, measure, hue="line", ax=ax, **style)
    ax.get_legend().set_title(None)
    return ax
