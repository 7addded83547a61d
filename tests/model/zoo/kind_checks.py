"""Every kind of site: what must add up, patterns and heads, against what a trace of the model holds."""

from __future__ import annotations

import copy
from functools import partial
from operator import add

import torch
from torch import Tensor, nn

import tdgeom as tg
from model.zoo.examined import KINDS, Examined, proportional, ratio, refusal
from model.zoo.own_hooks import Event, by_hand, far, main_output, own_hook, same
from tdgeom.model.structure.resolve import find_sites


class KindChecks(Examined):
    """The checks of what is read at every kind."""

    # ------------------------------------------------------------------------------------- kinds

    def check_kinds(self) -> dict[str, Tensor]:
        """Which kinds there are; what is not there is refused in words."""
        acts: dict[str, Tensor] = {}
        for kind in KINDS:
            try:
                read = self.read(kind)
            except Exception as error:
                if refusal(error):
                    self.report.refused[kind] = str(error)
                else:
                    self.wrong(f"{kind}: raw {type(error).__name__}: {str(error)[:160]}")
                continue
            self.report.offered[kind] = f"{len(read)}"
            self.report.partial |= self._partly(kind)
            acts |= read
        return acts

    def _partly(self, kind: str) -> set[str]:
        """The kind, if it is refused at some layers that seem to have it, with the reason of the first."""
        listed = {e.site for e in find_sites(self.model) if e.site.kind == kind and e.side != "choice"}
        lost = sorted(listed - {e.site for e in tg.available_sites(self.model)})
        if not lost:
            return set()
        try:
            self.read(str(lost[0]))
        except Exception as error:
            if refusal(error):
                self.report.refused[kind] = str(error)
            else:
                self.wrong(f"{lost[0]}: raw {type(error).__name__}: {str(error)[:160]}")
            return {kind}
        self.wrong(f"{lost[0]}: not listed by available_sites, and read all the same")
        return set()

    def check_sums(self, acts: dict[str, Tensor]) -> None:
        for name, stack in self.stacks.items():
            for layer, block in enumerate(stack.blocks):
                kinds = ("attn_output", "mlp_output", "cross_attn_output")
                attention, mlp, cross = (acts.get(str(tg.Site.of(k, layer, stack=name))) for k in kinds)
                if attention is None or mlp is None:
                    continue
                before, after = stack.inputs(layer), stack.outputs(layer)
                if cross is None and name == "decoder":
                    cross = self._declared(block, before)
                parts = [attention, mlp] + ([cross] if cross is not None else [])
                if any(p.shape != before.shape for p in parts):
                    self.wrong(f"sum at layer {name}.{layer}: shapes {[tuple(p.shape) for p in parts]}")
                    continue
                if same(before + sum(parts), after):
                    continue
                if self._normed(block, before, parts, after):
                    continue
                more = self._declared(block, before)
                if more is not None and same(self.member.ends_times * (before + sum(parts) + more), after):
                    continue
                self.wrong(f"sum at layer {name}.{layer}: {far(before + sum(parts), after)}")

    def _declared(self, block: Event, like: Tensor) -> Tensor | None:
        factors = self.member.factors
        found = [
            next(t for t in e.outputs if t.shape == like.shape) * factors.get(name, 1.0)
            for e in self.truth.inside(block)
            if (name := e.path.removeprefix(block.path + ".")) in self.member.adds
            and any(t.shape == like.shape for t in e.outputs)
        ]
        return sum(found) if found else None

    def _normed(self, block: Event, before: Tensor, parts: list[Tensor], after: Tensor) -> bool:
        """Whether the parts add up with norms of the block on the way: in front of a sum, behind it, or both."""
        norms = [
            e
            for e in self.truth.inside(block)
            if "norm" in type(e.module).__name__.lower() and e.inputs and e.outputs
        ]

        def and_normed(value: Tensor) -> list[Tensor]:
            return [value] + [e.outputs[0].view_as(before) for e in norms if same(e.inputs[0], value)]

        values = and_normed(before)
        for part in parts[:1] + parts[2:] + parts[1:2]:
            values = [normed for value in values for normed in and_normed(value + part)]
        return any(same(value, after) for value in values)

    def check_added(self, acts: dict[str, Tensor]) -> None:
        """What is said to be added is: a small change of it is found, as it is, in what comes after the addition."""
        for name, value in acts.items():
            site = tg.Site(name)
            if (
                site.kind not in ("attn_output", "mlp_output")
                or site.layer is None
                or site.stack not in self.stacks
            ):
                continue
            stack = self.stacks[site.stack]
            block, after = stack.blocks[site.layer], stack.outputs(site.layer)
            if same(value, after):
                self.wrong(f"{name}: is the stream itself, not what is added to it")
            if len({id(b.module) for b in stack.blocks}) < len(stack.blocks) or site.layer > 1:
                continue
            own = next(
                (e for e in self.truth.inside(block) if any(proportional(t, value) for t in e.outputs)), None
            )
            if own is None:
                self.wrong(f"{name}: no module of the block gives this tensor")
                continue
            push = torch.linspace(-1, 1, value.shape[-1]) * 0.1 * float(value.abs().max())
            model, factor = copy.deepcopy(self.model), ratio(value, own)
            with own_hook(model.get_submodule(own.path), partial(add, push), like=value):
                changed = self.by_hand(self.batch, model)
            begin = next(i for i, e in enumerate(changed.events) if e.path == block.path)
            again = changed.inside(changed.events[begin])
            places = [(after, t) for t in changed.events[begin].outputs]
            pairs = zip(self.truth.inside(block), again)
            places += [
                (b.inputs[0], e.inputs[0])
                for b, e in pairs
                if e.start > own.start and b.inputs and e.inputs and not proportional(b.inputs[0], value)
            ]
            push = push * factor
            if not any(
                b.shape == t.shape and t.shape[-1] == len(push) and same(t - b, push.expand_as(t), 2e-3)
                for b, t in places
            ):
                self.wrong(
                    f"{name}: a change of it is not found in the stream as it is (it is not what is added)"
                )

    def check_patterns(self, acts: dict[str, Tensor]) -> None:
        names = [n for n in acts if tg.Site(n).kind == "attn_pattern" and tg.Site(n).stack in self.stacks]
        if not names:
            return
        eager = copy.deepcopy(self.model)
        try:
            for module in eager.modules():
                if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
                    module.config._attn_implementation = "eager"
            out = by_hand(
                eager, self.batch, self.member.packed, trace=False, output_attentions=True, **self.quick
            ).output
            plain = by_hand(eager, self.batch, self.member.packed, trace=False, **self.quick).output
        except Exception as error:
            self.wrong(f"eager attentions: {type(error).__name__}: {str(error)[:100]}")
            return
        if not same(main_output(plain), main_output(self.truth.output), 1e-3):
            self.report.counts["patterns of a kernel that is not the eager one"] = len(names)
            return  # its eager attention is another computation: pattern @ v is z tells (check_heads)
        for name in names:
            site = tg.Site(name)
            given = getattr(out, "attentions" if site.stack is None else f"{site.stack}_attentions", None)
            if given is None and site.stack == "language_model":
                given = getattr(out, "attentions", None)
            own = [n for n in names if tg.Site(n).stack == site.stack]
            if (
                not given
                or not all(isinstance(g, Tensor) for g in given)
                or "attentions are scores" in self.member.notes
            ):
                self.report.counts["patterns without the model's own"] = (
                    self.report.counts.get("patterns without the model's own", 0) + 1
                )
                value = acts[name]
                if (
                    not same(value.sum(-1), torch.ones_like(value.sum(-1)), 1e-3)
                    and "sinks" not in self.member.notes
                ):
                    self.wrong(f"{name}: rows do not sum to 1")
                continue
            given = [g for g in given if g is not None]
            index = site.layer if len(given) == len(self.stacks[site.stack].blocks) else own.index(name)
            value = acts[name][..., :-1] if "sink column" in self.member.notes else acts[name]
            if (
                index >= len(given)
                or value.shape != given[index].shape
                or not same(value, given[index], 1e-3)
            ):
                self.wrong(f"{name}: {far(value, given[index]) if index < len(given) else 'no such layer'}")
            scores = acts.get(name.replace("attn_pattern", "attn_scores"))
            if (
                scores is not None
                and not same(scores.double().softmax(-1), acts[name], 1e-3)
                and "sinks" not in self.member.notes
            ):
                self.wrong(f"{name}: not the softmax of the scores: {far(scores.softmax(-1), acts[name])}")

    def check_heads(self, acts: dict[str, Tensor]) -> None:
        for name, value in acts.items():
            site = tg.Site(name)
            if site.stack not in self.stacks or site.layer is None:
                continue
            stem, cross = site.kind.removeprefix("cross_"), "cross_" if site.kind.startswith("cross_") else ""

            def beside(kind: str, site: tg.Site = site, cross: str = cross) -> Tensor | None:
                return acts.get(str(tg.Site.of(cross + kind, site.layer, stack=site.stack)))

            inside = self.truth.inside(self.stacks[site.stack].blocks[site.layer])
            if stem == "head_output" and (total := beside("attn_output")) is not None:
                rest = (value.sum(-2) - total).reshape(-1, total.shape[-1])
                spread, size = float((rest - rest.mean(0)).abs().max()), float(total.abs().max())
                if spread > 1e-4 * max(size, 1e-3):
                    self.wrong(
                        f"{name}: the sum over heads is not attn_output less a bias ({spread:.2g} of {size:.2g})"
                    )
            if stem in ("z", "mlp_act"):
                self._check_read_by(name, value.flatten(-2) if stem == "z" else value, inside)
                if site.layer < 2:
                    self._check_alone(name, cross + "attn_output" if stem == "z" else "mlp_output", acts)
            if stem in ("attn_input", "mlp_input", "attn_norm", "mlp_norm"):
                side = "outputs" if stem.endswith("norm") else "inputs"
                known = any(
                    same(t, value) for e in inside for t in getattr(e, side) if t.shape[-1] == value.shape[-1]
                )
                if not known and not (
                    stem.endswith("input") and same(value, self.stacks[site.stack].inputs(site.layer))
                ):
                    self.wrong(f"{name}: no module of the block has this among its {side}")
            pattern, z, keys = beside("attn_pattern"), beside("z"), beside("k_rotary")
            if stem == "v" and pattern is not None and z is not None and "gated" not in self.member.notes:
                heads = (
                    value
                    if value.shape[-2] == pattern.shape[1]
                    else value.repeat_interleave(pattern.shape[1] // value.shape[-2], -2)
                )
                mixed = (pattern[..., : heads.shape[1]] @ heads.transpose(1, 2)).transpose(1, 2)
                if mixed.shape != z.shape or not same(mixed, z, 1e-3):
                    self.wrong(f"{name}: pattern @ v is not z: {far(mixed, z)}")
            if stem == "q_rotary" and keys is not None and (scores := beside("attn_scores")) is not None:
                self._check_product(name, value, keys, scores)

    def _check_product(self, name: str, queries: Tensor, keys: Tensor, scores: Tensor) -> None:
        """Scores are the scaled product of queries and keys, and a mask and bias of positions: the same for every sequence."""
        product = queries.transpose(1, 2) @ keys.transpose(1, 2).transpose(-2, -1)
        scores = scores[..., : keys.shape[1]]  # behind them a sink
        if product.shape != scores.shape:
            self.wrong(
                f"{name}: the product of queries and keys is {tuple(product.shape)}, scores are {tuple(scores.shape)}"
            )
            return
        looks = (scores > -1e4).all(0)
        # a softmax leaves the level of a row free, and what depends on positions alone falls out between two sequences
        count = looks.sum(-1, keepdim=True).clamp(min=1)
        shown = [t.masked_fill(~looks, 0.0) for t in (product, scores)]
        level_free = [t - t.sum(-1, keepdim=True) / count for t in shown]
        one, other = ((t - t[:1])[1:, looks].reshape(-1).double() for t in level_free)
        scale = float(one @ other / (one @ one)) if len(one) else 1.0
        if len(one) and not same(scale * one, other, 1e-3):
            self.wrong(f"{name}: q_rotary @ k_rotary, scaled, are not the scores: {far(scale * one, other)}")

    def _check_read_by(self, name: str, flat: Tensor, inside: list[Event]) -> None:
        readers = [e for e in inside if any(t.numel() == flat.numel() and same(t, flat) for t in e.inputs)]
        if not readers:
            self.wrong(f"{name}: no module is given this tensor {tuple(flat.shape)}")
        elif not any(
            isinstance(e.module, nn.Linear)
            or type(e.module).__name__ == "Conv1D"
            or hasattr(e.module, "in_features")
            for e in readers
        ):
            self.wrong(f"{name}: read by {[e.path for e in readers]}, no projection")

    def _check_alone(self, name: str, kind: str, acts: dict[str, Tensor]) -> None:
        """Without it only a bias is left of what it is projected to."""
        site = tg.Site(name)
        total = str(tg.Site.of(kind, site.layer, stack=site.stack))
        if total not in acts:
            return
        try:
            with tg.Intervene(self.model, {name: torch.zeros_like}), self.capture(total) as entries:
                self.call(self.model)
        except Exception as error:
            if not refusal(error):
                self.wrong(f"{name} set to zero: raw {type(error).__name__}: {str(error)[:160]}")
            return
        rest = entries[0]["acts", total].flatten(0, -2)
        left, size = float((rest - rest[:1]).abs().max()), float(acts[total].abs().max())
        if left > 1e-4 * size:
            self.wrong(
                f"{name}: {total} does not come from it alone: set to zero it leaves {left:.2g} of {size:.2g}"
            )
