"""Any similarity beside what it is by chance: documents of one side change places, and the measure is taken again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys, key_tuple
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.warnings import tell_few_rows
from tdgeom.measures.significance.document_null import FEWEST
from tdgeom.measures.significance.documents import document_shuffles, rows_alike, sequence_of
from tdgeom.measures.similarity.pair_sources import MATCHED_ROWS, of_matched_rows
from tdgeom.numerics.centring import check_matched, warn_undefined
from tdgeom.numerics.near_copies import near_copies, rounding_radius

__all__ = [
    "Calibrated",
    "ShuffledNull",
    "against_draws",
    "check_repeats",
    "joint_p_values",
    "less_is_alike",
    "shuffled_null",
]

_BEST = {
    "procrustes": 0.0,
    "angular_shape": 0.0,
    "information_imbalance_ab": 0.0,
    "information_imbalance_ba": 0.0,
}
_SAME = 1e-12  # values that differ by rounding count as equal, which makes a p-value larger


def less_is_alike(measure: str) -> bool:
    """Whether a measure is a distance: 0 for two sides that are the same."""
    return _BEST.get(measure, 1.0) == 0.0


class ShuffledNull(NamedTuple):
    """Each (): the value, mean and standard deviation of the shuffled values, z-score, p-value, calibrated; and all of them."""

    value: Tensor
    null_mean: Tensor
    null_sd: Tensor
    z: Tensor
    p: Tensor
    calibrated: Tensor
    draws: Tensor


def shuffled_null(
    measure: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    document: Tensor | None = None,
    *,
    repeats: int = 200,
    best: float = 1.0,
    seed: int = 0,
) -> ShuffledNull:
    """A measure of two sides, and what it is when whole documents of one side have changed places.

    ``p`` = (1 + shuffles at least as near to ``best``)/(1 + repeats), exact for any number of rows, any measure and any
    likeness of the rows inside a document; ``calibrated`` = (value - null_mean)/(best - null_mean): 0 by chance, 1 for what
    cannot be more alike (Gröger et al. 2026 calls a null-calibrated similarity by that name).

    Args:
        measure: a function of (N, D) and (N, E) rows that gives one number.
        x: (N, D) rows. y: (N, E) the same rows on the other side.
        document: (N,) int64, which document a row is of: documents of equal numbers of rows change places. Default: every row
            by itself.
        repeats: shuffles. best: the value of two sides that are the same (0 for a distance). seed: of the shuffles.

    Returns:
        Each () float64; ``draws`` (repeats,), the shuffled values.

    Raises:
        ValueError: rows that do not match; documents that cannot change places.

        >>> from tdgeom.functional import neighborhood_overlap
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> null = shuffled_null(lambda x, y: neighborhood_overlap(x, y, k=5), x, 2 * x, repeats=50)
        >>> round(float(null.null_mean), 2), float(null.calibrated), round(float(null.p), 2)
        (0.08, 1.0, 0.02)
    """
    check_matched(x, y, "shuffled_null")
    orders = _orders(document, x.shape[-2], repeats, seed, "shuffled_null").to(y.device)
    draws = torch.stack([torch.as_tensor(measure(x, y[order])).detach() for order in orders])
    return against_draws(torch.as_tensor(measure(x, y)).detach(), draws, best)


def check_repeats(repeats: int, owner: str) -> None:
    """An error for draws too few to show anything."""
    if repeats < 19:
        raise ValueError(f"{owner}: {repeats} shuffles cannot show p <= 0.05; give repeats=200, at least 19.")


def _orders(document: Tensor | None, rows: int, repeats: int, seed: int, owner: str) -> Tensor:
    check_repeats(repeats, owner)
    if document is None:
        document = torch.arange(rows, device="cpu")
    if document.shape != (rows,):
        raise ValueError(
            f"{owner} expects document of shape ({rows},), one number a row, got {tuple(document.shape)}."
        )
    return document_shuffles(document, repeats, seed)


def against_draws(value: Tensor, draws: Tensor, best: float) -> ShuffledNull:
    """A value () beside draws (repeats,) of what it is by chance."""
    value, draws = value.double(), draws.double()
    toward = draws if best >= draws.mean() else -draws
    own = value if best >= draws.mean() else -value
    mean, deviation = draws.mean(), draws.std()
    p = (1 + (toward >= own - _SAME * own.abs()).sum()).double() / (1 + len(draws))
    z = (own - toward.mean()) / torch.where(deviation > 0, deviation, torch.nan)
    known = torch.isfinite(value) & torch.isfinite(mean)
    return ShuffledNull(
        value, mean, deviation, z, torch.where(known, p, torch.nan), (value - mean) / (best - mean), draws
    )


def joint_p_values(values: Tensor, draws: Tensor) -> Tensor:
    """p-values of several values under one null of them all: what the largest of them would be by chance.

    Each value and its draws are put on one scale, (v - mean)/sd over *all* of them, so that the value is measured by nothing
    that its draws are not; p of value i is the share of shuffles whose *largest* member reaches it:
    (1 + #{r: max_j z_jr >= z_i})/(1 + R). So the chance that any of the values is called significant where none is, is the level
    of one. Shuffles must be shared (the same order of documents for all pairs), as ``Calibrated`` shares them.

    Args:
        values: (P,), larger is more alike (negate distances). draws: (P, R), shuffled values of each, in the same orders.

    Returns:
        (P,) float64. NaN where a value is.

    Westfall and Young 1993 (max T).

        >>> draws = torch.randn(3, 999, generator=torch.Generator().manual_seed(0))
        >>> [round(p, 2) for p in joint_p_values(torch.tensor([0.0, 1.7, 5.0]), draws).tolist()]
        [0.88, 0.14, 0.0]
    """
    if values.ndim != 1 or draws.ndim != 2 or len(values) != len(draws):
        raise ValueError(
            f"joint_p_values expects values (P,) and draws (P, R), got {tuple(values.shape)} and {tuple(draws.shape)}."
        )
    values, draws = values.double(), draws.double()
    # by the draws alone the value's scale would err and theirs not: the best of many is then called too often
    every = torch.cat((values[:, None], draws), 1)
    mean, deviation = every.mean(1), every.std(1)
    fine = torch.isfinite(values) & (draws.std(1) > 0)
    z = (values - mean) / deviation
    largest = torch.where(fine[:, None], (draws - mean[:, None]) / deviation[:, None], -torch.inf).amax(0)
    p = (1 + (largest >= z[:, None] - _SAME).sum(1)).double() / (1 + draws.shape[1])
    return torch.where(fine, p, torch.nan)


class _Prepared(NamedTuple):
    """The rows; those that are judged with the stage's preparation of them, once documents are known."""

    rows: Tensor
    made: dict[Any, Any]


class Calibrated(PairStage):
    """A pair stage's values beside what they are by chance: see ``shuffled_null``.

    The stage's own values come out under their own names; each side is prepared once, and a stage that has
    ``reordered(prepared, order)`` (None: it cannot) is not prepared again for a shuffle. All pairs share the shuffles, so that
    ``joint_p_values`` can judge the best of many pairs.

    Args:
        stage: a pair stage on matched rows, such as ``NeighborhoodOverlap(k=10)``, ``RSA()``, ``LinearCKA()``.
        repeats: shuffles. sample_size: rows that are taken, the first of the (hash-ordered) sample; the values judged are of
            these rows.
        by: ``"document"`` shuffles whole sequences among those with as many rows (ids are read from ``"sample_row_id"``; without
            them every row is a document; documents where ``("sample_carried", "document_id")`` tells of them); ``"row"``
            shuffles rows.
            Of rows that a document has twice on both sides, one is judged.
        alike: judge the same number of rows of each document, as many documents and rows as that leaves: then all of them
            change places, however long they are. Default: all rows; a document of a length of its own stays where it is.
        best: the value of two sides that are the same; None: 0 for Procrustes distances and information imbalances, else 1.
        keep_draws: also write ``<measure>_draws``, (repeats,).
        seed: of the shuffles.
        in_keys, out_keys: the stage's, then ``"sample_row_id"``; a list of all leaves, or a root.

    Writes for each measure of the stage ``<measure>``, ``<measure>_null_mean``, ``_null_sd``, ``_z``, ``_p`` and ``_calibrated``,
    each ().

        >>> import tdgeom as tg
        >>> x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
        >>> out = tg.Calibrated(tg.LinearCKA(), repeats=99)(sample_a=x, sample_b=x.flip(-1))
        >>> round(float(out[0]), 6), float(out[4])
        (1.0, 0.01)
    """

    optional = frozenset({"sample_row_id", "document_id"})
    shared = ("sample_row_id",)

    def __init__(
        self,
        stage: PairStage,
        *,
        repeats: int = 200,
        sample_size: int = 1024,
        by: str = "document",
        alike: bool = False,
        best: float | None = None,
        keep_draws: bool = False,
        seed: int = 0,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        if not isinstance(stage, PairStage) or not of_matched_rows(stage):
            reads = f" reading {stage.in_keys}" if isinstance(stage, PairStage) else ""
            raise TypeError(
                f"Calibrated takes a pair stage on matched rows, ('sample', 'a') and ('sample', 'b'), such as tg.LinearCKA() or "
                f"tg.NeighborhoodOverlap(k=10); got {type(stage).__name__}{reads}. Leave source= out there."
            )
        if by not in ("document", "row"):
            raise ValueError(f"Calibrated: by is 'document' or 'row', got {by!r}.")
        self.repeats, self.sample_size, self.by, self.best = repeats, sample_size, by, best
        self.alike, self.keep_draws, self.seed = alike, keep_draws, seed
        _orders(None, 2, repeats, seed, "Calibrated")
        measured = [key_tuple(key) for key in stage.out_keys]
        endings = [
            "",
            "_null_mean",
            "_null_sd",
            "_z",
            "_p",
            "_calibrated",
            *(["_draws"] if keep_draws else []),
        ]
        writes: list[Key] = [(*key[:-1], key[-1] + ending) for key in measured for ending in endings]
        reads_all: dict[Key, str | None] = {
            role: shape for role, shape in zip(stage.in_roles, stage.shapes) if role in MATCHED_ROWS
        }
        ids: dict[Key, str | None] = {"sample_row_id": "N", ("sample_carried", "document_id"): "N"}
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads_all | ids, writes=writes)
        self.stage = stage

    def prepare(self, sample: Tensor) -> _Prepared:
        """The first ``sample_size`` rows, with room for the stage's preparation of those that are judged."""
        if sample.ndim != 2:
            raise ValueError(
                f"Calibrated expects one data set, rows of shape (N, D), got {tuple(sample.shape)}. Call it for each."
            )
        return _Prepared(sample[: self.sample_size], {})

    def compare(
        self, a: _Prepared, b: _Prepared, row_id: Tensor | None = None, document: Tensor | None = None
    ) -> list[Tensor]:
        """The stage's values, and those of the shuffles."""
        n = len(a.rows)
        check_matched(a.rows, b.rows, "Calibrated")
        if document is None and row_id is not None:
            document = sequence_of(row_id)
        document = None if document is None or self.by == "row" else document[:n]
        kept = None
        if document is not None and (first := self._no_copies(a, b, document)) is not None:
            kept, document, n = first, document[first.to(document.device)], len(first)
        if self.alike and document is not None:
            alike = rows_alike(document)
            kept = alike if kept is None else kept[alike]
            document = document[alike]
            if (documents := len(document.unique())) < FEWEST:
                return self._unjudged(a.rows, len(kept), documents)
            n = len(kept)
        orders = _orders(document, n, self.repeats, self.seed, "Calibrated").to(b.rows.device)
        sides = [self._judged(side, kept) for side in (a, b)]
        values = self._values(sides[0][1], sides[1][1])
        draws = [self._values(sides[0][1], self._reordered(*sides[1], order)) for order in orders]
        found: list[Tensor] = []
        for number, value in enumerate(values):
            name = self.stage.out_names[number]
            best = _BEST.get(name, 1.0) if self.best is None else self.best
            null = against_draws(value, torch.stack([draw[number] for draw in draws]), best)
            warn_undefined(null.null_mean, f"the null of {name}", "the measure is, for some shuffles.")
            found += null[: len(null) if self.keep_draws else -1]
        return found

    @staticmethod
    def _no_copies(a: _Prepared, b: _Prepared, document: Tensor) -> Tensor | None:
        """Rows without those that say on both sides again what one of the same document has said; None where none does.

        A copy is its own nearest neighbour on either side, and is beside another row where its document has changed places.
        """
        for side in (a, b):
            if "leader" not in side.made:
                side.made["leader"] = near_copies(side.rows, rounding_radius(side.rows.dtype))
        one, other = (side.made["leader"].to(document.device) for side in (a, b))
        own = torch.arange(len(document), device=document.device)
        again = (one != own) & (one == other) & (document[one] == document)
        return (~again).nonzero().flatten() if bool(again.any()) else None

    def _judged(self, side: _Prepared, kept: Tensor | None) -> tuple[Tensor, Any]:
        which = None if kept is None else kept.cpu().numpy().tobytes()
        if which not in side.made:  # all pairs share the rows, but for copies that some sites alone have
            rows = side.rows if kept is None else side.rows[kept.to(side.rows.device)]
            side.made[which] = (rows, self.stage.prepare(rows))
        return side.made[which]

    def _unjudged(self, like: Tensor, rows: int, documents: int) -> list[Tensor]:
        names = ", ".join(f"{name}_p" for name in self.stage.out_names)
        needed = f"{FEWEST} documents with as many rows each ({documents} are there), else it is NaN"
        tell_few_rows("Calibrated", names, rows, needed, "Give more documents")
        nan = torch.full((), torch.nan, dtype=torch.float64, device=like.device)
        one = [nan] * 6 + ([nan.expand(self.repeats)] if self.keep_draws else [])
        return one * len(self.stage.out_names)

    def _values(self, a: Any, b: Any) -> Sequence[Tensor]:
        return [torch.as_tensor(value).detach() for value in self.stage.listed(self.stage.compare(a, b))]

    def _reordered(self, rows: Tensor, side: Any, order: Tensor) -> Any:
        reordered = getattr(self.stage, "reordered", None)
        moved = None if reordered is None else reordered(side, order)
        return self.stage.prepare(rows[order]) if moved is None else moved
