"""Measures over layers, one line a group."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.measures.columns import column_of, error_column, fixed_ends
from tdgeom.plot.palette import COLOURS, DASHES, MARKERS
from tdgeom.plot.style import axes_or_new, axis_name, plain_legend, thinned, tidy
from tdgeom.run.several_models import MODEL, as_one_table

__all__ = ["profile"]


def profile(
    frame: Any,
    y: str,
    x: str = "layer",
    *,
    yerr: str | Sequence[float] | None = "auto",
    hue: str | None = None,
    ax: Any = None,
    legend: bool = True,
    **style: Any,
) -> Any:
    """A measure over layers: points joined by a line, one line for each value of ``hue``.

    Lines that coincide are drawn once, under all their names; a measure that has a range is drawn on the whole of it.

    Args:
        frame: a table with the columns named below (``results.metrics``, ``results.novelty``, ``to_frame(...)``), or
            ``AnalysisResults`` for its metrics; a list, or a mapping by name, of several for a line a model. In one table of
            several models ``model`` (or, where it alone tells rows apart, ``model_label``) does the same.
        y: the column drawn.
        x: "layer", "relative_depth", or any column; text (such as "transition") is set out in the order of the table.
        yerr: a column (or values) of standard errors, drawn as bars of ± one; "auto": the column ``<y>_se`` or
            ``<y>_standard_error`` where there is one; "interval": the columns ``<y>_low`` and ``<y>_high``
            (``results.with_intervals()``), about the value less its bias; None: no bars.
        hue: a column whose values get a line each ("kind", "variant", "model_label", "estimator").
        ax: matplotlib axes; made if None.
        legend: a legend for ``hue``.
        style: passed to ``ax.errorbar``.

    Returns:
        The axes.

    Raises:
        KeyError: no such column. ValueError: several rows at one x on one line. ModuleNotFoundError: no matplotlib.

        >>> ax = profile(pd.DataFrame({"layer": [0, 1], "d_pr": [3.0, 2.0]}), "d_pr")
        >>> ax.get_xlabel(), ax.get_lines()[0].get_ydata().tolist()
        ('layer', [3.0, 2.0])
    """
    table = as_one_table(frame, lambda one: one if isinstance(one, pd.DataFrame) else one.metrics)
    if isinstance(yerr, str) and yerr == "auto":
        yerr = error_column(y, [str(name) for name in table])
    ends = (f"{y}_low", f"{y}_high") if isinstance(yerr, str) and yerr == "interval" else ()
    yerr = None if ends else yerr
    errors = yerr if isinstance(yerr, str) else None
    missing = [column for column in (x, y, hue, errors, *ends) if column is not None and column not in table]
    if missing:
        raise KeyError(f"profile finds no column {missing}; the table has {list(table.columns)}.")
    if table[y].map(np.ndim).any():
        raise ValueError(
            f"profile draws one number a row; column {y!r} has several values in a row: tg.plot.scale_profile draws scales."
        )
    table, hue = _by_model(table, x, hue)
    table = table.assign(_error=table[errors] if errors else np.nan if yerr is None else np.asarray(yerr))
    groups = list(table.groupby(hue, sort=False, dropna=False)) if hue else [(None, table)]
    _one_row_each(table, groups, x, hue)
    ax = axes_or_new(ax, (6.0, 4.0))
    words = not pd.api.types.is_numeric_dtype(table[x])
    ticks = {word: place for place, word in enumerate(dict.fromkeys(table[x]))} if words else {}
    for index, (value, rows) in enumerate(_drawn_once(groups, x, y)):
        places = rows[x].map(ticks) if words else rows[x]
        order = np.argsort(places.to_numpy(), kind="stable")
        colour, marker, dashes = (looks[index % len(looks)] for looks in (COLOURS, MARKERS, DASHES))
        look = {
            "color": colour,
            "marker": marker,
            "markersize": 4.5,
            "linestyle": dashes,
            "linewidth": 1.5,
            "capsize": 2.5,
        }
        if ends:  # a value may lie outside of its interval
            low, high = (rows[end].to_numpy(dtype=np.float64)[order] for end in ends)
            bars = {"color": colour, "linestyle": "none", "linewidth": 1.5, "capsize": 2.5}
            ax.errorbar(places.to_numpy()[order], (low + high) / 2, yerr=(high - low) / 2, **bars)
        ax.errorbar(
            places.to_numpy()[order],
            rows[y].to_numpy(dtype=np.float64)[order],
            yerr=None if yerr is None else rows["_error"].to_numpy(dtype=np.float64)[order],
            **{**look, "label": None if value is None else str(value), **style},
        )
    ax.set(xlabel=axis_name(x), ylabel=fill(axis_name(y), 28))
    tidy(ax)
    if (whole := fixed_ends(column_of(y), table[y].to_numpy(dtype=np.float64))) is not None:
        margin = 0.03 * (whole[1] - whole[0])
        ax.set_ylim(whole[0] - margin, whole[1] + margin)
    if words:
        ax.set_xticks(*thinned([str(word) for word in ticks], 8), parse_math=False)
    elif pd.api.types.is_integer_dtype(table[x]):
        from matplotlib.ticker import MaxNLocator

        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    if hue and legend:
        plain_legend(ax, title=axis_name(hue), title_fontsize="small")
    return ax


def _drawn_once(groups: Sequence[tuple[Any, pd.DataFrame]], x: str, y: str) -> list[tuple[Any, pd.DataFrame]]:
    """Groups whose lines coincide as one, under all their names."""
    kept: list[tuple[Any, pd.DataFrame]] = []
    for value, rows in groups:
        rows = rows.sort_values(x, kind="stable") if pd.api.types.is_numeric_dtype(rows[x]) else rows
        for at, (name, other) in enumerate(kept):
            if list(rows[x]) == list(other[x]) and np.allclose(
                rows[y].to_numpy(float), other[y].to_numpy(float), rtol=1e-6, atol=0, equal_nan=True
            ):
                kept[at] = (f"{name} = {value}", other)
                break
        else:
            kept.append((value, rows))
    return kept


def _by_model(table: pd.DataFrame, x: str, hue: str | None) -> tuple[pd.DataFrame, str | None]:
    """The table and the column of its lines, where it holds several models: theirs, or theirs and the one asked for."""
    several = [name for name in (MODEL, "model_label") if name in table and table[name].nunique() > 1]
    if not several or hue in several or x in several:
        return table, hue
    if hue is None:
        return table, several[0]
    if table.groupby(hue, dropna=False)[several[0]].nunique().max() == 1:
        return table, hue
    said = table[several[0]].astype(str) + ", " + table[hue].astype(str)
    return table.assign(**{hue: said}), hue


def _one_row_each(
    table: pd.DataFrame, groups: Sequence[tuple[Any, pd.DataFrame]], x: str, hue: str | None
) -> None:
    if not any(rows[x].duplicated().any() for _, rows in groups):
        return
    apart = [
        column
        for column in (MODEL, "weights", "variant", "kind", "stack", "estimator", "model_label", "site")
        if column in table and not table.duplicated([x, *([hue] if hue else []), column]).any()
    ]
    raise ValueError(
        f"profile has several rows at the same {x!r}{f' and {hue!r}' if hue else ''}: name the column that tells them apart "
        f"with hue=; candidates: {apart or 'none, so select rows first'}."
    )
