"""Aggregation on the way out of a model: captures that stay small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.stage import Stage
from tdgeom.model.edits.edit import canonical, is_pattern
from tdgeom.model.positions import Positions, check_positions, position_mask
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


def group_attention(pattern: Tensor, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """Attention between groups of positions, (B, H, Tq, Tk) -> (B, H, R, C).

    How much of its attention a row of group r gives to all positions of group c together, averaged over the rows of the
    group: groups of columns that cover everything sum to 1. Groups are (B, T) masks; an empty group of rows gives NaN.

    >>> pattern = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    >>> both, last = torch.tensor([[True, True]]), torch.tensor([[False, True]])
    >>> group_attention(pattern, [both], [both, last])
    tensor([[[[1.0000, 0.2500]]]])
    """
    left = torch.stack([mask.to(pattern) for mask in rows], 1)
    right = torch.stack([mask.to(pattern) for mask in columns], 1)
    mass = torch.einsum("brq,bhqk,bck->bhrc", left, pattern, right)
    return mass / left.sum(-1)[:, None, :, None]


class _PerSite(Stage):
    """What the two stages share: the batch's attention mask in the columns of an activation."""

    def mask(self, tensordict: TensorDictBase, value: Tensor, positions: Positions, site: str) -> Tensor:
        # the other stack of an encoder-decoder has tokens, and padding, of its own
        side = "decoder_" if site.rpartition("/")[2].startswith("decoder.") else ""
        given = tensordict.get(side + "attention_mask", None)
        whole = (
            value.new_ones(value.shape[:2], dtype=torch.bool)
            if given is None
            else given.bool().to(value.device)
        )
        if whole.ndim != 2 or whole.shape[0] != value.shape[0] or whole.shape[1] < value.shape[1]:
            raise ValueError(
                f"{type(self).__name__} expects an attention mask (B, T) for an activation {tuple(value.shape)}, got "
                f"{tuple(whole.shape)}."
            )
        keep, _ = position_mask(
            whole,
            positions,
            input_ids=tensordict.get(side + "input_ids", None),
            special=None if side else tensordict.get("special_tokens_mask", None),
        )
        return keep[:, whole.shape[1] - value.shape[1] :]


class AggregateActs(_PerSite):
    """Reduce activations over positions, over examples or both, right behind ``Capture``.

    Reads ``("acts", site)`` and where present ``"attention_mask"``, ``"input_ids"``, ``"special_tokens_mask"``; writes
    ``("acts", site)`` anew: (B, ...) with ``reduce``, (B, P, ...) without, and without the first axis with
    ``over_examples``. Patterns (B, H, Tq, Tk) are reduced over their queries, and over examples only without
    padding. (B, D) activations have no positions. Sites of a decoder go by ``"decoder_attention_mask"``.

    Args:
        sites: such as ``capture.sites``.
        positions: which positions, in the vocabulary of :mod:`tdgeom.model.positions`.
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
        positions: Positions = "all",
        reduce: str | None = None,
        over_examples: str | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        keys = [("acts", str(site)) for site in sites]
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=keys, writes=keys)
        for name, how in (("reduce", reduce), ("over_examples", over_examples)):
            if how not in (None, "mean", "sum"):
                raise ValueError(f"AggregateActs: {name}= expects 'mean', 'sum' or None, got {how!r}.")
        self.positions, self.reduce, self.over_examples = check_positions(positions), reduce, over_examples
        self._sites = [str(site) for site in sites]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Reduce every site of one batch."""
        results = []
        for site, value in zip(self._sites, self.read(tensordict)):
            turned = canonical(value, site) if value.ndim == 4 else value
            if value.ndim > 2:
                keep = self.mask(tensordict, turned, self.positions, site)
                if (
                    self.over_examples
                    and is_pattern(site)
                    and not bool(self.mask(tensordict, turned, "all", site).all())
                ):
                    raise ValueError(
                        f"AggregateActs(over_examples={self.over_examples!r}) at {site!r}: with padding the same column is "
                        "another token in every text. Remedy: GroupAttention (row_groups=), or texts of one length."
                    )
                turned = aggregate_positions(turned, keep, self.reduce)
                value = canonical(turned, site) if turned.ndim == 4 and value.ndim == 4 else turned
            if self.over_examples == "sum":
                value = value.sum(0)
            elif self.over_examples == "mean":
                value = value.mean(0)
            results.append(value)
        return self.write(tensordict, results)


class GroupAttention(_PerSite):
    """Attention between groups of positions: patterns (B, H, Tq, Tk) to (B, H, R, C), right behind ``Capture``.

    Reads ``("acts", site)`` of ``attn_pattern`` sites and where present ``"attention_mask"`` and ``"input_ids"``; writes
    ``("acts", site)`` anew, see :func:`group_attention`.

    Args:
        sites: pattern sites.
        rows: name -> positions, the groups that attend.
        columns: name -> positions, the groups attended to (default: the same).

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
        rows: Mapping[str, Positions],
        columns: Mapping[str, Positions] | None = None,
        *,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        keys = [("acts", str(site)) for site in sites]
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=keys, writes=keys)
        if not rows:
            raise ValueError("GroupAttention expects at least one group of rows, name -> positions.")
        self.rows = {name: check_positions(positions) for name, positions in rows.items()}
        given = self.rows if columns is None else columns
        self.columns = {name: check_positions(positions) for name, positions in given.items()}

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Group every pattern of one batch."""
        results = []
        for key, pattern in zip(self.in_keys, self.read(tensordict)):
            if pattern.ndim != 4:
                raise ValueError(
                    f"GroupAttention expects {key!r} of shape (B, H, Tq, Tk), got {tuple(pattern.shape)}."
                )
            rows = [
                self.mask(tensordict, pattern.transpose(1, 2), positions, key[-1])
                for positions in self.rows.values()
            ]
            turned = pattern.permute(0, 3, 1, 2)
            columns = [
                self.mask(tensordict, turned, positions, key[-1]) for positions in self.columns.values()
            ]
            results.append(group_attention(pattern, rows, columns))
        return self.write(tensordict, results)
