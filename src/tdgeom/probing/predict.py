"""A second pass with finished probes: predictions of every row, and scores over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.stage import Stage
from tdgeom.probing.labelled_rows import LabelledStage, row_labels
from tdgeom.probing.scores import SCORES, probe_scores
from tdgeom.probing.splits import row_groups

__all__ = ["ProbePredict", "ProbeScore", "linear_decision"]


def linear_decision(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Wx + b: (*B, N, D), (K, D), (K,) -> (*B, N, K), in float64 where the weight is.

    >>> linear_decision(torch.ones(1, 2), torch.eye(2), torch.zeros(2))
    tensor([[1., 1.]])
    """
    return rows.to(weight.dtype) @ weight.mT + bias


class ProbePredict(Stage):
    """Decisions of a finished linear probe on every row, in a second pass: ``run(second, loader, inputs=first_result)``.

    Reads ``"tokens"`` (N, D) and ``("probe_fit", "weight" | "bias")``; writes ``"decision"`` (N, K): for classes the
    largest is the answer, for regression the prediction.

        >>> import torch, tdgeom as tg
        >>> tg.ProbePredict()(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]))
        tensor([[3.5000]])
    """

    reads = {"tokens": "N D", ("probe_fit", "weight"): "K D", ("probe_fit", "bias"): "K"}
    writes = ["decision"]

    def compute(self, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """See ``linear_decision``."""
        return linear_decision(tokens, weight.to(tokens.device), bias.to(tokens.device))


class ProbeScore(LabelledStage):
    """Scores of decisions over every row of a stream, for example of ``ProbePredict`` on a test loader.

    It keeps the decisions and labels (16 + 8·K bytes a row and site), not the rows.

    Args:
        permutations, ignore_index, seed: see ``Probe``.

    Reads ``"decision"`` (N, K), ``("tokens", "label")`` and ``"row_id"``; writes ``("probe_score", name)`` for every score
    of ``Probe`` (those of the control task and the training are NaN).

        >>> import torch, tdgeom as tg
        >>> out = tg.ProbeScore(permutations=0)(torch.eye(2), torch.tensor([0, 1]), torch.arange(2) << 20)
        >>> float(out[0])
        1.0
    """

    reads: Any = {"decision": "N K", ("tokens", "label"): None, "row_id": "N"}
    writes = [("probe_score", name) for name in SCORES]

    def __init__(
        self,
        *,
        permutations: int = 200,
        ignore_index: int = -100,
        seed: int = 0,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.permutations, self.ignore_index, self.seed = permutations, ignore_index, seed
        self.add_state("count", torch.int64)
        self.add_state("decisions", torch.float64)
        self.add_state("labels", torch.int64)
        self.add_state("groups", torch.int64)

    def settings(self) -> dict[str, Any]:
        """What two shards must share."""
        return {"ignore_index": self.ignore_index, "seed": self.seed, "permutations": self.permutations}

    def start(self, decision: Tensor, label: Tensor, row_id: Tensor | None) -> Mapping[str, Tensor]:
        """Nothing kept yet."""
        return {
            "count": torch.zeros((), dtype=torch.int64, device=decision.device),
            "decisions": decision.new_zeros((0, decision.shape[1]), dtype=torch.float64),
            "labels": label[:0].double() if label.is_floating_point() else label[:0].long(),
            "groups": torch.zeros(0, dtype=torch.int64, device=decision.device),
        }

    def accumulate(self, decision: Tensor, label: Tensor, row_id: Tensor | None = None) -> None:
        """Keep decisions, labels and groups."""
        label, used = row_labels(label, decision, self.in_keys[1], self.ignore_index, None, "ProbeScore")
        groups = (
            torch.arange(int(self.count), int(self.count) + len(used), device=used.device)
            if row_id is None
            else row_groups(row_id)
        )
        self._append(decision[used].double(), label[used], groups[used].long())

    def _append(self, decisions: Tensor, labels: Tensor, groups: Tensor) -> None:
        held = int(self.count)
        total = held + len(groups)
        labels = labels.reshape(len(labels), *self.labels.shape[1:])
        for name, value in (("decisions", decisions), ("labels", labels), ("groups", groups)):
            buffer = self._buffers[name]
            if total > buffer.shape[0]:  # room doubles, so that many blocks cost no more than a few
                grown = buffer.new_zeros((max(total, 2 * buffer.shape[0]), *buffer.shape[1:]))
                grown[:held] = buffer[:held]
                setattr(self, name, grown)
            self._buffers[name][held:total] = value
        self.count = self.count + len(groups)

    def merge_(self, other: ProbeScore) -> ProbeScore:  # type: ignore[override]
        """Append what ``other`` kept; lengths may differ."""
        if type(other) is type(self) and not self.is_empty and not other.is_empty:
            with torch.inference_mode(False), torch.no_grad():
                home, theirs = self.count.device, int(other.count)
                self._append(
                    *(other._buffers[n][:theirs].to(home) for n in ("decisions", "labels", "groups"))
                )
            return self
        return super().merge_(other)  # type: ignore[return-value]

    def result(self) -> dict[str, Tensor]:
        """The scores so far."""
        held = int(self.count)
        if not held:
            raise ValueError(f"ProbeScore saw no labelled rows; check ignore_index={self.ignore_index}.")
        return probe_scores(
            self.decisions[:held],
            self.labels[:held],
            self.groups[:held],
            permutations=self.permutations,
            seed=self.seed,
        )
