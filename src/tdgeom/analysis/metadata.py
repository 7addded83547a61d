"""What an analysis records about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdgeom.files.bundle import SCHEMA_VERSION
from tdgeom.measures.normalization import NormalizationAblation
from tdgeom.model.capture import Capture
from tdgeom.model.capture_spec import CaptureSpec
from tdgeom.model.loading import config_summary, model_identity, software_versions

__all__: list[str] = []


def stage_settings(stage: TensorDictModuleBase) -> dict[str, Any]:
    """A stage's public settings, which may change its numbers."""
    plain = (str, int, float, bool, tuple, list)
    values = {
        name: value
        for name, value in vars(stage).items()
        if not name.startswith("_") and isinstance(value, plain)
    }
    values.pop("training", None)
    return {
        "stage": type(stage).__name__,
        **values,
        "in_keys": list(stage.in_keys),
        "out_keys": list(stage.out_keys),
    }


def run_metadata(
    model: nn.Module,
    label: str | None,
    capture: Capture,
    frames: Sequence[tuple[TensorDict, list[Any]]],
    settings: Mapping[str, Any],
    max_tokens: int | None,
    metrics: Any,
) -> dict[str, Any]:
    """Model, sites, counts, every setting that changes a number, versions and times of an analysis."""
    first = next(model.parameters(), None)
    counts = {
        name: sum(int(result["run", name]) for result, _ in frames) for name in ("rows", "tokens", "batches")
    }
    seconds = {
        phase: sum(float(result["run", "seconds", phase]) for result, _ in frames)
        for phase in frames[0][0]["run", "seconds"].keys()
    }
    return {
        "artifact_schema_version": SCHEMA_VERSION,
        "model_id": model_identity(model, label)[1],
        "model_class": type(model).__name__,
        "model_config": config_summary(model),
        "parameter_count": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": None if first is None else str(first.dtype).removeprefix("torch."),
        "input_device": None if first is None else str(first.device),
        "sites": [str(site) for site in capture.sites],
        "capture": capture_record(capture, settings["select"]),
        "hook_targets": {str(site): path for site, path in capture.module_paths.items()},
        "layers": sorted({site.layer for site in capture.sites if site.layer is not None}),
        "max_tokens": max_tokens,
        "rows_observed": counts["rows"],
        "tokens_observed": counts["tokens"],
        "batches_observed": counts["batches"],
        "padding_rows": sum(int(result["run", "padding_rows"]) for result, _ in frames),
        "dropped_rows": sum(int(result["run", "dropped_rows"]) for result, _ in frames),
        "stopped": frames[0][0]["run", "stopped"],
        "settings": {
            "metrics": list(settings["families"]) + [type(stage).__name__ for stage in settings["extra"]],
            "extra_stages": [stage_settings(stage) for stage in settings["extra"]],
            "diagnostics": settings["diagnostics"],
            "sample_limit": settings["sample_limit"],
            "novelty_k": settings["novelty_k"],
            "seed": settings["seed"],
            "neighbors": settings["neighbors"],
            "select": {name: str(value) for name, value in settings["select"].items()},
            "ablation_variants": list(NormalizationAblation().variants) if settings["diagnostics"] else [],
        },
        "software": software_versions(),
        "runtime_seconds": seconds,
    }


def capture_record(capture: Capture, select: Mapping[str, Any]) -> dict[str, Any]:
    """The capture's specification as plain data; ``CaptureSpec.from_dict`` makes the same capture of it.

    Positions chosen by a key of the batch cannot be said without that batch: they stand as their name.
    """
    positions, reduce = select.get("positions", "all"), select.get("pool")
    try:
        return CaptureSpec.of(capture, positions=positions, reduce=reduce).to_dict()
    except (ValueError, TypeError):
        return {**CaptureSpec.of(capture, reduce=reduce).to_dict(), "positions": str(positions)}
