"""Bilinear probes: what two sites hold together, as ``h₁ᵀ W h₂ + b``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key, as_key, key_tuple
from tdgeom.core.stage import PairStage
from tdgeom.probing.control_task import control_map, type_buckets
from tdgeom.probing.labelled_rows import loose_inputs, one_hot
from tdgeom.probing.rules import Fitted, Metric, ProbeRules, Task, check_settings, plain_rows
from tdgeom.probing.scores import SCORES, complete
from tdgeom.probing.splits import holdout_mask, row_groups

__all__ = ["BilinearProbe", "LowRankBilinearProbe", "bilinear_ridge"]


def bilinear_ridge(
    x: Tensor, y: Tensor, targets: Tensor, alphas: Sequence[float] | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ridge on all products x_i y_j, α by leave-one-out, without ever forming them: (N, D), (N, E), (N, K).

    The kernel of the products is (XXᵀ)∘(YYᵀ); ridge with a free intercept is solved in it, so the cost is N³ and not
    (D·E)³.

    Returns:
        weight (K, D, E), bias (K,), the α chosen () and its leave-one-out error ().

    >>> x, y = torch.randn(30, 2).double(), torch.randn(30, 2).double()
    >>> weight, bias, *_ = bilinear_ridge(x, y, (x[:, 0] * y[:, 1] + 3)[:, None], [1e-8])
    >>> round(float(weight[0, 0, 1]), 4), round(float(bias[0]), 4)
    (1.0, 3.0)
    """
    x, y, t = x.double(), y.double(), targets.double()
    n = x.shape[0]
    kernel = (x @ x.mT) * (y @ y.mT)
    column = kernel.mean(0)
    centred = kernel - column - column[:, None] + column.mean()
    values, vectors = torch.linalg.eigh(centred)
    values = values.clamp(min=0)
    alphas = torch.as_tensor(alphas, dtype=torch.float64, device=x.device)
    mean = t.mean(0)
    turned = vectors.mT @ (t - mean)
    floor = values[-1] * n * torch.finfo(torch.float64).eps
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for alpha in alphas:
        filters = torch.where(values > floor, values / (values + alpha), 0.0)
        leverage = vectors.square() @ filters + 1 / n
        error = (
            (((t - mean) - vectors @ (filters[:, None] * turned)) / (1 - leverage)[:, None]).square().mean()
        )
        if best is None or error < best[0]:
            inverse = torch.where(values > floor, 1 / (values + alpha), 0.0)
            best = (error, alpha, vectors @ (inverse[:, None] * turned))
    error, alpha, dual = best  # type: ignore[misc]
    # Centring the kernel centres the products, so the weights come from dual coefficients that sum to 0.
    dual = dual - dual.mean(0)
    weight = torch.einsum("nk,nd,ne->kde", dual, x, y)
    bias = mean - torch.einsum("kde,de->k", weight, x.mT @ y / n)
    return weight, bias, alpha, error


