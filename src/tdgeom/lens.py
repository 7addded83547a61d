"""Logit lens and tuned lens: what the model would say if it ended at a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn import functional

from tdgeom.hooks.capture import Capture
from tdgeom.hooks.sites import LayerSpec
from tdgeom.hooks.tail import Tail
from tdgeom.keys import Key
from tdgeom.stage import Stage

__all__ = ["LogitLens", "TunedLens", "lens_measures", "logit_lens"]

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

    ``logits``, ``probabilities`` (softmax); ``top_tokens`` and ``top_probabilities`` (..., top); ``entropy`` in nats;
    ``kl`` = KL(final || lens), Σ p_final (ln p_final - ln p_lens); for ``directions``, token ids or pairs of them:
    ``logit_diff`` (..., P), the logit of an id or logit a - logit b, and ``accuracy`` (..., P), 1 where the id is the
    largest logit or a's logit exceeds b's. Softmaxes are taken in float32 at least.

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


class LogitLens(Stage):
    """Activations read out as the model reads its last layer (nostalgebraist 2020).

    Everything the model runs after its last block is run by the model itself on the activation: the final norm at *this*
    layer's statistics, head transform, unembedding (tied or not), bias, scaling and soft-capping.

    Reads ``"acts"`` (..., D) and, for ``kl``, the model's own ``"logits"`` (..., V); writes under ``"lens"`` the names of
    ``outputs``, in their order. ``ForEach(LogitLens(model), sites)`` reads ``("acts", site)`` and writes
    ``("lens", site, name)``; on rows: ``in_keys="tokens"``.

    Args:
        model: a model with logits; it stays the user's.
        outputs: which of ``logits``, ``probabilities``, ``top_tokens``, ``top_probabilities``, ``entropy``, ``kl``,
            ``logit_diff``, ``accuracy`` to write (see :func:`lens_measures`). Full logits only if asked for.
        apply_norm: False leaves the final norm out.
        top: how many tokens ``top_tokens`` and ``top_probabilities`` hold.
        directions: token ids or pairs of ids for ``logit_diff`` and ``accuracy``.
        chunk: rows read out at once.
        example: inputs of one call, for models that take neither token ids nor pixels.

    Raises ``ValueError`` for models without blocks or logits and activations of another width.
    """

    shared = frozenset({"logits"})

    def __init__(
        self,
        model: nn.Module,
        *,
        outputs: Sequence[str] = DEFAULT,
        apply_norm: bool = True,
        top: int = 10,
        directions: Directions = (),
        chunk: int = 2048,
        example: Mapping[str, Tensor] | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        outputs = check_outputs(outputs)
        super().__init__(
            in_keys=in_keys,
            out_keys=out_keys,
            reads=["acts", "logits"] if "kl" in outputs else ["acts"],
            writes=[("lens", name) for name in outputs],
        )
        self.outputs, self.apply_norm, self.top, self.chunk = outputs, apply_norm, top, chunk
        self.directions = directions
        self._tail = Tail(model, example)

    def compute(self, acts: Tensor, final: Tensor | None = None) -> Mapping[str, Tensor]:
        """The lens' measures of (..., D)."""
        with torch.no_grad():
            return read_out(
                self._tail,
                acts,
                final,
                self.outputs,
                apply_norm=self.apply_norm,
                top=self.top,
                directions=self.directions,
                chunk=self.chunk,
            )


