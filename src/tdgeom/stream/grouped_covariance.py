"""``GroupedCovariance``: the moments of all rows, and what the covariance is without each group of documents."""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.core.warnings import tell
from tdgeom.numerics.document_groups import document_groups, rows_by_group
from tdgeom.numerics.moments import Moments, about_running_mean, merge_moments
from tdgeom.numerics.products import product_error
from tdgeom.numerics.symmetric_strips import add_outer, packed_length, square_of, strips, times
from tdgeom.stream.covariance import StreamingCovariance
from tdgeom.stream.replicates import DOCUMENT, check_groups

__all__ = ["GroupedCovariance"]

_STATE = ("rows", "mean", "scatter", "norm2_x", "norm4")


class GroupedCovariance(StreamingStage):
    """What ``StreamingCovariance`` publishes, and the scatter of each group of documents about its own mean.

    The cheap way to errors of whatever a covariance says: each group is held once, half of it (4.5·D² bytes in float64, for its
    symmetric half), their sum is the covariance of all rows, so that the products cost what ``StreamingCovariance``'s cost; and
    ``LeaveOutSpectrum`` makes the spectrum without each group from them, without a decomposition of it. Exact under any batch
    split, order and merge. Published group matrices are divided by the features' own spreads and rounded to float32: 2⁻²⁴ of
    √(S_ii S_jj) each.

    Memory: 4.5·groups·D² bytes a site, and half of that once more when published: at D = 768 53 + 27 MB for 20 groups
    (``Replicates(StreamingCovariance())``: 94 + 99). Rows wider than ``widest`` keep no groups and cost nothing beyond
    ``StreamingCovariance``; ``LeaveOutSpectrum`` then takes the groups of the sample's rows.

    Args:
        groups, by, seed: as ``Replicates`` takes them.
        widest: largest D of which the groups are held.
        in_keys, out_keys: see ``Stage``.

    Reads ``"tokens"``, ``"row_id"`` and where present ``("carried", "document_id")``; writes what ``StreamingCovariance`` does,
    then ``("group_moments", "rows" | "centre" | "spread" | "scatter")`` of shapes (groups,), (groups, D), (D,) and
    (groups, P): the upper strips of S_g,ij/(spread_i·spread_j), see ``numerics/symmetric_strips.py``; P is 0 above ``widest``.

        >>> import torch, tdgeom as tg
        >>> rows = torch.arange(12.0).reshape(6, 2)
        >>> count, mean, covariance, *_ = tg.GroupedCovariance(groups=3)(tokens=rows, row_id=torch.arange(6) << 20)
        >>> covariance
        tensor([[14., 14.],
                [14., 14.]], dtype=torch.float64)
    """

    reads = {"tokens": "N D", "row_id": "N", DOCUMENT: "N"}
    optional = frozenset({"document_id"})
    shared = frozenset({"row_id"})
    writes = [
        *StreamingCovariance.writes,
        *(("group_moments", name) for name in ("rows", "centre", "spread", "scatter")),
    ]

    rows: Tensor
    mean: Tensor
    scatter: Tensor
    norm2_x: Tensor
    norm4: Tensor

    def __init__(
        self,
        *,
        groups: int = 20,
        by: str = "document",
        seed: int = 0,
        widest: int = 1024,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        check_groups(groups, by, "GroupedCovariance")
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.groups, self.by, self.seed, self.widest = groups, by, seed, widest
        for name in _STATE:
            self.add_state(name, torch.int64 if name == "rows" else torch.float64)

    def start(self, tokens: Tensor, *ids: Tensor | None) -> dict[str, Tensor]:
        """Zero moments of the rows' width for every group; of one group of all rows where they are too wide."""
        d = tokens.shape[-1]
        held = self.groups if d <= self.widest else 1
        shapes = {
            "rows": (held,),
            "mean": (held, d),
            "scatter": (held, packed_length(d)),
            "norm2_x": (held, d),
            "norm4": (held,),
        }
        state = self.state()
        return {n: torch.zeros(shapes[n], dtype=state[n].dtype, device=tokens.device) for n in _STATE}

    def accumulate(self, tokens: Tensor, row_id: Tensor, document_id: Tensor | None = None) -> None:
        """Each group's rows to its own moments: one product a group that has some."""
        if tokens.shape[-1] != self.mean.shape[-1]:
            raise ValueError(
                f"GroupedCovariance has seen rows of width {self.mean.shape[-1]} and now gets {self.in_keys[0]!r} of "
                f"shape {tuple(tokens.shape)}. Use one stage a width, or reset()."
            )
        if self.rows.shape[0] == 1:
            group = torch.zeros(row_id.shape, dtype=torch.int64, device="cpu")
        else:
            group = document_groups(row_id, self.groups, document_id, by=self.by, seed=self.seed)
        for g, own in rows_by_group(group, self.rows.shape[0]):
            _add(self._group(g), tokens if own.shape[0] == tokens.shape[0] else tokens[own.to(tokens.device)])

    def combine(self, other: GroupedCovariance) -> None:
        """Group by group."""
        for g in range(self.rows.shape[0]):
            theirs = {name: value.to(self.home) for name, value in other._group(g).items()}
            if int(theirs["rows"]):
                own = self._group(g)
                _merge(own, theirs)

    def result(self) -> list[Tensor]:
        """The moments of all rows, and the groups."""
        width = self.mean.shape[-1]
        whole = self._whole(width)
        if int(whole["count"]) == 1:
            tell("GroupedCovariance: the covariance of one row is undefined: NaN.")
        spread = whole["scatter"].diagonal().clamp(min=0).sqrt()
        spread = torch.where(spread > 0, spread, 1.0)
        kept = self.rows.shape[0] if width <= self.widest else 0
        scaled = self.scatter.new_empty((kept, self.scatter.shape[-1] if kept else 0), dtype=torch.float32)
        for g in range(kept):
            for (a, b, strip), (*_, target) in zip(
                strips(self.scatter[g], width), strips(scaled[g], width), strict=True
            ):
                target.copy_(strip / spread[a:b, None] / spread[a:])
        return [
            whole["count"],
            whole["mean"],
            whole["scatter"] / (whole["count"].double() - 1),
            whole["norm4"],
            whole["norm2_x"],
            self.norm4.new_full((), product_error(torch.float64)),
            self.rows.clone() if kept else self.rows.new_zeros(self.groups),
            self.mean.clone() if kept else self.mean.new_zeros(self.groups, width),
            spread,
            scaled,
        ]

    def _group(self, g: int) -> dict[str, Tensor]:
        return {name: value[g] for name, value in self.state().items()}

    def _whole(self, width: int) -> Moments:
        """The groups' moments merged, in the form of ``numerics/moments.py``."""
        whole: Moments | None = None
        for g in self.rows.nonzero().flatten().tolist():
            one = {name: value.clone() for name, value in self._group(g).items()}
            one = {**one, "count": one.pop("rows"), "scatter": square_of(one["scatter"], width)}
            if whole is None:
                whole = one
            else:
                merge_moments(whole, one)
        assert whole is not None  # publish() has seen rows
        return whole


def _add(group: dict[str, Tensor], tokens: Tensor) -> None:
    """Rows (n, D) to one group's moments, in place."""
    y, mean, step = about_running_mean([tokens], group["mean"], group["rows"])
    norm2_x, norm4 = _about(group, -step)
    squared = y[:-1].square().sum(-1)
    add_outer(group["scatter"], y)
    group["norm2_x"].copy_(norm2_x + squared @ y[:-1])
    group["norm4"].copy_(norm4 + squared.square().sum())
    group["mean"].copy_(mean)
    group["rows"].add_(tokens.shape[0])


def _merge(group: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Another group's moments, of rows or none before, in place."""
    n, m = group["rows"].double(), other["rows"].double()
    delta = other["mean"] - group["mean"]
    own2, own4 = _about(group, -delta * (m / (n + m)))
    their2, their4 = _about(other, delta * (n / (n + m)))
    group["scatter"].add_(other["scatter"])
    add_outer(group["scatter"], (delta * (n * m / (n + m)).sqrt()).unsqueeze(0))
    group["norm2_x"].copy_(own2 + their2)
    group["norm4"].copy_(own4 + their4)
    group["mean"].add_(delta * (m / (n + m)))
    group["rows"].add_(other["rows"])


def _about(group: dict[str, Tensor], shift: Tensor) -> tuple[Tensor, Tensor]:
    """norm2_x and norm4 of the group's rows about a centre at ``mean - shift``, as ``moments.moments_about``."""
    n, width = group["rows"].double(), shift.shape[0]
    trace = sum(strip[:, : b - a].diagonal().sum() for a, b, strip in strips(group["scatter"], width))
    turned, size, cubic = times(group["scatter"], shift), shift @ shift, group["norm2_x"]
    return (
        cubic + 2 * turned + (trace + n * size) * shift,
        group["norm4"] + 4 * (turned @ shift) + 4 * (cubic @ shift) + size * (2 * trace + n * size),
    )
