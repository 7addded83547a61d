"""Concept erasure: the smallest affine edit after which no linear probe can tell a label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key, resolve_keys
from tdgeom.core.stage import Stage
from tdgeom.core.words import Words, class_names, class_numbers
from tdgeom.numerics.centring import in_one_type
from tdgeom.numerics.numerical_rank import directions_that_vary
from tdgeom.probing.label_moments import LEAVES, label_moments, pool_folds, row_targets
from tdgeom.probing.labelled_rows import plain_rows, row_labels

__all__ = ["LEACE", "Erase", "erase", "leace"]


def leace(moments: Mapping[str, Tensor], *, tolerance: float = 1e-8) -> dict[str, Tensor]:
    """The LEACE eraser in factors, x - left·rightᵀ(x - mean): from label moments, (D, r), (D, r), (D,).

    Formula:
        x - W⁺PW(x - μ); W whitens the rows, P projects on what of them the label is correlated with

    left = W⁺U and right = WU with W = (Σ^½)⁺ the whitening of the rows' covariance and U (D, r) an orthonormal basis of
    col(WΣ_xz), so that left·rightᵀ = W⁺PW. Among all affine edits after which x is uncorrelated with the label z (and so
    no linear classifier or regression beats a constant), it moves x least in mean square, in every norm. Singular values
    below ``tolerance`` times the largest count as zero. r is K-1 for K classes.

    Belrose et al. (2023), LEACE: perfect linear concept erasure in closed form, theorem 4.3.

    >>> from tdgeom.functional import label_moments
    >>> rows = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0], [2.0, 1.0]])
    >>> found = leace(label_moments(rows, torch.eye(2)[[0, 0, 1, 1]]))
    >>> erase(rows, **found)
    tensor([[1., 0.],
            [1., 1.],
            [1., 0.],
            [1., 1.]], dtype=torch.float64)
    """
    pooled = pool_folds(moments)
    n = pooled["count"].double()
    values, vectors = torch.linalg.eigh(pooled["scatter"] / n)
    real = directions_that_vary(values, vectors, pooled["scatter"] / n)
    if not bool(real.any()):
        raise ValueError(
            f"LEACE: the {int(n)} rows have no variance, so there is nothing to erase. Check which rows and labels were streamed."
        )
    root = torch.where(real, values, 1.0).sqrt()
    half = torch.where(real, root, 0.0)
    inverse = torch.where(real, 1 / root, 0.0)
    # In the eigenbasis: W = V·inverse·Vᵀ, and its pseudoinverse V·half·Vᵀ.
    whitened = inverse[:, None] * (vectors.mT @ (pooled["cross_scatter"] / n))
    u, s, _ = torch.linalg.svd(whitened, full_matrices=False)
    u = u[:, (s > s[0] * tolerance) & (s > 0)]
    return {
        "left": vectors @ (half[:, None] * u),
        "right": vectors @ (inverse[:, None] * u),
        "mean": pooled["mean"].clone(),
    }


def erase(x: Tensor, left: Tensor, right: Tensor, mean: Tensor) -> Tensor:
    """x - left·rightᵀ(x - mean): (..., D) -> (..., D), in the widest precision of ``x`` and the factors.

    >>> erase(torch.tensor([3.0, 1.0]), torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 0.0]))
    tensor([1., 1.])
    """
    x, left, right, mean = in_one_type(x, left, right, mean)
    return x - ((x - mean) @ right) @ left.mT


class LEACE(Stage):
    """The closed-form eraser of a label, from streamed label moments; ``Erase`` applies it.

    See ``leace``: affine, erases every linear trace of the label, and moves the rows least among all that do.

    Args:
        tolerance: relative size below which a direction of correlation counts as none.

    Reads the six leaves of ``StreamingLabelMoments``; writes ``("erasure", "left" | "right" | "mean")``, (D, r), (D, r),
    (D,), float64.

        >>> import torch, tdgeom as tg
        >>> moments = tg.StreamingLabelMoments()(torch.randn(60, 4), torch.arange(60) % 2, torch.arange(60) << 20)
        >>> tg.LEACE()(*moments)[0].shape
        torch.Size([4, 1])
    """

    reads = [("label_moments", name) for name in LEAVES]
    writes = [("erasure", name) for name in ("left", "right", "mean")]

    def __init__(
        self,
        *,
        tolerance: float = 1e-8,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.tolerance = tolerance

    def compute(self, *moments: Tensor) -> Mapping[str, Tensor]:
        """See ``leace``."""
        return leace(dict(zip(LEAVES, moments)), tolerance=self.tolerance)


class Erase(Stage):
    """Erase a label from activations or rows: x - left·rightᵀ(x - mean), the same entry in and out.

    With an eraser of its own, ``Erase(eraser)``, it reads one entry of any shape (..., D) and can edit a model's
    activations; without one it reads the eraser from ``("erasure", ...)``, for a second pass over a stream, where the erased
    rows need a name of their own: ``tg.ForEach(tg.Erase(out_keys="clean"), sites)``.

    Args:
        eraser: what ``leace`` or ``LEACE`` found: a mapping with "left", "right" and "mean". It becomes part of the stage's
            state (not trained).

    Reads ``"tokens"`` (..., D), and without an eraser ``("erasure", "left" | "right" | "mean")``; writes ``"tokens"``, or
    what ``out_keys`` names, in the dtype of what it read. The first of ``in_keys`` is also what it
    writes. ``tg.Intervene(model, {site: Erase(eraser, in_keys="activation")})`` erases inside a model.

    Raises:
        ValueError: a mapping that is no eraser.

        >>> import torch, tdgeom as tg
        >>> x, y = torch.randn(200, 4), torch.arange(200) % 2
        >>> x[:, 1] += 3 * y
        >>> clean = tg.Erase.fit(x, y)(tokens=x)
        >>> bool((clean[y == 0].mean(0) - clean[y == 1].mean(0)).abs().max() < 1e-5)
        True
    """

    reads = {"tokens": "D"}
    writes = ["tokens"]
    left: Tensor
    right: Tensor
    mean: Tensor

    def __init__(
        self,
        eraser: Mapping[str, Tensor] | None = None,
        *,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        reads: dict[Key, str] = {"tokens": "D"}
        if eraser is None:
            reads |= {("erasure", "left"): "D r", ("erasure", "right"): "D r", ("erasure", "mean"): "D"}
        if out_keys is None and in_keys is not None:
            out_keys = resolve_keys(in_keys, list(reads), what="in_keys", owner="Erase")[:1]
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads)
        if eraser is not None and not {"left", "right", "mean"} <= set(eraser.keys()):
            raise ValueError(
                f"Erase expects an eraser with 'left', 'right' and 'mean', got {sorted(map(str, eraser.keys()))}. Of a result "
                f"of run it is result['erasure', site]."
            )
        for name in ("left", "right", "mean"):
            self.register_buffer(name, None if eraser is None else eraser[name].detach().clone())

    @classmethod
    def fit(cls, x: Tensor, label: Tensor, **keys: Any) -> Erase:
        """The eraser of a label from rows: (N, D) with classes int (N,) or numbers float (N,), (N, K)."""
        x, label = plain_rows("Erase.fit", x=x, label=label)
        if isinstance(label, Words):
            label = class_numbers(label, class_names(label)).to(x.device)
        label, used = row_labels(label, x, key="label", owner="Erase.fit")
        return cls(leace(label_moments(x[used], row_targets(label[used], 1))), **keys)

    def compute(self, x: Tensor, *eraser: Tensor) -> Tensor:
        """See ``erase``."""
        left, right, mean = eraser or (self.left, self.right, self.mean)
        return erase(x, left.to(x.device), right.to(x.device), mean.to(x.device)).to(x.dtype)
