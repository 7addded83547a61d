"""All pairs of rows, block by block: keys that order distances, in float32, and a bound on their rounding.

The key of two rows is half their squared distance (for Minkowski's other distances: the distance). Rows are centred and
scaled first, so keys depend neither on the data's offset nor on its unit, and Euclidean keys come from matrix products:
(|x|² + |y|²)/2 - x·y. The block of rows (I, J) also serves (J, I), so half of all blocks is multiplied. The bounds hold for
float32 products in full precision, in which ``opaque`` functions run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch
from torch import Tensor

from tdgeom.numerics.differences import UNIT, budget, product_error

__all__ = ["KeyBlocks", "block_rows", "centred", "key_error", "key_of", "keys_between"]

_CPU_BLOCK = 1024  # a block then stays in the last-level cache while it is looked through
_WORKERS = 4  # a block is looked through in a fifth of the time that multiplying it takes one core


def block_rows(n: int, batch: int, *, block: int | None, memory: int | None, device: torch.device) -> int:
    """Rows a block: the caller's, or as many as the budget allows (and the cache likes, on a CPU)."""
    if block is None:
        block = max(64, math.isqrt(budget(memory) // (8 * batch)))
        if device.type == "cpu":
            block = min(block, _CPU_BLOCK)
    parts = math.ceil(n / max(1, block))
    size = math.ceil(n / parts)
    return size if size <= 256 else math.ceil(size / 64) * 64


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (b, n, D) about (nearly) their mean, at most about 1 in size, in float32, and the factor (b,) undoing that.

    Any centre near the mean serves. For float32 rows a float32 centre makes the subtraction (nearly) exact, and a
    power of two as the factor loses no digit.
    """
    rows = x - x.mean(1, keepdim=True)
    low, high = rows.amin((1, 2)), rows.amax((1, 2))  # aminmax is ten times slower than both
    scale = torch.maximum(high, -low).double()
    scale = torch.exp2(torch.where(scale > 0, scale, 1.0).log2().round())
    return rows.div_(scale[:, None, None].to(rows.dtype)).float(), scale


class KeyBlocks:
    """The blocks of keys of rows (b, n, D): every pair of blocks I <= J of the first ``total`` >= n rows.

    Rows beyond n, and a row and itself, are infinitely far.
    """

    def __init__(
        self, rows: Tensor, p: float, *, block: int | None = None, memory: int | None = None
    ) -> None:
        b, n, _ = rows.shape
        self._p, self._workers = p, min(torch.get_num_threads(), _WORKERS) if rows.device.type == "cpu" else 1
        size = block_rows(n, b * self._workers, block=block, memory=memory, device=rows.device)
        self.total = total = math.ceil(n / size) * size
        self._half = torch.full((b, total), torch.inf, dtype=torch.float32, device=rows.device)
        self._half[:, :n] = torch.linalg.vector_norm(rows, dim=-1).square_().div_(2) if p == 2 else 0
        self._rows = torch.nn.functional.pad(rows, (0, 0, 0, total - n)) if total > n else rows
        self._shape = (b, size, size)
        parts = [slice(start, start + size) for start in range(0, total, size)]
        self._pairs = [(mine, other) for i, mine in enumerate(parts) for other in parts[i:]]

    def fill(self, keys: Tensor, mine: slice, other: slice) -> None:
        """Write the keys of one pair of blocks."""
        rows, half = self._rows, self._half
        keys_between(rows[:, mine], rows[:, other], half[:, mine], half[:, other], self._p, out=keys)
        if mine == other:
            keys.diagonal(dim1=1, dim2=2).fill_(torch.inf)

    def each(self, take: Callable[[Tensor, slice, slice], None], *, keep: bool = False) -> None:
        """``take`` every block (keys, rows I, rows J): on a CPU one worker multiplies while another's is looked through.

        ``keys`` is overwritten by the next block unless ``keep``.
        """
        threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
        workers = min(self._workers, len(self._pairs))
        pairs, turn = iter(self._pairs), Lock()  # a list's iterator gives each pair to one thread only

        def work() -> None:
            # whether gradients and inference mode are on belongs to a thread
            with torch.inference_mode(inference), torch.no_grad():
                keys = None
                for mine, other in pairs:
                    if keys is None or keep:
                        keys = torch.empty(self._shape, dtype=torch.float32, device=self._rows.device)
                    self.fill(keys, mine, other)
                    with turn:
                        take(keys, mine, other)

        if workers == 1:
            return work()
        try:
            with ThreadPoolExecutor(
                workers, initializer=torch.set_num_threads, initargs=(threads // workers,)
            ) as pool:
                for done in [pool.submit(work) for _ in range(workers)]:
                    done.result()
        finally:
            torch.set_num_threads(threads)
        return None


def keys_between(a: Tensor, b: Tensor, half_a: Tensor, half_b: Tensor, p: float, *, out: Tensor) -> None:
    """Keys of all rows of a against all rows of b; ``half`` are their |x|²/2 (Minkowski: 0)."""
    torch.add(half_a.unsqueeze(-1), half_b.unsqueeze(-2), out=out)
    if p != 2:
        out.add_(torch.cdist(a, b, p=p))
    elif len(a) == 1:  # the plain product is a little faster than a batch of one
        out[0].addmm_(a[0], b[0].mT, alpha=-1)
    else:
        out.baddbmm_(a, b.mT, alpha=-1)


def key_of(distance: Tensor, p: float) -> Tensor:
    """The key of a distance."""
    return distance.square() / 2 if p == 2 else distance


def key_error(size: Tensor, reach: Tensor, width: int, p: float, dtype: torch.dtype) -> Tensor:
    """Rounding error of a key between a row of norm ``size`` and any row within ``reach`` of it.

    Such a row's norm is at most size + reach (a row beyond can't be a neighbour), and a Euclidean key's error at
    most gamma (|x|+|y|)²/2. Minkowski distances come from differences: their error is relative.
    """
    gamma = product_error(width, dtype)
    if p == 2:
        return gamma * (2 * size + reach).square() / 2
    root = math.sqrt(width)
    return 2 * gamma * reach + 2 * UNIT[dtype] * root * (2 * size + root * reach)