def read_out(
    tail: Tail,
    acts: Tensor,
    final: Tensor | None,
    outputs: Sequence[str],
    *,
    apply_norm: bool,
    chunk: int,
    **settings: Any,
) -> dict[str, Tensor]:
    """:func:`lens_measures` of activations, in chunks of rows, so that logits of all rows never exist at once."""
    tail.require()
    if not tail.per_token:
        return lens_measures(tail(acts, apply_norm=apply_norm), outputs, final=final, **settings)
    rows = acts.reshape(-1, acts.shape[-1])
    finals = None if final is None else final.reshape(-1, final.shape[-1])
    parts = []
    for start in range(0, max(len(rows), 1), chunk):
        logits = tail(rows[start : start + chunk], apply_norm=apply_norm, chunk=chunk)
        own = None if finals is None else finals[start : start + chunk]
        parts.append(lens_measures(logits, outputs, final=own, **settings))
    whole = {name: torch.cat([part[name] for part in parts]) for name in outputs}
    return {name: value.reshape(*acts.shape[:-1], *value.shape[1:]) for name, value in whole.items()}


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

    ``inputs`` are the model's; ``sites`` and ``layers`` as for :class:`Capture`; ``outputs`` and further settings as for
    :class:`LogitLens`. ``("lens", site, "kl")`` compares with the model's own logits.
    """
    if not isinstance(inputs, TensorDictBase | Mapping):
        raise TypeError(
            f"logit_lens expects the model's inputs by name, such as {{'input_ids': ids}}, got {type(inputs).__name__}."
        )
    batch = inputs if isinstance(inputs, TensorDictBase) else TensorDict(dict(inputs), batch_size=[])
    outputs = check_outputs(outputs)
    lens = LogitLens(model, outputs=outputs, **settings)
    capture = Capture(model, sites, layers=layers, model_outputs="logits")
    td = capture(batch.copy())
    result = TensorDict({}, batch_size=[])
    for site in capture.sites:
        values = lens.compute(td["acts", site], td["logits"] if "kl" in outputs else None)
        for name in outputs:
            result.set(("lens", str(site), name), values[name])
    return result


class TunedLens(Stage):
    """A logit lens with an affine translator per site: ``x + A x + b``, trained to say what the model says in the end.

    Translators start at zero, so an untrained one is the logit lens (Belrose et al. 2023). They are ordinary parameters:
    ``state_dict`` stores them, the model is not part of it.

        lens = TunedLens(model, sites=capture.sites)
        lens.fit(loader, steps=250)
        torch.save(lens.state_dict(), path)

    Reads ``("acts", site)`` for every site and, for ``kl``, ``"logits"``; writes ``("lens", site, name)``.

    Args:
        model: a model with logits that are read out position by position.
        sites: concrete sites of one width, such as ``capture.sites`` of ``"residual_output"``.
        outputs, top, directions, chunk, example: as for :class:`LogitLens`.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[str],
        *,
        outputs: Sequence[str] = DEFAULT,
        top: int = 10,
        directions: Directions = (),
        chunk: int = 2048,
        example: Mapping[str, Tensor] | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if isinstance(sites, str) or not len(sites):
            raise ValueError(f"TunedLens expects a list of concrete sites, got {sites!r}.")
        outputs = check_outputs(outputs)
        names = [str(site) for site in sites]
        super().__init__(
            in_keys=in_keys,
            out_keys=out_keys,
            reads=[("acts", name) for name in names] + (["logits"] if "kl" in outputs else []),
            writes=[("lens", name, output) for name in names for output in outputs],
        )
        self.sites, self.outputs, self.top, self.chunk = names, outputs, top, chunk
        self.directions = directions
        self._tail = Tail(model, example)
        if not self._tail.per_token:
            raise ValueError("TunedLens needs a model whose head reads positions one by one.")
        width, first = self._tail.width, next(model.parameters())
        self.translators = nn.ModuleList(
            nn.Linear(width, width, device=first.device, dtype=first.dtype) for _ in names
        )
        for translator in self.translators:
            nn.init.zeros_(translator.weight)
            nn.init.zeros_(translator.bias)

    def translate(self, index: int, acts: Tensor) -> Tensor:
        """``x + A x + b`` with the translator of the ``index``-th site."""
        return acts + self.translators[index](acts)

    def compute(self, *values: Tensor) -> Sequence[Tensor]:
        """The measures of every site, in the order of ``writes``."""
        acts = values[: len(self.sites)]
        final = values[len(self.sites)] if len(values) > len(self.sites) else None
        results: list[Tensor] = []
        with torch.no_grad():
            for index, value in enumerate(acts):
                found = read_out(
                    self._tail,
                    self.translate(index, value),
                    final,
                    self.outputs,
                    apply_norm=True,
                    top=self.top,
                    directions=self.directions,
                    chunk=self.chunk,
                )
                results += [found[name] for name in self.outputs]
        return results

    def loss(self, tensordict: TensorDictBase) -> Tensor:
        """Mean KL(final || lens) over sites and attended tokens of a batch with ``acts`` and ``"logits"``."""
        final = tensordict["logits"]
        mask = tensordict.get("attention_mask", None)
        keep = (
            torch.ones(final.shape[:-1], dtype=torch.bool, device=final.device)
            if mask is None
            else mask.bool()
        )
        reference = final[keep].detach().float().log_softmax(-1)
        total = final.new_zeros((), dtype=torch.float32)
        for index, name in enumerate(self.sites):
            logits = self._tail(self.translate(index, tensordict["acts", name][keep]), chunk=self.chunk)
            total = total + functional.kl_div(
                logits.float().log_softmax(-1), reference, reduction="batchmean", log_target=True
            )
        return total / len(self.sites)

    def fit(
        self,
        batches: Iterable[Mapping[str, Tensor] | TensorDictBase],
        *,
        steps: int = 250,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> list[float]:
        """Train the translators on model inputs with Adam; the loss of every step. The model's parameters stay as they are.

        ``batches`` is gone through again and again until ``steps`` are done.
        """
        model = self._tail.require()
        capture = Capture(model, self.sites, model_outputs="logits")
        optimizer = torch.optim.Adam(self.parameters(), lr=lr, weight_decay=weight_decay)
        trained = [p for p in model.parameters() if p.requires_grad]
        losses: list[float] = []
        try:
            for parameter in trained:  # no gradients for the user's parameters
                parameter.requires_grad_(False)
            with torch.enable_grad():
                while len(losses) < steps:
                    before = len(losses)
                    for batch in batches:
                        td = (
                            batch
                            if isinstance(batch, TensorDictBase)
                            else TensorDict(dict(batch), batch_size=[])
                        )
                        loss = self.loss(capture(td.copy()))
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                        losses.append(float(loss.detach()))
                        if len(losses) == steps:
                            break
                    if len(losses) == before:
                        raise ValueError(
                            "TunedLens.fit: the batches are used up. Remedy: give a list or a loader."
                        )
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        return losses
