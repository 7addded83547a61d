"""``TunedLens``: a logit lens with a trained affine translator for each site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn import functional

from tdgeom.core.keys import Key
from tdgeom.core.stage import Stage
from tdgeom.model.capture import Capture
from tdgeom.model.lens.logit_lens import DEFAULT, Directions, check_outputs, read_out
from tdgeom.model.lens.tail import Tail

__all__ = ["TunedLens"]


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
