"""A comparison of two models in the terminal: each layer of one, and the layer of the other that is nearest to it."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.text import Text

from tdgeom.analysis.results import AnalysisResults
from tdgeom.cli.terminal_tables import broken, cells_of, print_in_groups
from tdgeom.measures.columns import is_error, of_chance
from tdgeom.plot.pair_grids import pair_grid, short_names

__all__: list[str] = []

HOW = {"rows": "token by token", "characters": "tokens that end together", "document": "means of documents"}
DISTANCES = ("procrustes", "angular_shape", "information_imbalance_ab", "information_imbalance_ba")


def print_comparison(result: AnalysisResults, console: Console) -> None:
    """For each measure of ``result.novelty`` a column of the nearest layers, and how near they are."""
    data = result.metadata
    names = list(data["models"])
    measures = [
        name
        for name in result.novelty.select_dtypes("number")
        if not name.startswith("layer_") and not is_error(name) and not of_chance(name)
    ]
    ids = " and ".join(str(model["id"]) for model in data["models"].values())
    console.print(
        Text.assemble((ids, "bold"), f": {int(data['rows_observed']):,} rows, {HOW[data['align']]}")
    )
    columns = []
    for measure in measures:
        grid, rows, across = pair_grid(result.novelty, measure, False, None)
        fair = np.nan_to_num(grid, nan=np.inf if measure in DISTANCES else -np.inf)
        best = fair.argmin(1) if measure in DISTANCES else fair.argmax(1)
        near = short_names(across)
        cells = cells_of(grid[np.arange(len(rows)), best].tolist(), measure)
        columns.append((broken(measure), [f"{cell} at {near[at]}" for cell, at in zip(cells, best)]))
    title = f"Each layer of {names[0]}, and the layer of {names[1]} that is nearest to it"
    print_in_groups(console, title, (names[0], short_names(rows)), columns)
