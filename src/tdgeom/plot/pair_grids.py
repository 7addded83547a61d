"""Pairs of sites as a matrix: rows and columns in order, both halves, the diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.run.site_places import site_parts

__all__ = ["pair_grid", "short_names", "side_name"]

# a place compared with itself
ITSELF = {
    **dict.fromkeys(("linear_cka", "rv", "layer_cosine_sim", "rbf_cka", "cca_mean", "cca_r2", "svcca"), 1.0),
    **dict.fromkeys(("linear_cka_debiased", "cknna", "distance_correlation", "rsa"), 1.0),
    **dict.fromkeys(("neighborhood_overlap", "jaccard_knn"), 1.0),
    **dict.fromkeys(("feature_subspace_novelty", "procrustes", "angular_shape"), 0.0),
}


def pair_grid(
    table: pd.DataFrame, measure: str | None, symmetric: bool, diagonal: float | str | None
) -> tuple[np.ndarray, list[str], list[str]]:
    """A table of pairs as (the matrix, its row sites, its column sites); NaN where nothing was measured."""
    numbers = [
        name
        for name in table.select_dtypes("number")
        if not name.startswith(("layer", "novelty_k", "k_used"))
    ]
    if not len(table):
        raise ValueError("matrix got a table without rows: nothing was compared.")
    if not {"a", "b"} <= set(table) or (measure is None and len(numbers) != 1):
        raise ValueError(
            f"matrix needs the columns a and b and measure=, one of {numbers}; got {list(table.columns)}."
        )
    measure = numbers[0] if measure is None else measure
    if measure not in table:
        raise KeyError(f"matrix finds no measure {measure!r}; the table has {numbers}.")
    stem = measure.removesuffix("_ab").removesuffix("_ba")
    directed = stem != measure and {f"{stem}_ab", f"{stem}_ba"} <= set(table)
    rows, columns = list(dict.fromkeys(table["a"])), list(dict.fromkeys(table["b"]))
    if set(rows) & set(columns) or len(table) == 1:
        rows = columns = sorted({*rows, *columns}, key=_place)
        symmetric = symmetric and stem == measure
    else:  # the sites of two models
        symmetric, diagonal = False, None
    twice = table[table.duplicated(["a", "b"])]
    if len(twice):
        one = twice.iloc[0]
        raise ValueError(
            f"matrix has one cell a pair, and the table has several rows of {one['a']!r} and {one['b']!r}: keep one kind, such "
            f"as table[table['weights'] == 'trained'], or one run."
        )
    grid = np.full((len(rows), len(columns)), np.nan)
    for one in table.to_dict(orient="records"):
        a, b = rows.index(one["a"]), columns.index(one["b"])
        grid[a, b] = one[f"{stem}_ab"] if directed else one[measure]
        if rows is columns and (directed or (symmetric and np.isnan(grid[b, a]))):
            grid[b, a] = one[f"{stem}_ba"] if directed else one[measure]
    own = ITSELF.get(measure) if diagonal == "auto" else diagonal
    if rows is columns and own is not None:
        blank = np.isnan(grid.diagonal())
        grid[blank.nonzero(), blank.nonzero()] = own
    return grid, rows, columns


def _place(site: str) -> tuple[Any, ...]:
    parts = site_parts(site)
    return (
        str(parts["stack"] or ""),
        str(parts["kind"]),
        -1 if parts["layer"] is None else parts["layer"],
        site,
    )


def side_name(sites: Sequence[str]) -> str:
    """What one side of a matrix is: which kind of site, of which model where names have a prefix."""
    parts = [site_parts(site) for site in sites]
    prefix = sites[0].rpartition("/")[0]
    return " ".join(filter(None, (prefix, parts[0]["stack"], "layer,", parts[0]["kind"])))


def short_names(sites: Sequence[str]) -> list[str]:
    """Layer numbers, where the number alone names a site."""
    parts = [site_parts(site) for site in sites]
    alike = len({(part["kind"], part["stack"]) for part in parts}) == 1 and None not in {
        p["layer"] for p in parts
    }
    numbers = [str(part["layer"]) for part in parts]
    return numbers if alike and len(set(numbers)) == len(sites) else list(sites)
