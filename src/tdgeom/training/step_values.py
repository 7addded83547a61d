"""What results say of one step of training, as tidy rows and under flat names for a log."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from tensordict import TensorDictBase, is_tensor_collection

from tdgeom.analysis.results import AnalysisResults
from tdgeom.measures.columns import accompanies, error_column, is_detail
from tdgeom.report.profile_sections import IDENTITY, MARKS
from tdgeom.run.site_places import site_places
from tdgeom.run.to_frame import cell, leaves

__all__ = ["StepValue", "as_rows", "flat_names", "step_values", "tidy_frame"]

COLUMNS = ("step", "site", "layer", "metric", "value", "standard_error")


class StepValue(NamedTuple):
    """A number of a site, or of a pair of sites (``"a->b"``, whose layer is the first one's), and its standard error."""

    site: str
    layer: int | None
    metric: str
    value: float
    standard_error: float = float("nan")


def step_values(results: AnalysisResults | TensorDictBase) -> list[StepValue]:
    """Every number of a site or a pair in results; vectors, marks and what only stands beside a measure are left out."""
    if isinstance(results, AnalysisResults):
        pairs = results.novelty
        if len(pairs):
            pairs = pairs.assign(site=[f"{a}->{b}" for a, b in zip(pairs["a"], pairs["b"])])
        return [value for table in (results.metrics, results.router, pairs) for value in as_rows(table)]
    return list(_of_result(results))


def as_rows(table: pd.DataFrame) -> Iterator[StepValue]:
    """The numbers of a table with a row a site (``AnalysisResults.metrics``)."""
    if not len(table) or "site" not in table:
        return
    names = [str(name) for name in table.columns]
    numbers = [
        name
        for name in table.select_dtypes("number")
        if name not in (*IDENTITY, *MARKS, "step")
        and not is_detail(name, names)
        and not accompanies(name, names)
    ]
    errors = {name: error_column(name, names) for name in numbers}
    layers = table["layer"] if "layer" in table else pd.Series(np.nan, table.index)
    for row, layer in zip(table.to_dict("records"), layers):
        for name in numbers:
            bar = errors[name]
            yield StepValue(
                str(row["site"]),
                None if pd.isna(layer) else int(layer),
                name,
                float(row[name]),
                float("nan") if bar is None else float(row[bar]),
            )


def _of_result(result: TensorDictBase) -> Iterator[StepValue]:
    """The scalars of what ``run`` returned: (root, site, metric ...); a metric that two roots write has the root before it."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for root in map(str, result.keys()):
        branch = result.get(root)
        if root == "run" or not is_tensor_collection(branch):
            continue
        for path, held in leaves(branch):
            value = cell(held)
            if isinstance(value, int | float) and not isinstance(value, bool):
                where, metric = (path[0], "_".join(path[1:]) or root) if len(path) > 1 else ("", path[0])
                found.setdefault((where, metric), {})[root] = float(value)
    sites = [name for where, _ in found for name in where.split("->", 1) if where]
    places = site_places(dict.fromkeys(sites))
    metrics = {metric for _, metric in found}
    for (where, metric), by_root in found.items():
        layer = places[where.split("->", 1)[0]]["layer"] if where else None
        for root, value in by_root.items():
            if not accompanies(metric, metrics) and not is_detail(metric, metrics):
                bar = error_column(metric, [name for at, name in found if at == where])
                error = float("nan") if bar is None else found[where, bar].get(root, float("nan"))
                yield StepValue(
                    where or root, layer, metric if len(by_root) == 1 else f"{root}_{metric}", value, error
                )


def flat_names(values: list[StepValue], prefix: str = "geometry") -> dict[str, float]:
    """Values by names that every log takes: ``geometry/residual_output.3/d_pr``, of pairs ``geometry/a_to_b/linear_cka``.

    >>> flat_names([StepValue("residual_output.3", 3, "d_pr", 2.0), StepValue("a.0->a.1", 0, "linear_cka", 0.5)])
    {'geometry/residual_output.3/d_pr': 2.0, 'geometry/a.0_to_a.1/linear_cka': 0.5}
    """
    return {f"{prefix}/{_word(one.site)}/{one.metric}": one.value for one in values}


def _word(site: str) -> str:
    """A site's name in the letters that every log takes."""
    return re.sub(r"[^\w./ :-]", "_", site.replace("->", "_to_"))


def tidy_frame(values: Mapping[int, list[StepValue]], *, pairs: bool = False) -> pd.DataFrame:
    """A row for each step, site and metric, of sites or of pairs; columns ``step, site, layer, metric, value, standard_error``.

    ``standard_error`` is left out where nothing has one.
    """
    rows = [(step, *one) for step, found in values.items() for one in found if ("->" in one.site) == pairs]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame if frame["standard_error"].notna().any() else frame.drop(columns="standard_error")
