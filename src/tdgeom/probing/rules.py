"""What every probe can do with plain tensors: check labels, predict, score, give its direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.probing.labelled_rows import row_labels
from tdgeom.probing.scores import SCORES, probe_scores
from tdgeom.probing.splits import row_groups

__all__ = ["Fitted", "Metric", "ProbeRules", "Task", "check_settings"]

Fitted = dict[str, Any]
Metric = Callable[[Tensor, Tensor], float]


def plain_rows(owner: str, **given: Any) -> list[Tensor | None]:
    """What a user hands over, as tensors: tensors, NumPy arrays or lists of numbers; (N, D) rows and finite values.

    ``label`` may have any shape of its own; ``None`` stays None.

    >>> [value.dtype for value in plain_rows("LinearProbe", x=[[1.0], [2.0]], label=[0, 1])]
    [torch.float32, torch.int64]
    """
    found: list[Tensor | None] = []
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            try:
                value = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                kind = getattr(value, "dtype", None) or type(value).__name__
                raise TypeError(
                    f"{owner} expects numbers at {name}, got {kind}. Number classes that have names from 0, such as "
                    f"numpy.unique(names, return_inverse=True)[1]."
                ) from None
        if value is not None:
            if name != "label" and value.ndim != 2:
                raise ValueError(
                    f"{owner} expects rows {name} of shape (N, D), got {tuple(value.shape)}. Remedy: x.flatten(0, -2) with a "
                    f"label for each row."
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{owner}: {name} (shape {tuple(value.shape)}) holds NaN or Inf. Drop such rows first."
                )
        found.append(value)
    return found


class Task:
    """What is predicted: classes 0..classes-1 (``regression`` False), or that many numbers."""

    def __init__(self, regression: bool, classes: int) -> None:
        self.regression, self.classes = regression, classes

    def counts(self, label: Tensor) -> Tensor | None:
        """Rows of each class."""
        return None if self.regression else label.bincount(minlength=self.classes)


class ProbeRules:
    """Fitting, predicting and scoring on plain tensors. A probe defines ``solve`` and ``decide``."""

    _fitted: Fitted | None = None
    _task: Task | None = None
    preprocess: Callable[[Tensor], Tensor] | None
    metrics: dict[str, Metric]
    seed: int
    permutations: int
    ignore_index: int

    def solve(self, inputs: tuple[Tensor, ...], label: Tensor, task: Task) -> Fitted:
        """Fit on rows: one (N, D) a site read, and int64 (N,) classes or float64 (N, K) targets."""
        raise TypeError(
            f"{type(self).__name__} defines no solve(): fit the rows there and return what was found."
        )

    def decide(self, fitted: Fitted, inputs: tuple[Tensor, ...]) -> Tensor:
        """A number a row and class (the largest is the answer), or a row and target: (N, K)."""
        raise TypeError(f"{type(self).__name__} defines no decide(): compute (N, K) decisions there.")

    @property
    def fitted(self) -> Fitted:
        """What the last fit found, such as "weight" (K, D) and "bias" (K,)."""
        if self._fitted is None:
            self.refit()
        if self._fitted is None:
            raise ValueError(
                f"{type(self).__name__} is not fitted: call fit(x, y), or run it over labelled rows first."
            )
        return self._fitted

    def refit(self) -> None:
        """Fit what the state holds, if it holds anything."""

    @property
    def task(self) -> Task:
        """What the last fit predicts."""
        self.fitted  # noqa: B018
        return self._task  # type: ignore[return-value]

    def prepared(self, x: Tensor) -> Tensor:
        """Rows after ``preprocess``."""
        if self.preprocess is None:
            return x
        out = self.preprocess(x)
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != x.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: preprocess must turn rows {tuple(x.shape)} into ({x.shape[0]}, features), got "
                f"{tuple(getattr(out, 'shape', ())) or type(out).__name__}. Return one row for each row, from that row alone."
            )
        return out

    def labels(self, label: Tensor, rows: Tensor, key: Key = "y") -> tuple[Tensor, Tensor]:
        """Labels as int64 (N,) or float64 (N, K), and which rows have one."""
        label, used = row_labels(label, rows, key, self.ignore_index, None, type(self).__name__)
        if label.is_floating_point() and label.ndim == 1:
            label = label[:, None]
        return label, used

    def task_of(self, label: Tensor) -> Task:
        """The task that these training labels set; one class or a constant target is refused."""
        name = type(self).__name__
        if label.shape[0] == 0:
            raise ValueError(
                f"{name} got no labelled rows to train on. Lower holdout=, or check the labels and ignore_index."
            )
        if label.is_floating_point():
            flat = (label == label[0]).all(0).nonzero().flatten().tolist()
            if flat:
                raise ValueError(
                    f"{name}: target {flat} is constant ({label[0, flat].tolist()}) over {label.shape[0]} training rows, so "
                    f"there is nothing to learn. Give targets that vary, or integer labels for classes."
                )
            return Task(True, label.shape[1])
        return self.task_of_counts(label.bincount())

    def task_of_counts(self, counts: Tensor) -> Task:
        """The classification that these training counts set."""
        name = type(self).__name__
        missing = (counts == 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(
                f"{name} expects rows of every class 0..{len(counts) - 1} in its training part, class {missing} is missing (rows "
                f"by class: {counts.tolist()}). Number classes without gaps, lower holdout=, take another seed=, or leave out "
                f"rare classes (ignore_index={self.ignore_index})."
            )
        if len(counts) < 2:
            raise ValueError(
                f"{name}: all {int(counts.sum())} training labels are class 0, so there is nothing to tell apart. Give at least "
                f"two classes."
            )
        return Task(False, len(counts))

    def predict(self, *inputs: Tensor) -> Tensor:
        """Classes (N,), or numbers (N,) or (N, K), for rows (N, D)."""
        decision = self.decision(*inputs)
        if not self.task.regression:
            return decision.argmax(-1)
        return decision[:, 0] if decision.shape[1] == 1 else decision

    def decision(self, *inputs: Tensor) -> Tensor:
        """What ``predict`` decides by: (N, K) for rows (N, D)."""
        rows = plain_rows(type(self).__name__, **dict(zip("xy", inputs)))
        prepared = tuple(self.prepared(x) for x in rows)  # type: ignore[arg-type]
        weight = self.fitted.get("weight")
        if weight is not None and [x.shape[1] for x in prepared] != list(weight.shape[1:]):
            raise ValueError(
                f"{type(self).__name__} was fitted on rows of width {list(weight.shape[1:])}, got "
                f"{[x.shape[1] for x in prepared]}. Give rows of the site it was fitted on."
            )
        return self.decide(self.fitted, prepared)

    def score(self, *inputs: Tensor, row_id: Tensor | None = None) -> dict[str, float]:
        """Scores by name on rows and their labels, ``score(x, y)``; error bars over the groups of ``row_id``."""
        *rows, label = inputs
        *rows, label = plain_rows(type(self).__name__, **dict(zip("xy", rows)), label=label)  # type: ignore[assignment]
        label, used = self.labels(label, rows[0])
        group = torch.arange(len(used), device=used.device) if row_id is None else row_groups(row_id)
        decision = self.decision(*(x[used] for x in rows))
        found = self.scored(decision, label[used], group[used])
        return {name: float(value) for name, value in found.items()}

    def scored(self, decision: Tensor, label: Tensor, group: Tensor) -> dict[str, Tensor]:
        """Scores and the metrics of one's own of decisions on held-out rows."""
        fitted, task = self.fitted, self.task
        if label.is_floating_point() != task.regression:
            raise ValueError(
                f"{type(self).__name__} was fitted for {'regression' if task.regression else 'classification'} but is scored on "
                f"{label.dtype} labels. Give the kind of labels it was fitted on."
            )
        if not task.regression and label.numel() and int(label.max()) >= task.classes:
            raise ValueError(
                f"class {int(label.max())} is among the held-out rows but missing from the training part, which has classes "
                f"0..{task.classes - 1}. Lower holdout=, take another seed=, or leave the class out (ignore_index)."
            )
        found = probe_scores(
            decision,
            label,
            group,
            train_counts=fitted.get("counts"),
            permutations=self.permutations,
            seed=self.seed,
        )
        found["train_rows"] = torch.as_tensor(float(fitted["train_rows"]), dtype=torch.float64)
        for name, metric in self.metrics.items():
            guess = decision if task.regression else decision.argmax(-1)
            found[name] = torch.as_tensor(metric(guess, label), dtype=torch.float64)
        return found

    def direction(self, label: int | None = None, *, unit: bool = True) -> Tensor:
        """The concept activation vector of a fitted linear probe, float64: what Steer and ProjectOut take.

        Two classes or one target: (D,), towards class 1 (towards larger values). More: (D, K), a column each, or the
        column of ``label``. For ``preprocess`` it lives in the preprocessed space.

        Args:
            label: the class (or target) to point to.
            unit: length 1; False keeps the probe's own scale.
        """
        weight = self.fitted.get("weight")
        if weight is None or weight.ndim != 2:
            raise TypeError(
                f"{type(self).__name__} has no direction: only probes with one weight a feature do."
            )
        if weight.shape[0] == 2 and not self.task.regression:
            vectors = torch.stack((weight[0] - weight[1], weight[1] - weight[0]), 1) / 2
        elif not self.task.regression:
            # Decisions are free to share a part; what tells a class from the others is left.
            vectors = (weight - weight.mean(0)).mT
        else:
            vectors = weight.mT
        if unit:
            vectors = vectors / vectors.norm(dim=0)
        if label is not None:
            if not 0 <= label < vectors.shape[1]:
                raise ValueError(f"the probe has classes 0..{vectors.shape[1] - 1}, got label={label}.")
            return vectors[:, label].clone()
        if vectors.shape[1] <= 2 and (not self.task.regression or vectors.shape[1] == 1):
            return vectors[:, -1].clone()
        return vectors


def check_settings(
    owner: str, holdout: float, test_rows: int, train_rows: int, metrics: Mapping[str, Metric]
) -> None:
    """Settings that all probes take."""
    if not 0 <= holdout < 1:
        raise ValueError(
            f"{owner}: holdout is a share of the sequences, at least 0 and below 1, got {holdout}."
        )
    if test_rows < 2 or train_rows < 2:
        raise ValueError(
            f"{owner}: test_rows and train_rows must be at least 2, got {test_rows} and {train_rows}."
        )
    clash = sorted(set(metrics) & set(SCORES))
    if clash:
        raise ValueError(f"{owner}: metrics named {clash} exist already. Give them other names.")
