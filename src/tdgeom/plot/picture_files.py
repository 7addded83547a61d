"""The pictures of an analysis as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.plot.depth import intrinsic_dimension, overlap
from tdgeom.plot.lines import profile
from tdgeom.plot.matrices import matrix
from tdgeom.plot.pair_grids import short_names
from tdgeom.plot.spectra import spectrum
from tdgeom.plot.style import as_array, require_matplotlib

__all__ = ["write_plots"]


def write_plots(results: Any, folder: str | Path) -> list[Path]:
    """The pictures of an analysis as PNG files: spectra, profiles, layer by layer changes, ablation, router load.

    Args:
        results: ``AnalysisResults``.
        folder: made if it is not there; files of the same names are replaced.

    Returns:
        The paths written.

    Raises:
        ModuleNotFoundError: no matplotlib.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (size, draw) in _pictures(results).items():
        # no pyplot: nothing of the caller's figures or backend is touched
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.suptitle(_title(results.metadata), fontsize="medium")
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
    return written


def _pictures(results: Any) -> dict[str, tuple[tuple[float, float], Any]]:
    pictures: dict[str, tuple[tuple[float, float], Any]] = {}
    hue = _kinds(results.metrics)
    if results.eigenvalues:
        pictures["spectrum"] = ((6.4, 4.6), lambda figure: spectrum(results, figure.subplots()))
    for name, table, x, wanted in (
        ("profile", results.metrics, "layer", ("d_pr", "effective_rank", "top1_share", "cos_sim_mean")),
        (
            "between_layers",
            results.novelty,
            "transition",
            ("feature_subspace_novelty", "linear_cka", "layer_cosine_sim"),
        ),
    ):
        shown = [column for column in wanted if column in table and table[column].notna().any()]
        if shown and table[x].notna().all():
            pictures[name] = _panels(table, shown, x, hue)
    ablation = results.diagnostics.get("normalization_ablation")
    if ablation is not None and hue is None and ablation["layer"].notna().all():
        pictures["ablation"] = (
            (6.4, 4.4),
            lambda figure: profile(ablation, "d_pr", hue="variant", ax=figure.subplots()),
        )
    for name, draw in (("intrinsic_dimension", intrinsic_dimension), ("overlap", overlap)):
        if name in results.diagnostics:
            table = results.diagnostics[name]
            pictures[name] = ((6.4, 4.4), _drawing(draw, table))
            if "step" in table and table["step"].max() > 0:
                pictures[f"{name}_over_scales"] = ((6.4, 4.4), _drawing(draw, table, x="scale"))
    if "load" in results.router:
        pictures["router"] = ((7.0, 4.4), lambda figure: _router(results.router, figure.subplots()))
    return pictures


def _title(metadata: Mapping[str, Any]) -> str:
    label = str(metadata.get("model_id") or metadata.get("model_class") or "")
    label = label if label.count("/") <= 1 and not label.startswith((".", "/")) else Path(label).name
    rows = metadata.get("rows_observed")
    return f"{label}, {rows:,} tokens" if rows else label


def _kinds(table: pd.DataFrame) -> str | None:
    """The column that tells sites of one layer apart."""
    several = [
        column
        for column in ("weights", "kind", "stack")
        if column in table and table[column].nunique(dropna=False) > 1
    ]
    return several[0] if several else None


def _panels(
    table: pd.DataFrame, columns: Sequence[str], x: str, hue: str | None
) -> tuple[tuple[float, float], Any]:
    across = 2 if len(columns) in (2, 4) else len(columns)
    down = -(-len(columns) // across)

    def draw(figure: Any) -> None:
        for index, (ax, column) in enumerate(zip(figure.subplots(down, across, squeeze=False).flat, columns)):
            profile(table, column, x, hue=hue, ax=ax, legend=index == 0)

    return (4.2 * across, 3.2 * down), draw


def _drawing(draw: Any, table: pd.DataFrame, **how: Any) -> Any:
    return lambda figure: draw(table, figure.subplots(), **how)


def _router(table: pd.DataFrame, ax: Any) -> Any:
    loads = np.stack([as_array(load) for load in table["load"]])
    matrix(loads, "load", ax, labels=None, vmin=0.0)
    ax.set_yticks(range(len(loads)), labels=short_names(list(table["site"])))
    ax.set(xlabel="expert", ylabel="layer", aspect="auto")
    return ax
