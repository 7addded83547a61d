"""The logit lens: what the model would say if it ended at a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdgeom.core.keys import Key, as_key
from tdgeom.core.stage import Stage
from tdgeom.model.capture import Capture
from tdgeom.model.lens.linear_tail import LinearTail
from tdgeom.model.lens.tail import Tail
from tdgeom.model.sites import LayerSpec, Site
from tdgeom.model.structure.meant_sites import listed_sites

__all__ = ["LogitLens", "lens_measures", "logit_lens"]

OUTPUTS = (
    "logits",
    "probabilities",
    "top_tokens",
    "top_probabilities",
    "entropy",
    "kl",
    "logit_diff",
    "accuracy",
)
DEFAULT = ("top_tokens", "top_probabilities", "entropy")
Directions = Sequence[int] | Sequence[tuple[int, int]]


def lens_measures(
    logits: Tensor,
    outputs: Sequence[str] = DEFAULT,
    *,
    final: Tensor | None = None,
    top: int = 10,
    directions: Directions = (),
) -> dict[str, Tensor]:
    """Measures of logits (..., V), each (...) or (..., k).

    Formula:
        entropy = -Σ q ln q; q the lens' probabilities; in nats
        kl = Σ p (ln p - ln q); p those of the model's own output: KL(final || lens)

    ``logits``, ``probabilities`` (softmax); ``top_tokens`` and ``top_probabilities`` (..., top); for ``directions``, token
    ids or pairs of them: ``logit_diff`` (..., P), the logit of an id or logit a - logit b, and ``accuracy`` (..., P), 1 where
    the id is the largest logit or a's logit exceeds b's. Softmaxes are taken in float32 at least.

    >>> lens_measures(torch.tensor([0.0, 0.0]), ["entropy"])["entropy"]
    tensor(0.6931)
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log = wide.log_softmax(-1)
    found: dict[str, Tensor] = {}
    for name in outputs:
        if name == "logits":
            found[name] = logits
        elif name == "probabilities":
            found[name] = log.exp()
        elif name in ("top_tokens", "top_probabilities"):
            values, tokens = log.topk(min(top, log.shape[-1]), -1)
            found[name] = tokens if name == "top_tokens" else values.exp()
        elif name == "entropy":
            found[name] = -torch.xlogy(log.exp(), log.exp()).sum(-1)
        elif name == "kl":
            if final is None or final.shape != logits.shape:
                got = None if final is None else tuple(final.shape)
                raise ValueError(f"'kl' needs the model's own logits, {tuple(logits.shape)}, got {got}.")
            reference = final.to(wide).log_softmax(-1)
            found[name] = (reference.exp() * (reference - log)).sum(-1)
        else:
            found[name] = _direction(wide, name, directions)
    return found


def _direction(logits: Tensor, name: str, directions: Directions) -> Tensor:
    if not len(directions):
        raise ValueError(f"{name!r} needs directions=, token ids or pairs of token ids.")
    columns = []
    for entry in directions:
        if isinstance(entry, int):
            value = logits[..., entry]
            columns.append(value if name == "logit_diff" else (logits.argmax(-1) == entry).to(logits))
        else:
            value = logits[..., entry[0]] - logits[..., entry[1]]
            columns.append(value if name == "logit_diff" else (value > 0).to(logits))
    return torch.stack(columns, -1)


