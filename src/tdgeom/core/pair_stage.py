"""The base class of stages on two sides, such as two sites: each side is prepared once, however many it is compared with."""

from __future__ import annotations

from typing import Any

from tdgeom.core.keys import key_tuple
from tdgeom.core.stage import Outputs, Stage

__all__ = ["PairStage"]


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
