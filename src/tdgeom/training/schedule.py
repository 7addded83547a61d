"""At which steps of training one looks: every so many, a list, a function, or steps that lie apart as powers do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tdgeom.core.guessed_names import answer_guesses

__all__ = ["Steps", "log_spaced_steps", "step_rule"]

Steps = str | Iterable[int] | Callable[[int], bool]


@answer_guesses
def log_spaced_steps(last: int, count: int = 40) -> list[int]:
    """Steps for a schedule that looks often at first: 0, 1, and on to ``last`` in equal ratios.

    Args:
        last: the last step. count: how many at most; small ones coincide and count once.

    Returns:
        Whole numbers in rising order, the first 0 and the last ``last``.

        >>> log_spaced_steps(1000, 5)
        [0, 1, 10, 100, 1000]
    """
    if last < 1 or count < 2:
        raise ValueError(
            f"log_spaced_steps: last counts steps (1 or more) and count is 2 or more, got {last}, {count}."
        )
    apart = max(count - 2, 1)
    return sorted({0, last, *(round(last ** (number / apart)) for number in range(apart + 1))})


def step_rule(every: int, schedule: Steps | None, owner: str) -> Callable[[int], bool]:
    """Whether a step is due: ``schedule`` where there is one, else every ``every`` steps, the first at 0.

    >>> [step for step in range(20) if step_rule(100, "log", "an example")(step)]
    [0, 1, 2, 4, 8, 16]
    """
    if schedule is None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                f"{owner}: every counts steps, 1 or more, got {every!r}. A list or a function is schedule=."
            )
        return lambda step: step % every == 0
    if schedule == "log":
        return lambda step: step & (step - 1) == 0
    if callable(schedule):
        return lambda step: bool(schedule(step))
    if isinstance(schedule, str) or not isinstance(schedule, Iterable):
        raise ValueError(
            f"{owner}: schedule is 'log' (0, 1, 2, 4, 8, ...), steps or a function of the step, got {schedule!r}."
        )
    steps = set(schedule)
    if wrong := [step for step in steps if isinstance(step, bool) or not isinstance(step, int) or step < 0]:
        raise ValueError(f"{owner}: schedule holds steps, whole numbers from 0, got {wrong[0]!r}.")
    return steps.__contains__
