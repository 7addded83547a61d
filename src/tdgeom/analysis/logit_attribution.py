"""Logits as sums of what layers, components, heads or neurons add to them, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.model.calls.inputs_of_text import inputs_of_text
from tdgeom.model.calls.site_hooks import edits_open
from tdgeom.model.lens.answer_tokens import Answers, answer_tokens
from tdgeom.model.lens.contributions import DETAILS, Contributions, contributions
from tdgeom.model.positions import Positions

__all__ = ["logit_attribution"]


@answer_guesses
def logit_attribution(
    model: nn.Module,
    batch: Mapping[str, Tensor] | TensorDictBase | str | Sequence[str],
    answers: Answers,
    by: str = "component",
    *,
    tokenizer: Any = None,
    positions: Positions = "last",
    per_text: bool | None = None,
) -> pd.DataFrame:
    """Direct logit attribution: what each part of the model adds to the logit of an answer (Elhage et al. 2021).

    With the statistics of its norms held at what they were in the pass, a model is linear from what its parts add to the
    stream to its logits: a part c adds (c scaled by the norm) · W_U[answer]. Where norms stand in the stream itself, behind
    each part (the small OPT, BERT-like decoders), parts go on through them. Logits are those before soft-capping. That the
    parts add up is checked: to what each block gives, to what the final norm reads, and to the logits.

    Args:
        model: a model with logits for every position, on top of blocks: causal, encoder-decoder, of images and texts.
        batch: its inputs; with a ``tokenizer`` a text or a list of texts.
        answers: a token's id, a word (with ``tokenizer``), or a tuple of two, the first's logit less the second's (each one
            token, or a list or tensor of one for each text); a list of several of these; a tensor or array of ids (B,), one for
            each text, or (B, A).
        by: ``"layer"``, what a block adds; ``"component"``, its ``attn_output``, ``cross_attn_output``, ``mlp_output``;
            ``"head"``, the heads of its attention, the projection's bias apart; ``"neuron"``, the neurons of its MLP (an MLP of
            experts stays one component).
        tokenizer: for answers and batches of text.
        positions: at which positions logits are read; default the last of each text.
        per_text: True, a list in ``answers`` holds one for each text; False, all of them are asked of every text. Needed
            where a list is as long as there are texts.

    Returns a table with a row for each text, position, answer and part, in the order of the model: ``text``, ``position``
    (counted over attended tokens), ``answer``, ``component``, ``kind`` (``embed``, which includes positions, ``layer``,
    ``attn_output``, ``mlp_output``, ``head``, ``neuron``, ``between_blocks`` for what enters the stream there, and ``bias``:
    of the final norm, the unembedding, norms in the stream, and where heads or neurons are asked of their projection),
    ``layer``, the number of the ``head`` or ``neuron``, ``contribution``; ``logit``, which the contributions of one text,
    position and answer add up to; ``model_logit``, the model's own, another one only behind a soft cap. ``table.attrs`` has
    ``soft_cap`` (or None) and ``largest_difference`` of a sum from its logit.

    Inside an ``Intervene`` it is the edited pass that is taken apart: what edits put into a part, or leave of it, is that part's
    contribution; an edit of the stream belongs to its layer, or to ``between_blocks``. Where it is a share of no part, it is
    refused.

    Raises ``ValueError`` where the parts do not add up, with where: a head with an activation in it (BERT's masked language
    model), a block that scales its stream; for pooling heads, unknown words, answers of more than one token.

    >>> import transformers
    >>> config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    >>> model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.tensor([[3, 4, 5]])
    >>> table = logit_attribution(model, {"input_ids": ids}, answers=7)
    >>> list(table["component"])
    ['embed', 'attn_output.0', 'mlp_output.0', 'attn_output.1', 'mlp_output.1', 'bias:final_norm', 'bias:unembedding']
    >>> bool(abs(table["contribution"].sum() - model(ids).logits[0, -1, 7].item()) < 1e-5)
    True
    """
    if by not in DETAILS:
        raise ValueError(f"by= expects one of {', '.join(DETAILS)}, got {by!r}.")
    inputs = inputs_of_text(model, batch, tokenizer, "logit_attribution")
    first = next((v for v in inputs.values() if isinstance(v, Tensor) and v.ndim), None)
    texts = next((len(inputs[k]) for k in ("decoder_input_ids", "input_ids") if k in inputs.keys()), None)
    texts = (0 if first is None else len(first)) if texts is None else texts
    if not texts or not all(v.numel() for k, v in inputs.items() if str(k).endswith("input_ids")):
        raise ValueError(
            "logit_attribution was given no text, or texts without a token: there is no logit to read."
        )
    ids, weights, names = answer_tokens(answers, texts, tokenizer=tokenizer, per_text=per_text)
    try:
        found = contributions(model, inputs, ids, weights, by=by, positions=positions)
    except ValueError as error:
        if not edits_open(model):
            raise
        raise ValueError(
            f"{error} An Intervene is open on the model: what an edit changes behind a part is a share of no part. Remedy: "
            "leave the with block, or by='layer'."
        ) from error
    return _table(found, names, by)


def _table(found: Contributions, names: list[list[str]], by: str) -> pd.DataFrame:
    unit = by if by in ("head", "neuron") else None
    columns: dict[str, list] = {"component": [], "kind": [], "layer": [], "unit": []}
    values: list[Tensor] = []  # (N, A, parts)
    for part in found.parts:
        count = 1 if part.values.ndim == 2 else part.values.shape[-1]
        split = part.values.ndim == 3
        columns["component"] += [f"{part.component}[{i}]" if split else part.component for i in range(count)]
        columns["kind"] += [part.kind] * count
        columns["layer"] += [part.layer] * count
        columns["unit"] += list(range(count)) if split else [None]
        values.append(part.values.reshape(*part.values.shape[:2], count))
    each = torch.cat(values, -1).cpu()
    rows, answers, parts = each.shape
    text = found.rows[:, 0].cpu().numpy()
    said = np.array([names[int(t)] for t in text], dtype=object).reshape(-1)
    repeated = lambda listed: np.tile(np.array(listed, dtype=object), rows * answers)
    whole = lambda logits: np.repeat(logits.double().cpu().numpy().reshape(-1), parts)
    table = pd.DataFrame(
        {
            "text": np.repeat(text, answers * parts),
            "position": np.repeat(found.ranks.cpu().numpy(), answers * parts),
            "answer": np.repeat(said, parts),
            "component": repeated(columns["component"]),
            "kind": repeated(columns["kind"]),
            "layer": pd.array(repeated(columns["layer"]), dtype="Int64"),
            **({unit: pd.array(repeated(columns["unit"]), dtype="Int64")} if unit else {}),
            "contribution": each.numpy().reshape(-1),
            "logit": whole(found.logits),
            "model_logit": whole(found.model_logits),
        }
    )
    table.attrs = {"soft_cap": found.cap, "largest_difference": found.difference}
    return table
