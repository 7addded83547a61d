"""CaptureSpec: what is captured and how it is reduced, said declaratively and kept with results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from tensordict.nn import TensorDictSequential
from torch import Tensor, nn

from tdgeom.core.stage_settings import Configured
from tdgeom.model.aggregate import AggregateActs, GroupAttention, over_first
from tdgeom.model.calls.repeated_calls import CallsSpec, check_calls
from tdgeom.model.capture import Capture
from tdgeom.model.positions import Positions, check_positions, position_groups
from tdgeom.model.sites import PATTERN_KINDS
from tdgeom.model.structure.select_heads import HeadSpec, listed_heads

__all__ = ["CaptureSpec"]


@dataclass(frozen=True)
class CaptureSpec(Configured):
    """What to capture and how to reduce it on the way out; plain data, so that it can be stored with results.

    Args:
        sites, layers, heads, model_outputs, calls: as for :class:`Capture`.
        positions, reduce, over_examples: as for :class:`AggregateActs`; the defaults keep everything.
        row_groups, column_groups, over_rows, over_columns: name -> positions; patterns become means, or sums, between groups
            (:class:`GroupAttention`).

    ``spec.build(model)`` is a ``TensorDictSequential`` of the capture and its reductions.

    >>> spec = CaptureSpec(["residual_output", "attn_pattern"], layers=[0, -1], positions="last", reduce="mean")
    >>> CaptureSpec.from_json(spec.to_json()) == spec
    True
    """

    sites: Sequence[str] = ("residual_input",)
    layers: Any = "all"
    heads: HeadSpec = None
    positions: Positions = "all"
    reduce: str | None = None
    over_examples: str | None = None
    row_groups: Mapping[str, Positions] = field(default_factory=dict)
    column_groups: Mapping[str, Positions] = field(default_factory=dict)
    model_outputs: Sequence[str] = ()
    calls: CallsSpec = None
    over_rows: str = "mean"
    over_columns: str = "sum"

    def __post_init__(self) -> None:
        layers, heads = self.layers, self.heads
        tidy = {
            "sites": _listed(self.sites),
            "layers": layers if isinstance(layers, str | int | slice) else tuple(layers),
            "heads": _tidy_heads(heads),
            "model_outputs": _listed(self.model_outputs),
            "calls": check_calls(self.calls),
        }
        for name, value in tidy.items():
            object.__setattr__(self, name, value)
        if not all(isinstance(site, str) for site in self.sites):
            raise ValueError(
                f"CaptureSpec: sites are strings (globs, not compiled expressions), got {self.sites!r}."
            )
        for positions in (
            *(position_groups(self.positions) or [self.positions]),
            *self.row_groups.values(),
            *self.column_groups.values(),
        ):
            check_positions(positions)
        groups = self.over_rows, self.over_columns
        if not set(groups) <= {"mean", "sum"}:
            raise ValueError(
                f"CaptureSpec: over_rows= and over_columns= expect 'mean' or 'sum', got {groups}."
            )
        if not self.row_groups and (
            self.column_groups or (self.over_rows, self.over_columns) != ("mean", "sum")
        ):
            raise ValueError("CaptureSpec: columns of attention go with row_groups=, which is not given.")
        for name in ("reduce", "over_examples"):
            if getattr(self, name) not in (None, "mean", "sum"):
                raise ValueError(
                    f"CaptureSpec: {name}= expects 'mean', 'sum' or None, got {getattr(self, name)!r}."
                )

    @classmethod
    def of(cls, capture: Capture, *, positions: Positions = "all", reduce: str | None = None) -> CaptureSpec:
        """What a Capture reads, site by site, and what is done to it afterwards: the form that results keep.

        >>> capture = Capture(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "residual_output", in_keys=["x"])
        >>> CaptureSpec.of(capture).sites
        ('residual_output.0', 'residual_output.1')
        """
        return cls(
            sites=[str(site).removeprefix(site.prefix or "") for site in capture.sites],
            heads=capture.heads,
            positions=positions,
            reduce=reduce,
            model_outputs=capture.model_outputs,
            calls=capture.calls,
        )

    def build(self, model: nn.Module, **settings: Any) -> TensorDictSequential:
        """The capture and its reductions as one TensorDict module; further settings go to :class:`Capture`."""
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        capture = Capture(
            model,
            list(self.sites),
            layers=layers,
            heads=self.heads,
            model_outputs=list(self.model_outputs) or None,
            calls=self.calls,
            **settings,
        )
        stages: list[nn.Module] = [capture]
        patterns = [site for site in capture.sites if site.kind in PATTERN_KINDS]
        grouped = patterns if self.row_groups else []
        if grouped:
            how = {"over_rows": self.over_rows, "over_columns": self.over_columns}
            stages.append(GroupAttention(grouped, self.row_groups, self.column_groups or None, **how))
        rest = [site for site in capture.sites if site not in grouped]
        everything = isinstance(self.positions, str) and self.positions == "all" and self.reduce is None
        if rest and not (everything and self.over_examples is None):
            stages.append(
                AggregateActs(
                    rest, positions=self.positions, reduce=self.reduce, over_examples=self.over_examples
                )
            )
        if grouped and self.over_examples is not None:
            stages.append(_OverExamples(grouped, over_examples=self.over_examples))
        return TensorDictSequential(*stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, numbers, lists and mappings."""
        told = self.effective_settings()
        return {k: v["tuple"] if isinstance(v, dict) and "tuple" in v else v for k, v in told.items()}

    def to_json(self, **settings: Any) -> str:
        """The spec as JSON text; settings go to ``json.dumps``."""
        return json.dumps(self.to_dict(), **settings)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CaptureSpec:
        """The inverse of :meth:`to_dict`; an unknown entry is an error."""
        known = {f.name for f in fields(cls)}
        if not isinstance(data, Mapping):
            raise ValueError(f"CaptureSpec is made from a mapping, got {type(data).__name__}.")
        if set(data) - known:
            raise ValueError(f"CaptureSpec has no {sorted(set(data) - known)}; it has {sorted(known)}.")
        return cls.from_settings(data)

    @classmethod
    def from_json(cls, text: str) -> CaptureSpec:
        """The inverse of :meth:`to_json`; text that describes no spec is a ValueError."""
        try:
            return cls.from_dict(json.loads(text))
        except (TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"CaptureSpec: this text describes no spec ({error}): {text[:80]!r}.") from error


def _tidy_heads(heads: Any) -> Any:
    if isinstance(heads, Mapping):  # as text its layers were words
        return listed_heads({int(layer): own for layer, own in heads.items()})
    return None if heads is None else _listed(heads)


def _listed(value: Any) -> tuple:
    return (value,) if isinstance(value, str | int) else tuple(value)


class _OverExamples(AggregateActs):
    """Averages between groups, which padding does not enter, reduced over examples."""

    def reduced(self, value: Tensor, site: str, told: Mapping[str, Tensor | None]) -> Tensor:
        """One site, over the batch."""
        return over_first(value, self.over_examples)