class BilinearProbe(ProbeRules, PairStage):
    """A bilinear probe of two sites, h₁ᵀ W h₂ + b, on a uniform sample of matched rows.

    W (K, D, E) is the ridge solution over all products of features, α chosen by leave-one-out, both in closed form
    through the kernel (XXᵀ)∘(YYᵀ): exact, time N³, memory N². Rows of each site are centred by the training part's means
    first, so W measures what the sites hold together and no linear probe of either could. Classes take targets -1/+1.

    Args:
        alphas: values to choose from; None for seven in units of the kernel's mean eigenvalue.
        holdout, control, permutations, ignore_index, seed, preprocess, metrics: see ``Probe``; ``control`` such as
            ``("sample", "input_ids")``.
        train_rows: training rows used at most (the first of the sample, which comes in hash order).

    Reads ``("sample", "a")``, ``("sample", "b")``, ``("sample", "label")`` and ``"sample_row_id"`` (``RowSample(sites,
    also=["label"])``); writes ``("probe", name)``, under ``ForEachPair`` ``("probe", "a->b", name)``: the scores of
    ``Probe``. ``fit(x, y, label)``, ``predict(x, y)``, ``score(x, y, label)`` take tensors; ``fitted["weight"]``.

    White et al. (2021), A non-linear structural probe; Hewitt and Manning (2019) for probes of pairs.

        >>> import torch, tdgeom as tg
        >>> x, y = torch.randn(150, 3), torch.randn(150, 3)
        >>> label = ((x * y).sum(1) > 0).long()
        >>> tg.BilinearProbe().fit(x, y, label).score(x, y, label)["accuracy"] > 0.9
        True
    """

    reads: Any = {
        ("sample", "a"): "N D",
        ("sample", "b"): "N E",
        ("sample", "label"): None,
        "sample_row_id": "N",
    }

    def __init__(
        self,
        *,
        alphas: Sequence[float] | None = None,
        holdout: float = 0.25,
        train_rows: int = 2048,
        control: Key | None = None,
        permutations: int = 200,
        ignore_index: int = -100,
        seed: int = 0,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        own = dict(metrics or {})
        check_settings(type(self).__name__, holdout, 2, train_rows, own)
        reads = dict(type(self).reads)
        if control is not None:
            reads[as_key(key_tuple(control))] = "N"
        writes = [("probe", name) for name in (*SCORES, *own)]
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads, writes=writes)
        self.alphas, self.holdout, self.train_rows, self.control = alphas, holdout, train_rows, control
        self.permutations, self.ignore_index, self.seed = permutations, ignore_index, seed
        self.preprocess, self.metrics = preprocess, own

    @property
    def shared(self) -> frozenset[Key]:  # type: ignore[override]
        """One label and one row id for all pairs."""
        return frozenset(as_key(key_tuple(key)) for key in self.in_keys[2:])

    def fit(self, x: Tensor, y: Tensor, label: Tensor) -> BilinearProbe:
        """Train on rows (N, D), (N, E) with labels (N,), at most ``train_rows`` of them; returns itself."""
        x, y, label = plain_rows(type(self).__name__, x=x, y=y, label=label)  # type: ignore[assignment]
        label, used = self.labels(label, x)
        inputs = tuple(self.prepared(rows)[used][: self.train_rows] for rows in (x, y))
        self._learn(inputs, label[used][: self.train_rows])
        return self

    def _learn(self, inputs: tuple[Tensor, ...], label: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            label = label.clone()  # a tensor made in inference mode cannot be part of a fit
            self._task = self.task_of(label)
            self._fitted = {
                "train_rows": len(label),
                "counts": self._task.counts(label),
                **self.solve(inputs, label, self._task),
            }

    def compare(
        self, a: Tensor, b: Tensor, label: Tensor, row_id: Tensor, types: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Split by sequence, fit, score what was held out."""
        label, used = self.labels(label, a, self.in_keys[2])
        group = row_groups(row_id)
        held = holdout_mask(group, self.holdout, self.seed)
        inputs = (self.prepared(a), self.prepared(b))
        train = (used & ~held).nonzero().flatten()[: self.train_rows]
        test = (used & held).nonzero().flatten()
        self._learn(tuple(x[train] for x in inputs), label[train])
        if not len(test):
            found = complete({"train_rows": float(len(train))}, a.device)
            return {**found, **{name: torch.full((), torch.nan).double() for name in self.metrics}}
        decision = self.decide(self.fitted, tuple(x[test] for x in inputs))
        found = self.scored(decision, label[test], group[test])
        if types is not None and not self.task.regression:
            bucket = type_buckets(types, self.seed)
            random = control_map(self.fitted["counts"], self.seed)[bucket]
            control = self.solve(tuple(x[train] for x in inputs), random[train], self.task)
            guess = self.decide(control, tuple(x[test] for x in inputs)).argmax(-1)
            right = (guess == random[test]).double().mean()
            found |= {"control_accuracy": right, "selectivity": found["accuracy"] - right}
        return found

    def solve(self, inputs: tuple[Tensor, ...], label: Tensor, task: Task) -> Fitted:
        """See ``bilinear_ridge``."""
        x, y = (rows.double() for rows in inputs)
        means = x.mean(0), y.mean(0)
        x, y = x - means[0], y - means[1]
        targets = label if task.regression else 2 * one_hot(label, task.classes) - 1
        alphas = self.alphas
        if alphas is None:
            unit = (x.square().sum(1) * y.square().sum(1)).mean()
            alphas = unit * torch.logspace(-4, 2, 7, dtype=torch.float64, device=x.device)
        weight, bias, alpha, _ = bilinear_ridge(x, y, targets, alphas)
        return {"weight": weight, "bias": bias, "alpha": alpha, "means": means}

    def decide(self, fitted: Fitted, inputs: tuple[Tensor, ...]) -> Tensor:
        """(h₁ - m₁)ᵀ W (h₂ - m₂) + b: (N, K)."""
        x, y = (rows.double() - mean for rows, mean in zip(inputs, fitted["means"]))
        turned = torch.einsum("nd,kde->nke", x, fitted["weight"])
        return (turned * y[:, None]).sum(-1) + fitted["bias"]

    # dispatch would ask for the keyword sample_label beside sample_a; plain names are taken too.
    def forward(self, tensordict: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Fit and score the rows of a TensorDict, or plain tensors in the order of ``in_keys``."""
        if hasattr(tensordict, "batch_size"):
            return self.write(tensordict, self.compute(*self.read(tensordict)))
        given = loose_inputs(self, (() if tensordict is None else (tensordict,)) + args, kwargs)
        found = self.listed(self.compute(*self.read(given)))  # type: ignore[arg-type]
        return tuple(found)


class LowRankBilinearProbe(BilinearProbe):
    """A bilinear probe of low rank, (U h₁)·(V h₂) + b, by L-BFGS on a uniform sample of matched rows.

    U (K, r, D), V (K, r, E): cross-entropy for classes, squared error for numbers, plus penalty/2·(|U|² + |V|²) in units
    of the centred rows at unit mean variance. Fewer parameters than ``BilinearProbe``: it needs fewer rows where few
    directions of each site matter. The start is random under ``seed``.

    Args:
        rank: r. penalty: weight of the squared parameters. steps: L-BFGS iterations.

    For the other arguments, what it reads and its scores see ``BilinearProbe``.

        >>> import torch, tdgeom as tg
        >>> x, y = torch.randn(200, 4), torch.randn(200, 4)
        >>> label = (x[:, 0] * y[:, 1] > 0).long()
        >>> tg.LowRankBilinearProbe(rank=1).fit(x, y, label).score(x, y, label)["accuracy"] > 0.9
        True
    """

    def __init__(self, *, rank: int = 4, penalty: float = 1.0, steps: int = 200, **settings: Any) -> None:
        if rank < 1:
            raise ValueError(f"LowRankBilinearProbe: rank must be at least 1, got {rank}.")
        if "alphas" in settings:
            raise TypeError("LowRankBilinearProbe takes penalty= in place of alphas=.")
        super().__init__(**settings)
        self.rank, self.penalty, self.steps = rank, penalty, steps

    def solve(self, inputs: tuple[Tensor, ...], label: Tensor, task: Task) -> Fitted:
        """Minimise by L-BFGS from a seeded random start."""
        x, y = (rows.double() for rows in inputs)
        means = x.mean(0), y.mean(0)
        x, y = x - means[0], y - means[1]
        tiny = torch.finfo(torch.float64).tiny
        scales = [rows.square().mean().sqrt().clamp(min=tiny) for rows in (x, y)]
        x, y = x / scales[0], y / scales[1]
        generator = torch.Generator().manual_seed(self.seed)
        parameters = [
            (
                torch.randn(task.classes, self.rank, rows.shape[1], generator=generator).double()
                / rows.shape[1] ** 0.5
            )
            .to(x.device)
            .requires_grad_()
            for rows in (x, y)
        ]
        bias = torch.zeros(task.classes, dtype=torch.float64, device=x.device, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [*parameters, bias], max_iter=self.steps, history_size=20, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimiser.zero_grad()
            out = _low_rank(x, y, *parameters) + bias
            fit = (
                (out - label).square().sum() / 2
                if task.regression
                else torch.nn.functional.cross_entropy(out, label, reduction="sum")
            )
            value = (fit + self.penalty / 2 * sum(p.square().sum() for p in parameters)) / x.shape[0]
            value.backward()
            return value

        with torch.enable_grad():
            optimiser.step(loss)
        u, v = (p.detach() / scale for p, scale in zip(parameters, scales))
        weight = torch.einsum("krd,kre->kde", u, v)
        return {"u": u, "v": v, "weight": weight, "bias": bias.detach(), "means": means}


def _low_rank(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (torch.einsum("nd,krd->nkr", x, u) * torch.einsum("ne,kre->nkr", y, v)).sum(-1)
