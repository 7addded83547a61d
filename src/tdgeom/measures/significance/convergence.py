"""Has a number settled? The same stage on N, N/2, N/4, ... rows, and how many rows it would need."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor

from tdgeom.core.keys import Key, Keys, as_key, key_tuple
from tdgeom.core.stage import Stage, device_of
from tdgeom.core.surroundings import steady
from tdgeom.core.warnings import Gathered, gathered

__all__ = ["Convergence", "Settling", "rows_to_settle", "settling"]

_POWERS = (0.25, 0.5, 1.0)  # of n, with which a bias falls: 1 for moments, 2/d for distances in d dimensions


class Settling(NamedTuple):
    """Each (...): where the curve is heading, c and a of value = limit + c·n^-a, and how far the last value is from the limit."""

    limit: Tensor
    coefficient: Tensor
    power: Tensor
    remaining: Tensor


def settling(value: Tensor, rows: Tensor) -> Settling:
    """The curve limit + c·n^-a through the values of a measure on ever more rows.

    a is that of 1/4, 1/2 and 1 with the least squared residuals, limit and c are least squares given a, residuals in
    proportion to the rows (where the curve is closest to its last form and values are surest). ``remaining`` is
    |value(N) - limit|: the bias that more rows would still take away, if the curve goes on as it did.

    Args:
        value: (..., S) of the measure, most rows first, as ``Convergence`` writes. rows: (S,).

    Returns:
        Each (...). NaN with fewer than 3 sizes, or where a value is NaN.

        >>> n = torch.tensor([1600.0, 800.0, 400.0, 200.0])
        >>> found = settling(5 - 100 / n, n)
        >>> round(float(found.limit), 6), float(found.power), round(float(found.remaining), 4)
        (5.0, 1.0, 0.0625)
    """
    value, rows = value.double(), rows.double().to(value.device)
    if rows.ndim != 1 or value.shape[-1:] != rows.shape:
        raise ValueError(
            f"settling expects value (..., S) and rows (S,), got {tuple(value.shape)} and {tuple(rows.shape)}."
        )
    if len(rows) < 3:
        nan = torch.full(value.shape[:-1], torch.nan, dtype=torch.float64, device=value.device)
        return Settling(nan, nan, nan, nan)
    fits, weight = [], rows / rows[0]
    for power in _POWERS:
        basis = torch.stack([torch.ones_like(rows), weight**-power], -1)
        found = (value * weight) @ torch.linalg.pinv(basis * weight[:, None]).mT
        left = ((value - found @ basis.mT) * weight).square().sum(-1)
        fits.append((left, found[..., 0], found[..., 1] * rows[0] ** power, torch.full_like(left, power)))
    best = torch.stack([fit[0] for fit in fits]).nan_to_num(torch.inf).argmin(0, keepdim=True)
    limit, factor, slope = (torch.stack(part).gather(0, best)[0] for part in list(zip(*fits))[1:])
    slope = torch.where(torch.isnan(limit), torch.nan, slope)
    return Settling(limit, factor, slope, (value[..., 0] - limit).abs())


def rows_to_settle(value: Tensor, rows: Tensor, tolerance: float = 0.05) -> Tensor:
    """How many rows bring a measure within ``tolerance`` (a share of its limit) of where it is heading: (..., S), (S,) -> (...).

    From the curve of ``settling``: (|c|/(tolerance·|limit|))^(1/a). An extrapolation: far beyond the rows at hand an order of
    magnitude. NaN where there is no curve.

        >>> n = torch.tensor([1600.0, 800.0, 400.0, 200.0])
        >>> round(float(rows_to_settle(5 - 100 / n, n, 0.01)))
        2000
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"rows_to_settle: tolerance is a share between 0 and 1, got {tolerance}.")
    found = settling(value, rows)
    return (found.coefficient.abs() / (tolerance * found.limit.abs())) ** (1 / found.power)


