"""What an analysis records about itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDict
from torch import nn

from tdgeom.analysis.analysis_settings import AnalysisSettings, Settings
from tdgeom.analysis.seed_names import seed_metadata
from tdgeom.files.bundle import SCHEMA_VERSION
from tdgeom.model.capture import Capture
from tdgeom.model.capture_spec import CaptureSpec
from tdgeom.model.loading import config_summary, model_identity, software_versions

__all__ = ["analysis_metadata", "model_record", "row_unit", "run_record", "with_run"]


def row_unit(capture: Capture, select: Mapping[str, Any]) -> str:
    """What one row of an analysis is: "sequences" where each gives one, "tokens" of a model of tokens, else "rows".

    >>> import tdgeom as tg
    >>> row_unit(tg.Capture(nn.Linear(2, 2), "module_output:"), {})
    'rows'
    """
    if select.get("pool") is not None or isinstance(select.get("positions"), int):
        return "sequences"
    if isinstance(positions := select.get("positions"), str) and re.fullmatch(
        r"(first|last|cls)(-\d+)?", positions
    ):
        return "sequences"
    words = {"input_ids", "inputs_embeds", "decoder_input_ids"}
    return "tokens" if words & {str(key) for key in capture.in_keys} else "rows"


def run_record(results: Sequence[TensorDict], settings: Settings) -> dict[str, Any]:
    """What the passes counted, how long they took and why they stopped, under which settings and versions."""

    def total(*name: str) -> float:
        return sum(result.get(("run", *name)).item() for result in results)

    return {
        "artifact_schema_version": SCHEMA_VERSION,
        "max_rows": settings.max_rows,
        **{f"{name}_observed": total(name) for name in ("rows", "tokens", "batches")},
        **{name: total(name) for name in ("padding_rows", "dropped_rows")},
        "stopped": results[0]["run", "stopped"],
        "loader": results[0]["run", "loader"],
        "data_sha256": results[0]["run", "data_sha256"],
        "settings": settings.record(),
        "software": software_versions(),
        "runtime_seconds": {phase: total("seconds", phase) for phase in results[0]["run", "seconds"].keys()},
    }


def model_record(model: nn.Module, label: str | None, capture: Capture) -> dict[str, Any]:
    """Which model it was, and which of its modules were read."""
    return {
        "id": model_identity(model, label)[1],
        "class": type(model).__name__,
        "config": config_summary(model),
        "parameter_count": sum(parameter.numel() for parameter in model.parameters()),
        "hook_targets": {str(site): path for site, path in capture.module_paths.items()},
    }


def analysis_metadata(
    model: nn.Module,
    label: str | None,
    capture: Capture,
    settings: AnalysisSettings,
    blocks: Mapping[str | None, int],
) -> dict[str, Any]:
    """Model, sites and what a row is: what an analysis knows of itself before it is run.

    ``blocks`` are those of each stack: ``num_blocks`` is their number, by stack where a model has several, None without.
    """
    first = next(model.parameters(), None)
    own = model_record(model, label, capture)
    return {
        **{f"model_{name}": own.pop(name) for name in ("id", "class", "config")},
        **own,
        "dtype": None if first is None else str(first.dtype).removeprefix("torch."),
        "input_device": None if first is None else str(first.device),
        "sites": [str(site) for site in capture.sites],
        "row_unit": row_unit(capture, settings.select),
        "capture": _capture_record(capture, settings.select),
        "layers": sorted({site.layer for site in capture.sites if site.layer is not None}),
        "num_blocks": blocks.get(None)
        if set(blocks) <= {None}
        else {str(name): n for name, n in blocks.items()},
    }


def with_run(
    told: Mapping[str, Any], results: Sequence[TensorDict], settings: AnalysisSettings
) -> dict[str, Any]:
    """What was known before, with counts, every setting that changes a number, versions and times; the seed's keys too."""
    whole = {**told, **run_record(results, settings)}
    return {**whole, **seed_metadata(whole)}


def _capture_record(capture: Capture, select: Mapping[str, Any]) -> dict[str, Any]:
    """The capture's specification as plain data; ``CaptureSpec.from_dict`` makes the same capture of it.

    Positions chosen by a key of the batch cannot be said without that batch: they stand as their name.
    """
    positions, reduce = select.get("positions", "all"), select.get("pool")
    try:
        return CaptureSpec.of(capture, positions=positions, reduce=reduce).to_dict()
    except (ValueError, TypeError):
        return {**CaptureSpec.of(capture, reduce=reduce).to_dict(), "positions": str(positions)}
