"""Pictures of results: every function takes axes (or makes them) and returns them; nothing is shown or saved unasked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd

from tdgeom._grids import pair_grid, short_names, side_name
from tdgeom._profile_plots import intrinsic_dimension, overlap
from tdgeom.frames import to_frame

__all__ = ["intrinsic_dimension", "matrix", "overlap", "profile", "spectrum", "write_plots"]

# Okabe and Ito's colours, told apart by readers with any colour vision; black is kept for text
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#F0E442")
MARKERS = "osD^vP*X"
# lines that coincide show through each other's gaps
DASHES = ("-", (0, (7, 2)), (0, (2, 2)), (0, (7, 2, 2, 2)))
GRADIENT = "viridis"

# what an axis says; the unit in brackets
NAMES = {
    "layer": "layer",
    "relative_depth": "relative depth (layer / last layer)",
    "layer_norm_depth": "relative depth (layer / last analysed layer)",
    "transition": "from layer -> to layer",
    "d_pr": "participation ratio (dimensions)",
    "d_pr_norm": "participation ratio / width",
    "d_entropy": "entropy dimension (dimensions)",
    "effective_rank": "effective rank (dimensions)",
    "stable_rank": "stable rank (dimensions)",
    "rankme": "RankMe (dimensions)",
    "k90": "components for 90 % of the variance",
    "k95": "components for 95 % of the variance",
    "k99": "components for 99 % of the variance",
    "top1_share": "variance in the first component (share)",
    "top10_share": "variance in the first 10 components (share)",
    "alpha_req": "power-law exponent of the spectrum",
    "cos_sim_mean": "mean cosine between tokens",
    "norm_mean": "mean norm of a token",
    "feature_subspace_novelty": "subspace novelty (0 to 1)",
    "linear_cka": "linear CKA",
    "layer_cosine_sim": "mean cosine, same token",
    "load": "share of assignments",
    "router_entropy_norm": "router entropy / ln(experts)",
}


def require_matplotlib() -> Any:
    """``matplotlib``, or an error that names the extra."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError('plots need matplotlib: pip install "tdgeom[report]".') from None
    return matplotlib


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    if ax is not None:
        return ax
    require_matplotlib()
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def _name(column: str) -> str:
    return NAMES.get(column, column.replace("_", " "))


