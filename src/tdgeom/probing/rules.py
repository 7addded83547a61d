"""What every probe does with its rows, fitted or not: prepare them, name the task, fit, decide, score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.surroundings import steady
from tdgeom.probing.class_labels import numbers_of
from tdgeom.probing.control_task import control_map
from tdgeom.probing.labelled_rows import plain_rows, row_labels
from tdgeom.probing.score_errors import SCORES_WITH_ERRORS, score_errors
from tdgeom.probing.scores import SCORES, complete, probe_scores
from tdgeom.probing.splits import row_groups

__all__ = ["AnyProbe", "Fitted", "Metric", "Task", "check_settings", "score_names"]

Fitted = dict[str, Any]
Metric = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Task:
    """What is predicted: classes 0..classes-1 (``regression`` False), or that many numbers."""

    regression: bool
    classes: int

    def refuse_numbers(self, owner: str) -> None:
        """An error where numbers are to be predicted by what tells classes apart."""
        if self.regression:
            raise ValueError(
                f"{owner} predicts classes: give integer labels 0..K-1, or take LinearProbe(solver='ridge')."
            )


class AnyProbe(Protocol):
    """What the functions here ask of a probe: of one site, or of a pair."""

    preprocess: Callable[[Tensor], Tensor] | None
    metrics: Mapping[str, Metric]
    labels: str
    control: str | None
    permutations: int
    groups: int
    ignore_index: int
    seed: int

    @property
    def names(self) -> list[str]:
        """The classes' names as JSON, in the order of their numbers; none where labels were numbers."""

    @property
    def classes(self) -> list[Any]:
        """The classes' names."""

    @property
    def fitted(self) -> Fitted:
        """What the last fit found; under "task" what it predicts."""

    def solve(self, inputs: tuple[Tensor, ...], label: Tensor, task: Task) -> Fitted:
        """Fit on rows: one (N, D) a site read, and int64 (N,) classes or float64 (N, K) targets."""

    def decide(self, fitted: Fitted, inputs: tuple[Tensor, ...]) -> Tensor:
        """A number a row and class (the largest is the answer), or a row and target: (N, K)."""


def check_settings(
    owner: str, holdout: float, test_rows: int, train_rows: int, metrics: Mapping[str, Metric]
) -> None:
    """Settings that all probes take."""
    if not 0 <= holdout < 1:
        raise ValueError(
            f"{owner}: holdout is a share of the documents, at least 0 and below 1, got {holdout}."
        )
    if test_rows < 2 or train_rows < 2:
        raise ValueError(
            f"{owner}: test_rows and train_rows must be at least 2, got {test_rows} and {train_rows}."
        )
    clash = sorted(set(metrics) & {*SCORES, *(f"{name}_se" for name in SCORES)})
    if clash:
        raise ValueError(f"{owner}: metrics named {clash} exist already. Give them other names.")


def score_names(metrics: Mapping[str, Metric], groups: int) -> list[str]:
    """What a probe writes: scores, metrics of one's own, and with groups of documents the errors of both."""
    with_errors = [*SCORES_WITH_ERRORS, *metrics] if groups else []
    return [*SCORES, *metrics, *(f"{name}_se" for name in with_errors)]


def prepared(probe: AnyProbe, x: Tensor) -> Tensor:
    """Rows after ``preprocess``."""
    if probe.preprocess is None:
        return x
    out = probe.preprocess(x)
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != x.shape[0]:
        raise ValueError(
            f"{type(probe).__name__}: preprocess must turn rows {tuple(x.shape)} into ({x.shape[0]}, features), got "
            f"{tuple(getattr(out, 'shape', ())) or type(out).__name__}. Return one row for each row, from that row alone."
        )
    return out


# ------------------------------------------------------------------------------------------------ fitting


