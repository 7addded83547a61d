"""Edits: the same change by a hook of our own, in a plain call and in cached generation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import tdgeom as tg
from model.zoo.examined import INNER_KINDS, Examined, Stack, proportional, ratio, refusal
from model.zoo.own_hooks import far, main_output, own_hook, same


class EditChecks(Examined):
    """The checks of edits."""

    # ------------------------------------------------------------------------------------- edits

    def _under_own_hook(
        self, path: str, change: Any, side: str, like: Tensor | None, calls: Any = None
    ) -> Tensor:
        model = copy.deepcopy(self.model)
        with own_hook(model.get_submodule(path), change, side=side, like=like, calls=calls), torch.no_grad():
            return main_output(self.call(model))

    def _under_edit(self, site: str, edit: Any) -> Tensor | None:
        try:
            with tg.Intervene(self.model, {site: edit}), torch.no_grad():
                return main_output(self.call(self.model))
        except Exception as error:
            if refusal(error):
                self.report.refused[f"edit of {tg.Site(site).kind}"] = str(error)
            else:
                self.wrong(f"edit of {site}: raw {type(error).__name__}: {str(error)[:160]}")
            return None

    def check_edits(self, acts: dict[str, Tensor]) -> None:
        plain = main_output(self.truth.output)
        for name, stack in self.stacks.items():
            layer = self.member.edited.get(name, min(1, len(stack.blocks) - 1))
            block = stack.blocks[layer]
            runs = [i for i, b in enumerate(stack.blocks) if b.path == block.path]
            calls = None if len(runs) == 1 else {runs.index(layer)}
            for side, like in (("output", stack.outputs(layer)), ("input", stack.inputs(layer))):
                push = torch.linspace(-1, 1, like.shape[-1]) * like.abs().mean()

                def shift(x: Tensor, push: Tensor = push) -> Tensor:
                    return 0.5 * x + push

                site = str(tg.Site.of(f"residual_{side}", layer, stack=name))
                self._compare_edit(
                    site, shift, self._under_own_hook(block.path, shift, side, like, calls), plain
                )
            for kind in INNER_KINDS:
                where = next(
                    (i for i in (layer, 1, 0, 2) if str(tg.Site.of(kind, i, stack=name)) in acts), None
                )
                if where is not None and calls is None:
                    self._check_inner_edit(
                        str(tg.Site.of(kind, where, stack=name)), kind, stack, where, acts, plain
                    )

    def _check_inner_edit(
        self, site: str, kind: str, stack: Stack, layer: int, acts: dict[str, Tensor], plain: Tensor
    ) -> None:
        block = stack.blocks[layer]
        stem, cross = kind.removeprefix("cross_"), "cross_" if kind.startswith("cross_") else ""
        at = cross + {"attn_pattern": "z", "head_output": "attn_output"}.get(stem, stem)
        value = acts.get(str(tg.Site.of(at, layer, stack=stack.name)))
        if value is None:
            return
        side = "input" if at.endswith("z") or at == "mlp_act" else "output"
        flat = value.flatten(-2) if at.removeprefix("cross_") in ("z", "v") else value
        matches = [
            e
            for e in self.truth.inside(block)
            if any(proportional(t, flat) for t in (e.inputs if side == "input" else e.outputs))
        ]
        if side == "input":
            matches = [e for e in matches if hasattr(e.module, "weight") or hasattr(e.module, "in_features")]
        if not matches:
            if at.endswith("_output"):
                self.wrong(f"{site}: no module of the block gives this tensor")
            return
        own, change, edit = matches[0], torch.zeros_like, torch.zeros_like
        if stem == "head_output":  # a share of head 0 less in what is added
            share = acts[site][..., 0, :] / ratio(value, own)

            def change(x: Tensor) -> Tensor:
                return x - (share.transpose(0, 1) if self.member.time_first else share.view_as(x))

            edit = tg.Ablate("zero", heads=[0])
        self._compare_edit(site, edit, self._under_own_hook(own.path, change, side, flat), plain)

    def _compare_edit(self, site: str, edit: Any, right: Tensor, plain: Tensor) -> None:
        found = self._under_edit(site, edit)
        if found is None:
            return
        kind = tg.Site(site).kind
        self.report.counts[f"edit of {kind}"] = self.report.counts.get(f"edit of {kind}", 0) + 1
        if same(right, plain, 1e-6) and self.member.moves:
            self.wrong(f"edit of {site}: our own hook changes nothing, so that nothing is shown")
        if not same(found, right, 1e-3):
            self.wrong(
                f"edit of {site}: not what an own hook gives: {far(found, right)} (unedited {far(plain, right)})"
            )

    def check_router(self, acts: dict[str, Tensor]) -> None:
        """Logits negated: the output is that of the model with the router's weight negated. Or the edit is refused."""
        for name in [n for n in acts if tg.Site(n).kind == "router_logits"][:2]:
            path, experts = tg.Capture(self.model, name).module_paths[name], acts[name].shape[-1]
            model = copy.deepcopy(self.model)
            rows = [
                (n, p)
                for n, p in model.get_submodule(path).named_parameters()
                if p.shape[:1] == (experts,) and "correction" not in n and p.ndim <= 2
            ]
            if not any(p.ndim == 2 for _, p in rows):
                self.wrong(f"{name}: {path} holds no router's weight ({[n for n, _ in rows]})")
                continue
            with torch.no_grad():
                for _, parameter in rows:
                    parameter.neg_()
            self._compare_edit(name, torch.neg, main_output(self.call(model)), main_output(self.truth.output))

    # ------------------------------------------------------------------------------------- generate

    def check_generate(self) -> None:
        if not self.member.generates or not self.stacks or set(self.stacks) == {"encoder"}:
            return
        name = next(n for n in (None, "decoder", "language_model", *self.stacks) if n in self.stacks)
        stack = self.stacks[name]
        layer = min(1, len(stack.blocks) - 1)
        block, like = stack.blocks[layer], stack.inputs(layer)
        runs = [i for i, b in enumerate(stack.blocks) if b.path == block.path]
        if len(runs) > 1:
            return
        push = torch.linspace(-1, 1, like.shape[-1]) * like.abs().mean()
        site = str(tg.Site.of("residual_output", layer, stack=name))
        start = self.batch["input_ids"].shape[1] if name != "decoder" else 1
        for positions in ("all", start + 1):
            edit = tg.Steer(push, positions=positions)
            model = copy.deepcopy(self.model)
            calls, done = None if positions == "all" else positions, [0]

            def change(x: Tensor, positions=positions, done=done) -> Tensor:
                if positions == "all":
                    return x + push
                at = positions - (
                    0 if self.member.whole else done[0]
                )  # whole: no cache, every step is the sequence so far
                time = 0 if self.member.time_first else 1
                done[0] += x.shape[time]
                x = x.clone()
                if 0 <= at < x.shape[time]:
                    x.select(time, at).add_(push)
                return x

            with own_hook(model.get_submodule(block.path), change, like=like):
                right = self._generated(model)
            try:
                with tg.Intervene(self.model, {site: edit}):
                    found = self._generated(self.model)
            except Exception as error:
                if refusal(error):
                    self.report.refused[f"generate, positions={'all' if calls is None else 'a number'}"] = (
                        str(error)
                    )
                else:
                    self.wrong(
                        f"generate with positions={positions}: raw {type(error).__name__}: {str(error)[:160]}"
                    )
                continue
            if found.shape != right.shape or not same(found, right, 1e-3):
                self.wrong(
                    f"generate with positions={positions}: not what an own hook gives: {far(found, right)}"
                )
        model = copy.deepcopy(self.model)
        seen: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            seen.append(self.turned(x.detach().clone()))
            return x

        with own_hook(model.get_submodule(block.path), keep, like=like):
            self._generated(model)
        try:
            with tg.Capture(self.model, site) as entries:
                self._generated(self.model)
        except Exception as error:
            if refusal(error):
                self.report.refused["generate, captured"] = str(error)
            else:
                self.wrong(f"captured generate: raw {type(error).__name__}: {str(error)[:160]}")
            return
        if len(entries) != len(seen) or not all(same(e["acts", site], s) for e, s in zip(entries, seen)):
            self.wrong(f"captured generate: {len(entries)} entries for {len(seen)} steps, or other values")

    def _generated(self, model: nn.Module) -> Tensor:
        given = {k: v for k, v in self.batch.items() if k not in ("decoder_input_ids", "labels")}
        if any(name == "decoder" for name in self.stacks):
            given["decoder_start_token_id"] = 1
        with torch.no_grad():
            out = model.generate(
                **given,
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
        return torch.stack(out.logits, 1)
