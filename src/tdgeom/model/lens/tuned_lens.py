"""The tuned lens: a logit lens with a trained affine translator for each site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn import functional

from tdgeom.core.process_groups import tell_not_shared
from tdgeom.core.split_loaders import find_split
from tdgeom.core.wrong_objects import site_list
from tdgeom.model.calls.input_device import where_inputs_go
from tdgeom.model.capture import Capture
from tdgeom.model.lens.logit_lens import Lens
from tdgeom.model.positions import attended_tokens
from tdgeom.model.sites import token_side

__all__ = ["TunedLens"]


class TunedLens(Lens):
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

    translators: Any  # nn.ModuleList of nn.Linear

    def __init__(self, model: nn.Module, sites: Sequence[str], **settings: Any) -> None:
        if isinstance(sites, str) or not site_list("TunedLens", sites):
            raise ValueError(f"TunedLens expects a list of concrete sites, got {sites!r}.")
        self.sites = [str(site) for site in sites]
        super().__init__(model, reads=[("acts", site) for site in self.sites], **settings)
        if not self._tail.per_token:
            raise ValueError("TunedLens needs a model whose head reads positions one by one.")
        width, first = self._tail.width, next(model.parameters())
        device = where_inputs_go(model)  # weights that are loaded for a forward only are nowhere else
        made = [nn.Linear(width, width, device=device, dtype=first.dtype) for _ in self.sites]
        for translator in made:
            nn.init.zeros_(translator.weight)
            nn.init.zeros_(translator.bias)
        self.translators = nn.ModuleList(made)

    def translate(self, index: int, acts: Tensor) -> Tensor:
        """``x + A x + b`` with the translator of the ``index``-th site."""
        return acts + self.translators[index](acts)

    @torch.no_grad()
    def compute(self, *values: Tensor) -> Sequence[Tensor]:
        """The measures of every site, in the order of ``writes``."""
        final = values[len(self.sites)] if len(values) > len(self.sites) else None
        moved = [self.translate(index, acts) for index, acts in enumerate(values[: len(self.sites)])]
        return [measure for acts in moved for measure in self.read_out(acts, final).values()]

    def loss(self, tensordict: TensorDictBase) -> Tensor:
        """Mean KL(final || lens) over sites and attended tokens of a batch with ``acts`` and ``"logits"``."""
        final = tensordict["logits"]
        side = token_side(str(self._tail.last_site))  # a decoder's padding is its own
        keep = attended_tokens(tensordict.get(f"{side}attention_mask", None), final)
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
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> list[float]:
        """Train the translators on model inputs with Adam; the loss of every step. The model's parameters stay as they are.

        ``batches`` is gone through again and again until ``steps`` are done. Every process trains by itself, on all that it is
        given: ranks of a process group that have one loader find the same translators, and are told so.

        Raises:
            ValueError: batches that are used up; a loader that is split by rank.
        """
        found = find_split(batches)
        if found is not None:
            raise ValueError(
                f"TunedLens.fit trains in one process, on all of the batches, but these are part {found.part} of {found.parts} "
                f"({found.by}). Give every rank the whole loader."
            )
        tell_not_shared(
            "TunedLens.fit",
            "With one loader all ranks find the same translators. To train once: fit in one process, torch.save its "
            "state_dict(), and load_state_dict on every rank.",
        )
        model = self._tail.require(self)
        capture = Capture(model, self.sites, model_outputs="logits")
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate, weight_decay=weight_decay)
        trained = [p for p in model.parameters() if p.requires_grad]
        losses: list[float] = []
        try:
            for parameter in trained:  # no gradients for the user's parameters
                parameter.requires_grad_(False)
            with torch.enable_grad():
                while len(losses) < steps:
                    before = len(losses)
                    for batch in islice(iter(batches), steps - before):
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
                    if len(losses) == before:
                        raise ValueError(
                            "TunedLens.fit: the batches are used up. Remedy: give a list or a loader."
                        )
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        return losses