def task_of(owner: str, rows: int, *, counts: Tensor | None = None, spread: Tensor | None = None) -> Task:
    """The task that training labels set, by the rows of each class or the spread of each target; what sets none is refused."""
    if rows == 0:
        raise ValueError(
            f"{owner} got no labelled rows to train on. Lower holdout=, or check the labels and ignore_index."
        )
    if spread is not None:
        flat = (spread <= 0).nonzero().flatten().tolist()
        if flat:
            raise ValueError(
                f"{owner}: target {flat} is constant over {rows} training rows, so there is nothing to learn. Give targets that "
                f"vary, or integer labels for classes."
            )
        return Task(True, len(spread))
    assert counts is not None  # classes or targets
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"{owner} expects rows of every class 0..{len(counts) - 1} in its training part, class {missing} is missing (rows "
            f"by class: {counts.tolist()}). Number classes without gaps, lower holdout=, take another seed=, or leave out "
            f"rare classes (ignore_index)."
        )
    if len(counts) < 2:
        raise ValueError(
            f"{owner}: all {rows} training labels are class 0, so there is nothing to tell apart. Give at least two classes."
        )
    return Task(False, len(counts))


def fit_rows(
    probe: AnyProbe, inputs: tuple[Tensor, ...], label: Tensor, bucket: Tensor | None = None
) -> Fitted:
    """What ``solve`` finds on training rows; with the buckets of types also on the control task, under "control"."""
    owner, rows = type(probe).__name__, len(label)
    if label.is_floating_point():
        counts, spread = None, (label != label[:1]).sum(0)
    else:
        counts, spread = label.bincount(), None
    task = task_of(owner, rows, counts=counts, spread=spread)
    found = {"task": task, "train_rows": rows, "counts": counts, "control": None}
    found |= probe.solve(inputs, label, task)
    if bucket is not None and counts is not None:
        found["control"] = probe.solve(inputs, control_map(counts, probe.seed)[bucket], task)
    return found


# ------------------------------------------------------------------------------------------------ a fitted probe


def decision(probe: AnyProbe, *inputs: Any) -> Tensor:
    """What a fitted probe decides by on plain rows: (N, K)."""
    rows = plain_rows(type(probe).__name__, **dict(zip("xy", inputs)))
    weight = probe.fitted.get("weight")
    with steady(rows[0].device):
        ready = tuple(prepared(probe, x) for x in rows)
        if weight is not None and [x.shape[1] for x in ready] != list(weight.shape[1:]):
            raise ValueError(
                f"{type(probe).__name__} was fitted on rows of width {list(weight.shape[1:])}, got "
                f"{[x.shape[1] for x in ready]}. Give rows of the site it was fitted on."
            )
        return probe.decide(probe.fitted, ready)


def answers(task: Task, decided: Tensor) -> Tensor:
    """Classes (N,), or numbers (N,) or (N, K), of decisions (N, K)."""
    if not task.regression:
        return decided.argmax(-1)
    return decided[:, 0] if decided.shape[1] == 1 else decided


def named_answers(probe: AnyProbe, found: Tensor) -> Any:
    """Answers by the names of the classes, as an array, where the probe was fitted on names."""
    return np.array(probe.classes)[found.cpu().numpy()] if probe.names else found


def control_right(probe: AnyProbe, inputs: tuple[Tensor, ...], bucket: Tensor) -> Tensor | None:
    """Where the probe of the control task gives its random labels: bool (N,); None without such a probe."""
    control = probe.fitted["control"]
    if control is None:
        return None
    random = control_map(probe.fitted["counts"], probe.seed)[bucket]
    return probe.decide(control, inputs).argmax(-1) == random


def score(
    probe: AnyProbe, *inputs: Any, row_id: Tensor | None = None, document_id: Tensor | None = None
) -> dict[str, float]:
    """Scores by name of a fitted probe on plain rows and their labels, the last of ``inputs``."""
    name = type(probe).__name__
    *rows, label = plain_rows(name, **dict(zip("xy", inputs[:-1])), label=inputs[-1])
    label = numbers_of(label, probe.names, probe.ignore_index, name, "y").to(rows[0].device)
    label, used = row_labels(label, rows[0], key="y", owner=name, ignore_index=probe.ignore_index)
    if row_id is None:  # each row by itself
        row_id = torch.arange(len(used), device=used.device) << POSITION_BITS
    group = row_groups(row_id.to(used.device), document_id)
    with torch.no_grad(), steady(label.device):
        decided = decision(probe, *(x[used] for x in rows))
        found = scored(probe, decided, label[used], group[used])
    return {key: float(value) for key, value in found.items()}


