"""Edits: TensorDict stages that read an activation and write the one to go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor, nn

from tdgeom.core.keys import Key
from tdgeom.core.stage import Stage
from tdgeom.model.positions import Positions, check_positions, position_mask
from tdgeom.model.sites import PATTERN_KINDS

__all__ = ["Edit", "ProjectOnto", "ProjectOut", "Scale", "Steer"]

Inputs = Mapping[str, Tensor]


class Edit(Stage):
    """The base of all edits: ``edit(value) -> value``, at chosen positions, heads and features.

    Reads ``"activation"``, (B, T, D) or (B, T, H, Dh) at sites with heads, and where present ``"attention_mask"`` (B, S),
    ``"input_ids"`` and ``"special_tokens_mask"``; S may exceed T in a step with a cache, and the last T columns are the
    activation's. Writes ``"activation"``; the tensor that came in is never written to. :class:`Intervene` calls edits with
    these keys, attention scores and patterns as (B, Tq, H, Tk).

    Args:
        positions: where to edit, in the vocabulary of :mod:`tdgeom.model.positions`; a boolean mask of a prompt selects
            nothing in later, cached steps.
        heads: query heads to edit; where queries share key/value heads, ``k`` and ``v`` of a head belong to its group.
        features: features to edit: an int, a list of ints or a slice.

    A subclass defines ``edit``:

        >>> import torch, tdgeom as tg
        >>> class Negate(tg.Edit):
        ...     def edit(self, value):
        ...         return -value
        >>> Negate(positions="last")(activation=torch.ones(1, 3, 1)).flatten()
        tensor([ 1.,  1., -1.])
    """

    reads = ["activation", "attention_mask", "input_ids", "special_tokens_mask"]
    writes = ["activation"]
    optional = frozenset({"attention_mask", "input_ids", "special_tokens_mask"})

    def __init__(
        self,
        *,
        positions: Positions = "all",
        heads: int | Sequence[int] | None = None,
        features: int | Sequence[int] | slice | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.positions = check_positions(positions)
        self.heads = None if heads is None else [heads] if isinstance(heads, int) else list(heads)
        self.features = [features] if isinstance(features, int) else features
        self.site: str | None = None
        self.groups = 1

    def edit(self, value: Tensor) -> Tensor:
        """The new activation, everywhere; positions, heads and features are applied by the caller."""
        raise TypeError(f"{type(self).__name__} defines no edit(): return the new activation there.")

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Edit ``"activation"``."""
        value, mask, ids, special = self.read(tensordict)
        self.site = tensordict.get_non_tensor("site", default=None)
        self.groups = tensordict.get_non_tensor("groups", default=1)
        keep = self.selected(value, mask, ids, special)
        new = self.replace(value, keep, mask, ids, special)
        if new.shape != value.shape:
            raise ValueError(
                f"{type(self).__name__} expected to give the activation's shape {tuple(value.shape)}, gave "
                f"{tuple(new.shape)}."
            )
        new = new.to(value.dtype)
        where = self._where(value, keep)
        return self.write(tensordict, new if where is None else torch.where(where, new, value))

    def replace(
        self,
        value: Tensor,
        keep: Tensor | None,
        mask: Tensor | None,
        ids: Tensor | None,
        special: Tensor | None,
    ) -> Tensor:
        """The new activation, for edits that need to know the (B, T) selection; the default calls ``edit``."""
        return self.edit(value)

    def selected(
        self, value: Tensor, mask: Tensor | None, ids: Tensor | None, special: Tensor | None
    ) -> Tensor | None:
        """(B, T) true at the positions to edit; ``None`` for all of them."""
        if isinstance(self.positions, str) and self.positions == "all":
            return None
        if value.ndim < 3:
            raise ValueError(
                f"positions={self.positions!r} needs an activation (B, T, ...), got {tuple(value.shape)}: this site has no "
                "positions. Remedy: positions='all'."
            )
        whole = value.new_ones(value.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        if whole.ndim != 2 or whole.shape[0] != value.shape[0] or whole.shape[1] < value.shape[1]:
            raise ValueError(
                f"positions={self.positions!r} needs an attention mask (B, S) for the activation {tuple(value.shape)}, got "
                f"{tuple(whole.shape)}. Remedy: call the model with its (B, S) padding mask."
            )
        whole = whole.to(value.device)
        positions, later = self.positions, whole.shape[1] - value.shape[1]
        if later and isinstance(positions, Tensor) and positions.shape[1] < whole.shape[1]:
            # a step with a cache: a mask of the prompt says nothing of the tokens after it
            positions = torch.nn.functional.pad(positions, (0, whole.shape[1] - positions.shape[1]))
        keep, _ = position_mask(whole, positions, input_ids=ids, special=special)
        return keep[:, whole.shape[1] - value.shape[1] :]

    def _where(self, value: Tensor, keep: Tensor | None) -> Tensor | None:
        where = None if keep is None else keep.reshape(*keep.shape, *[1] * (value.ndim - 2))
        if self.heads is not None:
            if value.ndim != 4:
                raise ValueError(
                    f"heads={self.heads} needs a site with heads, (B, T, H, Dh), got {tuple(value.shape)} at {self.site!r}. "
                    "Remedy: edit 'z' or 'head_output'."
                )
            count = value.shape[2]
            own = [
                head // self.groups if head >= 0 else (head + count * self.groups) // self.groups
                for head in self.heads
            ]
            if any(not 0 <= head < count for head in own):
                raise IndexError(
                    f"heads={self.heads} is out of range: {self.site!r} has {count * self.groups} query heads."
                )
            chosen = torch.zeros(count, 1, dtype=torch.bool, device=value.device)
            chosen[own] = True
            where = chosen if where is None else where & chosen
        if self.features is not None:
            chosen = torch.zeros(value.shape[-1], dtype=torch.bool, device=value.device)
            chosen[self.features] = True
            where = chosen if where is None else where & chosen
        return where

    # -------------------------------------------------------------------- activations of other runs

    def wanted_runs(self) -> dict[str, Inputs | Key]:
        """Runs of the model that the edit needs beforehand: name -> model inputs, or their key in the batch."""
        return {}

    def receive(self, name: str, site: str, acts: TensorDictBase | None) -> None:
        """Take the activations of a run (a TensorDict of Capture), or forget them (``None``)."""


class Steer(Edit):
    """Add a vector: ``x + coefficient * vector`` (Turner et al. 2023; Rimsky et al. 2023).

    Args:
        vector: (D,), (H, Dh) at sites with heads, or anything that broadcasts with the activation. A ``Parameter`` stays
            one, so that a steering vector can be trained.
        coefficient: what the vector is multiplied by.
        per_position: ``vector`` is (P, ...), one for each selected position, in their order.

    >>> Steer(torch.ones(2), coefficient=3.0, positions="first")(activation=torch.zeros(1, 2, 2))
    tensor([[[3., 3.],
             [0., 0.]]])
    """

    def __init__(
        self, vector: Tensor, *, coefficient: float = 1.0, per_position: bool = False, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if isinstance(vector, nn.Parameter):
            self.vector = vector
        else:
            self.register_buffer("vector", vector.detach().clone())
        self.coefficient, self.per_position = coefficient, per_position

    def replace(self, value: Tensor, keep: Tensor | None, *rest: Tensor | None) -> Tensor:
        """``x + coefficient * vector``."""
        vector = self.vector.to(value)
        if self.per_position:
            if keep is None:
                keep = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
            order = keep.cumsum(1) - 1
            if int(order.max()) >= vector.shape[0]:
                raise ValueError(
                    f"Steer(per_position=True) has {vector.shape[0]} vectors for {int(order.max()) + 1} selected positions."
                )
            vector = vector[order.clamp(min=0)]
        if vector.ndim and vector.shape[-1] not in (1, value.shape[-1]):
            raise ValueError(
                f"Steer expected a vector of the {value.shape[-1]} features at {self.site!r}, got {tuple(vector.shape)}."
            )
        return value + self.coefficient * vector


class Scale(Edit):
    """Multiply by a factor (a number, or a tensor that broadcasts).

    >>> Scale(2.0, features=0)(activation=torch.ones(1, 1, 2))
    tensor([[[2., 1.]]])
    """

    def __init__(self, factor: float | Tensor, **settings: Any) -> None:
        super().__init__(**settings)
        self.factor = factor

    def edit(self, value: Tensor) -> Tensor:
        """``factor * x``."""
        factor = self.factor.to(value) if isinstance(self.factor, Tensor) else self.factor
        return value * factor


class ProjectOut(Edit):
    """Remove a subspace: ``x - Q Qᵀ (x - mean)``, Q an orthonormal basis of the columns of ``basis``.

    Args:
        basis: (D, k) or (D,), need not be orthonormal; or an object with such a tensor as ``components``.
        mean: (D,), the point that the projection leaves alone; default the origin.

    >>> ProjectOut(torch.tensor([2.0, 0.0]))(activation=torch.ones(1, 1, 2))
    tensor([[[0., 1.]]])
    """

    def __init__(self, basis: Tensor, *, mean: Tensor | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        basis = getattr(basis, "components", basis)
        columns = basis.detach().double()
        columns = columns.unsqueeze(-1) if columns.ndim == 1 else columns
        if columns.ndim != 2 or columns.shape[1] > columns.shape[0]:
            raise ValueError(
                f"{type(self).__name__} expects a basis (D, k) with k <= D, got {tuple(basis.shape)}."
            )
        if not bool(torch.isfinite(columns).all()) or not bool(columns.any()):
            raise ValueError(
                f"{type(self).__name__} expects a basis with directions, got {tuple(basis.shape)} of zeros, NaN or Inf."
            )
        u, s, _ = torch.linalg.svd(columns, full_matrices=False)
        self.register_buffer("basis", u[:, s > s.max() * 1e-10])
        self.register_buffer("mean", None if mean is None else mean.detach().double())

    def inside(self, value: Tensor) -> Tensor:
        """The part of ``x - mean`` in the subspace."""
        basis = self.basis.to(value)
        centred = value if self.mean is None else value - self.mean.to(value)
        return (centred @ basis) @ basis.T

    def edit(self, value: Tensor) -> Tensor:
        """``x - Q Qᵀ (x - mean)``."""
        return value - self.inside(value)


class ProjectOnto(ProjectOut):
    """Keep a subspace only: ``mean + Q Qᵀ (x - mean)``; arguments as :class:`ProjectOut`.

    >>> ProjectOnto(torch.tensor([2.0, 0.0]))(activation=torch.ones(1, 1, 2))
    tensor([[[1., 0.]]])
    """

    def edit(self, value: Tensor) -> Tensor:
        """``mean + Q Qᵀ (x - mean)``."""
        inside = self.inside(value)
        return inside if self.mean is None else inside + self.mean.to(value)


def find_acts(source: TensorDictBase | Tensor, site: str | None, owner: str) -> tuple[Tensor, Tensor | None]:
    """The activations of a site in the output of ``Capture``, and the attention mask that was beside them."""
    if isinstance(source, Tensor):
        return source, None
    acts = None if site is None else source.get(("acts", site), None)
    if acts is None:
        have = (
            sorted(map(str, source.get("acts").keys()))
            if "acts" in source.keys()
            else sorted(map(str, source.keys()))
        )
        raise KeyError(
            f"{owner} needs ('acts', {site!r}) in the other run, which has {have[:12]}. Remedy: capture that site."
        )
    # a decoder has tokens, and padding, of its own
    side = "decoder_" if site is not None and site.rpartition("/")[2].startswith("decoder.") else ""
    mask = source.get(side + "attention_mask", None)
    fits = mask is not None and mask.ndim == 2 and acts.ndim >= 3 and mask.shape[0] == acts.shape[0]
    length = acts.shape[2] if is_pattern(site) else acts.shape[1] if acts.ndim > 1 else 0
    return acts, mask if fits and mask.shape[1] == length else None


def canonical(acts: Tensor, site: str | None) -> Tensor:
    """Scores and patterns (B, H, Tq, Tk) with their positions second, as edits see them."""
    return acts.transpose(1, 2) if is_pattern(site) else acts


def is_pattern(site: str | None) -> bool:
    """Whether a site holds attention scores or patterns.

    >>> is_pattern("encoder.attn_scores.2"), is_pattern("attn_output.2"), is_pattern("module_output:h.attn_scores")
    (True, False, False)
    """
    return _kind_of(site) in PATTERN_KINDS


def is_scores(site: str | None) -> bool:
    """Whether a site holds attention scores, before the softmax."""
    return _kind_of(site) == "attn_scores"


def _kind_of(site: str | None) -> str:
    # by its text: edits are also called on their own, where a site may have any name
    name = "" if site is None else site.rpartition("/")[2]
    return next((part for part in name.split(".") if part in PATTERN_KINDS), "") if ":" not in name else ""
