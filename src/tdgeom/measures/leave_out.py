"""``LeaveOut``: a measure of a sample, and what it is without each group of documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.stage import Stage
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.core.warnings import Gathered, gathered
from tdgeom.measures.left_out_methods import SITE_METHODS, PairSide, pair_method
from tdgeom.numerics.document_groups import document_groups
from tdgeom.stream.replicates import check_groups

__all__ = ["LeaveOut", "LeaveOutPair", "SampleGroups"]

GROUP: Key = "sample_group"
GROUP_ROWS: Key = "sample_group_rows"


class SampleGroups(Stage):
    """Deals the rows of a sample to groups of documents, for ``LeaveOut`` and ``Jackknife``.

    Args:
        groups, by, seed: as ``Replicates`` takes them; with the same a document is in the same group.
        in_keys, out_keys: see ``Stage``.

    Reads ``"sample_row_id"`` and where present ``("sample_carried", "document_id")`` (``RowSample(also=["document_id"])``);
    writes ``"sample_group"`` (n,) int64 and ``"sample_group_rows"`` (groups,), once for all sites.

        >>> import torch, tdgeom as tg
        >>> group, rows = tg.SampleGroups(groups=4)(sample_row_id=torch.arange(100) << 20)
        >>> group.shape, int(rows.sum())
        (torch.Size([100]), 100)
    """

    reads = {"sample_row_id": "N", ("sample_carried", "document_id"): "N"}
    optional = frozenset({"document_id"})
    writes = [GROUP, GROUP_ROWS]

    def __init__(
        self,
        *,
        groups: int = 20,
        by: str = "document",
        seed: int = 0,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        check_groups(groups, by, "SampleGroups")
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.groups, self.by, self.seed = groups, by, seed

    def compute(self, row_id: Tensor, document_id: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See ``document_groups``."""
        group = document_groups(row_id, self.groups, document_id, by=self.by, seed=self.seed)
        rows = torch.bincount(group, minlength=self.groups)
        return group.to(row_id.device), rows.to(row_id.device)


def _refuse_streams(stage: Any, owner: str) -> None:
    if isinstance(stage, StreamingStage) or not isinstance(stage, Stage):
        raise TypeError(
            f"{owner} takes a stage of a sample such as TwoNN(), got {type(stage).__name__}. Around a streaming stage goes "
            f"Replicates; a function becomes a stage with tg.Stage."
        )


class LeaveOut(Stage):
    """A stage of a sample over all its rows and, for each group of documents, over all but the group's.

    The outputs keep their keys and get a leading dimension ``groups + 1``, the value of all rows first; ``Jackknife`` behind it
    makes errors of them. ``SampleMetrics`` takes its spectra from one basis. Any other stage is called once a group, on the rows
    left: ``groups`` times its cost.

    For smooth measures. One of nearest neighbours jumps where a neighbour is left out, and its error comes out about 1.6 times
    too large.

    Args:
        stage: a stage that reads rows of the sample, its labels, or both; it is copied. A stage of one's own may define
            ``leave_out(inputs, group, groups)``, the outputs in order with their leading dimension, for a shorter way.
        in_keys, out_keys: see ``Stage``.

    Reads what ``stage`` reads, and ``"sample_group"`` and ``"sample_group_rows"`` of ``SampleGroups``.

    Raises:
        TypeError: a stage that streams, or one of pairs (``LeaveOutPair``). ValueError: an input that is not of the sample's
            rows, such as a neighbour table.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> rows = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> td = TensorDict(sample=rows, sample_row_id=torch.arange(1000) << 20)
        >>> key = ("sample_metrics", "norm_mean")
        >>> stages = tg.SampleGroups(), tg.LeaveOut(tg.SampleMetrics()), tg.Jackknife([key], rows="sample_group_rows")
        >>> for stage in stages:
        ...     td = stage(td)
        >>> f"{td[key]:.2f} +- {td['sample_metrics', 'norm_mean_se']:.2f}"
        '1.26 +- 0.02'
    """

    def __init__(self, stage: Stage, *, in_keys: Keys = None, out_keys: Keys = None) -> None:
        _refuse_streams(stage, "LeaveOut")
        if isinstance(stage, PairStage):
            raise TypeError(
                f"LeaveOut takes a stage of one site, {type(stage).__name__} compares two: LeaveOutPair."
            )
        inner = deepcopy(stage)
        method = next((found for kind in type(inner).__mro__ if (found := SITE_METHODS.get(kind))), None)
        further: Mapping[Key, str] = method.reads if method is not None else {}
        reads, free, order = _reads(inner, further)
        super().__init__(
            in_keys=in_keys, out_keys=out_keys, reads=reads, writes=inner.out_keys, optional=free
        )
        object.__setattr__(self, "stage", inner)
        self._method = method
        self._order, self._own = order, len(inner.in_keys)
        self._ids = [list(reads).index(key) for key in (GROUP, GROUP_ROWS)]
        self.shared = {*getattr(inner, "shared", ()), GROUP, GROUP_ROWS}
        self.one_thread_a_site = inner.one_thread_a_site  # type: ignore[misc]  # of this instance

    def compute(self, *inputs: Tensor | None) -> list[Tensor]:
        """The outputs of the stage, each with its replicates."""
        inner: Any = self.__dict__["stage"]
        group, groups = _groups(*(inputs[place] for place in self._ids))
        given = [inputs[place] for place in self._order]
        own, further = given[: self._own], given[self._own :]
        own += [None] * (len(inner.in_roles) - len(own))
        if hasattr(inner, "leave_out"):
            return list(inner.leave_out(own, group, groups))
        if self._method is not None:
            found = self._method.call(inner, own, group, groups, *further)
            if found is not None:
                return _selected(inner, found)
        return _selected(inner, one_by_one(inner, own, group, groups))


