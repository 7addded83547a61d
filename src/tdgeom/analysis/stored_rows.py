"""The analysis of rows that are kept already: no model runs, the tables are those of ``analyze_model``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensordict.nn import TensorDictSequential

from tdgeom.analysis.analysis_settings import AnalysisSettings
from tdgeom.analysis.analysis_state import Described
from tdgeom.analysis.default_pipeline import analysis_pipeline
from tdgeom.analysis.metadata import run_record
from tdgeom.analysis.one_model import by_stack, measured_passes
from tdgeom.analysis.results import AnalysisResults
from tdgeom.analysis.seed_names import seed_metadata
from tdgeom.core.keys import key_tuple
from tdgeom.model.sites import Site
from tdgeom.rows.batches import as_batch
from tdgeom.store.row_source import RowSource
from tdgeom.store.shuffled_rows import ShuffledRows

__all__ = ["analyzed_rows", "are_stored_rows", "named_site"]


def are_stored_rows(given: Any) -> bool:
    """Whether a loader is one of a store's."""
    return isinstance(given, RowSource | ShuffledRows)


def analyzed_rows(
    rows: Iterable[Any],
    label: str | None,
    settings: AnalysisSettings,
    sites: str | Sequence[str] | None = None,
    *,
    checkpoint: str | Path | None = None,
    **run_options: Any,
) -> AnalysisResults | None:
    """The analysis of batches with ``("tokens", site)`` and ``"row_id"``, such as ``store.rows(run)``, on rank 0.

    Args:
        rows: the batches; read once more for the names of their sites.
        label: what the model is called; default what the store says.
        settings: what is asked; of ``select`` only ``also``, what the rows carry.
        sites: names or kinds among those there are; default all.
        checkpoint: as for ``run``; further options go to ``run`` too.

    Raises:
        ValueError: rows that can be read once, no ``"tokens"`` in them, no such site, a selection or errors (which need the
            tokens' model).
    """
    extra = sorted(set(settings.select) - {"also"})
    if extra or settings.errors or settings.layers != "all" or settings.calls is not None:
        asked = extra or [name for name in ("errors", "layers", "calls") if getattr(settings, name)]
        raise ValueError(
            f"analyze_model: rows that are stored are chosen already, so {', '.join(asked)} has nothing to choose from. "
            f"Name sites with sites=, rows with max_rows=, carried values with select={{'also': [...]}}."
        )
    found = _sites(rows, sites)
    source = rows.source if isinstance(rows, ShuffledRows) else rows
    about: Mapping[str, Any] = source.about if isinstance(source, RowSource) else {}
    label = label or about.get("model") or "stored rows"
    key = re.sub(r"[^a-z0-9._-]+", "_", str(label).lower()).strip("_.") or "model"
    depths: dict[str | None, int] = {}
    for site in found:
        depths[site.stack] = max(depths.get(site.stack, 0), site.layer or 0)

    def pipeline_of(stack: str | None, own: Sequence[Site]) -> TensorDictSequential:
        return analysis_pipeline(None, own, settings)

    described = Described({"model_key": key, "model_label": label}, depths, "rows")
    groups = by_stack(found, rows)
    passes = measured_passes(groups, pipeline_of, rows, settings, described, checkpoint, **run_options)
    if not passes.passes:
        return None
    told = {
        "model_id": label,
        "model_class": None,
        "model_config": about.get("config"),
        "stored_run": about.get("id"),
        "hook_targets": {},
        "input_device": None,
        "sites": [str(site) for site in found],
        "row_unit": "rows",
        "layers": sorted({site.layer for site in found if site.layer is not None}),
        "num_blocks": None,
        **run_record([one.result for one in passes.passes], settings),
    }
    return passes.results(settings, {**told, **seed_metadata(told)})


def _sites(rows: Iterable[Any], wanted: str | Sequence[str] | None) -> list[Site]:
    """The sites that the rows are of, in their order, or those of them that are asked for."""
    if isinstance(rows, Iterator):
        raise ValueError(
            "analyze_model: without a model the rows are looked at before they are read, but this iterator can be read once. "
            "Give store.rows(run), a list or a DataLoader."
        )
    first = next(iter(rows), None)
    td = None if first is None else as_batch(first, None, None)
    keys = [] if td is None else [key_tuple(key) for key in td.keys(True, True)]
    names = [key[1] for key in keys if key[0] == "tokens" and len(key) == 2]
    if not names:
        raise ValueError(
            "analyze_model needs a model: model_name= (an id, a directory or a module) or model= (a module). Without one it "
            f"takes rows, ('tokens', site) and 'row_id', such as store.rows(run) has; the first batch has "
            f"{sorted({key[0] for key in keys})}."
        )
    sites = [named_site(name) for name in names]
    if wanted is None:
        return sites
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in asked if not any(name in (str(site), site.kind) for site in sites)]
    if unknown:
        raise ValueError(f"analyze_model: the rows have no site {unknown}; there is {names}.")
    return [site for site in sites if {str(site), site.kind} & set(map(str, asked))]


def named_site(name: str) -> Site:
    """A site of that name; one of the user's own is its own kind."""
    try:
        return Site(name)
    except ValueError:
        own = str.__new__(Site, name)
        own.prefix, own.stack, own.kind, own.layer, own.path = "", None, name, None, None
        return own
