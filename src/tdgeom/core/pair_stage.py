"""The base class of stages on two sides, such as two sites: each side is prepared once, however many it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import key_tuple
from tdgeom.core.stage import Outputs, Stage

__all__ = ["PairStage", "check_spread"]


def check_spread(
    x: Tensor, y: Tensor, what: str, x_events: int = 2, y_events: int = 2, names: str = "both sides"
) -> None:
    """Raise unless two sides' leading dimensions are broadcast, before their event dimensions, and they share a device."""
    leads = x.shape[: x.ndim - x_events], y.shape[: y.ndim - y_events]
    if any(a != b and 1 not in (a, b) for a, b in zip(reversed(leads[0]), reversed(leads[1]))):
        raise ValueError(
            f"{what} expects {names} of equal leading (batch) dimensions, or of size 1 where they differ, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}. Give the same number of data sets on both sides, or one (size 1) that is "
            f"compared with each of the other's."
        )
    if x.device != y.device:
        raise ValueError(
            f"{what} expects {names} on one device, got {x.device} and {y.device} (shapes {tuple(x.shape)} and "
            f"{tuple(y.shape)}). Move one of them: y.to(x.device)."
        )


class PairStage(Stage):
    """A stage on two sides, split so that each side is prepared once.

    Keys that belong to a side carry it second (``("sample", "a")``, ``("sample", "b")``); a subclass defines
    ``prepare(*inputs of one side)`` and ``compare(prepared_a, prepared_b, *other inputs)``. ``ForEachPair`` calls
    ``prepare`` once per site and ``compare`` once per pair.

        >>> import torch, tdgeom as tg
        >>> class MeanDistance(tg.PairStage):
        ...     reads = {("sample", "a"): "N D", ("sample", "b"): "M D"}
        ...     writes = [("between", "mean_distance")]
        ...     def prepare(self, sample):
        ...         return sample.mean(-2)
        ...     def compare(self, a, b):
        ...         return (a - b).norm(dim=-1)
        >>> MeanDistance()(sample_a=torch.zeros(3, 4), sample_b=torch.ones(5, 4))
        tensor(2.)
    """

    two_sided = True

    def _check_shapes(self, values: Sequence[Tensor | None], batch_size: torch.Size) -> None:
        """Also: leading dimensions that spread over one another (of size 1 or equal, as everywhere in torch), one device."""
        super()._check_shapes(values, batch_size)
        known = [
            (key, value, len(shape.split()))
            for key, value, shape in zip(self.in_keys, values, self.shapes)
            if shape is not None and value is not None
        ]
        for (first, x, m), (key, y, n) in combinations(known, 2):
            check_spread(x, y, type(self).__qualname__, m, n, f"{first!r} and {key!r}")

    def prepare(self, *inputs: Any, **options: Any) -> Any:
        """What one side contributes, from its inputs in the order of ``reads``. Default: the inputs themselves."""
        return inputs[0] if len(inputs) == 1 else inputs

    def compare(self, *sides: Any, **options: Any) -> Outputs:
        """The outputs, from two prepared sides and the inputs that belong to neither."""
        raise TypeError(f"{type(self).__name__} defines no compare(): write the stage's function there.")

    def sides(self) -> tuple[list[int], list[int], list[int]]:
        """Positions in ``in_keys`` of side a, side b and neither."""
        groups: tuple[list[int], list[int], list[int]] = ([], [], [])
        for position, key in enumerate(self.in_roles):
            parts = key_tuple(key)
            side = parts[1] if len(parts) > 1 else ""
            groups[{"a": 0, "b": 1}.get(side, 2)].append(position)
        return groups

    def compute(self, *inputs: Any, **options: Any) -> Outputs:
        """``compare(prepare(a), prepare(b))``."""
        side_a, side_b, rest = ([inputs[i] for i in group] for group in self.sides())
        return self.compare(self.prepare(*side_a), self.prepare(*side_b), *rest)