def _groups(group: Tensor | None, rows: Tensor | None) -> tuple[Tensor, int]:
    assert group is not None and rows is not None  # required
    return group, rows.shape[0]


def _selected(stage: Any, outputs: Sequence[Tensor]) -> list[Tensor]:
    named = dict(zip(stage.out_keys_source, outputs))
    return [named[key] for key in stage.out_keys]


def _reads(
    stage: Stage, further: Mapping[Key, str] = {}
) -> tuple[dict[Key, str | None], list[Key], list[int]]:
    """Keys and shapes read, those that may be absent, and where the stage's own inputs and the further ones stand."""
    shapes: dict[Key, str | None] = dict(zip(stage.in_keys, stage.shapes))
    may_miss = set(stage.optional_in_keys)
    needed = {key: shape for key, shape in shapes.items() if key not in may_miss}
    free = {key: shape for key, shape in shapes.items() if key in may_miss} | dict(further)
    reads = {**needed, GROUP: None, GROUP_ROWS: None, **free}
    listed = list(reads)
    return reads, list(free), [listed.index(key) for key in (*stage.in_keys, *further)]


def one_by_one(
    stage: Any,
    inputs: Sequence[Tensor | None],
    group: Tensor,
    groups: int,
    call: Callable[..., Any] | None = None,
) -> list[Tensor]:
    """The stage's outputs over all rows and, called anew, without each group; a group of no rows leaves out nothing."""
    n = group.shape[0]
    call = stage.compute if call is None else call
    whole = stage.listed(call(*inputs))
    letter = next((shape.split()[0] for shape in stage.shapes if shape), None)
    rows = []
    for key, value, shape in zip(stage.in_keys, inputs, stage.shapes):
        of_rows = (
            shape.split()[:1] == [letter]
            if shape is not None
            else value is not None and value.shape[:1] == (n,)
        )
        rows.append(of_rows)
        if value is not None and not of_rows and key not in stage.optional_in_keys:
            raise ValueError(
                f"LeaveOut: {type(stage).__name__} reads {key!r}, which is not of the sample's rows, so that none of them can be "
                f"left out of it. Take a source of rows, source='sample'."
            )
    rows += [False] * (len(inputs) - len(rows))
    found = [whole]
    with gathered(Gathered()):  # what the replicates warn of is told of the whole
        for g in range(groups):
            kept = group != g
            if bool(kept.all()):
                found.append(whole)
                continue
            left = [
                value[kept.to(value.device)] if value is not None and mine else None
                for value, mine in zip(inputs, rows)
            ]
            found.append(stage.listed(call(*left)) if bool(kept.any()) else [_unknown(one) for one in whole])
    stacked = []
    for values in zip(*found):
        if len({value.shape for value in values}) > 1:  # of the rows themselves
            values = (values[0], *(_unknown(values[0]) for _ in values[1:]))
        stacked.append(torch.stack(values))
    return stacked


def _unknown(value: Tensor) -> Tensor:
    return torch.full_like(value, torch.nan) if value.is_floating_point() else value


class LeaveOutPair(PairStage):
    """``LeaveOut`` of a stage of two sites whose rows are matched: a group's rows are left out of both at once.

    Each side is prepared once for all groups where the measure allows: ``LinearCKA`` (the sums over rows of each group, in
    float32 where rows are many), ``LayerCosine``, ``NeighborhoodOverlap`` and ``JaccardKNN``. Any other stage is called once a
    group.

    Args:
        stage: a ``PairStage`` of ``("sample", "a")`` and ``("sample", "b")``; it is copied.
        in_keys, out_keys: see ``Stage``.

        >>> import torch, tdgeom as tg
        >>> x = torch.randn(500, 4)
        >>> group, rows = tg.SampleGroups()(sample_row_id=torch.arange(500) << 20)
        >>> tg.LeaveOutPair(tg.LinearCKA())(sample_a=x, sample_b=x, sample_group=group, sample_group_rows=rows).shape
        torch.Size([21])
    """

    def __init__(self, stage: PairStage, *, in_keys: Keys = None, out_keys: Keys = None) -> None:
        _refuse_streams(stage, "LeaveOutPair")
        if not isinstance(stage, PairStage):
            raise TypeError(
                f"LeaveOutPair takes a stage of two sites, {type(stage).__name__} is of one: LeaveOut."
            )
        inner = deepcopy(stage)
        reads, free, order = _reads(inner)
        super().__init__(
            in_keys=in_keys, out_keys=out_keys, reads=reads, writes=inner.out_keys, optional=free
        )
        object.__setattr__(self, "stage", inner)
        self._order = order
        self.shared = {*getattr(inner, "shared", ()), GROUP, GROUP_ROWS}

    def prepare(self, *inputs: Any) -> PairSide:
        """The inputs, and room for what the groups' sums will be."""
        return PairSide(list(inputs), {})

    def compare(self, a: PairSide, b: PairSide, *rest: Any) -> list[Tensor]:
        """The outputs of the stage, each with its replicates."""
        inner: Any = self.__dict__["stage"]
        places: tuple[list[int], list[int], list[int]] = self.sides()
        given: list[Any] = [None] * len(self.in_roles)
        for where, values in zip(places, (a.inputs, b.inputs, rest)):
            for place, value in zip(where, values):
                given[place] = value
        roles = list(self.in_roles)
        group, groups = _groups(given[roles.index(GROUP)], given[roles.index(GROUP_ROWS)])
        method = pair_method(inner)
        if method is not None:
            found = method(inner, a, b, group, groups)
            if found is not None:
                return _selected(inner, found)
        own = [given[place] for place in self._order] + [None] * (len(inner.in_roles) - len(self._order))
        return _selected(inner, one_by_one(inner, own, group, groups))
