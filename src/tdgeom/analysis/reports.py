"""``write_report``: whatever was measured, as one HTML file; and how results become the tables that a report shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tensordict import TensorDictBase, is_tensor_collection

from tdgeom.analysis.interval_rows import with_intervals
from tdgeom.core.guessed_names import answer_guesses
from tdgeom.files.atomic import explained_writing
from tdgeom.model.sites import HEAD_KINDS
from tdgeom.report import write_report as written
from tdgeom.report.reported_run import ReportedRun, label_of
from tdgeom.run.curves import convergence
from tdgeom.run.profiles import intrinsic_dimension_profile, overlap_profile
from tdgeom.run.several_models import by_model
from tdgeom.run.to_frame import to_frame

__all__ = ["reported", "write_report"]

PROFILES = {
    "diagnostics/intrinsic_dimension": intrinsic_dimension_profile,
    "diagnostics/overlap": overlap_profile,
    "diagnostics/convergence": convergence,
}
ROOTS = {"between": "novelty", "router": "router", "ablation": "diagnostics/normalization_ablation"}


@answer_guesses
def write_report(results: Any, path: str | Path = "report.html", *, title: str | None = None) -> Path:
    """One HTML file that shows what was measured: charts, tables, protocol. It opens from disk and needs no network.

    Args:
        results: ``AnalysisResults`` or ``Comparison``, what ``run`` or ``activation_patching`` returned, a table (a profile,
            ``to_frame``), or a list of them, or a mapping from their names: runs are drawn one over the other, with their
            differences from the first.
        path: the file; one of that name is replaced, whole or not at all.
        title: default what was measured.

    Returns:
        The file's path.

    Raises:
        TypeError: nothing of these. ValueError: no results.

        >>> import tempfile, torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> sites = ["residual_input.0", "residual_input.1"]
        >>> rows = TensorDict({("sample", site): torch.rand(100, 4) for site in sites})
        >>> result = tg.ForEach(tg.TwoNN(), sites)(rows)
        >>> write_report(result, f"{tempfile.mkdtemp()}/report.html").stat().st_size < 3_000_000
        True
    """
    named = by_model(results)
    runs = [reported(results)] if named is None else [reported(one, name) for name, one in named.items()]
    path = Path(path)
    with explained_writing(path):
        return written(runs, path / "report.html" if path.is_dir() else path, title)


def reported(results: Any, name: str | None = None) -> ReportedRun:
    """The tables of any results; ``name`` is what a report calls them."""
    if hasattr(results, "_tables"):  # AnalysisResults
        folder = results.artifact_dir
        own = (
            results.metadata.get("run_name")
            or (folder.name if folder else None)
            or label_of(results.metadata)
        )
        tables = {**_profiles(results), **results._tables(), **with_intervals(results)}
        return ReportedRun(str(name or own or "results"), tables, results.eigenvalues, results.metadata)
    if isinstance(results, pd.DataFrame):
        table = _sites_and_measures(results)
        return ReportedRun(name or "table", {_kind(table): table})
    if is_tensor_collection(results):
        patching = "grid" in results.keys() and "recovered" in results.keys()
        tables = {"patching": _patching(results)} if patching else _tables(results)
        return ReportedRun(
            name or ("patching" if patching else "run"), tables, _spectra(results), _counts(results)
        )
    raise TypeError(
        f"write_report takes AnalysisResults, what run() or activation_patching() returned, a table, or a list or mapping of "
        f"them, got {type(results).__name__}. A saved bundle: tg.load_results(folder)."
    )


def _profiles(results: Any) -> dict[str, pd.DataFrame]:
    """Profiles that results hold: estimates over scales, overlaps of all pairs."""
    found = {}
    for name, profile in PROFILES.items():
        try:
            found[name] = profile(results)
        except (KeyError, ValueError):  # there is none
            continue
    return {name: table for name, table in found.items() if not _told_by_columns(name, table, results)}


def _told_by_columns(name: str, table: pd.DataFrame, results: Any) -> bool:
    """Whether the tables of sites and pairs of an analysis hold all of a profile already."""
    if getattr(results, "metrics", None) is None or "limit" in table:
        return False
    return bool((table["step"] == 0).all()) if "step" in table else not len(table[table["other"].isna()])


def _tables(result: TensorDictBase) -> dict[str, pd.DataFrame]:
    tables = _profiles(result)
    for root, name in ROOTS.items():
        if root in result.keys():
            tables[name] = to_frame(result, root)
    sites = [to_frame(result, root) for root in ("spectrum", "sample_metrics") if root in result.keys()]
    if sites:
        joined = sites[0]
        for other in sites[1:]:
            new = ["site", *[column for column in other if column not in joined]]
            joined = joined.merge(other[new], on="site", how="outer")
        tables["metrics"] = joined
    return tables


def _spectra(result: TensorDictBase) -> dict[str, np.ndarray]:
    branch = result.get("eigenvalues", None)
    if branch is None or not is_tensor_collection(branch):
        return {}
    return {str(site): branch.get(site).detach().cpu().double().numpy() for site in branch.keys()}


def _counts(result: TensorDictBase) -> Mapping[str, Any]:
    told = result.get("run", None)
    if told is None or not is_tensor_collection(told):
        return {}
    names = {"rows": "rows_observed", "tokens": "tokens_observed", "batches": "batches_observed"}
    return {label: int(told.get(name)) for name, label in names.items() if name in told.keys()}


def _sites_and_measures(table: pd.DataFrame) -> pd.DataFrame:
    """A tidy table (a row for each step, layer and measure) with a column for each measure; layers alone get names of sites."""
    if {"step", "metric", "value"} <= set(table) and {"site", "layer"} & set(table):
        values = [name for name in ("value", "standard_error") if name in table]
        beside = [name for name in table if name not in ("metric", *values) and table[name].notna().all()]
        wide = table.pivot(index=beside, columns="metric", values=values)
        ending = {"value": "", "standard_error": "_se"}
        wide.columns = [f"{metric}{ending[of]}" for of, metric in wide.columns]
        table = wide.reset_index()
    if "site" not in table and {"step", "layer"} <= set(table):
        table = table.assign(site=[f"layer.{layer}" for layer in table["layer"]])
    return table


def _kind(table: pd.DataFrame) -> str:
    """Which table of a bundle a table is like."""
    have = set(table)
    for name, columns in (
        ("diagnostics/intrinsic_dimension", {"estimator", "estimate", "step"}),
        ("diagnostics/convergence", {"metric", "rows", "value", "limit"}),
        ("diagnostics/overlap", {"measure", "value", "site", "other"}),
        ("diagnostics/normalization_ablation", {"site", "variant"}),
        ("novelty", {"a", "b"}),
        ("metrics", {"site"}),
    ):
        if columns <= have:
            return name
    return "table"


def _patching(result: TensorDictBase) -> pd.DataFrame:
    """The grids of ``activation_patching``, one row a cell."""
    return pd.DataFrame(list(_cells(result)))


def _cells(result: TensorDictBase) -> Iterator[dict[str, Any]]:
    for kind in result.get("grid").keys():
        held = result.get(("grid", kind))
        metrics = list(held.keys()) if isinstance(held, TensorDictBase) else [None]
        layers, columns = (result.get((root, kind)).tolist() for root in ("layers", "columns"))
        placed = ("positions", kind) in result.keys(True) or "changed" not in result.keys()
        sender = str(kind).partition("->")[0]  # of a path, who sends
        heads = sender.rpartition(".")[2] in HEAD_KINDS
        by = ("position" if not heads else "head or position") if placed else "head" if heads else "part"
        for metric in metrics:
            part = (kind,) if metric is None else (kind, metric)
            grid, recovered = (result.get((root, *part)).double() for root in ("grid", "recovered"))
            named = {"kind": str(kind)} if metric is None else {"kind": str(kind), "metric": str(metric)}
            for i, layer in enumerate(layers):
                for j, column in enumerate(columns):
                    values = {"grid": float(grid[i, j]), "recovered": float(recovered[i, j])}
                    yield {**named, "by": by, "layer": layer, "column": column, **values}
