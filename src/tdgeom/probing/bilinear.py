"""Bilinear probes: what two sites hold together, as ``h₁ᵀ W h₂ + b``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.stage import Stage
from tdgeom.core.surroundings import steady
from tdgeom.core.words import Vocabulary, Words, class_names, integers_with_gaps
from tdgeom.core.wrong_objects import named_functions
from tdgeom.numerics.numerical_rank import above_rounding
from tdgeom.probing import rules
from tdgeom.probing.class_labels import numbers_of
from tdgeom.probing.control_task import type_buckets
from tdgeom.probing.labelled_rows import labelled_keys, one_hot, plain_rows, row_labels
from tdgeom.probing.lbfgs import minimise
from tdgeom.probing.rules import Fitted, Metric, Task, check_settings, score_names
from tdgeom.probing.splits import holdout_mask, row_groups
from tdgeom.stream.replicates import error_groups

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
    values, vectors = torch.linalg.eigh(kernel - column - column[:, None] + column.mean())
    values = values.clamp(min=0)
    alphas = torch.as_tensor(alphas, dtype=torch.float64, device=x.device)
    mean = t.mean(0)
    turned = vectors.mT @ (t - mean)
    real = above_rounding(values)
    filters = torch.where(real, values / (values + alphas[:, None]), 0.0)
    leverage = filters @ vectors.square().mT + 1 / n
    residual = (t - mean) - vectors @ (filters[..., None] * turned)
    errors = (residual / (1 - leverage)[..., None]).square().mean((1, 2))
    best = errors.argmin()
    inverse = torch.where(real, 1 / (values + alphas[best]), 0.0)
    dual = vectors @ (inverse[:, None] * turned)
    # Centring the kernel centres the products, so the weights come from dual coefficients that sum to 0.
    dual = dual - dual.mean(0)
    weight = torch.einsum("nk,nd,ne->kde", dual, x, y)
    bias = mean - torch.einsum("kde,de->k", weight, x.mT @ y / n)
    return weight, bias, alphas[best], errors[best]


class BilinearProbe(Stage):
    """A bilinear probe of two sites on a uniform sample of matched rows.

    Formula:
        y = h₁ᵀWh₂ + b; h₁ and h₂ the two sites' rows, centred

    W (K, D, E) is the ridge solution over all products of features, α chosen by leave-one-out, both in closed form
    through the kernel (XXᵀ)∘(YYᵀ): exact, time N³, memory N². Rows of each site are centred by the training part's means
    first, so W measures what the sites hold together and no linear probe of either could. Classes take targets -1/+1.

    Args:
        alphas: values to choose from; None for seven in units of the kernel's mean eigenvalue.
        labels, holdout, control, permutations, errors, ignore_index, seed, preprocess, metrics: see ``Probe``.
        train_rows: training rows used at most (the first of the sample, which comes in hash order).

    Reads ``("sample", "a")``, ``("sample", "b")``, ``("sample_carried", labels)``, ``"sample_row_id"`` and, where present,
    ``("sample_carried", "document_id")`` (``RowSample(sites, also=[labels, "document_id"])``); writes ``("probe", name)``, under
    ``ForEachPair`` ``("probe", "a->b", name)``: the scores of ``Probe``. ``fit(x, y, label)``, ``predict(x, y)``, ``score(x, y,
    label)`` take tensors; ``fitted["weight"]``.

    White et al. (2021), A non-linear structural probe; Hewitt and Manning (2019) for probes of pairs.

        >>> import torch, tdgeom as tg
        >>> x, y = torch.randn(150, 3), torch.randn(150, 3)
        >>> label = ((x * y).sum(1) > 0).long()
        >>> tg.BilinearProbe().fit(x, y, label).score(x, y, label)["accuracy"] > 0.9
        True
    """

    takes_words = frozenset({"sample_carried"})
    optional = frozenset({"document_id"})
    metrics: Mapping[str, Metric]

    def __init__(
        self,
        *,
        alphas: Sequence[float] | None = None,
        labels: str = "label",
        holdout: float = 0.25,
        train_rows: int = 2048,
        control: str | None = None,
        permutations: int = 200,
        errors: bool | int = False,
        ignore_index: int = -100,
        seed: int = 0,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        self.metrics = named_functions(f"{self.__name__}: metrics", metrics)
        check_settings(self.__name__, holdout, 2, train_rows, self.metrics)
        sides: dict[Key, str | None] = {("sample", "a"): "N D", ("sample", "b"): "N E"}
        self.errors, self.groups = errors, error_groups(errors, self.__name__)
        reads = labelled_keys(self.__name__, labels, control, rows=sides, root="sample_")
        writes = [("probe", name) for name in score_names(self.metrics, self.groups)]
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads, writes=writes)
        self.labels, self.control = labels, control
        self.alphas, self.holdout, self.train_rows = alphas, holdout, train_rows
        self.permutations, self.ignore_index, self.seed = permutations, ignore_index, seed
        self.preprocess = preprocess
        self.names: list[str] = []  # of the classes, as JSON
        self._fitted: Fitted | None = None

    @property
    def classes(self) -> list[Any]:
        """The classes' names, in the order of their numbers; empty where labels are numbers."""
        return [json.loads(name) for name in self.names]

    def _numbered(self, label: Any, key: Key) -> Tensor:
        """Labels as numbers; names in their order."""
        is_named = (
            isinstance(label, Words)
            and integers_with_gaps(label, self.ignore_index, self.__name__, key) is None
        )
        self.names = class_names(label) if is_named else []
        return numbers_of(label, self.names, self.ignore_index, self.__name__, key)

    def compute(self, a: Tensor, b: Tensor, label: Any, row_id: Tensor, *further: Any) -> dict[str, Tensor]:
        """Split by document, fit, score what was held out."""
        types = further[0] if further and self.control is not None else None
        document = further[-1] if len(further) > (self.control is not None) else None
        with torch.inference_mode(False), torch.no_grad():
            label = self._numbered(label, self.in_keys[2]).to(a.device)
            types = Vocabulary().encode(types).to(a.device) if isinstance(types, Words) else types
            label, used = row_labels(
                label, a, key=self.in_keys[2], owner=self.__name__, ignore_index=self.ignore_index
            )
            group = row_groups(row_id, document)
            held = holdout_mask(group, self.holdout, self.seed)
            rows = (rules.prepared(self, a), rules.prepared(self, b))
            bucket = torch.zeros_like(row_id) if types is None else type_buckets(types, self.seed)
            train = (used & ~held).nonzero().flatten()[: self.train_rows]
            test = (used & held).nonzero().flatten()
            self._learn(tuple(x[train] for x in rows), label[train], None if types is None else bucket[train])
            if not len(test):
                return rules.unscored(self, a.device)
            inputs = tuple(x[test] for x in rows)
            right = rules.control_right(self, inputs, bucket[test])
            return rules.scored(self, self.decide(self.fitted, inputs), label[test], group[test], right)

    def _learn(self, inputs: tuple[Tensor, ...], label: Tensor, bucket: Tensor | None = None) -> None:
        # A tensor made in inference mode cannot be part of a fit.
        self._fitted = rules.fit_rows(self, tuple(x.clone() for x in inputs), label.clone(), bucket)

    def solve(self, inputs: tuple[Tensor, ...], label: Tensor, task: Task) -> Fitted:
        """See ``bilinear_ridge``."""
        x, y, means = centred(inputs)
        targets = label if task.regression else 2 * one_hot(label, task.classes) - 1
        unit = (x.square().sum(1) * y.square().sum(1)).mean()
        usual = unit * torch.logspace(-4, 2, 7, dtype=torch.float64, device=x.device)
        weight, bias, alpha, _ = bilinear_ridge(x, y, targets, usual if self.alphas is None else self.alphas)
        return {"weight": weight, "bias": bias, "alpha": alpha, "means": means}

    def decide(self, fitted: Fitted, inputs: tuple[Tensor, ...]) -> Tensor:
        """(h₁ - m₁)ᵀ W (h₂ - m₂) + b: (N, K)."""
        x, y = (rows.double() - mean.to(rows.device) for rows, mean in zip(inputs, fitted["means"]))
        turned = torch.einsum("nd,kde->nke", x, fitted["weight"].to(x.device))
        return (turned * y[:, None]).sum(-1) + fitted["bias"].to(x.device)

    def fit(self, x: Any, y: Any, label: Any) -> BilinearProbe:
        """Train on rows (N, D), (N, E) with labels (N,), at most ``train_rows`` of them; returns itself."""
        x, y, label = plain_rows(self.__name__, x=x, y=y, label=label)
        label = self._numbered(label, "label").to(x.device)
        with torch.inference_mode(False), torch.no_grad(), steady(x.device):
            label, used = row_labels(
                label, x, key="label", owner=self.__name__, ignore_index=self.ignore_index
            )
            inputs = tuple(rules.prepared(self, rows)[used][: self.train_rows] for rows in (x, y))
            self._learn(inputs, label[used][: self.train_rows])
        return self

    def take_fitted(self, fitted: Fitted, names: Sequence[str]) -> None:
        """Be fitted as another process was, without its rows."""
        self._fitted, self.names = fitted, list(names)

    @property
    def fitted(self) -> Fitted:
        """What the last fit found, such as "weight" (K, D, E) and "bias" (K,)."""
        if self._fitted is None:
            raise ValueError(
                f"{self.__name__} is not fitted: call fit(x, y, label), or run it over labelled rows first."
            )
        return self._fitted

    def predict(self, x: Any, y: Any) -> Any:
        """Classes (N,), by name where labels were names, or numbers (N,) or (N, K), for matched rows (N, D), (N, E)."""
        return rules.named_answers(self, rules.answers(self.fitted["task"], self.decision(x, y)))

    def decision(self, x: Any, y: Any) -> Tensor:
        """What ``predict`` decides by: (N, K)."""
        return rules.decision(self, x, y)

    def score(
        self,
        x: Any,
        y: Any,
        label: Any,
        *,
        row_id: Tensor | None = None,
        document_id: Tensor | None = None,
    ) -> dict[str, float]:
        """Scores by name on matched rows and their labels; error bars over documents, or the sequences of ``row_id``."""
        return rules.score(self, x, y, label, row_id=row_id, document_id=document_id)


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
        x, y, means = centred(inputs)
        tiny = torch.finfo(torch.float64).tiny
        scales = [rows.square().mean().sqrt().clamp(min=tiny) for rows in (x, y)]
        x, y = x / scales[0], y / scales[1]
        generator = torch.Generator().manual_seed(self.seed)
        shape = task.classes, self.rank
        parameters = [
            torch.randn(*shape, width, generator=generator, dtype=torch.float32, device="cpu").double()
            for width in (x.shape[1], y.shape[1])
        ]
        parameters = [(part / part.shape[-1] ** 0.5).to(x.device).requires_grad_() for part in parameters]
        bias = torch.zeros(task.classes, dtype=torch.float64, device=x.device, requires_grad=True)

        def objective() -> Tensor:
            out = low_rank_products(x, y, *parameters) + bias
            if task.regression:
                loss = (out - label).square().sum() / 2
            else:
                loss = torch.nn.functional.cross_entropy(out, label, reduction="sum")
            return (loss + self.penalty / 2 * sum(p.square().sum() for p in parameters)) / x.shape[0]

        minimise(objective, [*parameters, bias], steps=self.steps)
        u, v = (p.detach() / scale for p, scale in zip(parameters, scales))
        weight = torch.einsum("krd,kre->kde", u, v)
        return {"u": u, "v": v, "weight": weight, "bias": bias.detach(), "means": means}


def centred(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The rows of both sites in float64 about their means, and the means."""
    x, y = (rows.double() for rows in inputs)
    means = x.mean(0), y.mean(0)
    return x - means[0], y - means[1], means


def low_rank_products(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(U h₁)·(V h₂): (N, D), (N, E), (K, r, D), (K, r, E) -> (N, K)."""
    return (torch.einsum("nd,krd->nkr", x, u) * torch.einsum("ne,kre->nkr", y, v)).sum(-1)
