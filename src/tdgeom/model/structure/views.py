"""Views: how a site's tensor lies inside what a module receives or gives, and how it is put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tdgeom.core.devices import doubled
from tdgeom.core.surroundings import steady
from tdgeom.model.structure.linears import bias_of, shares
from tdgeom.model.structure.readers import read_input


class View:
    """How the tensor of a site lies in the module's own; ``write(value, read(value))`` changes nothing."""

    heads: int

    def read(self, value: Tensor, args: tuple = (), kwargs: dict | None = None) -> Tensor:
        """The site's tensor, from the module's and what the module was called with."""
        raise NotImplementedError

    def write(self, value: Tensor, new: Tensor) -> Tensor:
        """The module's tensor with the site's replaced."""
        raise NotImplementedError

    def gradient(self, value: Tensor) -> Tensor:
        """The gradient of the site's tensor, from the gradient of the module's."""
        return self.read(value)


@dataclass(frozen=True)
class HeadSlice(View):
    """Heads inside the features of a (fused) projection, (..., F) <-> (..., H, Dh), without a copy where possible.

    The F features are ``groups`` x ``width`` heads of ``dim`` each; of every group the heads ``start:stop`` are
    meant. A projection of its own is one group; ``[q | k | v]`` side by side is one group of all heads; query, key
    and value of a head beside each other are as many groups as there are key/value heads.
    """

    groups: int
    width: int
    dim: int
    start: int
    stop: int
    heads: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", self.groups * (self.stop - self.start))

    def read(self, value: Tensor, args: tuple = (), kwargs: dict | None = None) -> Tensor:
        """(..., F) -> (..., H, Dh)."""
        split = value.unflatten(-1, (self.groups, self.width, self.dim))
        return split[..., self.start : self.stop, :].flatten(-3, -2)

    def write(self, value: Tensor, new: Tensor) -> Tensor:
        """A copy of (..., F) with the heads replaced."""
        if self.start == 0 and self.stop == self.width:
            return new.flatten(-2)
        split = value.unflatten(-1, (self.groups, self.width, self.dim))
        parts = new.unflatten(-2, (self.groups, self.stop - self.start))
        return torch.cat([split[..., : self.start, :], parts, split[..., self.stop :, :]], -2).flatten(-3)


@dataclass(frozen=True, eq=False)
class HeadOutput(View):
    """Each head's share of the output projection, (..., T, H, D): ``z_h W_h``, the bias left out.

    A learned scale behind the projection is applied to every share. A norm behind it is taken at the statistics of
    the whole output, so that the shares still add up to what the stream receives; edits keep these statistics.
    """

    projection: nn.Module
    heads: int
    behind: nn.Module | None = None
    is_norm: bool = False

    def read(self, value: Tensor, args: tuple = (), kwargs: dict | None = None) -> Tensor:
        """The shares, from the projection's output and arguments, in at least the precision of its weights."""
        edited = vars(value).get("_head_output")
        if edited is not None:  # an edit has replaced them: the projection's input no longer tells
            return edited
        z = read_input(args, kwargs or {})
        if z is None:
            raise ValueError(f"{type(self.projection).__name__} expected a tensor, was called with {args}.")
        with steady(value.device):
            parts = shares(self.projection, z, self.heads)
            if self.behind is not None:
                parts = _normed(self.behind, value, parts) if self.is_norm else self.behind.forward(parts)
        return parts.to(value)

    def write(self, value: Tensor, new: Tensor) -> Tensor:
        """The projection's output with the shares replaced; what is not a share (the bias) stays.

        Where a norm or scale follows, the numbers stay: who edits adds the change of the sum behind it.
        """
        if self.behind is not None:
            total = value.view_as(value)
        else:
            with steady(value.device):
                bias = bias_of(self.projection, new)
            total = new.sum(-2) if bias is None else (new.sum(-2) + bias).to(new.dtype)
        vars(total)["_head_output"] = new  # a later reader of the same call sees the edited shares
        return total

    def gradient(self, value: Tensor) -> Tensor:
        """Every share enters the sum alike: the same gradient for every head, that of the sum (behind a norm or scale)."""
        return value.unsqueeze(-2).expand(*value.shape[:-1], self.heads, value.shape[-1])


def _normed(norm: nn.Module, total: Tensor, shares: Tensor) -> Tensor:
    # RMSNorm is x * gain / rms(x); a vector of ones gives the gain, however the weight is stored. Its forward is
    # called without the hooks around it: this is no call of the model
    eps = next((getattr(norm, n) for n in ("eps", "variance_epsilon") if hasattr(norm, n)), 1e-6)
    ones = torch.ones(total.shape[-1], dtype=total.dtype, device=total.device)
    gain = doubled(norm.forward(ones)) * (1.0 + eps) ** 0.5
    rms = (doubled(total).square().mean(-1, keepdim=True) + eps).rsqrt()
    return doubled(shares) * (rms * gain).unsqueeze(-2)


@dataclass(frozen=True)
class Pattern(View):
    """Attention scores or patterns, (B, H, Tq, Tk): the tensor itself."""

    heads: int

    def read(self, value: Tensor, args: tuple = (), kwargs: dict | None = None) -> Tensor:
        """The tensor."""
        return value

    def write(self, value: Tensor, new: Tensor) -> Tensor:
        """The new tensor."""
        return new


@dataclass(frozen=True)
class HeadsSecond(View):
    """Heads in front of positions, (B, H, T, Dh) <-> (B, T, H, Dh)."""

    heads: int

    def read(self, value: Tensor, args: tuple = (), kwargs: dict | None = None) -> Tensor:
        """(B, T, H, Dh)."""
        return value.transpose(1, 2)

    def write(self, value: Tensor, new: Tensor) -> Tensor:
        """(B, H, T, Dh)."""
        return new.transpose(1, 2)


@dataclass(frozen=True)
class Experts(View):
    """Something of ``experts`` experts: the tensor itself. It has no heads."""

    experts: int
    heads: int = 0

    def read(self, value: Tensor, args: tuple = (), kwargs: dict | None = None) -> Tensor:
        """The tensor."""
        return value

    def write(self, value: Tensor, new: Tensor) -> Tensor:
        """The new tensor."""
        return new


@dataclass(frozen=True)
class Part:
    """A module path, the side of the module, and what its tensor is multiplied by before it is used.

    ``side`` is ``"input"``, ``"output"``, or what lies inside the module's forward: ``"queries"``, ``"keys"``, ``"scores"``
    and ``"pattern"`` of an attention, ``"logits"`` and ``"choice"`` of a router. ``groups`` is the number of query heads that
    share a head. ``bypass`` says that the residual stream also goes around the module, so that who edits here has to edit
    the block's output too.
    """

    path: str
    side: str
    scale: float = 1.0
    view: View | None = None
    groups: int = 1
    bypass: bool = False


def take_heads(value: Tensor, heads: Sequence[int] | None, axis: int) -> Tensor:
    """The heads asked for, along ``axis``; ``None`` means all."""
    if heads is None:
        return value
    return value.index_select(axis, torch.tensor(heads, device=value.device))
