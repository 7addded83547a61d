"""A model's inputs, from what a user has of them: named tensors, or texts and a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch import nn

from tdgeom.model.calls.input_device import where_inputs_go


def inputs_of_text(model: nn.Module, batch: Any, tokenizer: Any, owner: str) -> TensorDictBase:
    """Inputs by name as a TensorDict; texts through the tokenizer, on the model's device, padded where there are several.

    Raises ``TypeError`` for anything else, ``ValueError`` where the texts, or one of them, are without a token.

    >>> import torch
    >>> ids = torch.tensor([[3, 4]])
    >>> sorted(inputs_of_text(nn.Linear(2, 2), {"input_ids": ids}, None, "logit_attribution").keys())
    ['input_ids']
    """
    if isinstance(batch, TensorDictBase):
        return batch.copy().auto_batch_size_(0)
    if isinstance(batch, Mapping):
        return TensorDict(dict(batch), batch_size=[])
    texts = [batch] if isinstance(batch, str) else list(batch) if isinstance(batch, Sequence) else None
    if texts is not None and not texts:
        raise ValueError(f"{owner} was given no text.")
    if texts is None or not all(isinstance(text, str) for text in texts) or tokenizer is None:
        raise TypeError(
            f"{owner} expects the model's inputs by name, such as {{'input_ids': ids}}, or texts with tokenizer=, got "
            f"{type(batch).__name__}{'' if tokenizer is not None else ' and no tokenizer'}."
        )
    given = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
    lengths = given["attention_mask"].sum(1) if "attention_mask" in given else None
    counts = [given["input_ids"].shape[1]] * len(texts) if lengths is None else lengths.tolist()
    if empty := [text for text, count in zip(texts, counts) if not count]:
        raise ValueError(
            f"{owner}: a text without a token has no place to read or to patch: {empty[:3]} of {len(texts)} texts. Remedy: leave "
            "it out, or a tokenizer that puts a token before every text."
        )
    device = where_inputs_go(model)
    return TensorDict({key: value.to(device) for key, value in given.items()}, batch_size=[])
