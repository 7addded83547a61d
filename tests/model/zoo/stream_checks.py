"""The stream and padding: what is read before and after each block, against the model's own."""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor

import tdgeom as tg
from model.zoo.examined import Examined, Stack, refusal
from model.zoo.own_hooks import Pass, far, same


class StreamChecks(Examined):
    """The checks of the stream."""

    def check_stream(self) -> None:
        listed = [e.site for e in tg.available_sites(self.model) if e.site.kind == "residual_output"]
        self.streams = [
            f"{stack}.{kind}" if stack else kind
            for stack in dict.fromkeys(site.stack for site in listed)
            for kind in ("residual_input", "residual_output")
        ] or ["residual_input", "residual_output"]
        acts = self.read(self.streams)
        sites = [tg.Site(name) for name in acts]
        self.find_stacks(list(dict.fromkeys(site.stack for site in sites)))
        with self.capture(self.streams) as calls:
            self.call(self.model)
        around = dict(calls[0]["acts"].items())
        for name, stack in self.stacks.items():
            own = [s for s in sites if s.stack == name and s.kind == "residual_output"]
            if len(own) != len(stack.blocks):
                self.wrong(f"stack {name!r}: {len(own)} layers, the model has {len(stack.blocks)}")
                continue
            for site in (s for s in sites if s.stack == name):
                right = (
                    stack.inputs(site.layer) if site.kind == "residual_input" else stack.outputs(site.layer)
                )
                for form, values in (("module form", acts), ("context form", around)):
                    value = values[site]
                    if value.shape != right.shape or not same(value, right):
                        self.wrong(f"{site}: {form}: {far(value, right)}")
        if len(calls) != 1:
            self.wrong(f"context form: {len(calls)} entries for one call")
        self.report.compared = bool(self.stacks)

    # ------------------------------------------------------------------------------------- padding

    def check_padding(self) -> None:
        """Rows of unequal lengths: the context form shows the call, the module form what each sequence gives alone."""
        if not self.member.masks or not self.stacks:
            return
        asked = {"output_hidden_states": True} if self.member.hidden else {}
        for side in ("right", "left"):
            padded, mask = self.member.padded(self.batch, side)
            right = self.by_hand(padded, **asked)
            with self.capture(self.streams) as calls:
                self.call(self.model, padded)
            for name, stack in self.stacks.items():
                again = self._again(stack, right)
                for layer in range(len(stack.blocks)):
                    for kind, value in (
                        ("residual_input", again.inputs(layer)),
                        ("residual_output", again.outputs(layer)),
                    ):
                        site = str(tg.Site.of(kind, layer, stack=name))
                        found = calls[0]["acts", site]
                        if found.shape != value.shape or not same(found, value):
                            self.wrong(f"{site}: context form, {side} padding: {far(found, value)}")
            self._check_rows(calls[0], mask, side)
            self._check_padded_module(padded, mask, side)

    def _again(self, stack: Stack, other: Pass) -> Stack:
        """The same stack in another pass."""
        paths = {block.path for block in stack.blocks}
        hidden = self._hidden(other.output, stack.name) if stack.hidden is not None else None
        return Stack(stack.name, [e for e in other.events if e.path in paths], hidden)

    def _check_rows(self, call: TensorDict, mask: Tensor, side: str) -> None:
        """As many rows as there are tokens."""
        name = next(
            (s for s in ("encoder.residual_output.1", "residual_output.1") if ("acts", s) in call.keys(True)),
            None,
        )
        if name is None:
            return
        try:
            rows = tg.SelectTokens([name])(call.copy())["tokens", name]
        except Exception as error:
            if refusal(error):
                self.report.refused["rows"] = str(error)
            else:
                self.wrong(f"SelectTokens, {side} padding: raw {type(error).__name__}: {error}")
            return
        if rows.shape[0] != int(mask.sum()):
            self.wrong(f"SelectTokens, {side} padding: {rows.shape[0]} rows for {int(mask.sum())} tokens")

    def _check_padded_module(self, padded: dict, mask: Tensor, side: str) -> None:
        try:
            acts = self.read(self.streams, padded)
        except Exception as error:
            if refusal(error):
                self.report.refused[f"{side} padding"] = str(error)
            else:
                self.wrong(f"module form, {side} padding: raw {type(error).__name__}: {error}")
            return
        alone = [self._alone(row) for row in range(len(mask))]
        for name, stack in self.stacks.items():
            worst = 0.0
            for layer in range(len(stack.blocks)):
                for row, given in enumerate(alone):
                    paths = {b.path for b in stack.blocks}
                    right = Stack(name, [e for e in given.events if e.path in paths], None).outputs(layer)[0]
                    value = acts[str(tg.Site.of("residual_output", layer, stack=name))][row]
                    if name != "decoder" and len(value) == mask.shape[1]:
                        value = value[mask[row].bool()]
                    if value.shape != right.shape:
                        self.wrong(f"stack {name!r}: module form, {side} padding: {far(value, right)}")
                        return
                    worst = max(worst, float((value - right).abs().max() / right.abs().max()))
            if worst > 1e-3:
                self.wrong(
                    f"stack {name!r}: module form, {side} padding: a padded row is not what the sequence "
                    f"gives alone ({worst:.2g})"
                )

    def _alone(self, row: int) -> Pass:
        return self.by_hand(self.member.alone(self.batch, row))
