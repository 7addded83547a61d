"""Where values of a step go: JSON lines, TensorBoard, or whatever logs a dict and a step."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tdgeom.files.json_text import plain

__all__ = ["JsonLines", "as_loggers"]

Log = Callable[[Mapping[str, float], int], Any]


class JsonLines:
    """A file with a line of JSON for each step: ``{"step": 100, "geometry/residual_output.3/d_pr": 4.2, ...}``.

    Lines are added to what is there, so that a training that goes on goes on in its file; NaN and infinities are null.
    ``pandas.read_json(path, lines=True)`` reads it.

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "geometry.jsonl"
        >>> JsonLines(path).log({"geometry/a/d_pr": 2.0}, 10)
        >>> path.read_text()
        '{"step": 10, "geometry/a/d_pr": 2.0}\\n'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a line, in one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"step": step, **plain(dict(values))}, allow_nan=False)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def as_loggers(given: Any, owner: str) -> list[Log]:
    """What takes values and a step, of everything that was given for a log.

    Raises:
        TypeError: something that logs nothing. ModuleNotFoundError: TensorBoard is not installed.
    """
    if given is None:
        return []
    many = isinstance(given, Iterable) and not isinstance(given, str | Path) and not _logs(given)
    return [_as_logger(one, owner) for one in (given if many else [given])]


def _logs(given: Any) -> bool:
    return callable(given) or any(hasattr(given, name) for name in ("log", "log_metrics", "add_scalar"))


def _as_logger(given: Any, owner: str) -> Log:
    if isinstance(given, str) and given.partition(":")[0] == "tensorboard":
        return _scalars(_summary_writer(given.partition(":")[2] or None, owner))
    if isinstance(given, str | Path) and Path(given).suffix in (".jsonl", ".ndjson"):
        return JsonLines(given).log
    if isinstance(given, logging.Logger):
        raise TypeError(
            f"{owner}: log= takes what logs numbers; for a logging.Logger give a function of values and step."
        )
    if hasattr(given, "add_scalar"):
        return _scalars(given)
    for name in ("log_metrics", "log"):
        if callable(method := getattr(given, name, None)):
            return lambda values, step: method(dict(values), step)
    if callable(given):
        return lambda values, step: given(dict(values), step)
    raise TypeError(
        f"{owner}: log= takes a file such as 'geometry.jsonl', 'tensorboard' (or 'tensorboard:FOLDER'), an object with "
        f".log(dict, step), .log_metrics(dict, step) or .add_scalar, a function, or a list of these, got {given!r:.80}."
    )


def _scalars(writer: Any) -> Log:
    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        if hasattr(writer, "flush"):
            writer.flush()

    return log


def _summary_writer(folder: str | None, owner: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{owner}: log='tensorboard' needs TensorBoard: python -m pip install tensorboard. Without it, log='geometry.jsonl'."
        ) from error
    return SummaryWriter(folder)
