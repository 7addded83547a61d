"""``StreamingCrossMoments``: all that the linear measures between sites need, over every row, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tdgeom.core.for_each_pair import pair_list
from tdgeom.core.keys import Key, Keys, key_tuple, site_key
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.core.wrong_objects import site_list
from tdgeom.numerics.forgetting import (
    check_halflife,
    decay,
    degrees_of_freedom,
    effective_sample_size,
    weight_sum,
    weighted_about_running_mean,
)
from tdgeom.numerics.moments import about_running_mean
from tdgeom.numerics.on_host import on_host
from tdgeom.numerics.products import (
    Precision,
    add_gram,
    add_product,
    check_precision,
    factors,
    product_dtype,
    product_error,
)
from tdgeom.stream.sketch import gaussian_columns

__all__ = ["StreamingCrossMoments"]

SITE_LEAVES = ("count", "mean", "covariance", "norm4", "norm2_x")
PAIR_LEAVES = ("cross_covariance", "norm2_product", "x_norm2y", "y_norm2x")


class StreamingCrossMoments(StreamingStage):
    """Moments of every site and cross moments of every pair, exact over all rows.

    With ``u = x - x̄`` and ``w = y - ȳ`` the rows of two sites about their means, in float64:

    | leaf of a site | |
    |---|---|
    | ``count``, ``mean`` | n, (D,) |
    | ``covariance`` | Σ u uᵀ/(n-1), (D, D) |
    | ``norm4`` | Σ \\|u\\|⁴ |
    | ``norm2_x`` | Σ \\|u\\|² u, (D,) |

    | leaf of a pair ``"a->b"`` | |
    |---|---|
    | ``cross_covariance`` | Σ u wᵀ/(n-1), (D, E) |
    | ``norm2_product`` | Σ \\|u\\|²\\|w\\|² |
    | ``x_norm2y`` | Σ u\\|w\\|², (D,) |
    | ``y_norm2x`` | Σ w\\|u\\|², (E,) |

    From them ``LinearCKA`` (debiased too), ``CCA``, ``SVCCA``, ``PWCCA``, ``Procrustes`` and ``LinearR2`` with
    ``source="moments"`` compute their value over all rows of a run.

    and ``"relative_error"`` () behind all others: no entry of a covariance or cross covariance C is further off than that times
    √(C_ii C_jj). The same again for every pair, as its last leaf, where the stages between two sites read it.

    A block is centred about the running mean that includes it and multiplied and added in float64; what was summed before is
    moved to that mean by a row more in the product and by vectors. So offsets, scales and massive rows cost no digits, and batch
    split, order and merging change nothing but rounding.

    Memory: ``8·Σ D·E`` bytes over sites and pairs (8·D² a pair), once as state and once more when published; refused
    above ``memory``. Time: the products, 2·D·E flops a row and pair, and about a tenth more.

    Args:
        sites: names (or numbers, or tuples of them: levels of a key); rows are read at ``("tokens", site)``, (N, D) with any
            width a site and the same rows in all.
        pairs: "consecutive" (within one kind and one stack), "all", or a list of (a, b).
        sketch: number of random projections a site instead of its D features, for widths where D² a pair is too much.
            Every leaf is then that of the projected rows in ``groups`` groups (``covariance`` (sketch, sketch),
            ``norm4`` and ``norm2_product`` (groups, groups), ``norm2_x`` (sketch, groups), ``mean`` still (D,)), and
            ``LinearCKA(source="sketch")`` turns them into a CKA that is unbiased over projections, with its standard
            error. Memory 8·sketch² bytes a pair and 8·D·sketch for the projection.
        groups: independent groups of projections under ``sketch``.
        seed: of the projection; stages to be merged must share it.
        memory: bytes of state above which the first rows are refused.
        halflife: rows after which a row weighs half, by age in the stream's order, as ``StreamingCovariance`` takes it:
            covariances are Σw u wᵀ/(Σw - Σw²/Σw) about weighted means, the leaves of norms NaN, and
            ``"effective_sample_size"`` () = (Σw)²/Σw² is the last leaf of the whole and, behind that, of every pair. Not with
            ``sketch``, whose CKA is of rows of equal weight.
        precision: of the D x E products, as ``StreamingCovariance`` takes it; norm leaves are float64 always.
        in_keys: a list, one key a site. out_keys: a list of every leaf (sites first), or a root in place of
            "cross_moments".

    Raises:
        ValueError: state above ``memory``, rows of changed width or number, no sites, unknown pair.

    Chan, Golub & LeVeque 1979 (merging); Song et al. 2012 (what debiased CKA needs).

        >>> from tensordict import TensorDict
        >>> stage = StreamingCrossMoments(["x", "y"])
        >>> rows = TensorDict({("tokens", "x"): torch.eye(4), ("tokens", "y"): torch.eye(4)[:, :2]})
        >>> stage(rows)["cross_moments", "x->y", "cross_covariance"].shape
        torch.Size([4, 2])
    """

    publishing = frozenset({"memory"})

    count: Tensor
    widths: Tensor
    mean: Tensor
    trace: Tensor
    norm2_product: Tensor
    x_norm2y: Tensor
    relative_error: Tensor

    def __init__(
        self,
        sites: Iterable[str | int | tuple[str | int, ...]],
        *,
        pairs: str | Sequence[tuple[str, str]] = "consecutive",
        sketch: int | None = None,
        groups: int = 16,
        seed: int = 0,
        memory: int = 8 * 2**30,
        halflife: float | None = None,
        precision: Precision = "auto",
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        sites = [sites] if isinstance(sites, str) else site_list("StreamingCrossMoments", sites)
        parts = [site_key(site) for site in sites]
        names = ["/".join(part) for part in parts]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"StreamingCrossMoments takes a non-empty list of different sites, got {names}.")
        if sketch is not None and (groups < 3 or sketch < groups or sketch % groups):
            raise ValueError(
                f"StreamingCrossMoments: sketch= counts projections in equal groups, 3 groups or more; got "
                f"sketch={sketch}, groups={groups}. Take sketch=1024, groups=16."
            )
        check_precision(precision, "StreamingCrossMoments")
        self.halflife = check_halflife(halflife, "StreamingCrossMoments")
        if halflife is not None and sketch is not None:
            raise ValueError(
                f"StreamingCrossMoments: a sketch is for a CKA of rows of equal weight; got halflife={halflife} and "
                f"sketch={sketch}. Leave one of them out."
            )
        self.precision = precision
        self.sites = names
        self.pairs = pair_list([s if isinstance(s, str) else name for s, name in zip(sites, names)], pairs)
        self.sketch, self.groups, self.seed = sketch, 1 if sketch is None else groups, seed
        self.memory = memory
        places: list[tuple[str, ...]] = [(*part, leaf) for part in parts for leaf in SITE_LEAVES]
        places += [(f"{a}->{b}", leaf) for a, b in self.pairs for leaf in PAIR_LEAVES]
        places.append(("relative_error",))
        places += [(f"{a}->{b}", "relative_error") for a, b in self.pairs]
        if halflife is not None:
            places.append(("effective_sample_size",))
            places += [(f"{a}->{b}", "effective_sample_size") for a, b in self.pairs]
        writes: list[Key] = [("cross_moments", *place) for place in places]
        if isinstance(out_keys, (str, tuple)):
            out_keys = [(*key_tuple(out_keys), *place) for place in places]
        reads: dict[Key, str] = {("tokens", *part): f"N D{i}" for i, part in enumerate(parts)}
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads, writes=writes)
        self._runs = _runs(names, self.pairs)
        self.add_state("count", torch.int64)
        for name in ("widths", "mean", "trace", "norm2_product", "x_norm2y", "relative_error"):
            self.add_state(name, torch.int64 if name == "widths" else torch.float64)
        for i, first, last in self._runs:
            self.add_state(f"scatter_{i}_{first}_{last}", torch.float64)
        self._projections: dict[tuple[int, torch.device], Tensor] = {}

    def start(self, *rows: Tensor) -> dict[str, Tensor]:
        """Zeros, once the widths are known to fit."""
        given = [x.shape[-1] for x in rows]
        widths = [self.sketch] * len(given) if self.sketch else given
        shapes = {(i, a, b): (widths[i], sum(widths[a:b])) for i, a, b in self._runs}
        needed = 8 * sum(d * e for d, e in shapes.values())
        if needed > self.memory:
            raise ValueError(
                f"StreamingCrossMoments needs {needed / 2**30:.1f} GiB for {len(self.sites)} sites of width up to "
                f"{max(given)} and {len(self.pairs)} pairs, above memory={self.memory / 2**30:.1f} GiB. "
                f"Pass sketch=1024 (random projections), fewer pairs=, or a higher memory=."
            )
        zeros: dict[str, tuple[int, ...]] = {
            "count": (),
            "relative_error": (),
            "mean": (sum(given),),
            "trace": (len(given) * self.groups,),
            "norm2_product": (len(given) * self.groups,) * 2,
            "x_norm2y": (sum(widths), len(given) * self.groups),
            **{f"scatter_{i}_{a}_{b}": shape for (i, a, b), shape in shapes.items()},
        }
        device = rows[0].device
        state = {
            name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in zeros.items()
        }
        return state | {"widths": torch.tensor(given, device=device)}

    def accumulate(self, *rows: Tensor) -> None:
        """Add a block of rows."""
        self._check_rows(rows)
        before = self.count.double()
        if self.halflife is None:
            y, self.mean, step = about_running_mean(rows, self.mean, self.count)
            y, step = self._project(y), self._project(step)
            block = y[:-1]
            norms = self._per_group(block.square())
            self._move(-step, before)
            self.trace = self.trace + norms.sum(0)
            self.norm2_product = self.norm2_product + norms.mT @ norms
            self.x_norm2y = self.x_norm2y + block.mT @ norms
        else:
            y, self.mean, _ = weighted_about_running_mean(rows, self.mean, self.count, self.halflife)
            for run in self._runs:
                self._panel(*run).mul_(decay(rows[0].shape[0], self.halflife))
        dtype = product_dtype(self.precision, y.device)
        columns, edges = factors(y, dtype), self._edges()
        for i, first, last in self._runs:
            panel, others = self._panel(i, first, last), columns[edges[first] : edges[last]]
            if i == first:
                add_gram(panel, others)
            else:
                add_product(panel, columns[edges[i] : edges[i + 1]], others)
        self.relative_error = self.relative_error.clamp(min=product_error(dtype))
        self.count = self.count + rows[0].shape[0]

    def _check_rows(self, rows: Sequence[Tensor]) -> None:
        widths = [x.shape[-1] for x in rows]
        if not torch.compiler.is_compiling() and widths != on_host(self.widths).tolist():
            raise ValueError(
                f"StreamingCrossMoments has seen rows of widths {self.widths.tolist()} at {self.in_keys} and now gets "
                f"{widths}. Use one stage a model, or reset()."
            )

    def combine(self, other: StreamingCrossMoments) -> None:
        """Move both to the common mean, then add."""
        if other.widths.tolist() != self.widths.tolist():
            raise ValueError(
                f"StreamingCrossMoments has seen rows of width {self.widths.tolist()}, the stage to merge "
                f"{other.widths.tolist()}: merge stages that saw the same sites of one model."
            )
        # The twin's vectors are replaced below, its scatters only read: no copy of the D x D state.
        twin = self.with_state({name: value.to(self.mean.device) for name, value in other.state().items()})
        n, m = self.count.double(), twin.count.double()
        if self.halflife is not None:  # the other's rows came later
            faded = torch.exp2(-m / self.halflife)
            n, m = weight_sum(n, self.halflife) * faded, weight_sum(m, self.halflife)
            for run in self._runs:
                self._panel(*run).mul_(faded)
        delta = twin.mean - self.mean
        self.mean = self.mean + delta * (m / (n + m))
        projected = self._project(delta)
        if self.halflife is None:
            self._move(-projected * (m / (n + m)), n)
            twin._move(projected * (n / (n + m)), m)
            self.trace = self.trace + twin.trace
            self.norm2_product = self.norm2_product + twin.norm2_product
            self.x_norm2y = self.x_norm2y + twin.x_norm2y
        self.relative_error = torch.maximum(self.relative_error, twin.relative_error)
        edges = self._edges()
        for run in self._runs:
            i, first, last = run
            left, right = projected[edges[i] : edges[i + 1]], projected[edges[first] : edges[last]]
            self._panel(*run).add_(twin._panel(*run)).addr_(left * (n * m / (n + m)), right)
        self.count = self.count + twin.count

    def _move(self, shift: Tensor, n: Tensor) -> None:
        """trace, norm2_product and x_norm2y of n rows about a mean that lies ``-shift`` away; scatter is still the old.

        With u' = u + δ, w' = w + ε and C = Σ u wᵀ: Σ u'|w'|² = Σ u|w|² + 2Cε + δ Σ|w|² + nδ|ε|², and so on.
        """
        edges, g = self._edges(), self.groups
        turned = torch.zeros_like(self.x_norm2y)
        for i, j, scatter in self._blocks():
            rows_i, rows_j = slice(edges[i], edges[i + 1]), slice(edges[j], edges[j + 1])
            turned[rows_i, j * g : (j + 1) * g] = _times(scatter, shift[rows_j], g)
            if i != j:
                turned[rows_j, i * g : (i + 1) * g] = _times(scatter.mT, shift[rows_i], g)
        size = self._per_group(shift.square().unsqueeze(0)).squeeze(0)
        along = self._per_group((shift[:, None] * self.x_norm2y).mT).mT
        across = self._per_group((shift[:, None] * turned).mT).mT
        sizes = size[:, None] * self.trace
        self.norm2_product = (
            self.norm2_product
            + 2 * (along + along.mT)
            + 4 * across
            + sizes
            + sizes.mT
            + n * torch.outer(size, size)
        )
        self.x_norm2y = self.x_norm2y + 2 * turned + shift[:, None] * (self.trace + n * size)
        self.trace = self.trace + n * size

    def result(self) -> list[Tensor]:
        """Every leaf of every site, then of every pair."""
        edges, scatter = self._edges(), {(i, j): block for i, j, block in self._blocks()}
        given = [0, *torch.cumsum(self.widths, 0).tolist()]
        degrees = degrees_of_freedom(self.count, self.halflife)

        def at(site: int) -> int | slice:
            return site if self.sketch is None else slice(site * self.groups, (site + 1) * self.groups)

        # of weighted rows the sums of norms are not kept
        unknown = 0.0 if self.halflife is None else torch.nan

        def norms(i: int, j: int) -> Tensor:
            return self.norm2_product[at(i), at(j)] + unknown

        def vectors(i: int, j: int) -> Tensor:
            return self.x_norm2y[edges[i] : edges[i + 1], at(j)] + unknown

        leaves: list[Tensor] = []
        for i in range(len(self.sites)):
            mean = self.mean[given[i] : given[i + 1]].clone()
            leaves += [self.count.clone(), mean, scatter[i, i] / degrees, norms(i, i), vectors(i, i)]
        for a, b in self.pairs:
            i, j = self.sites.index(a), self.sites.index(b)
            block = scatter[i, j] if i <= j else scatter[j, i].mT
            leaves += [(block / degrees).contiguous(), norms(i, j), vectors(i, j), vectors(j, i)]
        leaves += [self.relative_error.clone() for _ in range(1 + len(self.pairs))]
        if self.halflife is not None:
            leaves += [effective_sample_size(self.count, self.halflife) for _ in range(1 + len(self.pairs))]
        return leaves

    def _edges(self) -> list[int]:
        """Where each site's columns start, after projection."""
        edges = [0]
        for i, first, last in self._runs:
            if i == first:
                edges.append(edges[-1] + self._panel(i, first, last).shape[0])
        return edges

    def _panel(self, i: int, first: int, last: int) -> Tensor:
        return self.state()[f"scatter_{i}_{first}_{last}"]

    def _blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        edges = self._edges()
        for i, first, last in self._runs:
            panel = self._panel(i, first, last)
            for j in range(first, last):
                yield i, j, panel[:, edges[j] - edges[first] : edges[j + 1] - edges[first]]

    def _per_group(self, columns: Tensor) -> Tensor:
        """(R, columns) summed over each group's columns: (R, sites·groups)."""
        edges = self._edges()
        parts = [columns[:, a:b].unflatten(1, (self.groups, -1)).sum(-1) for a, b in pairwise(edges)]
        return torch.cat(parts, dim=1)

    def _project(self, values: Tensor) -> Tensor:
        """Rows or a shift of the mean (..., ΣD) in the coordinates of the sums."""
        if self.sketch is None:
            return values
        widths = self.widths.tolist()
        parts = zip(values.split(widths, -1), widths)
        return torch.cat(
            [part @ self._projection(width, self.sketch, part.device) for part, width in parts], -1
        )

    def _projection(self, width: int, columns: int, device: torch.device) -> Tensor:
        """(width, columns) Gaussian columns, each group's Gram matrix the identity on average.

        Sites share it: only products of different groups are ever used, and these are independent.
        """
        key = (width, device)
        if key not in self._projections:
            base = gaussian_columns(width, columns, self.seed, torch.float64, device)
            self._projections[key] = base * (self.groups / columns) ** 0.5
        return self._projections[key]


def _times(matrix: Tensor, vector: Tensor, groups: int) -> Tensor:
    """(D, groups): the matrix times each group of the vector."""
    if groups == 1:
        return (matrix @ vector).unsqueeze(1)
    return (matrix * vector).unflatten(1, (groups, -1)).sum(-1)


def _runs(sites: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int, int]]:
    """(i, first, last): site i is multiplied by the columns of sites first..last-1 at once; its own come first."""
    partners: dict[int, set[int]] = {i: {i} for i in range(len(sites))}
    for a, b in pairs:
        i, j = sorted((sites.index(a), sites.index(b)))
        partners[i].add(j)
    runs: list[tuple[int, int, int]] = []
    for i, others in partners.items():
        for j in sorted(others):
            if runs and runs[-1][0] == i and runs[-1][2] == j:
                runs[-1] = (i, runs[-1][1], j + 1)
            else:
                runs.append((i, j, j + 1))
    return runs
