"""Where a measure between two sites reads from: matched rows, or the moments of all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.warnings import UnresolvedMeasureWarning, tell
from tdgeom.numerics.centring import occurs

__all__ = ["MATCHED_ROWS", "MomentPairStage", "Source", "of_matched_rows", "refuse_sketch"]

FINE = 1e-10  # of a relative error, above which products were float32
Source = Literal["sample", "moments", "sketch"]

MATCHED_ROWS: dict[Key, str] = {("sample", "a"): "N D", ("sample", "b"): "N E"}


def of_matched_rows(stage: PairStage) -> bool:
    """Whether matched rows are all that a stage needs."""
    needed = {role for role, key in zip(stage.in_roles, stage.in_keys) if key not in stage.optional_in_keys}
    return needed == set(MATCHED_ROWS)


def refuse_sketch(
    reader: str, count: Tensor, mean: Tensor | None, covariance: Tensor, norm4: Tensor | None
) -> None:
    """An error where exact moments are read and these are of random projections.

    Those have a table of norm4 over their groups, and a covariance of another width than the mean.
    """
    table = norm4 is not None and norm4.ndim >= count.ndim + 2 and norm4.shape[-1] == norm4.shape[-2]
    if table or (mean is not None and mean.shape[-1] != covariance.shape[-1]):
        raise ValueError(
            f"{reader} expects exact moments, a mean and a covariance of the same D and one number as norm4, got a covariance of "
            f"shape {tuple(covariance.shape)}{' and a table as norm4' if table else ''}: the leaves of a sketch. Leave "
            f"sketch= out of StreamingCrossMoments, or take LinearCKA(source='sketch')."
        )


class MomentPairStage(PairStage):
    """A pair stage on matched rows, or on moments.

    Args:
        source: ``"sample"`` reads matched rows, (N, D) and (N, E); ``"moments"`` the leaves of ``StreamingCrossMoments``, so
            that the value is over all rows of the run.
        in_keys, out_keys: see ``Stage``.

    Class attributes:
        sources: those that ``source=`` may name. measures: the names of what is written under "between".
        sample_leaves: what is known of a site's sample may be read too: roots of keys, and the shape on side a, of C features.
        side_leaves, pair_leaves: what is read with any source but "sample", and its shape on side a. ``norm4`` tells moments
            from a sketch of them, where it is there.
    """

    optional = frozenset({"norm4", "relative_error", "effective_sample_size"})

    sources: Sequence[Source] = ("sample", "moments")
    measures: Sequence[str] = ()
    sample_leaves: Mapping[str, str] = {}
    side_leaves: Mapping[str, str] = {"count": "", "mean": "D_mean", "covariance": "D D"}
    pair_leaves: Mapping[str, str] = {"cross_covariance": "D E"}

    def __init__(self, *, source: Source = "sample", in_keys: Keys = None, out_keys: Keys = None) -> None:
        if source not in self.sources:
            raise ValueError(f"{type(self).__name__}: source is one of {list(self.sources)}, got {source!r}.")
        self.source = source
        known = {
            (leaf, side): shape.replace("C", letter)
            for side, letter in (("a", "C"), ("b", "G"))
            for leaf, shape in self.sample_leaves.items()
        }
        reads: dict[Key, str] = dict(MATCHED_ROWS) | known
        if source != "sample":
            reads = {
                ("cross_moments", side, leaf): shape.replace("D", letter)
                for side, letter in (("a", "D"), ("b", "E"))
                for leaf, shape in self.side_leaves.items()
            }
            reads |= {("cross_moments", leaf): shape for leaf, shape in self.pair_leaves.items()}
            reads |= {
                ("cross_moments", side, "norm4"): "" for side in "ab" if "norm4" not in self.side_leaves
            }
            if source == "moments":
                reads[("cross_moments", "relative_error")] = ""
                reads[("cross_moments", "effective_sample_size")] = ""
        writes: list[Key] = [("between", name) for name in self.measures]
        free = [key for key in reads if key in known or key[-1] in self.optional]
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads, writes=writes, optional=free)

    def tell_unresolved(self, names: str, moved: Tensor, relative_error: Tensor | None) -> None:
        """One warning where float32 products, off by ``relative_error``, may have moved a measure by 1e-4.

        ``moved``: by how many times the relative error.
        """
        if relative_error is None or not occurs(relative_error > FINE):
            return
        if occurs(relative_error * torch.nan_to_num(moved, 0.0, 0.0) > 1e-4):
            tell(
                f"{type(self).__qualname__}: the rounding of float32 products could move {names} by more than 1e-4: unresolved. "
                f"StreamingCrossMoments(precision='float64') resolves them.",
                UnresolvedMeasureWarning,
            )
