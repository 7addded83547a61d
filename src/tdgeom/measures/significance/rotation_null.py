"""What a measure that compares features one by one would be if the axes of one side meant nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tdgeom.measures.significance.calibrated import ShuffledNull, against_draws, check_repeats
from tdgeom.numerics.centring import centre, check_matched

__all__ = ["random_rotation", "rotated_null"]

_UNCHANGED = 1e-6  # of a value: what rounding leaves of a rotation that a measure does not see


def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """A rotation or reflection (D, D) float64, each as likely as any other (Haar).

    Q of a Gaussian matrix = QR with the signs of R's diagonal made positive (Mezzadri 2007).

    >>> q = random_rotation(3, torch.Generator().manual_seed(0))
    >>> torch.allclose(q @ q.T, torch.eye(3, dtype=torch.float64))
    True
    """
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64, device="cpu"))
    return q * r.diagonal().sign()


def rotated_null(
    measure: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    repeats: int = 200,
    best: float = 1.0,
    seed: int = 0,
) -> ShuffledNull:
    """A measure of two sides, and what it is when one side is turned to an arbitrary basis about its mean.

    The hypothesis is that the *axes* of the sides have nothing to do with each other: rows, and each side's own geometry, stay
    as they are, so that whatever is alike in CKA, Procrustes or neighbourhoods stays alike too. For measures that match
    features to features (``soft_matching``, ``layer_cosine``): are neurons alike beyond what their spaces are? A measure
    that is the same in every basis is refused, for it has no such null.

    Args:
        measure: a function of (N, D) and (N, E) rows that gives one number.
        x: (N, D) rows. y: (N, E) the same rows on the other side, the one that is turned.
        repeats: rotations. best: the value of two sides that are the same (0 for a distance). seed: of the rotations.

    Returns:
        As ``shuffled_null``: each () float64, and ``draws`` (repeats,).

    Raises:
        ValueError: rows that do not match; fewer than 19 repeats; a measure that no rotation changes.

        >>> from tdgeom.functional import soft_matching
        >>> x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
        >>> null = rotated_null(soft_matching, x, x[:, torch.randperm(6)], repeats=50)
        >>> round(float(null.p), 2), float(null.calibrated) > 0.99
        (0.02, True)
    """
    check_repeats(repeats, "rotated_null")
    check_matched(x, y, "rotated_null")
    generator = torch.Generator().manual_seed(seed)
    mean = y.double().mean(-2, keepdim=True)
    rows = centre(y.double()).rows
    value = torch.as_tensor(measure(x, y)).detach().double()
    draws = []
    for _ in range(repeats):
        turned = rows @ random_rotation(y.shape[-1], generator).to(y.device) + mean
        draws.append(
            torch.as_tensor(measure(x, turned.to(torch.promote_types(y.dtype, torch.float32)))).detach()
        )
    found = torch.stack(draws).double()
    if bool(((found - value).abs() <= _UNCHANGED * value.abs().clamp(min=1e-12)).all()):
        raise ValueError(
            "rotated_null: the measure is the same in every basis (CKA, Procrustes, CCA and neighbourhoods are), so that a "
            "rotation is no chance for it. Take shuffled_null, which moves rows, or a measure of single features."
        )
    return against_draws(value, found, best)