class Convergence(Stage):
    """A stage on nested prefixes of a sample, N, N/2, N/4, ... rows: has its number settled?

    The rows of ``RowSample`` are in hash order, so that every prefix is a uniform sample.

    Args:
        stage: a stage, or a sequence of stages, that reads ``"sample"`` and writes numbers: ``TwoNN()``, ``SampleMetrics()``.
        levels: prefixes at most. min_rows: no prefix has fewer.
        tolerance: a number has settled where the last doubling of the rows moved it by at most half this share of itself, and the
            one before by at most this share. A bias that falls with 1/n is then below half the tolerance, one that falls with
            1/√n about the tolerance; slower ones (distances in many dimensions) show in ``limit`` only.
        in_keys: the rows, default ``"sample"``. out_keys: a list of every leaf, or a root in place of ``"convergence"``.

    Writes ``("convergence", "rows")`` (S,), most rows first, and for each number of the stage ``("convergence", name, "value")``
    (S,), ``("convergence", name, "limit")`` () and ``("convergence", name, "converged")`` (), 1 or 0. ``name`` is the last part
    of the stage's key, the estimator's where that is an "estimate".

        >>> import tdgeom as tg
        >>> x = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
        >>> td = tg.Convergence(tg.SampleMetrics())(TensorDict({"sample": x}))
        >>> td["convergence", "rows"].tolist(), int(td["convergence", "sv_participation_ratio", "converged"])
        ([2000, 1000, 500, 250, 125], 1)
    """

    reads = {"sample": "N D"}

    def __init__(
        self,
        stage: TensorDictModuleBase,
        *,
        levels: int = 5,
        min_rows: int = 64,
        tolerance: float = 0.05,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        free = getattr(stage, "optional_in_keys", [])
        reads = [key for key in getattr(stage, "in_keys", []) if key not in free]
        if not isinstance(stage, TensorDictModuleBase) or reads != ["sample"]:
            raise TypeError(
                f"Convergence takes a stage that reads 'sample' alone, such as tg.TwoNN() or tg.SampleMetrics(), got "
                f"{type(stage).__name__} reading {reads}."
            )
        if levels < 2 or min_rows < 4 or not 0 < tolerance < 1:
            raise ValueError(
                f"Convergence: levels is 2 or more, min_rows 4 or more, tolerance between 0 and 1; got {levels}, {min_rows}, "
                f"{tolerance}."
            )
        self.levels, self.min_rows, self.tolerance = levels, min_rows, tolerance
        self.measured = _names(stage)
        writes: list[Key] = [("convergence", "rows")]
        writes += [
            ("convergence", name, leaf) for name in self.measured for leaf in ("value", "limit", "converged")
        ]
        if isinstance(out_keys, (str, tuple)):
            out_keys = [as_key((*key_tuple(out_keys), *key_tuple(key)[1:])) for key in writes]
        super().__init__(in_keys=in_keys, out_keys=out_keys, writes=writes)
        self.stage = stage

    def compute(self, sample: Tensor) -> list[Tensor]:
        """The stage on each prefix."""
        n = sample.shape[-2]
        if sample.ndim != 2 or n < 2 * self.min_rows:
            raise ValueError(
                f"Convergence expects one data set of at least {2 * self.min_rows} rows (twice min_rows), got "
                f"{tuple(sample.shape)}."
            )
        sizes = [n >> level for level in range(self.levels) if n >> level >= self.min_rows]
        curves: dict[str, list[Tensor]] = {name: [] for name in self.measured}
        with steady(device_of([sample])):
            for size in sizes:
                # Few rows are what the smaller prefixes are for: only the whole sample's are told of.
                with gathered(None if size == n else Gathered()):
                    out = self.stage(TensorDict({"sample": sample[:size]}, batch_size=[]))
                for name, key in self.measured.items():
                    curves[name].append(out.get(key).detach().double())
        rows = torch.tensor(sizes, dtype=torch.int64, device=sample.device)
        found = [rows]
        for name, values in curves.items():
            if any(value.ndim for value in values):
                shapes = [tuple(value.shape) for value in values]
                raise ValueError(
                    f"Convergence expects single numbers, {name} has shapes {shapes}. Leave it out."
                )
            curve = torch.stack(values)
            found += [curve, *self._judged(curve, rows)]
        return found

    def _judged(self, curve: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        size = self.tolerance * curve[0].abs()
        steps = (curve[:-1] - curve[1:]).abs()
        settled = steps[0] <= size / 2
        if len(steps) > 1:
            settled = settled & (steps[1] <= size)
        return settling(curve, rows).limit, settled.double()


def _names(stage: TensorDictModuleBase) -> dict[str, Any]:
    """The numbers of a stage by short name: what tells of rows, copies and errors is no measure, nor what later stages read."""
    names: dict[str, Any] = {}
    members: list[Any] = list(cast(Any, stage.module)) if isinstance(stage, TensorDictSequential) else [stage]
    between = {
        key
        for place, member in enumerate(members)
        if any(set(later.in_keys) & set(member.out_keys) for later in members[place + 1 :])
        for key in member.out_keys
    }
    for key in stage.out_keys:
        if key in between:
            continue
        parts = key_tuple(key)
        if parts[-1] in _BESIDE or parts[-1].endswith(("few_rows", "standard_error")):
            continue
        name = parts[-2] if parts[-1] == "estimate" and len(parts) > 1 else parts[-1]
        names["_".join(parts[1:]) if name in names else name] = key
    return names


_BESIDE = {"rows", "duplicates", "near_duplicates", "scale", "unresolved", "numerical_rank", "ceiling"}
