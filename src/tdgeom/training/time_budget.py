"""How much of a training's time looking at it may take."""

from __future__ import annotations

import time

import torch

from tdgeom.training.untouched import devices_in_use

__all__ = ["TimeBudget"]


class TimeBudget:
    """Seconds of training and of looking, and whether there is time to look again.

    ``share`` bounds looking as a share of training: another look is allowed once all looks so far and one more as long as the
    longest of the last two fit. The first is always allowed, since nobody knows how long it takes; so looking takes at most
    ``share`` of the training time, and one look. None: no bound.

        >>> budget = TimeBudget(0.1)
        >>> budget.looking = budget.longest = 1.0
        >>> budget.allows(training=15.0), budget.allows(training=25.0)
        (False, True)
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self.started: float | None = None
        self.looking, self.longest, self.looks = 0.0, 0.0, 0
        self._last = 0.0

    def start(self) -> None:
        """The first step of training begins."""
        if self.started is None:
            self.started = time.perf_counter()

    @property
    def training(self) -> float:
        """Seconds of training so far, without looking."""
        return 0.0 if self.started is None else time.perf_counter() - self.started - self.looking

    def allows(self, training: float | None = None) -> bool:
        """Whether there is time to look now."""
        if self.share is None or not self.longest:
            return True
        return self.looking + self.longest <= self.share * (self.training if training is None else training)

    def begin(self) -> float:
        """A look begins: what training left in a device's queue belongs to training."""
        self.start()
        for kind in devices_in_use():
            torch.get_device_module(kind).synchronize()
        return time.perf_counter()

    def end(self, begun: float) -> float:
        """A look that began then ends; its seconds."""
        seconds = time.perf_counter() - begun
        self.looking, self.longest, self._last = self.looking + seconds, max(seconds, self._last), seconds
        self.looks += 1
        return seconds

    def account(self) -> dict[str, float | int | None]:
        """How often, how long, and which share of the training time."""
        training = self.training
        return {
            "looks": self.looks,
            "seconds": self.looking,
            "training_seconds": training,
            "share": self.looking / training if training > 0 else None,
            "budget": self.share,
        }
