"""Pictures of a measure against the number of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from tdgeom.plot.palette import depth_colours
from tdgeom.plot.style import axes_or_new, axis_name, few_ticks, layer_legend, tidy
from tdgeom.run.curves import convergence as curves_of

__all__ = ["convergence"]


def convergence(result: Any, ax: Any = None, *, metric: str | None = None, legend: bool | None = None) -> Any:
    """A measure on N, N/2, N/4, ... rows, a line a layer from dark (first) to light (last); level lines have settled.

    Lines of layers that have not converged are dashed; the short level line at the right is where a curve is heading.

    Args:
        result: ``AnalysisResults`` of ``analyze_model(..., convergence=True)``, what ``run`` returned, or the table of
            ``tg.convergence``.
        ax: matplotlib axes; made if None.
        metric: which one; default the first.
        legend: a legend; default up to 12 lines, a colour bar beyond.

    Returns:
        The axes.

    Raises:
        KeyError: no such metric; the message lists those there are. ValueError: the results hold no curves.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> rows = TensorDict({("sample", "residual_input.0"): torch.rand(400, 3)})
        >>> ax = convergence(tg.ForEach(tg.Convergence(tg.TwoNN()), ["residual_input.0"])(rows))
        >>> ax.get_xlabel(), ax.get_lines()[0].get_xdata().tolist()
        ('rows', [100, 200, 400])
    """
    table = result if isinstance(result, pd.DataFrame) else curves_of(result)
    metrics = list(dict.fromkeys(table["metric"]))
    if (metric or metrics[0]) not in metrics:
        raise KeyError(f"plot.convergence finds no curve of {metric!r}; there is {metrics}.")
    metric = metric or str(metrics[0])
    table = table[table["metric"] == metric]
    ax = axes_or_new(ax, (6.0, 4.2))
    sites = table["site"] if "site" in table else pd.Series(metric, index=table.index)
    groups = list(table.groupby(sites, sort=False))
    for (site, rows), colour in zip(groups, depth_colours(len(groups))):
        rows = rows.sort_values("rows")
        settled = bool(rows["converged"].iloc[0])
        count, value = rows["rows"].to_numpy(), rows["value"].to_numpy(dtype=np.float64)
        look = {"color": colour, "linewidth": 1.4}
        ax.plot(count, value, "-" if settled else "--", marker="o", markersize=3, label=str(site), **look)
        ax.plot(count[-1] * np.array([1.1, 1.4]), [rows["limit"].iloc[0]] * 2, "-", **look)
    ax.set(xscale="log", xlabel="rows", ylabel=axis_name(metric))
    few_ticks(ax)
    tidy(ax)
    layer_legend(ax, [str(site) for site, _ in groups], legend)
    return ax
