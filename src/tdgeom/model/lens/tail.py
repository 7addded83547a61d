"""What a model runs after its last block, run by the model itself on activations from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdgeom.model.calls.bound_model import eval_mode, refuse_compiled
from tdgeom.model.calls.model_inputs import made_up_inputs, read_signature
from tdgeom.model.calls.quiet import replaced_forwards, without_hooks
from tdgeom.model.structure.blocks import find_final_norm, find_stacks
from tdgeom.model.structure.readers import read_input, write_output


class Tail:
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
        refuse_compiled(model, ())
        stacks = find_stacks(model)
        if not stacks:
            raise ValueError(f"the logit lens needs repeated blocks, found none in {type(model).__name__}.")
        self.model: nn.Module | None = model
        self.name, self.example = type(model).__name__, example
        self.stack = stacks[-1]
        self.others = [block.module for stack in stacks[:-1] for block in stack.blocks]
        self.blocks = list({id(block.module): block.module for block in self.stack.blocks}.values())
        path = find_final_norm(model, self.stack)
        self.norm = None if path is None else model.get_submodule(path)
        self.signature = read_signature(model)
        self.templates: dict[int, Any] = {}
        self.width: int | None = None
        self._probe()

    def __deepcopy__(self, memo: dict) -> Tail:
        return self

    def __reduce__(self):
        return _lost, (self.name,)

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

    def require(self) -> nn.Module:
        """The model, or an error if pickling has dropped it."""
        if self.model is None:
            raise RuntimeError(
                f"this lens was unpickled without its model (a {self.name}). Remedy: make a new one."
            )
        return self.model

    # ------------------------------------------------------------------------------------------ inside

    def _probe(self) -> None:
        """One small call of the whole model: what its blocks return, and how its head reads."""
        handles = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            self.templates[id(module)] = output

        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.width = read_input(args, kwargs).shape[-1]  # type: ignore[union-attr]

        try:
            for block in {id(b): b for b in (*self.others, *self.blocks)}.values():
                handles.append(block.register_forward_hook(keep))
            handles.append(self.blocks[-1].register_forward_pre_hook(see, with_kwargs=True))
            with eval_mode(list(self.model.modules())), torch.no_grad():  # type: ignore[union-attr]
                logits = self._logits(self.model(**self._dummy(2, 3)))  # type: ignore[misc]
        finally:
            for handle in handles:
                handle.remove()
        self.per_token = logits.ndim == 3 and logits.shape[:2] == (2, 3)

    def _run(self, acts: Tensor, apply_norm: bool) -> Tensor:
        model = self.model
        if not apply_norm and self.norm is None:
            raise ValueError(f"{self.name} has no final norm to leave out (apply_norm=False).")
        forwards = {block: self._stand_in(block, None) for block in self.others}
        forwards.update({block: self._stand_in(block, acts) for block in self.blocks})
        if not apply_norm:
            forwards[self.norm] = lambda x, *args, **kwargs: x
        with eval_mode(list(model.modules())), replaced_forwards(forwards), without_hooks(model):
            return self._logits(model(**self._dummy(*acts.shape[:2])))

    def _stand_in(self, block: nn.Module, acts: Tensor | None) -> Any:
        template = self.templates[id(block)]

        def forward(*args: Any, **kwargs: Any) -> Any:
            value = acts if acts is not None else read_input(args, kwargs)
            return write_output((), {}, template, value)

        return forward

    def _dummy(self, batch: int, length: int) -> dict[str, Tensor | bool]:
        if self.example is not None:
            return {k: v[:1].expand(batch, *v.shape[1:]) for k, v in self.example.items()}
        given = made_up_inputs(self.require(), self.signature, batch, length)
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


def _lost(name: str) -> Tail:
    tail = Tail.__new__(Tail)
    tail.model, tail.name = None, name
    return tail
