"""``ChangeAlarms``: a word when a watched metric leaves, within few updates, the course it has kept."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student
from tensordict import TensorDictBase
from torch import Tensor

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.warnings import tell

__all__ = ["Alarm", "AlarmRule", "ChangeAlarms"]

_SCALES = ("log", "log_rest", "linear")


@answer_guesses
@dataclass(frozen=True)
class AlarmRule:
    """Which change of a metric is worth an alarm.

    Attributes:
        kind: what the alarm is called.
        falls: whether a fall of the value (on its scale) is watched, else a rise.
        scale: ``"log"`` (ratios), ``"log_rest"`` (ratios of 1 - value: shares and cosines near 1) or ``"linear"``.
        least: the smallest change on that scale that counts: 0.7 on a log scale is a halving.

        >>> AlarmRule("rank drop", scale="log", least=0.22).falls
        True
    """

    kind: str
    falls: bool = True
    scale: str = "log"
    least: float = 0.22

    def __post_init__(self) -> None:
        if self.scale not in _SCALES or not (math.isfinite(self.least) and self.least > 0):
            raise ValueError(
                f"AlarmRule: scale is one of {list(_SCALES)}, least a positive number; got {self.scale!r} and {self.least!r}."
            )

    def on_scale(self, value: float) -> float:
        """The value where changes are compared; NaN where it has no place there."""
        if self.scale == "linear":
            return value
        value = 1 - value if self.scale == "log_rest" else value
        # what has fallen to 0 has fallen further than any value that a ratio could be taken of
        return math.log(max(value, 1e-12)) if value >= 0 else math.nan


_RANK = AlarmRule("rank drop", least=0.22)  # a fifth
_USUAL: Mapping[str, AlarmRule] = {
    **dict.fromkeys(
        (
            "d_pr",
            "effective_rank",
            "stable_rank",
            "rankme",
            "numerical_rank",
            "sv_effective_rank",
            "sv_stable_rank",
        ),
        _RANK,
    ),
    **dict.fromkeys(("top1_share", "cos_sim_mean"), AlarmRule("collapse", scale="log_rest", least=0.7)),
    "total_variance": AlarmRule("collapse", least=1.4),
    "feature_subspace_novelty": AlarmRule("novelty jump", falls=False, scale="linear", least=0.1),
}


@dataclass(frozen=True)
class Alarm:
    """One metric has changed.

    Attributes:
        step: when it was noticed. kind: "collapse", "rank drop", "novelty jump" or that of a rule of one's own; "undefined"
            where a value is no number any more. metric: its name, as it was given.
        before, now: mean value over the block before and over the last block (on the rule's scale, and back).
        size: the change on the rule's scale. p_value: the chance of such a step in a stationary run, at one look.
    """

    step: int
    kind: str
    metric: str
    before: float
    now: float
    size: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.kind}: {self.metric} went from {self.before:.4g} to {self.now:.4g} (p = {self.p_value:.1g})"


class _Course:
    """The recent values of one metric on its scale, and whether the last block has left them."""

    def __init__(self, rule: AlarmRule, block: int, reference: int) -> None:
        self.rule, self.block, self.reference = rule, block, reference
        self.values: deque[float] = deque(maxlen=block * (reference + 2))

    def step(self) -> tuple[float, float, float, float] | None:
        """(before, now, size, p) where a block of values lies a step of ``least`` or more off the block before."""
        if len(self.values) < self.block * (self.reference + 2):
            return None
        sign = -1.0 if self.rule.falls else 1.0
        blocks = sign * np.asarray(self.values).reshape(-1, self.block)
        means = blocks.mean(1)
        steps = np.diff(means)
        size, past = float(steps[-1]), steps[:-1]
        # one value far off makes no alarm: each of the block has gone half of the way
        if size < self.rule.least or (blocks[-1] - means[-2]).min() < size / 2:
            return None
        spread = max(float(past.std(ddof=1)) * math.sqrt(1 + 1 / self.reference), 1e-3 * self.rule.least)
        p = float(student.sf((size - float(past.mean())) / spread, self.reference / 3))
        return sign * float(means[-2]), sign * float(means[-1]), sign * size, p


class ChangeAlarms:
    """Alarms on metrics over training: collapse, rank drop, novelty jump.

    The step between the means of the last two blocks of a metric is compared with the ``reference`` such steps before, at the
    same spacing: values may depend on one another from update to update in any way that has been the same for a while, and may
    drift, for then the steps between blocks have had their size for a while too. An alarm is a step that is

    - larger than chance: p = P(t_ν > (d - d̄)/(s_d·√(1 + 1/reference))) < ``false_alarms``/(``horizon``·metrics watched),
      with ν = reference/3, a third of the steps: for steps depend on their neighbours, and tails may be heavy;
    - of size: at least its rule's ``least``;
    - and lasting: each value of the last block has gone half of the way.

    So in a run whose metrics are stationary, the chance of any alarm within ``horizon`` updates is at most ``false_alarms``, over
    all metrics together. Measured at 0.05, without ``least``, on 200 stationary runs of 1,000 updates each (first-order
    autoregressions, φ from 0 to 1): in none with Gaussian noise, in up to 3 % with noise of t with 4 degrees of freedom, but in
    up to 17 % with log-normal noise and φ >= 0.9, whose shocks are changes by any account (tests/benchmarks/alarms.py).

    What goes slower than ``block`` updates is no jump: a second object with longer blocks sees it. After an alarm a metric is
    quiet until it has a new course.

    Args:
        block: updates in a block; an alarm comes about as many updates after a change.
        reference: steps between blocks that a new one is compared with. The first alarm can come after
            block·(reference + 2) updates.
        false_alarms: chance of an alarm in a stationary run of ``horizon`` updates.
        horizon: see above.
        rules: by the last part of a metric's name, beside the usual ones or in their place; None leaves a metric alone. The
            usual rules: docs/howto/alarms.md.

    Raises:
        ValueError: blocks or references too short, a chance outside (0, 1).

        >>> alarms = ChangeAlarms(block=2, reference=10)
        >>> for step in range(44):
        ...     for alarm in alarms.update(step, {"layer 3/d_pr": (40 if step < 40 else 10) + step % 3}):
        ...         print(step, alarm)
        41 rank drop: layer 3/d_pr went from 40.99 to 11.49 (p = 1e-06)
    """

    @answer_guesses
    def __init__(
        self,
        *,
        block: int = 3,
        reference: int = 16,
        false_alarms: float = 0.05,
        horizon: int = 1000,
        rules: Mapping[str, AlarmRule | None] | None = None,
    ) -> None:
        if block < 1 or reference < 8 or horizon < 1 or not 0 < false_alarms < 1:
            raise ValueError(
                f"ChangeAlarms: block and horizon are at least 1, reference at least 8 steps between blocks, and false_alarms a "
                f"chance in (0, 1); got block={block}, reference={reference}, false_alarms={false_alarms}, horizon={horizon}."
            )
        self.block, self.reference = block, reference
        self.false_alarms, self.horizon = false_alarms, horizon
        asked = {**_USUAL, **(rules or {})}
        self.rules = {name: rule for name, rule in asked.items() if rule is not None}
        self._courses: dict[str, _Course] = {}
        self._step: int | None = None

    def update(self, step: int, metrics: Mapping[Any, Any] | TensorDictBase) -> list[Alarm]:
        """The values of a step, and the alarms that they set off.

        Args:
            step: of training. One that is not after the last begins anew, with a warning: training has gone back.
            metrics: numbers by name; of names like ``"spectrum/residual_output.3/d_pr"``, or keys, the last part says what it is.
                A result of ``run`` will do. What is not watched is left alone.

        Raises:
            ValueError: a watched metric that is not one number.
        """
        step = int(step)
        if self._step is not None and step <= self._step:
            tell(
                f"ChangeAlarms: step {step} after step {self._step}: training has gone back, courses begin anew.",
                UserWarning,
            )
            self.reset()
        self._step = step
        found = []
        for name, rule, value in self._watched(metrics):
            course = self._courses.setdefault(name, _Course(rule, self.block, self.reference))
            placed = rule.on_scale(value)
            if not math.isfinite(placed):
                if course.values:
                    found.append(
                        Alarm(
                            step,
                            "undefined",
                            name,
                            self._back(rule, course.values[-1]),
                            value,
                            math.nan,
                            math.nan,
                        )
                    )
                    course.values.clear()
                continue
            course.values.append(placed)
            left = course.step()
            if left is not None and left[3] < self.false_alarms / (self.horizon * len(self._courses)):
                before, now, size, p = left
                found.append(
                    Alarm(step, rule.kind, name, self._back(rule, before), self._back(rule, now), size, p)
                )
                course.values.clear()
        return found

    def reset(self) -> None:
        """Forget every course."""
        self._courses.clear()
        self._step = None

    def state_dict(self) -> dict[str, Any]:
        """The courses as plain data, with the settings that they were kept under."""
        courses = {name: list(course.values) for name, course in self._courses.items()}
        return {"settings": self._settings(), "step": self._step, "courses": courses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``.

        Raises:
            ValueError: a state of other settings.
        """
        if dict(state["settings"]) != self._settings():
            raise ValueError(
                f"ChangeAlarms.load_state_dict: the state was kept under {state['settings']}, this object has "
                f"{self._settings()}. Make it as it was."
            )
        self.reset()
        self._step = state["step"]
        for name, values in state["courses"].items():
            course = self._courses[name] = _Course(self.rules[_last(name)], self.block, self.reference)
            course.values.extend(values)

    def _settings(self) -> dict[str, Any]:
        rules = {name: asdict(one) for name, one in self.rules.items()}
        return {"block": self.block, "reference": self.reference, "rules": rules}

    def _watched(self, metrics: Mapping[Any, Any] | TensorDictBase) -> list[tuple[str, AlarmRule, float]]:
        items: Any = metrics.items(True, True) if isinstance(metrics, TensorDictBase) else metrics.items()
        found = []
        for key, value in items:
            name = "/".join(map(str, key)) if isinstance(key, tuple) else str(key)
            rule = self.rules.get(_last(name))
            if rule is None:
                continue
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(
                    f"ChangeAlarms.update: {name!r} is watched, so it is one number; got shape {tuple(value.shape)}. Give one "
                    f"name to each value, or leave it out of rules=."
                )
            found.append((name, rule, float(value)))
        return found

    @staticmethod
    def _back(rule: AlarmRule, placed: float) -> float:
        if rule.scale == "linear":
            return placed
        return math.exp(placed) if rule.scale == "log" else 1 - math.exp(placed)


def _last(name: str) -> str:
    return name.rpartition("/")[2]
