"""``RouterLoad``: how a mixture-of-experts router spreads tokens over experts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.streaming_stage import StreamingStage

__all__ = ["RouterLoad", "router_load"]

ROUTER_LEAVES = (
    "router_entropy", "router_entropy_norm", "load_imbalance", "most_used_expert", "top_expert_load",
    "routed_assignments", "load", "mean_probability",
)  # fmt: skip


def router_load(counts: Tensor, probability: Tensor | None = None) -> dict[str, Tensor]:
    """The load measures of (*B, E) assignment counts, and the mean router probabilities when given.

    >>> round(float(router_load(torch.tensor([1, 1, 2]))["load_imbalance"]), 6)
    1.5
    """
    load = counts.double() / counts.sum(-1, keepdim=True)
    experts = counts.shape[-1]
    entropy = -torch.xlogy(load, load).sum(-1)
    top = load.amax(-1)
    return {
        "router_entropy": entropy,
        "router_entropy_norm": entropy / (math.log(experts) or math.nan),  # of one expert: 0/0
        "load_imbalance": top * experts,
        "most_used_expert": load.argmax(-1),
        "top_expert_load": top,
        "routed_assignments": counts.sum(-1),
        "load": load,
        **({} if probability is None else {"mean_probability": probability}),
    }


class RouterLoad(StreamingStage):
    """Load of each expert of a router, counted over all selected rows: the experts that ran.

    They are what the router has chosen, ``"chosen"`` (N, k), -1 for none (a token beyond an expert's capacity). Where nobody
    told, they are each row's ``top_k`` largest logits, which many routers choose by; a warning says so where the rows come
    from a model.

    Formula:
        router_entropy = -Σ_e load_e ln load_e; load: an expert's share of all assignments, ``load_e = c_e/Σc``
        router_entropy_norm = -Σ_e load_e ln load_e / ln E; in [0, 1], 1 is even
        load_imbalance = E max_e load_e; in [1, E], 1 is even
        top_expert_load = max_e load_e; of ``most_used_expert``

    Beside them ``routed_assignments``, the ``load`` vector (E,) and ``mean_probability`` (E,), the mean softmax over experts'
    logits. Padding never counts: rows come from ``SelectTokens``.

    Reads ``"tokens"`` (N, E), the rows of a site ``router_logits``, and ``"chosen"`` where ``SelectTokens`` has found it
    beside; writes ``("router", name)``. Raises ``ValueError`` for rows of another number of experts.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> td = tg.RouterLoad(top_k=1)(TensorDict(tokens=logits))
        >>> td["router", "load"]
        tensor([0.5000, 0.0000, 0.5000], dtype=torch.float64)
        >>> tg.RouterLoad()(TensorDict(tokens=logits, chosen=torch.tensor([[1], [2]])))["router", "load"]
        tensor([0.0000, 0.5000, 0.5000], dtype=torch.float64)
    """

    reads = {"tokens": "N E", "chosen": "N K"}
    optional = frozenset({"chosen"})
    writes = [("router", name) for name in ROUTER_LEAVES]

    counts: Tensor
    rows: Tensor
    probability: Tensor

    def __init__(self, *, top_k: int = 2, in_keys: Keys = None, out_keys: Keys = None) -> None:
        if top_k < 1:
            raise ValueError(f"RouterLoad: top_k must be at least 1, got {top_k}.")
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.top_k = top_k
        self.add_state("counts", torch.int64)
        self.add_state("rows", torch.int64)
        self.add_state("probability", torch.float64)

    def start(self, tokens: Tensor, chosen: Tensor | None = None) -> dict[str, Tensor]:
        """No assignments yet."""
        counts = torch.zeros(tokens.shape[-1], dtype=torch.int64, device=tokens.device)
        return {"counts": counts, "rows": counts.sum(), "probability": counts.double()}

    def accumulate(self, tokens: Tensor, chosen: Tensor | None = None) -> None:
        """Count the assignments of a block of rows."""
        experts = self.counts.shape[0]
        if tokens.shape[-1] != experts:
            raise ValueError(
                f"RouterLoad has seen rows of {experts} experts and now gets {self.in_keys[0]!r} of shape "
                f"{tuple(tokens.shape)}. Use one stage a router, or reset()."
            )
        if chosen is None or not chosen.shape[-1]:
            if chosen is not None and not torch.compiler.is_compiling():
                warnings.warn(
                    f"RouterLoad at {self.in_keys[0]!r}: the model does not tell which experts its router chose, so the "
                    f"{self.top_k} largest logits of each row are counted, which may be others.",
                    stacklevel=2,
                )
            chosen = tokens.topk(min(self.top_k, experts), dim=-1).indices
        # -1 is counted behind the last expert, and left out
        places = torch.where(chosen < 0, experts, chosen.long()).flatten()
        self.counts += self.counts.new_zeros(experts + 1).scatter_add_(0, places, torch.ones_like(places))[
            :-1
        ]
        self.rows += tokens.shape[0]
        self.probability += tokens.double().softmax(-1).sum(0)

    def combine(self, other: RouterLoad) -> None:
        """Add another's assignments."""
        for name, value in self.state().items():
            value += other.state()[name].to(value.device)

    def result(self) -> Mapping[str, Tensor]:
        """See ``router_load``."""
        return router_load(self.counts, self.probability / self.rows.double())
