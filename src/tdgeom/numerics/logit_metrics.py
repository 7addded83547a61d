"""What activation patching measures of a run: metrics of the logits at the last position."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "Ids",
    "Metric",
    "answer_probability",
    "kl_divergence",
    "kl_from",
    "logit_diff",
    "logit_difference",
    "token_probability",
]

Metric = Callable[[Tensor, Tensor], Tensor]
Ids = int | Sequence[int] | Tensor


def logit_diff(logits: Tensor, correct: Ids, wrong: Ids) -> Tensor:
    """logit(correct) - logit(wrong), (*B, V) -> (*B,): how far the first token is ahead of the second.

    Ids are one number, or one for each of *B. Raises ``ValueError`` for ids outside the vocabulary.

    >>> logit_diff(torch.tensor([[1.0, 4.0], [2.0, 2.5]]), 1, [0, 1])
    tensor([3., 0.])
    """
    return _at(logits, correct) - _at(logits, wrong)


def token_probability(logits: Tensor, token: Ids) -> Tensor:
    """The softmax probability of a token, (*B, V) -> (*B,), in [0, 1]; ids as for ``logit_diff``.

    >>> token_probability(torch.zeros(1, 4), 0)
    tensor([0.2500])
    """
    return _at(logits.float().log_softmax(-1), token).exp()


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || logits) of two next-token distributions in nats, (*B, V) and (*B, V) -> (*B,), at least 0.

    >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, 100.0]]))
    tensor([0.6931])
    """
    own, log = reference.to(logits).float().log_softmax(-1), logits.float().log_softmax(-1)
    return (own.exp() * (own - log)).sum(-1)


def _at(values: Tensor, ids: Ids) -> Tensor:
    """The entries at token ids, (*B, V) -> (*B,)."""
    index, vocabulary = torch.as_tensor(ids, device=values.device), values.shape[-1]
    lead = tuple(values.shape[:-1])
    if index.is_floating_point() or index.dtype == torch.bool or (index.ndim and tuple(index.shape) != lead):
        raise ValueError(
            f"expected a token id, or one for each of {lead}, got {index.dtype} of shape {tuple(index.shape)}."
        )
    if bool(((index < 0) | (index >= vocabulary)).any()):
        raise ValueError(f"expected token ids from 0 to {vocabulary - 1}, got {index.tolist()}.")
    return values.gather(-1, index.long().expand(lead).unsqueeze(-1)).squeeze(-1)


def logit_difference(correct: Ids, wrong: Ids) -> Metric:
    """The metric logit(correct) - logit(wrong); ids are one number or one per example.

    >>> logit_difference(1, 0)(torch.tensor([[1.0, 4.0]]), torch.tensor([0]))
    tensor([3.])
    """
    return lambda logits, example: logit_diff(logits, _of(correct, example), _of(wrong, example))


def answer_probability(correct: Ids) -> Metric:
    """The metric softmax probability of an answer; ids are one number or one per example.

    >>> answer_probability(0)(torch.zeros(1, 4), torch.tensor([0]))
    tensor([0.2500])
    """
    return lambda logits, example: token_probability(logits, _of(correct, example))


def kl_from(reference: Tensor) -> Metric:
    """The metric KL(reference || patched) in nats, from the reference run's logits (B, V)."""
    return lambda logits, example: kl_divergence(logits, reference[example])


def _of(ids: Ids, example: Tensor) -> Tensor:
    """The ids of some examples: one for all of them, or each its own."""
    index, last = torch.as_tensor(ids, device=example.device), int(example.max()) if len(example) else -1
    if index.is_floating_point() or index.ndim > 1 or (index.ndim == 1 and last >= len(index)):
        raise ValueError(
            f"expected a token id, or one for each of the {last + 1} examples, got {index.dtype} of shape {tuple(index.shape)}."
        )
    return index[example] if index.ndim else index