def scored(
    probe: AnyProbe,
    decided: Tensor,
    label: Tensor,
    group: Tensor,
    right: Tensor | None = None,
) -> dict[str, Tensor]:
    """Scores and the metrics of one's own of decisions on held-out rows; with ``control_right`` those of the control task.

    ``group`` are the rows' documents. With ``probe.groups`` the errors of all scores too, over groups of documents.
    """
    fitted, task, name = probe.fitted, probe.fitted["task"], type(probe).__name__
    if label.is_floating_point() != task.regression:
        raise ValueError(
            f"{name} was fitted for {'regression' if task.regression else 'classification'} but is scored on "
            f"{label.dtype} labels. Give the kind of labels it was fitted on."
        )
    if not task.regression and label.numel() and int(label.max()) >= task.classes:
        raise ValueError(
            f"class {int(label.max())} is among the held-out rows but missing from the training part, which has classes "
            f"0..{task.classes - 1}. Lower holdout=, take another seed=, or leave the class out (ignore_index)."
        )

    def scores(kept: Any, permutations: int = 0) -> dict[str, Tensor]:
        found = probe_scores(
            decided[kept],
            label[kept],
            group[kept],
            train_counts=fitted["counts"],
            permutations=permutations,
            seed=probe.seed,
        )
        if right is not None:
            found["control_accuracy"] = right[kept].double().mean()
            found["selectivity"] = found["accuracy"] - found["control_accuracy"]
        guess = decided if task.regression else decided.argmax(-1)
        own = {key: metric(guess[kept], label[kept]) for key, metric in probe.metrics.items()}
        return found | {
            key: torch.as_tensor(v, dtype=torch.float64, device=label.device) for key, v in own.items()
        }

    found = scores(slice(None), probe.permutations)
    found["train_rows"] = torch.full_like(found["train_rows"], float(fitted["train_rows"]))
    if not probe.groups:
        return found
    values = {key: found[key] for key in (*SCORES_WITH_ERRORS, *probe.metrics)}
    return found | score_errors(scores, values, group, groups=probe.groups, owner=name)


def unscored(probe: AnyProbe, device: torch.device) -> dict[str, Tensor]:
    """What there is to say where nothing was held out: on how many rows the probe was trained."""
    found = complete({"train_rows": float(probe.fitted["train_rows"])}, device)
    names = score_names(probe.metrics, probe.groups)
    return found | {
        name: torch.full_like(found["accuracy"], torch.nan) for name in names if name not in found
    }


def concept_direction(probe: AnyProbe, label: int | str | None = None, *, unit: bool = True) -> Tensor:
    """See ``Probe.direction``."""
    weight, task = probe.fitted.get("weight"), probe.fitted["task"]
    if weight is None or weight.ndim != 2:
        raise TypeError(f"{type(probe).__name__} has no direction: only probes with one weight a feature do.")
    # Decisions of classes are free to share a part; what tells a class from the others is left.
    vectors = weight if task.regression else weight - weight.mean(0)
    if unit:
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
    place: int | None
    if isinstance(label, str):
        if label not in probe.classes:
            raise ValueError(
                f"the probe has the classes {probe.classes[:12] or 'of numbers'}, got label={label!r}."
            )
        place = probe.classes.index(label)
    else:
        place = label
    if place is None:
        return vectors.clone()
    if not 0 <= place < len(vectors):
        raise ValueError(f"the probe has classes 0..{len(vectors) - 1}, got label={label}.")
    return vectors[place].clone()
