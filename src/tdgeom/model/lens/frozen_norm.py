"""A norm with the statistics that it had in a pass: then it is linear, and parts of its input have parts of its output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdgeom.core.devices import doubled


class FrozenNorm:
    """What a norm did to the rows of one pass, as an affine map: ``gain · (x - mean) · scale + bias``, ``scale`` of the pass.

    Whether the norm centres, its gain and its bias are asked of the norm itself; the scale of each row is read from what it
    took and gave. Then the map must give what the norm gave.

    Args:
        norm: a module that normalises the last axis by its root mean square or its deviation.
        taken: what it took in the pass, (..., D).
        gave: what it gave, (..., D).

    Raises ``ValueError`` for a norm that is not of this form.

    >>> x = torch.tensor([[1.0, 2.0, 6.0]])
    >>> frozen = FrozenNorm(norm := nn.LayerNorm(3), x, norm(x))
    >>> parts = frozen.linear(x - 1.0), frozen.linear(torch.ones(1, 3))
    >>> torch.allclose(parts[0] + parts[1] + frozen.bias, norm(x).double())
    True
    """

    @torch.no_grad()
    def __init__(self, norm: nn.Module, taken: Tensor, gave: Tensor) -> None:
        width, name = taken.shape[-1], type(norm).__name__
        # wide of any eps, and exact in every dtype; never constant, as an odd width would be without the last two
        probe = torch.full((1, width), 64.0, dtype=taken.dtype, device=taken.device)
        probe[:, 1::2] = -64.0
        asked = torch.cat([torch.zeros_like(probe), probe, probe + 64.0])
        try:
            zero, plain, moved = doubled(norm.forward(asked)).split(1)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"{name} takes more than what it normalises, so its statistics cannot be held fixed: {error}."
            ) from error
        self.bias = zero[0]
        self.centres = bool((plain - moved).abs().max() <= 1e-2 * (plain - zero).abs().max())
        unit = self._centred(doubled(probe))
        self.gain = ((plain - zero) / (unit / unit.square().mean().sqrt()))[0]
        base = self.gain * self._centred(doubled(taken))
        size = base.square().sum(-1, keepdim=True)
        target = doubled(gave) - self.bias
        self.scale = torch.where(
            size > 0, (base * target).sum(-1, keepdim=True) / size.clamp(min=1e-300), 0.0
        )
        missed = (base * self.scale - target).abs().amax(-1)
        allowed = 32 * torch.finfo(gave.dtype).eps * doubled(gave).abs().amax(-1) + 1e-30
        if bool((missed > allowed).any()):
            raise ValueError(
                f"{name} is no norm whose statistics can be held fixed: gain times centred input misses what it gave by "
                f"{float(missed.max()):.2g}."
            )

    def _centred(self, value: Tensor) -> Tensor:
        return value - value.mean(-1, keepdim=True) if self.centres else value

    def linear(self, value: Tensor) -> Tensor:
        """What a part of the input gives, (..., D) -> (..., D) in float64; the bias belongs to no part."""
        return self.gain * self._centred(doubled(value)) * self._scale_of(value)

    def transposed(self, value: Tensor) -> Tensor:
        """The direction in the input that a direction in the output reads, (..., D) -> (..., D) in float64."""
        return self._centred(self.gain * doubled(value)) * self._scale_of(value)

    def _scale_of(self, value: Tensor) -> Tensor:
        # rows of the pass stand first; further axes (answers) come between them and the features
        lead = self.scale.shape[:-1]
        return self.scale.reshape(*lead, *[1] * (value.ndim - len(lead)))
