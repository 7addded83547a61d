"""What each part of a pass adds to the logits of some answers, with the statistics of the norms held fixed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdgeom.core.devices import doubled
from tdgeom.core.surroundings import steady
from tdgeom.model.calls.checked_sites import available_sites
from tdgeom.model.calls.input_device import where_inputs_go
from tdgeom.model.capture import Capture
from tdgeom.model.lens.block_path import NormSeen, Step, block_path
from tdgeom.model.lens.frozen_norm import FrozenNorm
from tdgeom.model.lens.linear_tail import LinearTail, agree
from tdgeom.model.lens.tail import Tail
from tdgeom.model.positions import Positions, attended_tokens, selected_tokens
from tdgeom.model.sites import Site, token_side
from tdgeom.model.structure.module_roles import is_norm, join
from tdgeom.model.structure.resolved_site import ADDED_KINDS, ResolvedSite

DETAILS = ("layer", "component", "head", "neuron")
# what is inside a part, and what one of it is called
_INSIDE = {
    "head": {"attn_output": ("z", "head"), "cross_attn_output": ("cross_z", "cross_head")},
    "neuron": {"mlp_output": ("mlp_act", "neuron")},
}


@dataclass(frozen=True)
class Contribution:
    """What one place adds to each answer, (N, A), or what each of its U heads or neurons adds, (N, A, U)."""

    component: str
    kind: str
    layer: int | None
    values: Tensor


@dataclass(frozen=True)
class Contributions:
    """What :func:`contributions` found: rows (N, 2) of text and place, their ranks (N,), parts, and answers' logits (N, A).

    ``logits`` are those that the parts add up to, before soft-capping at ``cap`` (``None``: there is no cap);
    ``model_logits`` are the model's own; ``difference`` is the largest by which a sum misses its logit.
    """

    rows: Tensor
    ranks: Tensor
    parts: list[Contribution]
    logits: Tensor
    model_logits: Tensor
    cap: float | None
    difference: float


def contributions(
    model: nn.Module,
    batch: TensorDictBase,
    ids: Tensor,
    weights: Tensor,
    *,
    by: str = "component",
    positions: Positions = "last",
) -> Contributions:
    """The sum that the logits of answers are, part by part, at the positions of each text.

    Args:
        model: a model with logits that are read out position by position.
        batch: its inputs, B texts.
        ids: (B, K) token ids, those of one text a row.
        weights: (A, K), each answer as a sum of these tokens' logits: one 1, and a -1 for a difference.
        by: "layer", "component", "head" or "neuron".
        positions: whose logits; each place is a row of the result.

    Raises ``ValueError`` where parts do not add up to the stream, or not to the logits.
    """
    home = where_inputs_go(model) or torch.device("cpu")
    with steady(home), torch.inference_mode(False), torch.no_grad():
        return _Pass(model, batch, by, positions).attribute(ids, weights)


class _Pass:
    """One pass of the model, its rows at the positions asked for."""

    def __init__(self, model: nn.Module, batch: TensorDictBase, by: str, positions: Positions) -> None:
        self.model, self.by, self.name = model, by, type(model).__name__
        self.tail = Tail(model)
        self.tail.check_per_token()
        self.stack, self.depth = self.tail.stack.name, len(self.tail.stack.blocks)
        self.found = {e.site: e for e in available_sites(model) if e.site.stack == self.stack}
        inside = {kind for kind, _ in _INSIDE.get(by, {}).values()}
        kinds = {"embed", "residual_input", "residual_output", *ADDED_KINDS, *inside}
        wanted = [site for site in self.found if site.kind in kinds]
        if inside and not any(site.kind in inside for site in wanted):
            raise ValueError(
                f"logit_attribution(by={by!r}) needs {' or '.join(sorted(inside))}, which {self.name} has at no layer of the "
                "stack that is read out. Remedy: by='component' or by='layer'."
            )
        for layer in range(self.depth):
            for kind in ("residual_input", "residual_output"):
                if self.site(kind, layer) not in self.found:
                    raise ValueError(
                        f"logit_attribution: {self.name} has no {kind!r} at layer {layer} whose parts could be told."
                    )
        # some models add to what a part gave in place
        capture = Capture(model, wanted, model_outputs="logits", clone=True)
        td = capture(batch.copy())
        side = token_side(str(self.tail.last_site))
        first = td["acts", self.tail.last_site]
        mask, tokens = td.get(f"{side}attention_mask", None), td.get(f"{side}input_ids", None)
        keep = selected_tokens(
            first, positions, mask, input_ids=tokens, special=td.get("special_tokens_mask", None), owner=self
        )
        self.rows = keep.nonzero()
        if not len(self.rows):
            raise ValueError(f"logit_attribution: no text has the positions {positions!r}.")
        attended = attended_tokens(mask, first)
        if empty := (~attended.any(1)).nonzero().flatten().tolist():
            raise ValueError(f"logit_attribution: the texts {empty[:8]} have no token to read a logit at.")
        self.ranks = (attended.cumsum(1) - 1)[keep]
        self.shape = first.shape[:2]
        self.values = {site: self._at_rows(td["acts", site]) for site in wanted}
        logits = td["logits"]
        if tuple(logits.shape[:2]) != tuple(self.shape):
            raise ValueError(
                f"logit_attribution: the logits {tuple(logits.shape)} are not those of the positions {tuple(self.shape)}."
            )
        self.logits = logits[self.rows[:, 0], self.rows[:, 1]]
        self.batch = batch
        self.seen: dict[str, NormSeen] | None = (
            None  # norms in the stream, looked at only where there are some
        )

    def site(self, kind: str, layer: int | None = None) -> Site:
        return Site.of(kind, layer, stack=self.stack)

    def _at_rows(self, acts: Tensor) -> Tensor:
        if acts.shape[0] == self.shape.numel() and acts.shape[:2] != self.shape:
            acts = acts.unflatten(0, self.shape)  # what works on (B T, D)
        if acts.shape[:2] != self.shape:
            raise ValueError(
                f"logit_attribution: a part of shape {tuple(acts.shape)} beside a stream {tuple(self.shape)}."
            )
        return acts[self.rows[:, 0], self.rows[:, 1]]

    # ------------------------------------------------------------------------------------------ the sum

    def attribute(self, ids: Tensor, weights: Tensor) -> Contributions:
        dtype, vocabulary = self.logits.dtype, self.logits.shape[-1]
        if bool(((ids < 0) | (ids >= vocabulary)).any()):
            raise ValueError(f"expected token ids from 0 to {vocabulary - 1}, got {ids.unique().tolist()}.")
        stream = self.values[self.site("residual_output", self.depth - 1)]
        linear = LinearTail(self.tail, stream)
        if not agree(linear.logits, self.logits, self.logits.abs().amax(), dtype):
            raise ValueError(
                f"logit_attribution: what {self.name} runs behind its last block gives other logits in the pass, by "
                f"{float((linear.logits - self.logits).abs().max()):.2g}: it reads more than the last block's output."
            )
        own = ids.to(self.rows.device)[self.rows[:, 0]]
        weights = doubled(weights.to(own.device))
        pick = lambda logits: doubled(logits).gather(1, own.to(weights.device)) @ weights.T
        direction = torch.einsum("ak,nkd->nad", weights, linear.directions(own))
        parts = list(self._walk(direction))[::-1]
        offset, head = linear.offset.expand(len(own), -1), linear.head_bias.expand(len(own), -1)
        if linear.norm is not None:
            parts.append(Contribution("bias:final_norm", "bias", None, pick(offset) - pick(head)))
        parts.append(Contribution("bias:unembedding", "bias", None, pick(head)))
        logits = pick(linear.before_cap)
        each = torch.cat([part.values.reshape(*logits.shape, -1) for part in parts], -1)
        size, total = each.abs().sum(-1), each.sum(-1)
        if not agree(total, logits, size, dtype):
            raise ValueError(
                f"logit_attribution: the parts of {self.name} miss the logits by {float((total - logits).abs().max()):.2g}, "
                "beyond rounding: something between them is not linear. Remedy: by='layer'."
            )
        return Contributions(
            self.rows,
            self.ranks,
            parts,
            logits,
            pick(self.logits),
            linear.cap,
            float((total - logits).abs().max()),
        )

    def _walk(self, direction: Tensor) -> Iterator[Contribution]:
        """Contributions from the last block to the embedding; the direction is carried back through norms on the way."""
        for layer in reversed(range(self.depth)):
            before, after = (self.values[self.site(k, layer)] for k in ("residual_input", "residual_output"))
            added = [kind for kind in ADDED_KINDS if self.site(kind, layer) in self.found]
            path = self._path(layer, added)
            if path is None and self.by != "layer":
                raise ValueError(
                    f"logit_attribution(by={self.by!r}): {', '.join(added) or 'no known part'} of layer {layer} of {self.name} "
                    "do not add up to what the block adds to the stream. Remedy: by='layer'."
                )
            if path is None:
                yield self._part("layer", layer, _dot(doubled(after) - doubled(before), direction))
            else:
                found = []
                for step in reversed(path):
                    if isinstance(step, str):
                        found += self._inside(step, layer, direction)
                        continue
                    name, norm = step
                    label = f"bias:{self.site('norm', layer)}:{name}"
                    yield Contribution(label, "bias", layer, _dot(norm.bias, direction))
                    direction = norm.transposed(direction)
                if self.by == "layer":
                    yield self._part("layer", layer, sum(one.values for one in found))
                else:
                    yield from found
            came = (
                self.values[self.site("embed")]
                if layer == 0
                else self.values[self.site("residual_output", layer - 1)]
            )
            if not agree(came, before, before.abs().amax(-1, keepdim=True), before.dtype):
                # something else enters between two blocks: images in several layers, say
                yield self._part("between_blocks", layer, _dot(doubled(before) - doubled(came), direction))
        yield Contribution(
            str(self.site("embed")), "embed", None, _dot(self.values[self.site("embed")], direction)
        )

    def _part(self, kind: str, layer: int, values: Any) -> Contribution:
        return Contribution(str(self.site(kind, layer)), kind, layer, values)

    def _path(self, layer: int, added: Sequence[str]) -> list[Step] | None:
        before, after = (
            self.values[self.site(kind, layer)] for kind in ("residual_input", "residual_output")
        )
        parts = {kind: self.values[self.site(kind, layer)] for kind in added}
        if (path := block_path(before, after, parts, {})) is not None or not parts:
            return path
        return block_path(before, after, parts, self._norms(layer))

    def _norms(self, layer: int) -> Mapping[str, NormSeen]:
        """The norms of a block with the stream's width, and what they took and gave; read in one more pass, once."""
        if self.seen is None:
            self.seen = {}
            modules = {
                join(block.path, path): module
                for block in self.tail.stack.blocks
                for path, module in block.module.named_modules()
                if path and is_norm(path.rpartition(".")[2], module)
            }
            names = [f"module_{side}:{path}" for path in modules for side in ("input", "output")]
            acts = Capture(self.model, names, clone=True)(self.batch.copy())["acts"] if names else {}
            width = self.tail.width
            for path, module in modules.items():
                both = [acts[f"module_{side}:{path}"] for side in ("input", "output")]
                if all(v.shape[-1] == width and v.numel() == self.shape.numel() * width for v in both):
                    self.seen[path] = NormSeen(module, *map(self._at_rows, both))
        block = self.tail.stack.blocks[layer].path
        return {p[len(block) + 1 :]: seen for p, seen in self.seen.items() if p.startswith(f"{block}.")}

    # ------------------------------------------------------------------------------------------ heads and neurons

    def _inside(self, kind: str, layer: int, direction: Tensor) -> list[Contribution]:
        site, part = self.site(kind, layer), self.values[self.site(kind, layer)]
        inner, one = _INSIDE.get(self.by, {}).get(kind, ("", ""))
        if (entry := self.found.get(self.site(inner, layer)) if inner else None) is None:
            return [Contribution(str(site), kind, layer, _dot(part, direction))]
        read = self.values[entry.site]
        flat = read.reshape(len(read), -1)
        units, bias = self._through(self.found[site], entry, flat, part, direction)
        units = units.unflatten(-1, (read.shape[1], -1)).sum(-1) if read.ndim == 3 else units
        return [
            Contribution(f"bias:{site}", "bias", layer, bias),
            Contribution(str(self.site(one, layer)), one, layer, units),
        ]

    def _through(
        self, outer: ResolvedSite, inner: ResolvedSite, read: Tensor, part: Tensor, direction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What each feature of a projection's input adds to the answers, (N, A, F), and what belongs to none, (N, A)."""
        projection = self.model.get_submodule(inner.module_path)
        last = self.model.get_submodule(outer.module_path)
        behind = None if last is projection or projection in set(last.modules()) else last
        given = _plain(projection, read)
        scaled, norm = direction * outer.scale, None
        if behind is not None and is_norm(outer.module_path.rpartition(".")[2], behind):
            norm = FrozenNorm(behind, given, part / outer.scale)
            scaled = norm.transposed(scaled)
        count = direction.shape[1]
        with torch.enable_grad():
            start = read.new_zeros(len(read) * count, read.shape[-1]).requires_grad_()
            gave = projection.forward(start)
            if behind is not None and norm is None:
                gave = behind.forward(gave)
            flat = scaled.reshape(len(read) * count, -1).to(gave)
            (gradient,) = torch.autograd.grad(gave, start, flat)
        units = doubled(read).unsqueeze(1) * doubled(gradient.reshape(len(read), count, -1))
        bias = _dot(gave[0].detach(), scaled)
        if norm is not None:
            bias = bias + _dot(norm.bias, direction * outer.scale)
        return units, bias


def _plain(module: nn.Module, value: Tensor) -> Tensor:
    with torch.no_grad():
        return module.forward(value)


def _dot(part: Tensor, direction: Tensor) -> Tensor:
    """(N, D) or (D,) and (N, A, D) -> (N, A) in float64."""
    whole = doubled(part).expand(direction.shape[0], direction.shape[-1])
    return torch.einsum("nd,nad->na", whole, direction)
