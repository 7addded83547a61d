"""``Replicates``: any streaming stage over all rows, and over all rows but those of one group of documents, for each group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys
from tdgeom.core.stage import Outputs
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.core.warnings import FewRowsWarning, tell
from tdgeom.numerics.document_groups import GROUPED_BY, document_groups, rows_by_group
from tdgeom.numerics.on_host import on_host, remember

__all__ = ["DOCUMENT", "GROUPS", "REPLICATE_ROWS", "Replicates", "check_groups", "error_groups"]

DOCUMENT: Key = ("carried", "document_id")
REPLICATE_ROWS: Key = ("replicates", "rows")
GROUPS = 20


def check_groups(groups: int, by: str, owner: str) -> None:
    """Raise unless these are groups, of something, that a jackknife can leave out one by one."""
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 2:
        raise ValueError(f"{owner}: groups counts what is left out in turn, at least 2, got {groups!r}.")
    if by not in GROUPED_BY:
        raise ValueError(f"{owner}: by is one of {list(GROUPED_BY)}, got {by!r}.")


def error_groups(errors: bool | int, owner: str) -> int:
    """How many groups of documents ``errors=`` asks for; 0 for none."""
    if isinstance(errors, bool) or errors == 0:
        return GROUPS if errors else 0
    if not isinstance(errors, int) or errors < 2:
        raise ValueError(
            f"{owner}: errors is True ({GROUPS} groups of documents), False, or a number of groups from 2 on, got {errors!r}."
        )
    return errors


class Replicates(StreamingStage):
    """A streaming stage over all rows and, for every group of documents, over all rows but the group's.

    Rows are dealt to ``groups`` by a hash of their document, for the tokens of a document are not independent; each group is a
    state of ``stage``. Every output of ``stage`` is published under its own key with a leading dimension ``groups + 1``: the
    value over all rows, then those that leave out one group each, made by merging the others (never by subtracting). Stages
    behind it take the dimension as any leading dimension, and ``Jackknife`` turns what comes out into an error and an interval:

    | | |
    |---|---|
    | the stage's own keys | (groups + 1, ...) |
    | ``("replicates", "rows")`` | (groups,) rows of each group; one of 0 rows leaves out nothing |

    Exact under any batch split, order and merge, as the stage is. Memory: ``groups`` states, and as published ``groups + 1``
    outputs: 20 groups of a covariance of D = 768 take 94 MB a site and 99 MB more at the end, of D = 4,096 2.7 GB and 2.8 GB.
    Time: a block costs what it costs the stage, cut into the groups that have rows in it; groups·log₂(groups) merges at the end.
    For spectra ``GroupedCovariance`` does it in half the memory, without decompositions of the replicates.

    Args:
        stage: any streaming stage, which is copied.
        groups: at least 2. More give a steadier error (its own relative error is about 1/√(2·groups - 2)).
        by: "document" (``("carried", "document_id")`` where ``SelectTokens(also=["document_id"])`` carries one, else the
            sequence), "sequence", or "row", which takes rows for independent.
        seed: of the hash; stages to be merged must share it.

    Reads what ``stage`` reads, ``"row_id"`` and where present ``("carried", "document_id")``. A group that holds all rows leaves
    none: NaN with one warning.

    Raises:
        TypeError: ``stage`` does not stream. ValueError: fewer than 2 groups, or outputs whose shapes depend on the rows
            (``Collect``), which do not stand side by side.

    Kott (2001), The delete-a-group jackknife; Efron and Stein (1981), The jackknife estimate of variance.

        >>> import torch, tdgeom as tg
        >>> rows = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
        >>> stage = tg.Replicates(tg.StreamingMean(), groups=10)
        >>> mean, *_, left_out = stage(tokens=rows, row_id=torch.arange(400) << 20)
        >>> mean.shape, int(left_out.sum())
        (torch.Size([11, 3]), 400)
    """

    rows: Tensor

    def __init__(
        self,
        stage: StreamingStage,
        *,
        groups: int = 20,
        by: str = "document",
        seed: int = 0,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        if not isinstance(stage, StreamingStage) or isinstance(stage, Replicates):
            raise TypeError(
                f"Replicates takes a streaming stage such as StreamingCovariance(), got {type(stage).__name__}. A stage that "
                f"reads finished results goes behind it as it is; one of the sample goes into LeaveOut."
            )
        if stage.ordered:
            raise ValueError(
                f"Replicates leaves out groups of documents that weigh alike; {stage!r} forgets older rows. Leave halflife= out."
            )
        check_groups(groups, by, "Replicates")
        inner = deepcopy(stage)
        inner.reset()
        shapes: dict[Key, str | None] = dict(zip(inner.in_keys, inner.shapes))
        may_miss = set(inner.optional_in_keys)
        needed: dict[Key, str | None] = {key: shape for key, shape in shapes.items() if key not in may_miss}
        free: dict[Key, str | None] = {key: shape for key, shape in shapes.items() if key in may_miss}
        reads = {**needed, "row_id": None, **free, DOCUMENT: None} if by == "document" else {
            **needed, "row_id": None, **free,
        }  # fmt: skip
        super().__init__(
            in_keys=in_keys,
            out_keys=out_keys,
            reads=reads,
            writes=[*inner.out_keys, REPLICATE_ROWS],
            optional=[key for key in reads if key in may_miss or key == DOCUMENT],
        )
        # no submodule: run calls this stage alone, and its own state is empty
        object.__setattr__(self, "stage", inner)
        self.groups, self.by, self.seed = groups, by, seed
        self.shared = {*getattr(inner, "shared", ()), "row_id"}
        self._order = [list(reads).index(key) for key in inner.in_keys]
        self._ids = list(reads).index("row_id")
        self._documents = list(reads).index(DOCUMENT) if DOCUMENT in reads else None
        self.add_state("rows", torch.int64)
        for g in range(groups):
            for name, dtype in inner.__dict__["_state_dtypes"].items():
                self.add_state(f"{name}_{g}", dtype)

    def start(self, *inputs: Any) -> dict[str, Tensor]:
        """No rows in any group; a group's own state starts with its first rows."""
        home = inputs[0].device
        empty = {name: value.new_zeros(0) for name, value in self.state().items()}
        return {**empty, "rows": torch.zeros(self.groups, dtype=torch.int64, device=home)}

    def accumulate(self, *inputs: Any) -> None:
        """Each group's rows to its own state."""
        ids = inputs[self._ids]
        documents = None if self._documents is None else inputs[self._documents]
        group = document_groups(ids, self.groups, documents, by=self.by, seed=self.seed)
        rows = [inputs[place] for place in self._order]
        held = on_host(self.rows).clone()
        for g, own in rows_by_group(group, self.groups):
            given = [None if row is None else row[own.to(row.device)] for row in rows]
            given += [None] * (len(self._inner.in_roles) - len(given))
            if not held[g]:
                fresh = self._inner.start(*given)
                self._keep(g, self._inner.with_state({**self._inner.state(), **fresh}))
            one = self._group(g)
            one.accumulate(*given)
            self._keep(g, one)
            held[g] += own.shape[0]
        self.rows = held.to(self.home)
        remember(self.rows, held)

    def combine(self, other: Replicates) -> None:
        """Group by group."""
        for g in range(self.groups):
            if not int(other.rows[g]):
                continue
            own, theirs = self._group(g), other._group(g)
            if int(self.rows[g]):
                own.combine(theirs)
            else:
                own = self._inner.with_state(
                    {n: v.to(self.home, copy=True) for n, v in theirs.state().items()}
                )
            self._keep(g, own)
        self.rows = self.rows + other.rows.to(self.home)

    def fits(self, name: str, value: Tensor) -> bool:
        """A group without rows fits any."""
        own = self.state()[name]
        if name == "rows" or not own.numel() or not value.numel():
            return name != "rows" or own.shape == value.shape
        piece, _, g = name.rpartition("_")
        return self._group(int(g)).fits(piece, value)

    def result(self) -> Outputs:
        """All rows, and all but each group's."""
        held = [g for g in range(self.groups) if int(self.rows[g])]
        whole = self._listed(self._merged([self._group(g) for g in held]))
        found = {g: self._listed(stage) for g, stage in self._left_out(held, None)} if len(held) > 1 else {}
        if not found:
            tell(
                f"Replicates: all {int(self.rows.sum())} rows are of one group of documents, so nothing is left without it: "
                f"NaN. Give rows of several documents, or by='row'.",
                FewRowsWarning,
            )
            found = {held[0]: [_unknown(value) for value in whole]}
        outputs = []
        for place, (key, value) in enumerate(zip(self._inner.out_keys, whole)):
            values = [value, *(found.get(g, whole)[place] for g in range(self.groups))]
            if len({tuple(one.shape) for one in values}) > 1:
                values = self.beside_each_other(key, values)
            outputs.append(torch.stack(values))
        return [*outputs, self.rows.clone()]

    def beside_each_other(self, key: Key, values: list[Tensor]) -> list[Tensor]:
        """Replicates that differ in shape, which are refused."""
        raise ValueError(
            f"Replicates: {key!r} of {type(self._inner).__name__} has another shape without each group "
            f"({sorted({tuple(one.shape) for one in values})}), so that the replicates do not stand side by side. "
            f"Wrap a stage whose outputs have one shape, whatever the rows."
        )

    # ------------------------------------------------------------------------------------------------ the groups' states

    @property
    def _inner(self) -> StreamingStage:
        return self.__dict__["stage"]

    def _group(self, g: int) -> Any:
        state = {name: getattr(self, f"{name}_{g}") for name in self._inner.state()}
        return self._inner.with_state(state)

    def _keep(self, g: int, stage: Any) -> None:
        self.set_state({f"{name}_{g}": value for name, value in stage.state().items()})

    def _merged(self, stages: Sequence[Any]) -> Any:
        def add(one: Any, other: Any) -> Any:
            one.combine(other)
            return one

        first = {name: value.clone() for name, value in stages[0].state().items()}
        return reduce(add, stages[1:], self._inner.with_state(first))

    def _left_out(self, held: Sequence[int], outside: Any) -> Iterator[tuple[int, Any]]:
        """The merged state without each of these groups, by halves: log₂(groups) states stand at a time, not groups."""
        if len(held) == 1:
            yield held[0], outside
            return
        half = len(held) // 2
        for inner, outer in ((held[:half], held[half:]), (held[half:], held[:half])):
            beside = [self._group(g) for g in outer]
            yield from self._left_out(inner, self._merged([*([] if outside is None else [outside]), *beside]))

    def _listed(self, stage: Any) -> list[Tensor]:
        outputs: Outputs = stage.result()
        listed = stage.listed(outputs)
        names = dict(zip(stage.out_keys_source, listed))
        return [names[key] for key in stage.out_keys]


def _unknown(value: Tensor) -> Tensor:
    return torch.full_like(value, torch.nan) if value.is_floating_point() else value
