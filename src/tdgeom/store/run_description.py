"""What a run says about itself: a few names and plain JSON values, checked on the way in and on the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tdgeom.files.json_text import canonical_json, plain, read_json
from tdgeom.model.loading import config_summary, model_identity

__all__ = ["DETAILS", "RunDescription", "capture_of", "describe_run"]

DETAILS = ("config", "capture", "interventions", "positions", "metadata")
_LONGEST_NAME = 4096


@dataclass(frozen=True)
class RunDescription:
    """What a run says about itself; ``details`` holds those of ``DETAILS`` that were given, as JSON values."""

    model: str | None = None
    revision: str | None = None
    dataset: str | None = None
    experiment: str = "default"
    tags: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """As JSON values, each by its name."""
        told = {name: getattr(self, name) for name in ("model", "revision", "dataset", "experiment")}
        return {**told, "tags": list(self.tags), **self.details}


def describe_run(
    *,
    model: str | nn.Module | None = None,
    revision: str | None = None,
    dataset: str | None = None,
    experiment: str = "default",
    tag: str | Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    capture: Any = None,
    interventions: Any = None,
    positions: Any = None,
    metadata: Mapping[str, Any] | None = None,
) -> RunDescription:
    """A description as plain JSON values.

    Args:
        model: a name, or a module, which gives its name, its revision and the summary of its configuration.
        revision: the commit of the weights.
        dataset: a name.
        experiment: a name that several runs share.
        tag: one label or several.
        config: the model's configuration.
        capture: JSON values, or a ``Capture``, which gives its sites and their module paths.
        interventions, positions: JSON values; a stage or an edit stands for its settings, anything else for its text.
        metadata: anything else, JSON values.

    Raises:
        ValueError: a name that is empty, too long or no text; values nested too deep or too large.
    """
    if isinstance(model, nn.Module):
        config = config_summary(model) if config is None else config
        revision = revision or getattr(getattr(model, "config", None), "_commit_hash", None)
        model = model_identity(model)[1]
    given = {
        "config": config,
        "capture": capture_of(capture),
        "interventions": interventions,
        "positions": positions,
        "metadata": metadata,
    }
    tags = tuple(tag or ()) if isinstance(tag, Iterable) and not isinstance(tag, str) else (tag,)
    return RunDescription(
        model=_name(model, "model") if model is not None else None,
        revision=_name(revision, "revision") if revision is not None else None,
        dataset=_name(dataset, "dataset") if dataset is not None else None,
        experiment=_name(experiment, "experiment"),
        tags=tuple(dict.fromkeys(_name(one, "tag") for one in tags if tag is not None)),
        details=_details({name: value for name, value in given.items() if value is not None}),
    )


def capture_of(capture: Any) -> Any:
    """What a ``Capture`` says of itself: its sites and their module paths. JSON values stay as they are."""
    if not hasattr(capture, "module_paths"):
        return capture
    paths = {str(site): str(path) for site, path in capture.module_paths.items()}
    return {"sites": [str(site) for site in capture.sites], "modules": paths}


def _details(given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        details = plain(given)
        read_json(canonical_json(details), "the description")  # what could not be read back is not written
    except (RecursionError, UnicodeEncodeError, RuntimeError) as error:
        raise ValueError(f"the run's description cannot be kept as JSON: {error}.") from error
    return details


def _name(text: object, what: str) -> str:
    if not isinstance(text, str) or not text or len(text) > _LONGEST_NAME:
        raise ValueError(f"{what}= takes a text of 1 to {_LONGEST_NAME} characters, got {str(text)[:80]!r}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}={text[:80]!r} is no valid Unicode text: {error}.") from error
    return text
