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
from tdgeom.model.structure.blocks import find_final_norm, find_stacks
from tdgeom.model.structure.readers import read_input, read_output, write_output


class Tail(HeldModel):
    """Everything after the last block: final norm, head transform, unembedding, bias, scaling, soft-capping.

    No part of it is written a second time: the model is called with its blocks standing in, and the last stack's blocks
    hand on the activations given. ``per_token`` says whether positions are read out one by one; a head that pools (a
    classifier) needs whole sequences. The model stays the user's: shared by copies, dropped by pickling.

    Args:
        model: a model whose output has ``logits``, or gives a tensor.
        example: inputs of one call, for models whose inputs are neither token ids nor pixels.

    Raises ``ValueError`` for models without blocks or without logits.
    """

    def __init__(self, model: nn.Module, example: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(model)
        refuse_compiled(model, ())
        stacks = find_stacks(model)
        if not stacks:
            raise ValueError(f"the logit lens needs repeated blocks, found none in {self.name}.")
        self.example, self.signature = example, read_signature(model)
        self.others = [block.module for stack in stacks[:-1] for block in stack.blocks]
        self.blocks = list(dict.fromkeys(block.module for block in stacks[-1].blocks))
        path = find_final_norm(model, stacks[-1])
        self.norm = None if path is None else model.get_submodule(path)
        self.templates: dict[nn.Module, Any] = {}
        self.width = 0
        self._probe(model)

    def __call__(self, acts: Tensor, *, apply_norm: bool = True, chunk: int = 2048) -> Tensor:
        """Logits of activations, (..., D) -> (..., V) where positions are read out one by one, else (B, T, D) -> (B, V)."""
        if acts.shape[-1] != self.width:
            raise ValueError(
                f"the logit lens expects activations of width {self.width}, got {tuple(acts.shape)}."
            )
        if not self.per_token:
            if acts.ndim != 3:
                raise ValueError(
                    f"{self.name} reads whole sequences out, so the lens needs activations (B, T, D), got {tuple(acts.shape)}."
                )
            return self._run(acts, apply_norm)
        rows = acts.reshape(-1, 1, acts.shape[-1])
        parts = [self._run(part, apply_norm) for part in rows.split(chunk)]
        return torch.cat(parts).reshape(*acts.shape[:-1], -1)

    # ------------------------------------------------------------------------------------------ inside

    def _probe(self, model: nn.Module) -> None:
        """One small call of the whole model: what its blocks return, and how its head reads."""
        handles = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            self.templates[module] = output

        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            value = read_input(args, kwargs)
            self.width = 0 if value is None else value.shape[-1]

        given = self._dummy(model, 2, 3)
        try:
            for block in dict.fromkeys([*self.others, *self.blocks]):
                handles.append(block.register_forward_hook(keep))
            handles.append(self.blocks[-1].register_forward_pre_hook(see, with_kwargs=True))
            with eval_mode(list(model.modules())), steady(_home(given)), torch.no_grad():
                logits = self._logits(model(**given))
        finally:
            for handle in handles:
                handle.remove()
        self.per_token = logits.ndim == 3 and logits.shape[:2] == (2, 3)

    def _run(self, acts: Tensor, apply_norm: bool) -> Tensor:
        model = self.require(self)
        forwards = {block: self._stand_in(block, None) for block in self.others}
        forwards.update({block: self._stand_in(block, acts) for block in self.blocks})
        if not apply_norm:
            if self.norm is None:
                raise ValueError(f"{self.name} has no final norm to leave out (apply_norm=False).")
            forwards[self.norm] = lambda x, *args, **kwargs: x
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
            return {k: v[:1].expand(batch, *v.shape[1:]) for k, v in self.example.items()}
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
