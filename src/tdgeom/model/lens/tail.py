"""What a model runs after its last block, run by the model itself on activations from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdgeom.core.surroundings import steady
from tdgeom.model.calls.bound_model import HeldModel, eval_mode, refuse_compiled
from tdgeom.model.calls.forward_signature import read_signature
from tdgeom.model.calls.model_inputs import made_up_inputs
from tdgeom.model.calls.quiet import replaced_forwards, without_hooks
from tdgeom.model.sites import Site
from tdgeom.model.structure.blocks import Stack, find_final_norm, find_stacks
from tdgeom.model.structure.readers import read_input, read_output, write_output


class Tail(HeldModel):
    """Everything after the last block: final norm, head transform, unembedding, bias, scaling, soft-capping.

    No part of it is written a second time: the model is called with its blocks standing in, and the blocks of the stack that
    runs last hand on the activations given. ``per_token`` says whether positions are read out one by one; a head that pools
    (a classifier) needs whole sequences. The model stays the user's: shared by copies, dropped by pickling.

    Args:
        model: a model whose output has ``logits``, or gives a tensor.
        example: inputs of one call, for models whose inputs are neither token ids nor pixels.

    Attributes: ``stack``, the stack that is read out (of a model of images and texts, or of an encoder and a decoder, the one
    whose blocks run last); ``last_site``, the name of what it ends in; ``norm``, the final norm, or ``None``.

    Raises ``ValueError`` for models without blocks or without logits, and for an ``example`` where none is needed.
    """

    def __init__(self, model: nn.Module, example: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(model)
        refuse_compiled(model, ())
        stacks = find_stacks(model)
        if not stacks:
            raise ValueError(f"the logit lens needs repeated blocks, found none in {self.name}.")
        self.signature = read_signature(model)
        self.example: Mapping[str, Tensor] | None = None
        self.width = self.vocabulary = 0
        self.stack = self._begin(model, stacks, example)
        own = {block.module for block in self.stack.blocks}
        self.blocks = [block for block in self.templates if block in own]
        self.others = [block for block in self.templates if block not in own]
        self.last_site = Site.of("residual_output", len(self.stack.blocks) - 1, stack=self.stack.name)
        path = find_final_norm(model, self.stack)
        self.norm = None if path is None else model.get_submodule(path)

    def __call__(self, acts: Tensor, *, apply_norm: bool = True, chunk: int = 2048) -> Tensor:
        """Logits of activations, (..., D) -> (..., V) where positions are read out one by one, else (B, T, D) -> (B, V)."""
        self.check_width(acts)
        instead: dict[nn.Module, Callable] = {}
        if not apply_norm:
            if self.norm is None:
                raise ValueError(f"{self.name} has no final norm to leave out (apply_norm=False).")
            instead = {self.norm: lambda x, *args, **kwargs: x}
        if not self.per_token:
            if acts.ndim != 3:
                raise ValueError(
                    f"{self.name} reads whole sequences out, so the lens needs activations (B, T, D), got {tuple(acts.shape)}."
                )
            return self._run(acts, instead)
        parts = [self.rows(part, instead) for part in acts.reshape(-1, acts.shape[-1]).split(chunk)]
        return torch.cat(parts).reshape(*acts.shape[:-1], -1)

    def check_per_token(self) -> None:
        """Raise where no position has logits of its own."""
        if not self.per_token:
            raise ValueError(
                f"{self.name} reads whole sequences out: its logits are no sum over one position's parts. Remedy: a head that "
                "reads positions one by one."
            )

    def check_width(self, acts: Tensor) -> None:
        """Raise for activations that are not as wide as the stream that is read out."""
        if acts.shape[-1] != self.width:
            which = f" (of the stack {self.stack.name!r})" if self.stack.name else ""
            raise ValueError(
                f"the logit lens expects activations of width {self.width}{which}, got {tuple(acts.shape)}."
            )

    def rows(self, rows: Tensor, instead: Mapping[nn.Module, Callable]) -> Tensor:
        """Logits of rows, (N, D) -> (N, V), with other forwards ``instead`` of those of some modules."""
        # with inputs of its own, the model sees one text of as many positions as there are rows
        logits = self._run(rows.unsqueeze(1) if self.example is None else rows.unsqueeze(0), instead)
        return logits.reshape(len(rows), -1)

    # ------------------------------------------------------------------------------------------ inside

    def _begin(self, model: nn.Module, stacks: list[Stack], example: Mapping[str, Tensor] | None) -> Stack:
        """The probe on inputs that are made up, or on those of the example where that cannot be."""
        if made_up_inputs(model, self.signature, 1, 1) is None:
            self.example = example
            return self._probe(model, stacks)
        try:
            stack = self._probe(model, stacks)
        except (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError):
            if example is None:
                raise
            self.example = example
            return self._probe(model, stacks)
        if example is not None:
            raise ValueError(
                f"example= was given for {self.name}, whose inputs are made up: the lens would not use it. Remedy: leave "
                "example= out."
            )
        return stack

    def _probe(self, model: nn.Module, stacks: list[Stack]) -> Stack:
        """One small call of the whole model: which stack runs last, what its blocks return, and how its head reads."""
        handles: list[Any] = []
        self.templates: dict[nn.Module, Any] = {}
        of = {block.module: stack for stack in stacks for block in stack.blocks}
        ran: list[nn.Module] = []

        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self.templates[module] = output
            ran.append(module)
            value = read_input(args, kwargs)
            self.width = 0 if value is None else value.shape[-1]

        given = self._dummy(model, 2, 3)
        try:
            for block in of:
                handles.append(block.register_forward_hook(keep, with_kwargs=True))
            with eval_mode(list(model.modules())), steady(_home(given)), torch.no_grad():
                logits = self._logits(model(**given))
        finally:
            for handle in handles:
                handle.remove()
        if not ran:
            raise ValueError(f"the logit lens needs repeated blocks that run, those of {self.name} did not.")
        final = read_output((), {}, self.templates[ran[-1]])
        shape = (2, 3) if self.example is None or final is None else tuple(final.shape[:2])
        self.per_token = logits.ndim == 3 and tuple(logits.shape[:2]) == shape
        self.vocabulary = logits.shape[-1]
        return of[ran[-1]]

    def _run(self, acts: Tensor, instead: Mapping[nn.Module, Callable]) -> Tensor:
        model = self.require(self)
        forwards: dict[nn.Module, Callable] = {block: self._stand_in(block, None) for block in self.others}
        forwards.update({block: self._stand_in(block, acts) for block in self.blocks})
        forwards.update(instead)
        given = self._dummy(model, *acts.shape[:2])
        with (
            eval_mode(list(model.modules())),
            replaced_forwards(forwards),
            without_hooks(model),
            steady(acts.device),
        ):
            return self._logits(model(**given))

    def _stand_in(self, block: nn.Module, acts: Tensor | None) -> Callable:
        template = self.templates[block]
        usual = read_output((), {}, template)

        def forward(*args: Any, **kwargs: Any) -> Any:
            value = read_input(args, kwargs) if acts is None else acts
            if value is None or usual is None:
                raise ValueError(f"the logit lens expects blocks of {self.name} to take and give tensors.")
            return write_output((), {}, template, value.to(usual.dtype))

        return forward

    def _dummy(self, model: nn.Module, batch: int, length: int) -> dict[str, Any]:
        if self.example is not None:
            whole = getattr(self, "per_token", True)
            return {k: v if whole else v[:1].expand(batch, *v.shape[1:]) for k, v in self.example.items()}
        given = made_up_inputs(model, self.signature, batch, length)
        if given is None:
            raise ValueError(
                f"{self.name} takes {self.signature.names}: the lens cannot make up inputs for it. Remedy: example={{name: "
                "tensor}."
            )
        return given

    def _logits(self, output: Any) -> Tensor:
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"the logit lens needs a model with logits, {self.name} gives {type(output).__name__} without. Remedy: the "
                "model with its head (AutoModelForCausalLM)."
            )
        return logits


def _home(given: Mapping[str, Any]) -> torch.device:
    return next((v.device for v in given.values() if isinstance(v, Tensor)), torch.device("cpu"))
