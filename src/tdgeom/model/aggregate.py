"""Aggregation on the way out of a model: captures that stay small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.stage import Stage
from tdgeom.core.wrong_objects import site_list
from tdgeom.model.positions import (
    Positions,
    check_positions,
    position_groups,
    positions_second,
    selected_tokens,
)
from tdgeom.model.sites import is_pattern, token_side
from tdgeom.numerics.centring import upcast

__all__ = ["AggregateActs", "GroupAttention", "aggregate_positions", "group_attention"]


def aggregate_positions(value: Tensor, keep: Tensor, how: str | None) -> Tensor:
    """(B, T, ...) at the kept positions (B, T): ``"mean"`` or ``"sum"`` (B, ...), or with ``None`` themselves (B, P, ...).

    Means and sums are taken in float32 at least; the mean of no positions is NaN. Without ``how`` every sequence must keep
    the same number of positions.

    >>> value, keep = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])
    >>> aggregate_positions(value, keep, "mean")
    tensor([[2.]])
    """
    where = keep.reshape(*keep.shape, *[1] * (value.ndim - 2))
    count = keep.sum(1)
    if how is None:
        if not (count == count[:1]).all():
            raise ValueError(
                f"positions select {count.tolist()} tokens of the sequences: without reduce= every sequence must give the same "
                "number. Remedy: reduce='mean' or 'sum', or SelectTokens for rows."
            )
        return value[keep].reshape(value.shape[0], -1, *value.shape[2:])
    wide = upcast(value)
    # where(), not a product: a NaN at a padding position must not reach the sum
    total = torch.where(where, wide, torch.zeros((), dtype=wide.dtype, device=wide.device)).sum(1)
    return total if how == "sum" else total / count.reshape(-1, *[1] * (value.ndim - 2))


def group_attention(
    pattern: Tensor,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    *,
    over_rows: str = "mean",
    over_columns: str = "sum",
) -> Tensor:
    """Attention between groups of positions, (B, H, Tq, Tk) -> (B, H, R, C).

    How much of its attention a row of group r gives to all positions of group c together (``over_columns="mean"``: to one of
    them on average), averaged over the rows of the group (``over_rows="sum"``: of all its rows). With the defaults, groups of
    columns that cover everything sum to 1. Groups are (B, T) masks; the mean over an empty group is NaN.

    >>> pattern = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    >>> both, last = torch.tensor([[True, True]]), torch.tensor([[False, True]])
    >>> group_attention(pattern, [both], [both, last])
    tensor([[[[1.0000, 0.2500]]]])
    """
    left = torch.stack([mask.to(pattern) for mask in rows], 1)
    right = torch.stack([mask.to(pattern) for mask in columns], 1)
    for name, how in (("over_rows", over_rows), ("over_columns", over_columns)):
        if how not in ("mean", "sum"):
            raise ValueError(f"group_attention: {name}= expects 'mean' or 'sum', got {how!r}.")
    mass = torch.einsum("brq,bhqk,bck->bhrc", left, pattern, right)
    mass = mass / left.sum(-1)[:, None, :, None] if over_rows == "mean" else mass
    return mass / right.sum(-1)[:, None, None, :] if over_columns == "mean" else mass


class _PerSite(Stage):
    """What the two stages share: sites, and the mask and tokens beside them, which a decoder has for itself."""

    optional = frozenset(
        {"attention_mask", "input_ids", "special_tokens_mask", "decoder_attention_mask", "decoder_input_ids"}
    )

    def __init__(
        self, sites: Sequence[str], *, in_keys: Key | list[Key] | None, out_keys: Key | list[Key] | None
    ) -> None:
        sites = [sites] if isinstance(sites, str) else site_list(f"{type(self).__name__}", sites)
        keys: list[Key] = [("acts", str(site)) for site in sites]
        sides = sorted({token_side(site) for site in sites})
        self._tokens = [side + name for side in sides for name in ("attention_mask", "input_ids")]
        self._tokens += ["special_tokens_mask"] if "" in sides else []
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=[*keys, *self._tokens], writes=keys)
        self._sites = [str(site) for site in sites]
        self._images = {str(site): getattr(site, "image", None) for site in sites}

    def compute(self, *inputs: Any) -> list[Tensor]:
        """Every site of one batch, reduced."""
        told = dict(zip(self._tokens, inputs[len(self._sites) :]))
        return [self.reduced(value, site, told) for site, value in zip(self._sites, inputs)]

    def reduced(self, value: Tensor, site: str, told: Mapping[str, Tensor | None]) -> Tensor:
        """One site."""
        raise NotImplementedError

    def selected(
        self, value: Tensor, positions: Positions, site: str, told: Mapping[str, Tensor | None]
    ) -> Tensor:
        """(B, T), true at positions of an activation (B, T, ...)."""
        side = token_side(site)
        return selected_tokens(
            value,
            positions,
            told.get(side + "attention_mask"),
            input_ids=told.get(side + "input_ids"),
            special=None if side else told.get("special_tokens_mask"),
            image=self._images[site],
            owner=self,
        )


class AggregateActs(_PerSite):
    """Reduce activations over positions, over examples or both, right behind ``Capture``.

    Reads ``("acts", site)`` and where present ``"attention_mask"``, ``"input_ids"``, ``"special_tokens_mask"``; writes
    ``("acts", site)`` anew: (B, ...) with ``reduce``, (B, P, ...) without, and without the first axis with
    ``over_examples``. Patterns (B, H, Tq, Tk) are reduced over their queries, and over examples only without
    padding. (B, D) activations have no positions. Sites of a decoder go by ``"decoder_attention_mask"``.

    Args:
        sites: such as ``capture.sites``.
        positions: which positions, in the vocabulary of :mod:`tdgeom.model.positions`; or several groups of them, such as
            ``["last", (2, 5)]`` or a mapping, each reduced to one position: (B, groups, ...), which needs ``reduce``.
        reduce: ``"mean"``, ``"sum"`` or ``None``, over the positions of a sequence.
        over_examples: ``"mean"``, ``"sum"`` or ``None``, over the sequences of the batch. For a mean over many batches use
            ``SelectTokens`` and ``StreamingMean``.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"acts": {"x": torch.arange(6.0).reshape(2, 3, 1)}})
        >>> tg.AggregateActs(["x"], reduce="mean")(td)["acts", "x"].flatten()
        tensor([1., 4.])
    """

    def __init__(
        self,
        sites: Sequence[str],
        *,
        positions: Positions | Sequence[Positions] | Mapping[str, Positions] = "all",
        reduce: str | None = None,
        over_examples: str | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(sites, in_keys=in_keys, out_keys=out_keys)
        for name, how in (("reduce", reduce), ("over_examples", over_examples)):
            if how not in (None, "mean", "sum"):
                raise ValueError(f"AggregateActs: {name}= expects 'mean', 'sum' or None, got {how!r}.")
        groups = position_groups(positions)
        if groups is not None and reduce is None:
            raise ValueError(
                f"AggregateActs: groups of positions, {positions!r}, are reduced to one each: reduce='mean' or 'sum'."
            )
        self.positions: Any = positions if groups is not None else check_positions(positions)
        self.reduce, self.over_examples = reduce, over_examples

    def reduced(self, value: Tensor, site: str, told: Mapping[str, Tensor | None]) -> Tensor:
        """One site, over positions and examples."""
        if value.ndim > 2:
            turned = positions_second(value, site) if value.ndim == 4 else value
            groups = position_groups(self.positions)
            whole = self.over_examples is None or not is_pattern(site)
            if not (whole or bool(self.selected(turned, "all", site, told).all())):
                raise ValueError(
                    f"AggregateActs(over_examples={self.over_examples!r}) at {site!r}: with padding the same column is "
                    "another token in every text. Remedy: GroupAttention (row_groups=), or texts of one length."
                )
            if groups is None:
                reduced = aggregate_positions(
                    turned, self.selected(turned, self.positions, site, told), self.reduce
                )
            else:
                masks = [self.selected(turned, group, site, told) for group in groups]
                reduced = torch.stack([aggregate_positions(turned, keep, self.reduce) for keep in masks], 1)
            value = positions_second(reduced, site) if reduced.ndim == 4 and value.ndim == 4 else reduced
        return over_first(value, self.over_examples)


def over_first(value: Tensor, how: str | None) -> Tensor:
    """The sum or mean over the first axis, or the value itself."""
    return value if how is None else value.sum(0) if how == "sum" else value.mean(0)


def _named_groups(what: str, given: Any) -> dict[str, Positions]:
    """Groups by name; those of a list are called as they are written."""
    groups = position_groups(given)
    if groups is None:
        raise ValueError(
            f"GroupAttention: {what} are groups, name -> positions or a list of positions, got {given!r}."
        )
    return dict(zip(given if isinstance(given, Mapping) else map(str, groups), groups, strict=True))


class GroupAttention(_PerSite):
    """Attention between groups of positions: patterns (B, H, Tq, Tk) to (B, H, R, C), right behind ``Capture``.

    Reads ``("acts", site)`` of ``attn_pattern`` sites and where present ``"attention_mask"`` and ``"input_ids"``; writes
    ``("acts", site)`` anew, see :func:`group_attention`.

    Args:
        sites: pattern sites.
        rows: name -> positions, or a list such as ``["last", (2, 5)]``, the groups that attend.
        columns: name -> positions, the groups attended to (default: the same).
        over_rows, over_columns: ``"mean"`` or ``"sum"`` over the positions of a group.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"acts": {"attn_pattern.0": torch.full((1, 2, 3, 3), 1 / 3)}})
        >>> stage = tg.GroupAttention(["attn_pattern.0"], {"last": "last"}, {"first": "first", "rest": "patches"})
        >>> stage(td)["acts", "attn_pattern.0"][0, 0]
        tensor([[0.3333, 0.6667]])
    """

    def __init__(
        self,
        sites: Sequence[str],
        rows: Mapping[str, Positions] | Sequence[Positions],
        columns: Mapping[str, Positions] | Sequence[Positions] | None = None,
        *,
        over_rows: str = "mean",
        over_columns: str = "sum",
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(sites, in_keys=in_keys, out_keys=out_keys)
        self.over_rows, self.over_columns = over_rows, over_columns
        if not {over_rows, over_columns} <= {"mean", "sum"}:
            raise ValueError(
                f"GroupAttention: over_rows= and over_columns= expect 'mean' or 'sum', got {over_rows!r}, {over_columns!r}."
            )
        if not rows:
            raise ValueError("GroupAttention expects at least one group of rows, name -> positions.")
        self.rows = _named_groups("rows", rows)
        self.columns = self.rows if columns is None else _named_groups("columns", columns)

    def reduced(self, value: Tensor, site: str, told: Mapping[str, Tensor | None]) -> Tensor:
        """One pattern, by groups."""
        if value.ndim != 4:
            raise ValueError(
                f"GroupAttention expects {site!r} of shape (B, H, Tq, Tk), got {tuple(value.shape)}."
            )
        queries, keys = value.transpose(1, 2), value.permute(0, 3, 1, 2)
        rows = [self.selected(queries, positions, site, told) for positions in self.rows.values()]
        columns = [self.selected(keys, positions, site, told) for positions in self.columns.values()]
        how = {"over_rows": self.over_rows, "over_columns": self.over_columns}
        return group_attention(value, rows, columns, **how)