def _tidy(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def spectrum(
    eigenvalues: Any, ax: Any = None, *, normalize: bool = True, legend: bool | None = None, **style: Any
) -> Any:
    """Eigenvalues against their rank, both axes logarithmic, one line a layer from dark (first) to light (last).

    Eigenvalues at rounding level (λ <= D·eps·λ₁) are not drawn: a logarithm would make noise look like a spectrum. A cliff
    at the last 2 % of ranks (directions that a layer norm removes, say) leaves the picture at its lower edge.

    Args:
        eigenvalues: ``AnalysisResults``, a result of ``run`` with ``("eigenvalues", site)``, a mapping from name to (D,),
            or one (D,) array or tensor; descending.
        ax: matplotlib axes; made if None.
        normalize: draw shares of the total variance, λ/Σλ, else λ.
        legend: a legend; default up to 12 named lines, a colour bar beyond.
        style: passed to ``ax.plot``.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: no matplotlib. ValueError: nothing to draw.

        >>> ax = spectrum({"layer_00": np.array([4.0, 2.0, 1.0])})
        >>> ax.get_lines()[0].get_xdata().tolist()
        [1, 2, 3]
    """
    series = _spectra(eigenvalues)
    ax = _axes(ax, (6.0, 4.2))
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = colormaps[GRADIENT](np.linspace(0.0, 0.88, len(series))) if len(series) > 1 else [COLOURS[0]]
    bottoms = []
    for (name, values), colour in zip(series.items(), colours):
        values = np.asarray(values, dtype=np.float64)
        shown = values > values[0] * len(values) * np.finfo(np.float64).eps
        drawn = values / values.sum() if normalize else values
        bottoms.append(drawn[shown][int(0.98 * (shown.sum() - 1))])
        ax.plot(
            1 + np.flatnonzero(shown),
            drawn[shown],
            **{"color": colour, "linewidth": 1.5, "label": name, **style},
        )
    ax.set(xscale="log", yscale="log", xlabel="rank of the eigenvalue")
    ax.set_ylabel("share of variance, λ/Σλ" if normalize else "eigenvalue of the covariance, λ")
    if ax.get_ylim()[0] < min(bottoms) / 4:
        ax.set_ylim(bottom=min(bottoms) / 4)
    _tidy(ax)
    named = [name for name in series if name]
    if legend if legend is not None else named and len(named) <= 12:
        ax.legend(frameon=False, fontsize="small", ncols=1 if len(named) <= 6 else 2, loc="lower left")
    elif legend is None and len(named) > 12:
        scale = ScalarMappable(Normalize(0, (len(named) - 1) / 0.88), GRADIENT)
        bar = ax.figure.colorbar(scale, ax=ax, boundaries=np.arange(len(named) + 1) - 0.5)
        places = np.unique(np.linspace(0, len(named) - 1, 7).round().astype(int))
        bar.set_ticks(places, labels=[named[place] for place in places])
    return ax


def _spectra(eigenvalues: Any) -> dict[str, np.ndarray]:
    own = getattr(eigenvalues, "eigenvalues", None)
    if isinstance(own, Mapping):  # AnalysisResults
        series = dict(own)
    elif hasattr(eigenvalues, "batch_size") and hasattr(eigenvalues, "keys"):  # a TensorDict
        frame = to_frame(eigenvalues, "eigenvalues")
        series = dict(zip(frame["site"], frame["eigenvalues"]))
    elif isinstance(eigenvalues, Mapping):
        series = dict(eigenvalues)
    else:
        series = {"": eigenvalues}
    series = {_layer_name(name): _array(values) for name, values in series.items()}
    for name, values in series.items():
        if values.ndim != 1 or not len(values) or not values[0] > 0:
            raise ValueError(
                f"spectrum expects descending eigenvalues of shape (D,), the first above 0; {name or 'it'!r} has shape "
                f"{values.shape} and starts {values.ravel()[:3].tolist()}."
            )
    if not series:
        raise ValueError(
            "spectrum found no eigenvalues: the analysis ran without them (metrics='default' has them)."
        )
    return series


def _layer_name(name: object) -> str:
    name = str(name)
    return f"layer {int(name[6:])}" if name.startswith("layer_") and name[6:].isdigit() else name


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def profile(
    frame: Any,
    y: str,
    x: str = "layer",
    *,
    yerr: str | Sequence[float] | None = None,
    hue: str | None = None,
    ax: Any = None,
    legend: bool = True,
    **style: Any,
) -> Any:
    """A measure over layers: points joined by a line, one line for each value of ``hue``.

    Args:
        frame: a table with the columns named below (``results.metrics``, ``results.novelty``, ``to_frame(...)``), or
            ``AnalysisResults`` for its metrics.
        y: the column drawn.
        x: "layer", "relative_depth", or any column; text (such as "transition") is set out in the order of the table.
        yerr: a column (or values) of standard errors, drawn as bars of ± one.
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
    table = frame if isinstance(frame, pd.DataFrame) else frame.metrics
    errors = yerr if isinstance(yerr, str) else None
    missing = [column for column in (x, y, hue, errors) if column is not None and column not in table]
    if missing:
        raise KeyError(f"profile finds no column {missing}; the table has {list(table.columns)}.")
    table = table.assign(_error=table[errors] if errors else np.nan if yerr is None else np.asarray(yerr))
    groups = list(table.groupby(hue, sort=False, dropna=False)) if hue else [(None, table)]
    _one_row_each(table, groups, x, hue)
    ax = _axes(ax, (6.0, 4.0))
    words = not pd.api.types.is_numeric_dtype(table[x])
    ticks = {word: place for place, word in enumerate(dict.fromkeys(table[x]))} if words else {}
    for index, (value, rows) in enumerate(groups):
        places = rows[x].map(ticks) if words else rows[x]
        order = np.argsort(places.to_numpy(), kind="stable")
        look = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 4.5,
        }
        look["linestyle"] = DASHES[index % len(DASHES)]
        ax.errorbar(
            places.to_numpy()[order],
            rows[y].to_numpy(dtype=np.float64)[order],
            yerr=None if yerr is None else rows["_error"].to_numpy(dtype=np.float64)[order],
            **{
                **look,
                "linewidth": 1.5,
                "capsize": 2.5,
                "label": None if value is None else str(value),
                **style,
            },
        )
    ax.set(xlabel=_name(x), ylabel=fill(_name(y), 28))
    _tidy(ax)
    if words:
        ax.set_xticks(*_thinned([str(word) for word in ticks], 8))
    elif pd.api.types.is_integer_dtype(table[x]):
        from matplotlib.ticker import MaxNLocator

        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    if hue and legend:
        ax.legend(frameon=False, fontsize="small", title=_name(hue), title_fontsize="small")
    return ax


def _one_row_each(
    table: pd.DataFrame, groups: Sequence[tuple[Any, pd.DataFrame]], x: str, hue: str | None
) -> None:
    if not any(rows[x].duplicated().any() for _, rows in groups):
        return
    apart = [
        column
        for column in ("weights", "variant", "kind", "stack", "estimator", "model_label", "site")
        if column in table and not table.duplicated([x, *([hue] if hue else []), column]).any()
    ]
    raise ValueError(
        f"profile has several rows at the same {x!r}{f' and {hue!r}' if hue else ''}: name the column that tells them apart "
        f"with hue=; candidates: {apart or 'none, so select rows first'}."
    )


def matrix(
    values: Any,
    measure: str | None = None,
    ax: Any = None,
    *,
    labels: Sequence[str] | None = None,
    symmetric: bool = True,
    diagonal: float | str | None = "auto",
    annotate: bool | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    cmap: str = GRADIENT,
    colorbar: bool = True,
) -> Any:
    """A measure between sites as a matrix: row a, column b.

    Args:
        values: a result of ``run`` (its root "between" is read), a table with columns ``a``, ``b`` and the measure, or a
            2-D array.
        measure: the column drawn; needed unless ``values`` is an array. Of a directed measure give either name
            (``linear_r2_ab`` or ``linear_r2_ba``): both fill the matrix.
        ax: matplotlib axes; made if None.
        labels: names of rows and columns; default the layers.
        symmetric: fill (b, a) from (a, b) where a measure has no direction.
        diagonal: the value of a site with itself; "auto" knows the common measures and leaves others blank, None blank.
        annotate: numbers in the cells; default up to 10 rows.
        vmin, vmax: the ends of the colour scale; default the data's.
        cmap: a colour map; the default is even in lightness.
        colorbar: a colour bar.

    Returns:
        The axes; ``ax.images[0].get_array()`` holds the matrix, masked where nothing was measured.

    Raises:
        KeyError: no such measure. ValueError: no measure named, or not a matrix. ModuleNotFoundError: no matplotlib.

        >>> pairs = pd.DataFrame({"a": ["residual_input.0"], "b": ["residual_input.1"], "linear_cka": [0.5]})
        >>> matrix(pairs, "linear_cka").images[0].get_array().tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    if isinstance(values, pd.DataFrame) or hasattr(values, "batch_size"):
        table = values if isinstance(values, pd.DataFrame) else to_frame(values, "between")
        grid, rows, columns = pair_grid(table, measure, symmetric, diagonal)
        named = [side_name(rows), side_name(columns)]
        rows, columns = short_names(rows), short_names(columns)
    else:
        grid = _array(values).astype(np.float64)
        if grid.ndim != 2:
            raise ValueError(f"matrix expects a 2-D array, a table or a result, got shape {grid.shape}.")
        rows, columns = ([str(index) for index in range(size)] for size in grid.shape)
        named = ["layer", "layer"]
    rows, columns = (
        (rows, columns) if labels is None else (list(labels)[: len(rows)], list(labels)[: len(columns)])
    )
    cell = min(0.42, 7.5 / max(grid.shape))
    ax = _axes(ax, (max(cell * grid.shape[1], 2.4) + 2.0, max(cell * grid.shape[0], 1.6) + 1.0))
    masked = np.ma.masked_invalid(grid)
    colours = require_matplotlib().colormaps.get_cmap(cmap).with_extremes(bad="0.92")
    image = ax.imshow(masked, cmap=colours, vmin=vmin, vmax=vmax, interpolation="nearest")
    long = max(map(len, [*rows, *columns]), default=0) > 3
    ax.set_xticks(*_thinned(columns), rotation=90 if long else 0)
    ax.set_yticks(*_thinned(rows))
    if not long:
        ax.set(xlabel=named[1], ylabel=named[0])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if annotate if annotate is not None else max(grid.shape) <= 10:
        _write_cells(ax, image, grid)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03)
        bar.outline.set_visible(False)
        bar.set_label(_name(measure) if measure else "value")
    return ax


def _thinned(names: Sequence[str], most: int = 32) -> tuple[list[int], list[str]]:
    step = -(-len(names) // most)
    places = list(range(0, len(names), step))
    return places, [names[place] for place in places]


def _write_cells(ax: Any, image: Any, grid: np.ndarray) -> None:
    shares = np.nanmax(np.abs(grid), initial=0.0) <= 1
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            ax.text(
                column,
                row,
                f"{value:.2f}" if shares else f"{value:.3g}",
                ha="center",
                va="center",
                fontsize="x-small",
                color="white" if dark else "black",
            )


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
    loads = np.stack([_array(load) for load in table["load"]])
    matrix(loads, "load", ax, labels=None, vmin=0.0)
    ax.set_yticks(range(len(loads)), labels=short_names(list(table["site"])))
    ax.set(xlabel="expert", ylabel="layer", aspect="auto")
    return ax