class Lens(Stage):
    """What a logit lens and a tuned lens share: a model's tail, and the measures of what it says."""

    shared = frozenset({"logits", "stream"})  # every site is read with the statistics of the one stream
    norm: str = "own"

    def __init__(
        self,
        model: nn.Module,
        *,
        reads: Sequence[tuple[str, ...]],
        outputs: Sequence[str] = DEFAULT,
        top: int = 10,
        directions: Directions = (),
        chunk: int = 2048,
        example: Mapping[str, Tensor] | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        self.outputs = check_outputs(outputs)
        tail = Tail(model, example)
        beside: list[Key] = ["stream"] if self.norm == "final" else []
        super().__init__(
            in_keys=in_keys,
            out_keys=out_keys,
            reads=[*map(as_key, reads), *beside, *(["logits"] if "kl" in self.outputs else [])],
            writes=[("lens", *site, name) for _, *site in reads for name in self.outputs],
        )
        self.top, self.chunk, self.directions = top, chunk, directions
        self._tail = tail

    def read_out(
        self, acts: Tensor, final: Tensor | None, *, apply_norm: bool = True, stream: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The measures of activations (..., D), in chunks of rows, so that logits of all rows never exist at once.

        With the last block's output as ``stream``, the norm's statistics are those of its rows.
        """
        self._tail.require(self)
        told: dict[str, Any] = {"outputs": self.outputs, "top": self.top, "directions": self.directions}
        if stream is not None and stream.shape != acts.shape:
            raise ValueError(
                f"norm='final' reads every row with the statistics of the last block's output there, {tuple(stream.shape)}; the "
                f"activations are {tuple(acts.shape)}."
            )
        if not self._tail.per_token and stream is None:
            return lens_measures(self._tail(acts, apply_norm=apply_norm), final=final, **told)
        rows = acts.reshape(-1, acts.shape[-1])
        finals = None if final is None else final.reshape(-1, final.shape[-1])
        streams = None if stream is None else stream.reshape(-1, stream.shape[-1])
        parts = []
        for start in range(0, max(len(rows), 1), self.chunk):
            here = slice(start, start + self.chunk)
            if streams is None:
                logits = self._tail(rows[here], apply_norm=apply_norm, chunk=self.chunk)
            else:
                logits = LinearTail(self._tail, streams[here]).linear(rows[here])
            parts.append(lens_measures(logits, final=None if finals is None else finals[here], **told))
        joined = {name: torch.cat([part[name] for part in parts]) for name in self.outputs}
        return {name: value.reshape(*acts.shape[:-1], *value.shape[1:]) for name, value in joined.items()}


class LogitLens(Lens):
    """Activations read out as the model reads its last layer (nostalgebraist 2020).

    Everything the model runs after its last block is run by the model itself on the activation: the final norm at *this*
    layer's statistics, head transform, unembedding (tied or not), bias, scaling and soft-capping. Of models of images and
    texts, and of encoder-decoders, it is the stack that runs last whose activations are read.

    Reads ``"acts"`` (..., D) and, for ``kl``, the model's own ``"logits"`` (..., V); writes under ``"lens"`` the names of
    ``outputs``, in their order. ``ForEach(LogitLens(model), sites)`` reads ``("acts", site)`` and writes
    ``("lens", site, name)``; on rows: ``in_keys="tokens"``.

    Args:
        model: a model with logits; it stays the user's.
        outputs: which of ``logits``, ``probabilities``, ``top_tokens``, ``top_probabilities``, ``entropy``, ``kl``,
            ``logit_diff``, ``accuracy`` to write (see :func:`lens_measures`). Full logits only if asked for.
        apply_norm: False leaves the final norm out.
        norm: ``"own"``, the final norm at the statistics of what is read; ``"final"``, at those that it had in the pass, taken
            from the last block's output, which the stage then reads as ``"stream"``, one for all sites
            (``in_keys=[("acts", site), ("acts", lens.last_site)]`` names a captured one). So held, the norm is linear: what is
            read is a *part* of the logits, before soft-capping, and ``embed``, ``attn_output`` and ``mlp_output`` of all layers
            of a model without norms in its stream add up to the logits with :meth:`biases` (:func:`logit_attribution` reads
            single answers, of any model).
        top: how many tokens ``top_tokens`` and ``top_probabilities`` hold.
        directions: token ids or pairs of ids for ``logit_diff`` and ``accuracy``.
        chunk: rows read out at once.
        example: inputs of one call, for models that take neither token ids nor pixels.

    Raises ``ValueError`` for models without blocks or logits, activations of another width, and, with ``norm="final"``, heads
    that are not linear behind their norm.
    """

    def __init__(
        self, model: nn.Module, *, apply_norm: bool = True, norm: str = "own", **settings: Any
    ) -> None:
        if (
            norm not in ("own", "final")
            or not isinstance(apply_norm, bool)
            or (norm == "final" and not apply_norm)
        ):
            raise ValueError(
                f"norm= expects 'own' or 'final' (the second with apply_norm=True), apply_norm= a bool, got {norm!r} and "
                f"{apply_norm!r}."
            )
        self.norm = norm
        super().__init__(model, reads=[("acts",)], **settings)
        self.apply_norm = apply_norm

    @property
    def last_site(self) -> str:
        """The site that the model's head reads: the output of the last block."""
        return str(self._tail.last_site)

    @torch.no_grad()
    def compute(self, acts: Tensor, *beside: Tensor) -> dict[str, Tensor]:
        """The lens' measures of (..., D), by name; ``beside`` are the last block's output (``norm="final"``) and the logits."""
        stream = beside[0] if self.norm == "final" and beside else None
        final = beside[-1] if "kl" in self.outputs and beside else None
        if self.norm == "final" and stream is None:
            raise ValueError(
                "norm='final' reads the last block's output beside the activations, got these alone."
            )
        return self.read_out(acts, final, apply_norm=self.apply_norm, stream=stream)

    def biases(self, stream: Tensor) -> Tensor:
        """The logits that belong to no part of the last block's output (..., D) under ``norm="final"``, (V,).

        The final norm's bias, read out, and the head's own.
        """
        self._tail.require(self)
        return LinearTail(self._tail, stream.reshape(-1, stream.shape[-1])[:1]).offset


def check_outputs(outputs: Sequence[str]) -> tuple[str, ...]:
    """The names asked for, or an error that lists the known ones."""
    outputs = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs:
        raise ValueError(f"outputs= expects names among {', '.join(OUTPUTS)}, got {list(outputs)}.")
    return outputs


def logit_lens(
    model: nn.Module,
    inputs: Mapping[str, Tensor] | TensorDictBase,
    *,
    sites: str | Sequence[str] = "residual_output",
    layers: LayerSpec = "all",
    outputs: Sequence[str] = DEFAULT,
    **settings: Any,
) -> TensorDictBase:
    """The logit lens over all layers in one call: a TensorDict with ``("lens", site, name)``.

    ``inputs`` are the model's; ``sites`` and ``layers`` as for :class:`Capture`, of the stack that the model's head reads (a
    language model's, a decoder's); ``outputs`` and further settings as for :class:`LogitLens`. ``("lens", site, "kl")``
    compares with the model's own logits.
    """
    if not isinstance(inputs, TensorDictBase | Mapping):
        raise TypeError(
            f"logit_lens expects the model's inputs by name, such as {{'input_ids': ids}}, got {type(inputs).__name__}."
        )
    batch = inputs if isinstance(inputs, TensorDictBase) else TensorDict(dict(inputs), batch_size=[])
    lens = LogitLens(model, outputs=outputs, **settings)
    # some models add to what a part gave in place
    capture = Capture(model, _of_stack(model, sites, lens), layers=layers, model_outputs="logits", clone=True)
    last = Capture(model, lens.last_site) if lens.norm == "final" else None
    td = capture(batch.copy())
    beside = [] if last is None else [last(batch.copy())["acts", lens.last_site]]
    beside += [td["logits"]] if "kl" in lens.outputs else []
    result = TensorDict({}, batch_size=[])
    for site in capture.sites:
        for name, value in lens.compute(td["acts", site], *beside).items():
            result.set(("lens", str(site), name), value)
    if last is not None and "logits" in lens.outputs:
        result.set(("lens", "biases", "logits"), lens.biases(beside[0]))
    return result


def _of_stack(model: nn.Module, sites: Any, lens: LogitLens) -> list[Any]:
    """The sites in the stack that is read out, where a model has several; others are refused."""
    stack = Site(lens.last_site).stack
    listed = list(listed_sites(model, sites))
    if stack is None:
        return listed
    found = []
    for name in listed:
        site = Site(name) if isinstance(name, str) else None
        if site is not None and site.path is None and site.stack is None:
            site = Site.of(site.kind, site.layer, stack=stack, prefix=site.prefix)
        if site is not None and site.stack not in (None, stack):
            raise ValueError(
                f"logit_lens: the head of {type(model).__name__} reads the stack {stack!r}, and {str(site)!r} is of another. "
                f"Remedy: sites of {stack!r}."
            )
        found.append(name if site is None else site)
    return found
