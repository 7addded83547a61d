"""``LeaveOutMoments``: a measure of all rows' moments, and the error that the sample's rows give it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys, key_tuple
from tdgeom.core.stage import Stage
from tdgeom.core.warnings import Gathered, gathered
from tdgeom.measures.jackknife import without_bias
from tdgeom.measures.leave_out import GROUP, GROUP_ROWS

__all__ = ["LeaveOutMoments"]


class LeaveOutMoments(Stage):
    """A stage of all rows' moments, such as ``RankMe``, and beside it replicates that have its error.

    The value is of all rows. The replicates differ from it as the same measure of the sample's rows without each group of
    documents does from that of the sample: the errors are never too small, and at most √(rows/sample rows) too large. They have
    no bias. Cost: one product of the sample's rows, and the stage's own for every group.

    Args:
        stage: a stage that reads leaves of ``"moments"`` alone; it is copied.
        in_keys, out_keys: see ``Stage``.

    Reads what ``stage`` reads, ``"sample"``, ``"sample_group"`` and ``"sample_group_rows"``; writes what it writes, (groups+1,).

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> x = torch.randn(900, 4, generator=torch.Generator().manual_seed(0))
        >>> td = TensorDict(tokens=x, sample=x, sample_row_id=torch.arange(900) << 20)
        >>> for stage in (tg.StreamingCovariance(), tg.SampleGroups(), LeaveOutMoments(tg.RankMe())):
        ...     td = stage(td)
        >>> td["spectrum", "rankme"].shape
        torch.Size([21])
    """

    def __init__(self, stage: Stage, *, in_keys: Keys = None, out_keys: Keys = None) -> None:
        inner = deepcopy(stage)
        if {key_tuple(key)[0] for key in inner.in_keys} != {"moments"}:
            raise TypeError(
                f"LeaveOutMoments takes a stage of moments alone, such as RankMe(); {type(stage).__name__} reads {inner.in_keys}."
            )
        free = set(inner.optional_in_keys)
        shapes: dict[Key, str | None] = dict(zip(inner.in_keys, inner.shapes))
        needed = {key: shape for key, shape in shapes.items() if key not in free}
        rows: dict[Key, str | None] = {"sample": "N E", GROUP: None, GROUP_ROWS: None}
        reads = {**needed, **rows, **{key: shape for key, shape in shapes.items() if key in free}}
        super().__init__(
            in_keys=in_keys, out_keys=out_keys, reads=reads, writes=inner.out_keys, optional=list(free)
        )
        object.__setattr__(self, "stage", inner)
        listed = list(reads)
        self._order = [listed.index(key) for key in inner.in_keys]
        self._rows = [listed.index(key) for key in rows]
        self.shared = {GROUP, GROUP_ROWS}
        self.one_thread_a_site = True  # type: ignore[misc]  # of this instance

    def compute(self, *inputs: Tensor | None) -> list[Tensor]:
        """The outputs of the stage, each with its replicates."""
        inner: Any = self.__dict__["stage"]
        whole = inner.listed(inner.compute(*(inputs[place] for place in self._order)))
        sample, group, rows = (inputs[place] for place in self._rows)
        assert sample is not None and group is not None and rows is not None  # required
        leaves = [str(key_tuple(key)[-1]) for key in inner.in_keys]
        with gathered(Gathered()):  # what the sample's rows warn of is told of all rows
            found = [
                inner.listed(inner.compute(*(moments.get(leaf) for leaf in leaves)))
                for moments in _moments_without(sample, group.to(sample.device), len(rows))
            ]
        return [
            without_bias(torch.cat((value[None], value + (torch.stack(own[1:]) - own[0]))).movedim(0, -1), rows).movedim(-1, 0)
            if value.is_floating_point()
            else torch.stack([value] * len(own))
            for value, own in zip(whole, zip(*found))
        ]  # fmt: skip


def _moments_without(sample: Tensor, group: Tensor, groups: int) -> list[dict[str, Tensor]]:
    """The leaves of ``StreamingCovariance`` of the sample's rows, and of those without each group."""
    centre = sample.mean(0, dtype=torch.float64)
    rows = sample.double() - centre
    found, total = [], rows.mT @ rows
    for g in range(-1, groups):
        out = group == g
        kept = rows[~out]
        n = torch.as_tensor(kept.shape[0], device=rows.device)
        mean = kept.mean(0)
        scatter = total - rows[out].mT @ rows[out] - n * mean[:, None] * mean
        apart = kept - mean
        size = apart.square().sum(-1)
        found.append(
            {"count": n, "mean": mean + centre, "covariance": scatter / (n - 1), "norm4": size.square().sum(),
             "norm2_x": size @ apart}
        )  # fmt: skip
    return found
