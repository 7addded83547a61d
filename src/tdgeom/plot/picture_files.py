"""The pictures of an analysis as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tdgeom.files.atomic import explained_writing
from tdgeom.model.sites import STACK_KINDS
from tdgeom.plot.ablations import ablation
from tdgeom.plot.depth import intrinsic_dimension, overlap
from tdgeom.plot.lines import profile
from tdgeom.plot.router_loads import router
from tdgeom.plot.spectra import spectrum
from tdgeom.plot.style import require_matplotlib

__all__ = ["one_picture", "title_of", "told_apart_by", "write_pictures", "write_plots"]

Picture = tuple[tuple[float, float], Callable[[Any], Any]]
"""Width and height in inches, and what draws into the figure."""


def write_plots(results: Any, folder: str | Path) -> list[Path]:
    """The pictures of an analysis as PNG files: spectra, profiles, layer by layer changes, ablation, router load.

    Args:
        results: ``AnalysisResults``, or anything with its tables ``metrics``, ``novelty``, ``router``, ``diagnostics``, its
            ``eigenvalues`` and ``metadata``.
        folder: made if it is not there; files of the same names are replaced.

    Returns:
        The paths written.

    Raises:
        ModuleNotFoundError: no matplotlib.
    """
    return write_pictures(_pictures(results), folder, title_of(results.metadata))


def write_pictures(pictures: Mapping[str, Picture], folder: str | Path, title: str = "") -> list[Path]:
    """Pictures by name as PNG files; no pyplot, so that nothing of the caller's figures or backend is touched."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(folder)
    with explained_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (size, draw) in pictures.items():
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        if title:
            figure.suptitle(title, fontsize="medium", parse_math=False)
        written.append(folder / f"{name}.png")
        with explained_writing(written[-1]):
            figure.savefig(written[-1], dpi=150)
    return written


def one_picture(draw: Callable[..., Any], *given: Any, size: tuple[float, float], **how: Any) -> Picture:
    """A picture of one pair of axes, by a function that takes ``ax=``."""
    return size, lambda figure: draw(*given, ax=figure.subplots(), **how)


def _pictures(results: Any) -> dict[str, Picture]:
    pictures: dict[str, Picture] = {}
    hue = told_apart_by(results.metrics)
    if results.eigenvalues:
        pictures["spectrum"] = one_picture(spectrum, results, size=(6.4, 4.6))
    shapes, changes = results.metrics, results.novelty
    for name, table, x, wanted in (
        ("profile", shapes, "layer", ("d_pr", "effective_rank", "top1_share", "cos_sim_mean")),
        (
            "between_layers",
            changes,
            "transition",
            ("feature_subspace_novelty", "linear_cka", "layer_cosine_sim"),
        ),
    ):
        shown = [column for column in wanted if column in table and table[column].notna().any()]
        if shown and table[x].notna().all():
            pictures[name] = _panels(table, shown, x, hue)
    size = (6.4, 4.4)
    table = results.diagnostics.get("normalization_ablation")
    if table is not None and hue is None and table["layer"].notna().all():
        pictures["ablation"] = one_picture(ablation, table, size=size)
    for name, draw in (("intrinsic_dimension", intrinsic_dimension), ("overlap", overlap)):
        if name in results.diagnostics:
            table = results.diagnostics[name]
            pictures[name] = one_picture(draw, table, size=size)
            if "step" in table and table["step"].max() > 0:
                pictures[f"{name}_over_scales"] = one_picture(draw, table, x="scale", size=size)
    if "load" in results.router:
        pictures["router"] = one_picture(router, results.router, size=(7.0, 4.4))
    return pictures


def title_of(metadata: Mapping[str, Any]) -> str:
    """The model, and how much was measured."""
    label = str(metadata.get("model_id") or metadata.get("model_class") or "")
    label = label if label.count("/") <= 1 and not label.startswith((".", "/")) else Path(label).name
    rows = metadata.get("rows_observed")
    return f"{label}, {rows:,} {metadata.get('row_unit', 'rows')}" if rows else label


def told_apart_by(table: pd.DataFrame) -> str | None:
    """The column that tells sites of one layer apart."""
    at = [column for column in ("weights", "stack", "layer") if column in table]
    for column in ("weights", "kind", "stack"):
        if column not in table or table[column].nunique(dropna=False) < 2:
            continue
        # the embedding and the final norm open and close the line of the blocks
        blocks = table["kind"][~table["kind"].isin(STACK_KINDS)].nunique()
        if column == "kind" and blocks == 1 and not table.duplicated(at).any():
            continue
        return column
    return None


def _panels(table: pd.DataFrame, columns: Sequence[str], x: str, hue: str | None) -> Picture:
    across = 2 if len(columns) in (2, 4) else len(columns)
    down = -(-len(columns) // across)

    def draw(figure: Any) -> None:
        for index, (ax, column) in enumerate(zip(figure.subplots(down, across, squeeze=False).flat, columns)):
            profile(table, column, x, hue=hue, ax=ax, legend=index == 0)

    return (4.2 * across, 3.2 * down), draw
