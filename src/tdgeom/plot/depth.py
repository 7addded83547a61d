"""Pictures of profiles: intrinsic dimension and neighbourhood overlap against relative depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.model.sites import BLOCK_KINDS
from tdgeom.plot.lines import profile
from tdgeom.plot.style import few_ticks
from tdgeom.run.profiles import intrinsic_dimension_profile, overlap_profile, scale_name
from tdgeom.run.several_models import MODEL, as_one_table

__all__ = ["intrinsic_dimension", "overlap"]


def intrinsic_dimension(result: Any, ax: Any = None, *, x: str = "relative_depth", **style: Any) -> Any:
    """Intrinsic dimension against depth, a line for each estimator, bars of ± one standard error.

    Estimators with several scales (Gride) are drawn where they are alone, a line for each scale.

    Args:
        result: what ``run`` returned, ``AnalysisResults``, or the table of ``intrinsic_dimension_profile``; a list or mapping
            of several, or a table with the column ``model``, has lines for each model.
        ax: matplotlib axes; made if None.
        x: "relative_depth", "layer", or "scale": then a line for each site of the trained model, against the distance the
            estimate looks at, on a logarithmic axis.
        style: passed to ``ax.errorbar``.

    Returns:
        The axes.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> rows = TensorDict({("sample", f"attn_input.{i}"): torch.rand(200, 3 + i) for i in range(2)})
        >>> sites = ["attn_input.0", "attn_input.1"]
        >>> ax = tg.plot.intrinsic_dimension(tg.ForEach(tg.TwoNN(), sites)(rows))
        >>> ax.get_ylabel()
        'intrinsic dimension'
    """
    table = as_one_table(result, partial(_table, profile=intrinsic_dimension_profile))
    several = table.groupby("estimator")["step"].transform("max") > 0
    if x == "scale":
        table = table[several] if several.any() else table
        if "weights" in table:
            table = table[table["weights"] == "trained"]
        ax = profile(table, "estimate", "scale", yerr="standard_error", hue="site", ax=ax, **style)
        ax.set(xscale="log", xlabel="scale (distance)")
        few_ticks(ax)
    else:
        # a line for each scale beside other estimators would bury them
        table = _lines(table if several.all() else table[~several], x)
        ax = profile(table, "estimate", x, yerr="standard_error", hue="line", ax=ax, **style)
    ax.set_ylabel("intrinsic dimension")
    return _untitled(ax)


def overlap(result: Any, ax: Any = None, *, x: str = "relative_depth", **style: Any) -> Any:
    """Neighbourhood overlap against depth: of consecutive sites, and with labels where they were measured.

    Args:
        result: what ``run`` returned, ``AnalysisResults``, or the table of ``overlap_profile``; a list or mapping of several, or
            a table with the column ``model``, has lines for each model.
        ax: matplotlib axes; made if None.
        x: "relative_depth" or "layer"; a pair of sites stands at its first.
        style: passed to ``ax.errorbar``.

    Returns:
        The axes, from 0 to 1.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> sites = ["attn_input.0", "attn_input.1"]
        >>> rows = TensorDict({("sample", site): torch.rand(50, 4) for site in sites})
        >>> ax = tg.plot.overlap(tg.ForEachPair(tg.NeighborhoodOverlap(k=5), sites)(rows))
        >>> ax.get_ylabel()
        'overlap'
    """
    table = as_one_table(result, partial(_table, profile=overlap_profile))
    # Of all pairs those with the next site: tg.plot.matrix draws the others.
    from_here = ["measure", "site", *(column for column in (MODEL, "weights") if column in table)]
    nearest = table.groupby(from_here, sort=False)["other_relative_depth"].transform("min")
    table = table[table["other"].isna() | (table["other_relative_depth"] == nearest)]
    table = _lines(table, x)
    ax = profile(table, "value", x, hue="line", ax=ax, **style)
    ax.set(ylabel="overlap", ylim=(0, 1.02))
    return _untitled(ax)


def _table(result: Any, profile: Callable[[Any], pd.DataFrame]) -> pd.DataFrame:
    return result if isinstance(result, pd.DataFrame) else profile(result)


def _lines(table: pd.DataFrame, x: str) -> pd.DataFrame:
    """The table with a column ``line``, and on the axis of layers a block's output where the next block's input stands."""
    rows = table.to_dict("records")
    if x == "layer":
        inputs = {
            _stack(row) for row in rows if row["kind"] in BLOCK_KINDS and row["kind"].endswith("_input")
        }
        beside = [row["kind"] == "residual_output" and _stack(row) in inputs for row in rows]
        table = table.assign(layer=table["layer"] + np.array(beside, dtype=int))
    names = pd.Series([_line(row, table) for row in rows], index=table.index)
    places = table[x].to_numpy()
    # what closes a line stands behind it: a site at a place that the line has already is a point of its own
    own = ~table["kind"].isin(_drawn_apart(table, "kind"))
    names = names.where(~(own & _taken(names, places)), names + ", " + table["kind"].astype(str))
    # two models, or two modules of every block: by what their sites have in common
    crowded = names.isin(set(names[_taken(names, places)]))
    common = table["site"].astype(str).str.replace(r"(?<![^.:])\d+(?![^.])", "*", regex=True)
    return table.assign(line=names.where(~crowded, names + ", " + common))


def _taken(names: pd.Series, places: np.ndarray) -> pd.Series:
    """Which rows share their line and place with another."""
    return pd.DataFrame({"line": names, "x": places}).duplicated(keep=False)


def _stack(row: Mapping[Any, Any]) -> tuple[str, str]:
    return str(row.get(MODEL)), str(row["stack"])


def _line(row: dict[Any, Any], table: pd.DataFrame) -> str:
    """What the legend calls the line that a row belongs to."""
    name = str(row.get("estimator") or row["measure"]).replace("_", " ")
    if "step" in table and table.loc[table["estimator"] == row.get("estimator"), "step"].max() > 0:
        name += f", {scale_name(row)}"
    for column in (MODEL, "weights", "kind", "stack"):
        if column in table and len(_drawn_apart(table, column)) > 1:
            name += f", {row[column]}"
    return name


def _drawn_apart(table: pd.DataFrame, column: str) -> list[Any]:
    """The values of a column that make lines of their own: a kind with one site closes the line of the others."""
    sites = table.groupby(column, dropna=False)["site"].nunique()
    return list(sites[sites > 1].index if column == "kind" else sites.index)


def _untitled(ax: Any) -> Any:
    legend = ax.get_legend()
    if legend is not None:
        legend.set_title(None)
    return ax
