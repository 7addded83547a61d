"""From a run's TensorDict to the tables of ``AnalysisResults``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from tdgeom.core.keys import key_tuple
from tdgeom.core.stage import PairStage
from tdgeom.run.to_frame import cell, leaves, site_parts

__all__: list[str] = []

FIRST_ROOTS = ("spectrum", "sample_metrics")
NOT_METRICS = {"run", "eigenvalues", "ablation", "between", "router", "hidden_dim", "sample_rows"}


@dataclass(frozen=True)
class Identity:
    """What every row says about its model."""

    model_key: str
    model_label: str
    novelty_k: int
    depth: Mapping[str | None, int]

    def columns(self) -> dict[str, object]:
        """The columns that name the model."""
        return {"model_key": self.model_key, "model_label": self.model_label}


def _layers(sites: Sequence[str]) -> list[int]:
    return [part["layer"] for part in map(site_parts, sites) if part["layer"] is not None]  # type: ignore[misc]


def _one_kind(sites: Sequence[str]) -> bool:
    """True where a layer number alone names a site."""
    parts = [site_parts(site) for site in sites]
    return len({(part["kind"], part["stack"]) for part in parts}) == 1 and all(
        part["layer"] is not None for part in parts
    )


def metrics_table(
    result: TensorDictBase,
    sites: Sequence[str],
    identity: Identity,
    extra: Sequence[TensorDictModuleBase] = (),
) -> pd.DataFrame:
    """One row a site: who and where, then every scalar that some stage wrote for the site."""
    last = max(_layers(sites), default=0)
    pair_roots = {
        key_tuple(key)[0] for stage in extra if isinstance(stage, PairStage) for key in stage.out_keys
    }
    roots = [root for root in FIRST_ROOTS if root in result.keys()]
    roots += [root for root in result.keys() if root not in (*roots, *NOT_METRICS, *pair_roots)]
    rows = []
    for site in map(str, sites):
        parts = site_parts(site)
        layer = parts["layer"]
        deepest = identity.depth.get(parts["stack"], last)  # type: ignore[arg-type]
        row = {
            **identity.columns(),
            "site": site,
            **parts,
            "num_layers": len(set(_layers(sites))) or len(sites),
            "layer_norm_depth": np.nan if layer is None else layer / max(last, 1),  # type: ignore[operator]
            "relative_depth": np.nan if layer is None else layer / max(deepest, 1),  # type: ignore[operator]
            "tokens_observed": int(result["run", "rows"]),
            "hidden_dim": _hidden_dim(result, site),
        }
        for root in roots:
            for path, value in leaves(result.get(root)):
                if path[0] == site:
                    row["_".join(path[1:]) or root] = cell(value)
        rows.append(row)
    return _whole_layers(pd.DataFrame(rows))


def _hidden_dim(result: TensorDictBase, site: str) -> int | None:
    value = result.get(("hidden_dim", site), None)
    return None if value is None else int(value)


def novelty_table(result: TensorDictBase, sites: Sequence[str], identity: Identity) -> pd.DataFrame:
    """One row a pair of sites: every scalar under a root whose places are pairs."""
    rows: dict[str, dict[str, object]] = {}
    for root in result.keys():
        branch = result.get(root)
        if not hasattr(branch, "keys"):
            continue
        for path, value in leaves(branch):
            if "->" not in path[0]:
                continue
            a, b = path[0].split("->", 1)
            one, other = site_parts(a), site_parts(b)
            row = rows.setdefault(
                path[0],
                {
                    **identity.columns(),
                    "a": a,
                    "b": b,
                    "kind": one["kind"],
                    "stack": one["stack"],
                    "layer": one["layer"],
                    "transition": f"{_short(a, one)}->{_short(b, other)}",
                    "novelty_k": min(identity.novelty_k, _hidden_dim(result, a) or identity.novelty_k),
                },
            )
            row["_".join(path[1:]) or root] = cell(value)
    return _whole_layers(pd.DataFrame(list(rows.values())))


def _short(name: str, parts: Mapping[str, object]) -> str:
    return name if parts["layer"] is None else str(parts["layer"])


def router_table(result: TensorDictBase, identity: Identity) -> pd.DataFrame:
    """One row a router; ``load`` and ``mean_probability`` are vectors over experts."""
    branch = result.get("router", None)
    if branch is None:
        return pd.DataFrame()
    rows = []
    for site in branch.keys():
        values = {name: cell(branch.get((site, name))) for name in branch.get(site).keys()}
        rows.append({**identity.columns(), "site": site, **site_parts(site), **values})
    return _whole_layers(pd.DataFrame(rows))


def diagnostics_table(result: TensorDictBase, sites: Sequence[str], identity: Identity) -> pd.DataFrame:
    """The ablation: one row a site and variant."""
    rows = []
    for site in map(str, sites):
        branch = result.get(("ablation", site))
        for variant in branch.keys():
            row = {**identity.columns(), "site": site, **site_parts(site), "variant": variant}
            row |= {"tokens": int(result["sample_rows"]), "hidden_dim": _hidden_dim(result, site)}
            rows.append({**row, **{name: cell(value) for (name,), value in leaves(branch.get(variant))}})
    return _whole_layers(pd.DataFrame(rows))


def eigenvalue_arrays(
    result: TensorDictBase, sites: Sequence[str], several_groups: bool
) -> dict[str, np.ndarray]:
    """Eigenvalues by ``layer_00``, or by site where a layer number would not be enough."""
    branch = result.get("eigenvalues", None)
    if branch is None:
        return {}
    by_layer = _one_kind(sites) and not several_groups
    return {
        f"layer_{site_parts(site)['layer']:02d}" if by_layer else site: branch.get(site).cpu().numpy()
        for site in map(str, sites)
    }


def _whole_layers(table: pd.DataFrame) -> pd.DataFrame:
    if "layer" in table and table["layer"].notna().all():
        table["layer"] = table["layer"].astype(int)
    return table
