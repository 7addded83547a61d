"""Checkpoints of one training, however they are given: steps, names, and how the model of each is opened."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tdgeom.model.loading import load_model

__all__ = ["Checkpoints", "TrainedTo", "as_checkpoints"]

Checkpoints = str | Path | Iterable[str | Path] | Mapping[int, Any] | Callable[[int], Any]
_FOLDER = re.compile(r"(?:checkpoint|step|global_step|iter|ckpt)[-_]?(\d+)$")


@dataclass(frozen=True)
class TrainedTo:
    """A model trained to a step.

    Attributes: ``name`` of the checkpoint, ``model`` what the model is called at every step, ``open`` the function that gives it,
    ``given`` whether it is a module of the caller's.
    """

    step: int
    name: str
    model: str | None
    open: Callable[[], nn.Module]
    given: bool = False


def as_checkpoints(
    given: Checkpoints, steps: Iterable[int] | None, owner: str, **loading: Any
) -> list[TrainedTo]:
    """Checkpoints in the order of their steps.

    Args:
        given: a folder that holds ``checkpoint-100``, ...; names, each a folder or ``id@revision``, whose last number is the
            step; a mapping from steps to names, modules or functions that make one; a function of the step, with ``steps``.
        steps: those that are meant; default all that are found. loading: for ``load_model``.

    Raises:
        ValueError: no checkpoints, two of one step, names without a number, a function without steps.

        >>> [one.step for one in as_checkpoints(["pythia@step1000", "pythia@step0"], None, "an example")]
        [0, 1000]
    """
    wanted = None if steps is None else list(steps)
    if isinstance(given, str | Path):
        found = _inside(Path(given), owner)
    elif isinstance(given, Mapping):
        found = {_whole(step, owner): value for step, value in given.items()}
    elif isinstance(given, nn.Module):
        raise TypeError(
            f"{owner}: checkpoints is a mapping from steps to models, got one {type(given).__name__}."
        )
    elif callable(given):
        if wanted is None:
            raise ValueError(
                f"{owner}: a function that makes the model of a step needs steps=, such as steps=[0, 100, 1000]."
            )
        made: Callable[[int], Any] = given
        found = {_whole(step, owner): _later(made, step) for step in wanted}
    else:
        found = _by_number(list(given), owner)
    if wanted is not None:
        if missing := [step for step in wanted if step not in found]:
            raise ValueError(
                f"{owner}: there is no checkpoint of step {missing[0]}; there are {sorted(found)[:20]}."
            )
        found = {step: found[step] for step in wanted}
    if not found:
        raise ValueError(f"{owner}: there are no checkpoints in {given!r:.80}.")
    return [
        TrainedTo(
            step,
            *_names(found[step], step),
            _opener(found[step], owner, loading),
            isinstance(found[step], nn.Module),
        )
        for step in sorted(found)
    ]


def _later(made: Callable[[int], Any], step: int) -> Callable[[], Any]:
    return lambda: made(step)


def _inside(folder: Path, owner: str) -> dict[int, Any]:
    """The checkpoints in a trainer's output directory."""
    if not folder.is_dir():
        raise ValueError(
            f"{owner}: checkpoints={str(folder)!r} is no folder that holds checkpoint-100, checkpoint-200, ... Several "
            f"revisions of a model are a list of names, such as ['org/model@step1000', 'org/model@step2000']."
        )
    named = {
        path: match
        for path in sorted(folder.iterdir())
        if path.is_dir() and (match := _FOLDER.search(path.name))
    }
    return _unique([(int(match[1]), path) for path, match in named.items()], owner)


def _by_number(names: list[Any], owner: str) -> dict[int, Any]:
    """Names by the last number in them."""
    if wrong := [name for name in names if not isinstance(name, str | Path)]:
        raise TypeError(
            f"{owner}: a list of checkpoints holds names, got {type(wrong[0]).__name__}. "
            f"Give a mapping from steps: {{0: model, ...}}."
        )
    numbers = [
        (re.findall(r"\d+", str(name).rpartition("@")[2].rstrip("/").rpartition("/")[2]), name)
        for name in names
    ]
    if without := [name for found, name in numbers if not found]:
        raise ValueError(
            f"{owner}: the step of {str(without[0])!r} is not in its name. Give a mapping: {{step: name, ...}}."
        )
    return _unique([(int(found[-1]), name) for found, name in numbers], owner)


def _unique(pairs: list[tuple[int, Any]], owner: str) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for step, value in pairs:
        if step in found:
            raise ValueError(
                f"{owner}: {found[step]} and {value} are both of step {step}. Give a mapping: {{step: name, ...}}."
            )
        found[step] = value
    return found


def _whole(step: Any, owner: str) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"{owner}: steps are whole numbers from 0, got {step!r}.")
    return step


def _names(value: Any, step: int) -> tuple[str, str | None]:
    if not isinstance(value, str | Path):
        return f"step {step}", None
    model, _, revision = str(value).partition("@")
    return str(value), model if revision else Path(value).parent.name or None


def _opener(value: Any, owner: str, loading: Mapping[str, Any]) -> Callable[[], nn.Module]:
    def opened() -> nn.Module:
        made = value if isinstance(value, nn.Module) or not callable(value) else value()
        if isinstance(made, str | Path):
            return _loaded(str(made), loading)
        if not isinstance(made, nn.Module):
            raise TypeError(
                f"{owner}: a checkpoint is a name, a module or a function that makes one, got {type(made).__name__}."
            )
        return made

    return opened


def _loaded(name: str, loading: Mapping[str, Any]) -> nn.Module:
    """A folder, or an id with its revision behind an ``@``."""
    model, _, revision = name.partition("@")
    if not revision or Path(name).exists():
        return load_model(name, **loading)
    options = dict(loading.get("model_kwargs") or {})
    return load_model(model, **{**loading, "model_kwargs": {**options, "revision": revision}})
