"""Path patching: what an edit at one place changes at another along the direct path between them, and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdgeom.model.edits.edit import Edit, Inputs
from tdgeom.model.edits.edit_call import EditCall
from tdgeom.model.intervene import EditLike
from tdgeom.model.patching.frozen_parts import THROUGH, FrozenParts
from tdgeom.model.positions import positions_second
from tdgeom.model.sites import token_side

__all__ = ["PathPatch"]


class PathPatch(Edit):
    """At a receiver: what it would hold if edits at a sender reached it along the direct path alone (Wang et al. 2023).

    ``Intervene(model, {"q.5": PathPatch({"z.2": Patch(other, heads=[1])}, heads=[3])})`` gives head 3 of layer 5 the query that
    it forms when head 1 of layer 2 is another run's, and all other heads and MLPs are this run's (Goldowsky-Dill et al. 2023):
    what the sender adds to the receiver's input is exchanged in front of its norm, and norm and projection are computed anew. The
    receiver is where the edit stands: ``q``, ``k``, ``v`` (``heads=``; where queries share keys and values, those of a group),
    ``attn_input``, ``mlp_input``, ``final_norm`` for the logits only, or any other site.

    The context runs the model twice when it is entered: once to see what every part gives, once with the edits at the sender and
    every attention and MLP held at what it gave. What scales a part's output (a norm behind it, as in Gemma 2) or stands in the
    stream (BERT, the small OPT) acts on the change as it does in the model. That streams are the sum of held parts is checked.

    Args:
        sender: site -> edit or list of edits, as for :class:`Intervene`: ``z`` with ``heads=`` (one head's share of its
            attention's output), ``attn_output``, ``mlp_act`` (neurons), ``mlp_output``, their ``cross_`` kinds, ``embed``; any
            edit (``Patch``, ``Ablate``, ``Steer``). Several senders act together, each on what it gave in the first run.
        clean: in context form the model's inputs, those of the one call in the block; the module form takes its batch.
        through: ``"residual"``, the direct path; ``"mlp"`` lets the MLPs in between compute anew from what they are given.
        positions, heads, features: of the receiver, as for every :class:`Edit`.

    Raises ``ValueError`` where nothing of the sender reaches the receiver (it comes before it; attention and MLP side by side),
    where something beside attention and MLPs adds to the stream (a state space block in a hybrid), and for a call with other
    tokens than ``clean``; warns where the edits change nothing at the sender.

    >>> import transformers, tdgeom as tg
    >>> config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    >>> model = transformers.GPT2LMHeadModel(config).eval()
    >>> batch = TensorDict({"input_ids": torch.tensor([[3, 4, 5]])})
    >>> silent = tg.PathPatch({"z.0": tg.Ablate(heads=[1])}, heads=[0])
    >>> tg.Intervene(model, {"k.1": silent})(batch)["logits"].shape
    torch.Size([1, 3, 20])
    """

    clean: Any
    through: str
    _sender: dict[str, list[EditLike]]
    _found: TensorDictBase | None

    def __init__(
        self,
        sender: Mapping[str, EditLike | Sequence[EditLike]],
        *,
        clean: Inputs | TensorDictBase | None = None,
        through: str = "residual",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not isinstance(sender, Mapping) or not sender:
            raise ValueError(
                "PathPatch expects a mapping from senders to edits, such as {'z.0': Patch(other, heads=[1])}, got "
                f"{sender!r}."
            )
        if through not in THROUGH:
            raise ValueError(f"PathPatch: through= expects 'residual' or 'mlp', got {through!r}.")
        listed = {name: list(e) if isinstance(e, list | tuple) else [e] for name, e in sender.items()}
        self.edits = nn.ModuleList(e for own in listed.values() for e in own if isinstance(e, nn.Module))
        self._set_plain(clean=clean, through=through, _sender=listed, _found=None)

    def prepare(self, model: nn.Module, sites: Sequence[str], inputs: TensorDictBase | None) -> None:
        """Run the model: what each receiver holds when the path alone carries the change."""
        if (inputs is None) == (self.clean is None):
            raise ValueError(
                "PathPatch runs the model on the inputs of the call that it edits. Remedy: intervene(td), or in context form "
                "PathPatch(..., clean=inputs)."
                if inputs is None
                else "PathPatch(clean=) is for the context form; in module form the batch is the clean run. Remedy: leave it out."
            )
        given = self.clean if inputs is None else inputs
        given = given if isinstance(given, TensorDictBase) else TensorDict(dict(given), batch_size=[])
        frozen = FrozenParts(
            model, given.copy().auto_batch_size_(0), list(self._sender), sites, through=self.through
        )
        if len(frozen.senders) != len(self._sender):
            raise ValueError(
                f"PathPatch: a sender is one place, {list(self._sender)} are {[str(s) for s in frozen.senders]}. Remedy: with a "
                "layer, 'z.2'."
            )
        sent = {str(site): own for site, own in zip(frozen.senders, self._sender.values())}
        td = frozen.run(sent)
        if not any(bool(frozen.changed(td, site).any()) for site in frozen.senders):
            warnings.warn(
                f"PathPatch: the edits at {', '.join(sent)} changed nothing there, so nothing is sent.",
                stacklevel=5,
            )
        else:
            for site in frozen.receivers:
                if not bool(frozen.changed(td, site).any()):
                    raise ValueError(
                        f"PathPatch at {str(site)!r}: nothing of {', '.join(sent)} reaches it along the direct path: it comes "
                        "before it, or beside it. Remedy: a receiver behind the sender."
                    )
        self._set_plain(_found=td)

    def forget(self) -> None:
        """Let go of the runs."""
        self._set_plain(_found=None)

    def replace(self, value: Tensor, call: EditCall) -> Tensor:
        """What the receiver holds when the path alone carries the change."""
        if self._found is None:
            raise RuntimeError(
                f"PathPatch at {call.site!r} has no run of the path: Intervene makes it. Remedy: enter Intervene."
            )
        new = positions_second(self._found["acts", call.site], call.site)
        ids = self._found.get(token_side(call.site) + "input_ids", None)
        same = (
            call.input_ids is None
            or ids is None
            or torch.equal(ids.to(call.input_ids.device), call.input_ids)
        )
        if new.shape != value.shape or not same:
            raise ValueError(
                f"PathPatch at {call.site!r}: this call has other tokens than the clean run, {tuple(value.shape)} beside "
                f"{tuple(new.shape)}. Remedy: the same batch, in one call without a cache."
            )
        return new.to(value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": None}
