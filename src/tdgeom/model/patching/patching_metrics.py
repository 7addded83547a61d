"""Metrics of patched runs: named ones with their answers, and functions of the user's, checked for what they give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdgeom.model.lens.answer_tokens import Answers, answer_tokens
from tdgeom.numerics.logit_metrics import Metric, kl_from

__all__ = ["AnyMetric", "Measured", "Metrics", "read_metrics"]

AnyMetric = str | Callable[..., Tensor]
Metrics = AnyMetric | Sequence[str] | Mapping[str, AnyMetric]
NAMED = ("logit_diff", "logit", "probability", "kl")


@dataclass(frozen=True)
class Measured:
    """One metric: its leaf in results (``None`` where it is the only one) and the function of a run's rows, -> (n,)."""

    leaf: str | None
    of: Metric

    def under(self, root: str, kind: str | None = None) -> Any:
        """The key of a result: root, kind of site, leaf, those that there are."""
        key = tuple(part for part in (root, kind, self.leaf) if part is not None)
        return key if len(key) > 1 else key[0]


def read_metrics(
    metric: Metrics,
    answers: Answers | None,
    examples: int,
    *,
    tokenizer: Any = None,
    per_text: bool | None = None,
    reference: Any = None,
    output: str | None = "logits",
) -> list[Measured]:
    """The metrics that are meant, of rows (n, V) of logits or of whatever ``output`` is, and example indices (n,).

    ``reference`` are the other run's logits (B, V), from which "kl" is measured. Raises ``ValueError`` for unknown names,
    answers that are missing, not used, or of another form than the metric's.
    """
    named = _named(metric)
    if any(isinstance(one, str) for one in named.values()) and output != "logits":
        raise ValueError(
            f"the metrics {', '.join(NAMED)} are of logits, and output={output!r}. Remedy: metric=<a function of it>."
        )
    of_answers = [one for one in named.values() if isinstance(one, str) and one != "kl"]
    if answers is not None and not of_answers:
        raise ValueError(
            "answers= was given, and no metric asks for them. Remedy: leave it out, or metric='logit_diff'."
        )
    asked = None
    if of_answers:
        if answers is None:
            word = of_answers[0]
            form = "(correct, wrong)" if word == "logit_diff" else "the correct token"
            raise ValueError(f"metric={word!r} needs answers=, {form}, got None.")
        asked = _asked(answers, examples, tokenizer, per_text, reference)
    single = not isinstance(metric, Mapping | list | tuple)
    found: list[Measured] = []
    for name, one in named.items():
        if not isinstance(one, str):
            found.append(Measured(None if single else name, _checked(one, name)))
        elif one == "kl":
            found.append(Measured(None if single else name, kl_from(reference)))
        else:
            found += _of_answers(one, None if single else name, *asked) if asked else []
    return found


def _named(metric: Metrics) -> dict[str, AnyMetric]:
    if isinstance(metric, str):
        named: dict[str, Any] = {metric: metric}
    elif isinstance(metric, Mapping):
        named = dict(metric)
    elif isinstance(metric, list | tuple):
        named = {one if isinstance(one, str) else getattr(one, "__name__", ""): one for one in metric}
        if len(named) < len(metric):
            raise ValueError(
                f"metric= names a metric twice: {list(metric)}. Remedy: a mapping, name to metric."
            )
    else:
        named = {getattr(metric, "__name__", type(metric).__name__): metric}
    for name, one in named.items():
        if not (callable(one) or one in NAMED) or not isinstance(name, str):
            raise ValueError(
                f"metric= expects {', '.join(map(repr, NAMED))}, a function, or a mapping or list of these, got {one!r}."
            )
    if not named:
        raise ValueError("metric= names no metric.")
    return named


def _asked(
    answers: Answers, examples: int, tokenizer: Any, per_text: bool | None, reference: Tensor
) -> tuple[Tensor, Tensor, list[str]]:
    ids, weights, names = answer_tokens(answers, examples, tokenizer=tokenizer, per_text=per_text)
    vocabulary = reference.shape[-1]
    if bool((ids >= vocabulary).any()):
        raise ValueError(
            f"expected token ids from 0 to {vocabulary - 1}, got {ids[ids >= vocabulary].unique().tolist()}."
        )
    first, *others = names
    own = first if all(one == first for one in others) else [str(i) for i in range(len(first))]
    return ids.to(reference.device), weights.to(reference.device), own


def _of_answers(
    word: str, leaf: str | None, ids: Tensor, weights: Tensor, names: list[str]
) -> list[Measured]:
    if word == "logit_diff" and bool((weights.abs().sum(1) != 2).any()):
        raise ValueError(
            "metric='logit_diff' needs answers=(correct ids, wrong ids), a difference of two. Remedy: metric='logit' for "
            "the logit of one."
        )

    def metric(row: Tensor) -> Metric:
        def measure(logits: Tensor, example: Tensor) -> Tensor:
            values = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            if word == "probability":
                values = values.log_softmax(-1)
            picked = values.gather(-1, ids[example])
            return ((picked.exp() if word == "probability" else picked) * row.to(picked)).sum(-1)

        return measure

    if len(names) == 1:
        return [Measured(leaf, metric(weights[0]))]
    return [
        Measured(name if leaf is None else f"{leaf} of {name}", metric(row))
        for name, row in zip(names, weights)
    ]


def _checked(function: Callable[..., Any], name: str) -> Metric:
    """The function of a user, of what the model gives and, where it asks for them, of example indices."""
    both = _wants_examples(function)

    def measure(value: Any, example: Tensor) -> Tensor:
        got = function(value, example) if both else function(value)
        shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        if shape != (len(example),):
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the metric {name!r} expected to give one number a row, ({len(example)},) for {given}, gave {shape}. Remedy: no "
                "mean over rows: that is taken afterwards."
            )
        if bool(got.isnan().any()):
            raise ValueError(
                f"the metric {name!r} gave NaN, with which a grid marks positions that are not there."
            )
        return got

    return measure


def _wants_examples(function: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # what is written in C says nothing of itself
        return False
    placed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in placed if p.default is p.empty]
    if len(needed) > 2:
        raise ValueError(
            f"a metric is a function of what the model gives, or of this and example indices; {function!r} needs {len(needed)} "
            "arguments."
        )
    return len(needed) == 2
