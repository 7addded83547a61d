"""From a pass's TensorDict to the tables of ``AnalysisResults``: the columns of ``metrics.csv`` and the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from tensordict import TensorDict
from torch import Tensor

from tdgeom.measures.spectrum_metrics import marked_measures
from tdgeom.model.sites import Site
from tdgeom.run.site_places import SiteParts, site_parts, site_places
from tdgeom.run.to_frame import cell, leaves, whole_numbers

__all__ = [
    "Measured",
    "ablation_rows",
    "eigenvalue_arrays",
    "errors_beside",
    "metrics_rows",
    "novelty_rows",
    "router_rows",
    "table",
]

ERROR_PARTS = ("error_parts", "spectrum_parts")  # what errors are made of, for the pairing of runs
FIRST_ROOTS = ("spectrum", "sample_metrics")
ERROR_BIAS = ("error_bias", "spectrum_bias")  # what is taken off values under intervals
NOT_METRICS = {
    "run",
    "eigenvalues",
    "ablation",
    "between",
    "router",
    "convergence",
    *ERROR_PARTS,
    *ERROR_BIAS,
}


@dataclass(frozen=True)
class Measured:
    """What one pass over the sites of one stack found, and what every row of its tables says about the model.

    ``depth`` is the last layer of the model's stack, ``widths`` are the sites' numbers of features, ``sample`` the rows of the
    sample, ``unit`` what a row is.
    """

    result: TensorDict
    sites: Sequence[Site]
    model: Mapping[str, str]
    depth: int
    widths: Mapping[str, int]
    sample: int
    novelty_k: int
    unit: str = "tokens"

    @cached_property
    def places(self) -> Mapping[str, SiteParts]:
        """Kind, layer and stack of every site that was measured, routers too."""
        routers = self.result.get("router", None)
        sites = [*map(str, self.sites), *([] if routers is None else map(str, routers.keys()))]
        return site_places(sites, {self.sites[0].stack: self.depth + 1})

    @cached_property
    def last(self) -> int:
        """The last layer of the model's stack, behind which its final norm stands where it was measured."""
        return max(self.depth, *(self.places[site]["layer"] or 0 for site in self.sites))


def table(rows: Callable[[Measured], Iterable[dict[str, Any]]], passes: Iterable[Measured]) -> pd.DataFrame:
    """The rows of all passes."""
    return whole_numbers(pd.DataFrame([row for one in passes for row in rows(one)]), "layer")


def metrics_rows(one: Measured) -> Iterator[dict[str, Any]]:
    """One row a site: who and where, then every scalar that some stage wrote for the site."""
    layers = {site.layer for site in one.sites if site.layer is not None}
    measured = max(one.places[site]["layer"] or 0 for site in one.sites)
    found = [root for root in map(str, one.result.keys()) if root not in NOT_METRICS]
    roots = sorted(
        found, key=lambda root: FIRST_ROOTS.index(root) if root in FIRST_ROOTS else len(FIRST_ROOTS)
    )
    values = [(root, path, value) for root in roots for path, value in leaves(one.result.get(root))]
    for site in one.sites:
        yield {
            **one.model,
            **_place(one, site),
            "num_layers": len(layers) or len(one.sites),
            "layer_norm_depth": _share(one, site, measured),
            "relative_depth": _share(one, site, one.last),
            "tokens_observed": int(one.result["run", "rows" if one.unit == "tokens" else "tokens"]),
            "rows_observed": int(one.result["run", "rows"]),
            "hidden_dim": one.widths.get(site),
            **errors_beside(
                {
                    "_".join(path[1:]) or root: _cell(path, value)
                    for root, path, value in values
                    if path[0] == site
                }
            ),
            **_settled(one, site),
        }


def errors_beside(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Every ``<metric>_se`` right behind its metric.

    >>> list(errors_beside({"a": 1, "b": 2, "a_se": 3}))
    ['a', 'a_se', 'b']
    """
    apart = {name for name in cells if name.endswith("_se") and name.removesuffix("_se") in cells}
    names = (one for name in cells if name not in apart for one in (name, f"{name}_se") if one in cells)
    return {name: cells[name] for name in names}


def _settled(one: Measured, site: Site) -> dict[str, Any]:
    """Whether every metric whose convergence was asked for has settled."""
    branch = one.result.get(("convergence", str(site)), None)
    if branch is None:
        return {}
    return {"converged": all(bool(value) for path, value in leaves(branch) if path[-1] == "converged")}


def _cell(path: tuple[str, ...], value: Tensor) -> Any:
    """Which measures are unresolved is told by their names."""
    return ", ".join(marked_measures(value)) if path[-1] == "unresolved" else cell(value)


def _place(one: Measured, site: str) -> dict[str, Any]:
    return {"site": str(site), **one.places[site]}


def _share(one: Measured, site: str, last: int) -> float:
    return (one.places[site]["layer"] or 0) / max(last, 1)


def novelty_rows(one: Measured) -> Iterable[dict[str, Any]]:
    """One row a pair of sites: every scalar under a root whose places are pairs."""
    rows: dict[str, dict[str, Any]] = {}
    for root in map(str, one.result.keys()):
        for path, value in leaves(one.result.get(root)):
            if "->" not in path[0]:
                continue
            a, b = path[0].split("->", 1)
            place = one.places.get(a) or site_parts(a)
            row = {
                **one.model,
                "a": a,
                "b": b,
                **place,
                "transition": f"{_short(a)}->{_short(b)}",
                "novelty_k": min(one.novelty_k, one.widths.get(a, one.novelty_k)),
            }
            rows.setdefault(path[0], row)["_".join(path[1:]) or root] = cell(value)
    for pair, row in rows.items():
        widths = [one.widths[site] for site in pair.split("->", 1) if site in one.widths]
        if "linear_cka" in row and widths:  # it is biased upwards then
            row["few_rows"] = one.sample < 4 * max(widths)
    return [errors_beside(row) for row in rows.values()]


def _short(name: str) -> str:
    layer = site_parts(name)["layer"]
    return name if layer is None else str(layer)


def router_rows(one: Measured) -> Iterator[dict[str, Any]]:
    """One row a router; ``load`` and ``mean_probability`` are vectors over experts."""
    branch = one.result.get("router", None)
    for site in [] if branch is None else branch.keys():
        yield {**one.model, **_place(one, site), **_cells(branch.get(site))}


def ablation_rows(one: Measured) -> Iterator[dict[str, Any]]:
    """The ablation: one row a site and variant."""
    for site in one.sites:
        branch = one.result.get(("ablation", str(site)))
        for variant in branch.keys():
            counts = {
                "tokens" if one.unit == "tokens" else "rows": one.sample,
                "hidden_dim": one.widths.get(site),
            }
            yield {
                **one.model,
                **_place(one, site),
                "variant": variant,
                **counts,
                **_cells(branch.get(variant)),
            }


def _cells(branch: TensorDict) -> dict[str, Any]:
    return errors_beside({path[-1]: _cell(path, value) for path, value in leaves(branch)})


def eigenvalue_arrays(passes: Sequence[Measured]) -> dict[str, np.ndarray]:
    """Eigenvalues by ``layer_00``, or by site where a layer number would not be enough."""
    sites = [site for one in passes for site in one.sites]
    by_layer = len({(site.kind, site.stack) for site in sites}) == 1 and None not in {
        site.layer for site in sites
    }
    return {
        f"layer_{site.layer:02d}" if by_layer else str(site): one.result["eigenvalues", str(site)]
        .cpu()
        .numpy()
        for one in passes
        for site in one.sites
        if "eigenvalues" in one.result.keys()
    }
