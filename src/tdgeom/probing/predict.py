"""A second pass with finished probes: predictions of every row, and scores over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.stage import Stage
from tdgeom.core.words import Vocabulary, Words
from tdgeom.numerics.centring import in_one_type
from tdgeom.probing import rules
from tdgeom.probing.class_labels import numbers_of
from tdgeom.probing.control_task import type_buckets
from tdgeom.probing.labelled_rows import labelled_keys, row_labels
from tdgeom.probing.rules import AnyProbe, score_names
from tdgeom.probing.scores import SCORES, probe_scores
from tdgeom.probing.splits import row_groups
from tdgeom.stream.growing_rows import GrowingRows

__all__ = ["ProbePredict", "ProbeScore", "linear_decision"]


def linear_decision(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Wx + b: (*B, N, D), (K, D), (K,) -> (*B, N, K), in the widest of the three types.

    >>> linear_decision(torch.ones(1, 2), torch.eye(2), torch.zeros(2))
    tensor([[1., 1.]])
    """
    rows, weight, bias = in_one_type(rows, weight, bias)
    return rows @ weight.mT + bias


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


class ProbeScore(GrowingRows):
    """Scores of decisions over every row of a stream, for example of ``ProbePredict`` on a test loader.

    It keeps the decisions and labels (16 + 8·K bytes a row and site), not the rows.

    Args:
        labels, permutations, ignore_index, seed: see ``Probe``.

    Reads ``"decision"`` (N, K), ``("carried", labels)``, ``"row_id"`` and, where present, ``("carried", "document_id")``; writes
    ``("probe_score", name)`` for every score of ``Probe`` (those of the control task and the training are NaN).

        >>> import torch, tdgeom as tg
        >>> out = tg.ProbeScore(permutations=0)(torch.eye(2), torch.tensor([0, 1]), torch.arange(2) << 20)
        >>> float(out[0])
        1.0
    """

    writes = [("probe_score", name) for name in SCORES]
    optional = frozenset({"row_id", "document_id"})
    publishing = frozenset({"permutations"})

    def __init__(
        self,
        *,
        labels: str = "label",
        permutations: int = 200,
        ignore_index: int = -100,
        seed: int = 0,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        reads = labelled_keys("ProbeScore", labels, rows={"decision": "N K"})
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads)
        self.permutations, self.ignore_index, self.seed = permutations, ignore_index, seed
        self.declare(decision=torch.float64, label=None, group=torch.int64)

    def kept(
        self,
        decision: Tensor,
        label: Tensor,
        row_id: Tensor | None = None,
        document: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Decisions, labels and groups of the rows with a label."""
        label, used = row_labels(
            label, decision, key=self.in_keys[1], owner="ProbeScore", ignore_index=self.ignore_index
        )
        if row_id is None:  # rows without an id: each is its own group, numbered as it comes
            row_id = (self.held + used.cumsum(0)) << POSITION_BITS
        group = row_groups(row_id, document)[used]
        return {"decision": decision[used].double(), "label": label[used], "group": group}

    def result(self) -> dict[str, Tensor]:
        """The scores so far."""
        rows = self.rows()
        if not len(rows["label"]):
            raise ValueError(f"ProbeScore saw no labelled rows; check ignore_index={self.ignore_index}.")
        return probe_scores(**rows, permutations=self.permutations, seed=self.seed)


class HeldOutRows(GrowingRows):
    """A finished probe, of one site or of a pair, and its scores over every row of a stream.

    Reads the rows of ``sites``, ``("carried", labels)``, ``"row_id"``, the types of the control task, if the probe has one, and
    ``("carried", "document_id")``, if rows carry it; writes ``("probe", name, score)``.
    """

    def __init__(self, probe: AnyProbe, sites: Sequence[str], name: str) -> None:
        tokens: dict[Key, str | None] = {("tokens", site): None for site in sites}
        super().__init__(
            reads=labelled_keys(type(probe).__name__, probe.labels, probe.control, rows=tokens),
            writes=[("probe", name, score) for score in score_names(probe.metrics, probe.groups)],
        )
        self.width = len(tokens)
        self.probe = (probe,)  # in a tuple: its state is not part of this one
        controlled = {} if probe.fitted["control"] is None else {"right": torch.bool}
        self.declare(decision=torch.float64, label=None, group=torch.int64, **controlled)

    optional = frozenset({"document_id"})
    takes_words = frozenset({"carried"})

    def kept(self, *inputs: Any) -> dict[str, Tensor]:
        """Decisions, labels and groups of the rows with a label, and where the probe of the control task is right."""
        (probe,), rows, (label, row_id, *further) = self.probe, inputs[: self.width], inputs[self.width :]
        types = further[: probe.control is not None]
        document = further[-1] if len(further) > len(types) else None
        key, owner = self.in_keys[self.width], type(probe).__name__
        label = numbers_of(label, probe.names, probe.ignore_index, owner, key).to(rows[0].device)
        label, used = row_labels(label, rows[0], key=key, owner=owner, ignore_index=probe.ignore_index)
        ready = tuple(rules.prepared(probe, x) for x in rows)
        group = row_groups(row_id, document)
        found = {"decision": probe.decide(probe.fitted, ready), "label": label, "group": group}
        if types and isinstance(types[0], Words):
            types = [Vocabulary().encode(types[0]).to(rows[0].device)]
        if types:
            right = rules.control_right(probe, ready, type_buckets(types[0], probe.seed))
            found |= {} if right is None else {"right": right}
        return {name: value[used] for name, value in found.items()}

    def result(self) -> dict[str, Tensor]:
        """The scores so far."""
        (probe,), held = self.probe, self.rows()
        return rules.scored(probe, held["decision"], held["label"], held["group"], held.get("right"))
