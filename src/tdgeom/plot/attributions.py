"""Pictures of what parts of a model add to a logit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from tdgeom.plot.matrices import matrix
from tdgeom.plot.palette import COLOURS
from tdgeom.plot.style import axes_or_new, thinned, tidy

__all__ = ["attribution"]


def attribution(table: pd.DataFrame, answer: str | None = None, ax: Any = None, *, top: int = 20) -> Any:
    """What each part adds to an answer's logit, the mean over texts and positions.

    Heads are a matrix, layers down; layers and components are bars in the order of the model; of neurons the ``top`` with the
    largest contributions are drawn, as bars.

    Args:
        table: what ``logit_attribution`` returned.
        answer: which answer; needed where there are several.
        ax: matplotlib axes; made if None.
        top: how many bars of neurons.

    Returns:
        The axes.

    Raises:
        KeyError: not such a table. ValueError: no rows, no such answer, or several and none named, ``top`` under 1.

        >>> parts = pd.DataFrame({"answer": "7", "component": ["embed", "mlp_output.0"], "kind": ["embed", "mlp_output"],
        ...     "layer": [None, 0], "contribution": [1.0, -0.5]})
        >>> [float(bar.get_width()) for bar in attribution(parts).patches]
        [1.0, -0.5]
    """
    needed = ["answer", "component", "kind", "contribution"]
    if missing := [name for name in needed if name not in table]:
        raise KeyError(f"plot.attribution draws what logit_attribution returns: the table has no {missing}.")
    if not len(table):
        raise ValueError("plot.attribution was given a table without rows: there is nothing to draw.")
    if top < 1:
        raise ValueError(f"top= is how many bars of neurons are drawn, at least 1, got {top}.")
    answers = list(dict.fromkeys(table["answer"]))
    if answer not in answers and not (answer is None and len(answers) == 1):
        raise ValueError(f"plot.attribution draws one answer: answer= is one of {answers}, got {answer!r}.")
    own = table[table["answer"] == (answers[0] if answer is None else answer)]
    cap = table.attrs.get("soft_cap")
    said = "contribution to the logit" + ("" if cap is None else f" before its cap at {cap:.3g}")
    heads = own[own["kind"].isin(["head", "cross_head"])]
    if len(heads):
        return _heads(heads, said, ax)
    mean = own.groupby(["component", "kind"], sort=False)["contribution"].mean().reset_index()
    if "neuron" in set(mean["kind"]):
        mean = mean[mean["kind"] == "neuron"]
        mean = mean.loc[mean["contribution"].abs().sort_values(ascending=False).index[:top]]
    ax = axes_or_new(ax, (5.0, max(1.5, 0.22 * len(mean) + 0.8)))
    kinds = list(dict.fromkeys(mean["kind"]))
    colours = [COLOURS[kinds.index(kind) % len(COLOURS)] for kind in mean["kind"]]
    ax.barh(range(len(mean)), mean["contribution"], color=colours)
    ax.invert_yaxis()
    ax.set_yticks(*thinned(list(mean["component"]), 60), parse_math=False)
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.set_xlabel(said)
    tidy(ax)
    return ax


def _heads(heads: pd.DataFrame, said: str, ax: Any) -> Any:
    heads = heads.assign(row=heads["component"].str.partition("[")[0])
    rows = list(dict.fromkeys(heads["row"]))
    grid = heads.pivot_table(index="row", columns="head", values="contribution", aggfunc="mean").loc[rows]
    values = grid.to_numpy(dtype=np.float64)
    end = float(np.nanmax(np.abs(values))) or 1.0
    ax = matrix(values, None, ax, vmin=-end, vmax=end, cmap="RdBu_r")
    # layers alone, unless attention over two sequences needs both names
    layers = [str(layer) for layer in heads.drop_duplicates("row")["layer"]]
    ax.set_yticks(*thinned(rows if len(set(layers)) < len(layers) else layers), parse_math=False)
    ax.set_xticks(*thinned([str(head) for head in grid.columns]), rotation=0)
    ax.set(xlabel="head", ylabel="layer", aspect="auto")
    ax.images[0].colorbar.set_label(said)
    return ax
