"""Convergence of a run: every metric against rows, and how many rows it would need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from tensordict import TensorDictBase

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.measures.significance.convergence import rows_to_settle
from tdgeom.run.site_places import site_places

__all__ = ["convergence", "rows_needed"]


@answer_guesses
def convergence(results: Any) -> pd.DataFrame:
    """Every metric against the number of rows, from nested prefixes of the sample: has it settled?

    Args:
        results: of ``analyze_model(..., convergence=True)``, also after loading, or a run's result with ``Convergence`` in its
            pipeline.

    Returns:
        One row a site, metric and number of rows (most first): ``value`` on that many rows; ``limit``, where the curve is
        heading; ``converged``, whether the last doubling and what is left to the limit are within the tolerance.

    Raises:
        ValueError: the results hold no curves.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> sample = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> td = tg.Convergence(tg.TwoNN())(TensorDict({"sample": sample}))
        >>> list(convergence(td)["rows"])
        [400, 200, 100]
    """
    rows, curves = [], list(_curves(results))
    places = site_places([site for site, _ in curves if site is not None])
    for site, branch in curves:
        sizes = branch.get("rows").tolist()
        for metric in (name for name in branch.keys() if name != "rows"):
            leaf = branch.get(metric)
            values, limit = leaf.get("value").tolist(), float(leaf.get("limit"))
            for size, value in zip(sizes, values):
                rows.append(
                    {
                        **({} if site is None else {"site": site, **places[site]}),
                        "metric": str(metric),
                        "rows": size,
                        "value": value,
                        "limit": limit,
                        "converged": bool(leaf.get("converged")),
                    }
                )
    return pd.DataFrame(rows)


@answer_guesses
def rows_needed(results: Any, metric: str, tolerance: float = 0.05) -> pd.DataFrame:
    """How many rows bring a metric within ``tolerance`` (a share of its limit) of where its curve is heading, site by site.

    Args:
        results: as for ``convergence``. metric: a name in its column ``metric``. tolerance: a share, such as 0.05.

    Returns:
        One row a site: ``rows_needed`` (an extrapolation: beyond ten times the rows at hand an order of magnitude), ``rows``,
        those at hand, and ``limit``.

    Raises:
        KeyError: no such metric; the message lists those there are. ValueError: the results hold no curves.
    """
    found, curves = [], list(_curves(results))
    places = site_places([site for site, _ in curves if site is not None])
    for site, branch in curves:
        if metric not in branch.keys():
            have = sorted(str(name) for name in branch.keys() if name != "rows")
            raise KeyError(f"rows_needed: no curve of {metric!r}; there is {have}.")
        sizes, leaf = branch.get("rows"), branch.get(metric)
        needed = rows_to_settle(leaf.get("value"), sizes, tolerance)
        place: Mapping[str, object] = {} if site is None else {"site": site, **places[site]}
        found.append(
            {**place, "metric": metric, "rows_needed": float(torch.ceil(needed)), "rows": int(sizes[0]),
             "limit": float(leaf.get("limit"))}
        )  # fmt: skip
    return pd.DataFrame(found)


def _curves(results: Any) -> Iterator[tuple[str | None, TensorDictBase]]:
    """The branch of each site; one without a name where ``Convergence`` ran on one tensor."""
    held = results if isinstance(results, TensorDictBase) else getattr(results, "result", None)
    passes = [] if held is None else [held] if "convergence" in held.keys() else list(held.values())
    branches = [
        one.get("convergence")
        for one in passes
        if isinstance(one, TensorDictBase) and "convergence" in one.keys()
    ]
    if not branches:
        raise ValueError(
            "convergence: these results hold no curves. Ask for them: analyze_model(..., convergence=True), or put "
            "tg.ForEach(tg.Convergence(stage), sites) in the pipeline."
        )
    for branch in branches:
        if "rows" in branch.keys() and not isinstance(branch.get("rows"), TensorDictBase):
            yield None, branch
        else:
            yield from ((str(site), branch.get(site)) for site in branch.keys())
