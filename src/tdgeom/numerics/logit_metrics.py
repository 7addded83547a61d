"""What activation patching measures of a run: metrics of the logits at the last position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Ids", "Metric", "answer_probability", "kl_from", "logit_difference", "named_metric"]

Metric = Callable[[Tensor, Tensor], Tensor]
Ids = int | Sequence[int] | Tensor


def logit_difference(correct: Ids, wrong: Ids) -> Metric:
    """The metric logit(correct) - logit(wrong); ids are one number or one per example.

    >>> logit_difference(1, 0)(torch.tensor([[1.0, 4.0]]), torch.tensor([0]))
    tensor([3.])
    """

    def metric(logits: Tensor, example: Tensor) -> Tensor:
        return _pick(logits, correct, example) - _pick(logits, wrong, example)

    return metric


def answer_probability(correct: Ids) -> Metric:
    """The metric softmax probability of an answer; ids are one number or one per example.

    >>> answer_probability(0)(torch.zeros(1, 4), torch.tensor([0]))
    tensor([0.2500])
    """

    def metric(logits: Tensor, example: Tensor) -> Tensor:
        return _pick(logits.float().log_softmax(-1), correct, example).exp()

    return metric


def kl_from(reference: Tensor) -> Metric:
    """The metric KL(reference || patched) in nats, from the reference run's logits (B, V)."""

    def metric(logits: Tensor, example: Tensor) -> Tensor:
        own, log = reference.to(logits).float().log_softmax(-1)[example], logits.float().log_softmax(-1)
        return (own.exp() * (own - log)).sum(-1)

    return metric


def _pick(values: Tensor, ids: int | Sequence[int] | Tensor, example: Tensor) -> Tensor:
    ids = torch.as_tensor(ids, device=values.device)
    vocabulary, last = values.shape[1], int(example.max()) if len(example) else -1
    if ids.is_floating_point() or ids.ndim > 1 or (ids.ndim == 1 and last >= len(ids)):
        raise ValueError(
            f"expected a token id, or one for each of the {last + 1} examples, got {ids.dtype} of shape {tuple(ids.shape)}."
        )
    if bool(((ids < 0) | (ids >= vocabulary)).any()):
        raise ValueError(f"expected token ids from 0 to {vocabulary - 1}, got {ids.tolist()}.")
    if ids.ndim == 0:
        return values[:, int(ids)]
    return values.gather(1, ids[example][:, None])[:, 0]


def named_metric(metric: str | Metric, answers: Any, reference: Tensor) -> Metric:
    """The metric of a name, with its answers or the reference run's logits (B, V); a function is taken as it is."""
    if callable(metric):
        return metric
    if metric == "kl":
        return kl_from(reference)
    if metric == "logit_diff":
        if not isinstance(answers, list | tuple) or len(answers) != 2:
            raise ValueError(f"metric='logit_diff' needs answers=(correct ids, wrong ids), got {answers!r}.")
        return logit_difference(*answers)
    if metric == "probability":
        if answers is None or isinstance(answers, tuple):
            raise ValueError(f"metric='probability' needs answers=, the correct token's id, got {answers!r}.")
        return answer_probability(answers)
    raise ValueError(f"metric= expects 'logit_diff', 'probability', 'kl' or a function, got {metric!r}.")
