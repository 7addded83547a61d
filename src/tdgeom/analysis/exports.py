"""Results for other tools: Arrow tables, Parquet files, labelled arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.files.atomic import explained_writing, write_whole
from tdgeom.files.json_text import plain
from tdgeom.report.profile_sections import IDENTITY

__all__ = ["arrow_tables", "eigenvalue_table", "parquet_files", "to_xarray"]

_ALONG = ("step", "model", "weights")  # what a table may hold several of, beside sites
_TIDY = {"site", "metric", "value"}


def arrow_tables(tables: Mapping[str, pd.DataFrame], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Tables as ``pyarrow.Table`` by name, with the metadata as JSON under ``b"tdgeom"`` of each schema; empty ones left out.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """
    pyarrow = _library("pyarrow", "Arrow tables and Parquet files")
    about = json.dumps(plain(dict(metadata)))
    found = {}
    for name, table in tables.items():
        if not len(table.columns):
            continue
        made = pyarrow.Table.from_pandas(table.map(_cell), preserve_index=False)
        found[name] = made.replace_schema_metadata(
            {**(made.schema.metadata or {}), b"tdgeom": about.encode()}
        )
    return found


def parquet_files(tables: Mapping[str, Any], folder: Path) -> list[Path]:
    """Arrow tables as Parquet files of their names (``/`` becomes ``_``), each whole or not at all, and their paths."""
    parquet, pyarrow = import_module("pyarrow.parquet"), import_module("pyarrow")
    paths = []
    with explained_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            held = pyarrow.BufferOutputStream()
            parquet.write_table(table, held)
            paths.append(folder / f"{name.replace('/', '_')}.parquet")
            write_whole(paths[-1], [held.getvalue().to_pybytes()])
    return paths


def eigenvalue_table(eigenvalues: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """A row for each eigenvalue: ``name`` (as in ``results.eigenvalues``), ``rank`` from 1, ``eigenvalue``.

    >>> eigenvalue_table({"layer_00": np.array([2.0, 1.0])})["rank"].tolist()
    [1, 2]
    """
    parts = [
        pd.DataFrame(
            {
                "name": name,
                "rank": np.arange(1, len(values) + 1),
                "eigenvalue": np.asarray(values, dtype=float),
            }
        )
        for name, values in eigenvalues.items()
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


@answer_guesses
def to_xarray(results: Any, *, pairs: bool = False) -> Any:
    """Numbers of sites, or of pairs of sites, as one ``xarray.DataArray`` of dimensions layer x step x metric.

    Args:
        results: ``AnalysisResults``, a sweep, or a table: one row a site, or one row a site and metric (``frame()`` of a sweep or
            a watch).
        pairs: of pairs of sites (``results.pairs``) in place of sites.

    Returns:
        float64. The first dimension is ``layer`` where every layer has one site, with the sites' names beside it, else ``site``,
        with layers beside it; then ``step``, ``model``, ``weights`` where the table has several of them; ``metric`` is the last.
        NaN where something was not measured. ``attrs`` name the model.

    Raises:
        ModuleNotFoundError: xarray is not installed. ValueError: a table without sites, or with a site twice.

        >>> table = pd.DataFrame({"site": ["embed", "final_norm"], "layer": [0, 1], "d_pr": [3.0, 2.0]})
        >>> to_xarray(table).dims
        ('layer', 'metric')
    """
    xarray = _library("xarray", "labelled arrays")
    table = _wide(results, pairs)
    along = [
        name for name in _ALONG if name in table and (name == "step" or table[name].nunique(dropna=False) > 1)
    ]
    by_site = (
        table.groupby("site", sort=False)["layer"].first() if "layer" in table else pd.Series(dtype=float)
    )
    one_each = len(by_site) > 0 and by_site.notna().all() and by_site.is_unique
    place = "layer" if one_each else "site"
    numbers = [
        str(name) for name in table.select_dtypes(["number", "bool"]) if name not in (*IDENTITY, "step")
    ]
    if not numbers:
        raise ValueError(
            f"to_xarray: there are no numbers of {'pairs of sites' if pairs else 'single sites'} here. Remedy: "
            f"pairs={not pairs}, or results that hold some."
        )
    index = [place, *along]
    if table.duplicated(index).any():
        twice = table.loc[table.duplicated(index), index].iloc[0].to_dict()
        raise ValueError(
            f"to_xarray expects one row for each of {index}, got {twice} twice. Give a table of one model and sample."
        )
    values = table.set_index(index)[numbers].astype(float)
    array = (
        xarray.Dataset.from_dataframe(values)
        .to_dataarray("metric", name="geometry")
        .transpose(*index, "metric")
    )
    order = (
        list(by_site.sort_values() if one_each else by_site.index)
        if len(by_site)
        else list(table["site"].unique())
    )
    array = array.sel({place: order}).assign_coords(metric=numbers)
    if one_each:
        site_of = {layer: site for site, layer in by_site.items()}
        array = array.assign_coords(site=("layer", [site_of[layer] for layer in order]))
    elif len(by_site):
        array = array.assign_coords(layer=("site", [float(by_site[site]) for site in order]))
    return array.assign_attrs(_attributes(results))


def _wide(results: Any, pairs: bool) -> pd.DataFrame:
    """One row a site (or pair, as ``"a->b"``)."""
    table = results
    if not isinstance(results, pd.DataFrame):
        table = getattr(results, "novelty" if pairs else "metrics", None)
    if isinstance(table, pd.DataFrame) and {"a", "b"} <= set(table.columns) and "site" not in table:
        table = table.assign(site=[f"{a}->{b}" for a, b in zip(table["a"], table["b"])])
    if not isinstance(table, pd.DataFrame) or "site" not in table or not len(table):
        raise ValueError(
            f"to_xarray expects results, or a table with a column 'site' (or 'a' and 'b'), got {type(results).__name__}"
            f"{'' if not isinstance(table, pd.DataFrame) else f' with columns {list(table.columns)[:8]}'}."
        )
    if set(table.columns) >= _TIDY:
        rows = [name for name in ("step", "site", "layer") if name in table]
        places = {site: place for place, site in enumerate(table["site"].unique())}  # pivot puts 10 before 2
        table = (
            table.pivot(index=rows, columns="metric", values="value").reset_index().rename_axis(columns=None)
        )
        table = table.sort_values(
            "site", key=lambda sites: sites.map(places), kind="stable", ignore_index=True
        )
    return table


def _attributes(results: Any) -> dict[str, str]:
    """What netCDF can hold of the metadata: words."""
    told = getattr(results, "metadata", {})
    return {
        name: str(told[name]) for name in ("model_id", "run_name", "dataset", "data_sha256") if told.get(name)
    }


def _cell(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _library(name: str, what: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what} need {name}: python -m pip install {name}.") from error
