"""The hidden representations that profiles over depth look at."""

from __future__ import annotations

from torch import nn

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.model.calls.checked_sites import available_sites

__all__ = ["hidden_state_sites"]


@answer_guesses
def hidden_state_sites(model: nn.Module) -> list[str]:
    """The normalised input of every block and what the last block hands on: one site more than there are blocks.

    ``attn_input`` of each block, then ``final_norm``; a stack without one (BERT normalises at the end of each block)
    ends in its last ``residual_output``. In an encoder-decoder the stacks follow one another.

    As in Valeriani et al. (2023), The geometry of hidden representations of large transformer models.

    Raises:
        ValueError: no block with an attention input.

        >>> from transformers import GPT2Config, GPT2Model
        >>> hidden_state_sites(GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11)))
        ['attn_input.0', 'attn_input.1', 'final_norm']
    """
    found = [entry.site for entry in available_sites(model)]
    sites: list[str] = []
    for stack in dict.fromkeys(site.stack for site in found if site.kind == "attn_input"):
        own = [site for site in found if site.stack == stack]
        inputs = [site for site in own if site.kind == "attn_input"]
        last = [site for site in own if site.kind == "final_norm"] or [
            site for site in own if site.kind == "residual_output"
        ]
        sites += [str(site) for site in (*inputs, *last[-1:])]
    if not sites:
        kinds = sorted({site.kind for site in found})
        raise ValueError(
            f"{type(model).__name__} has no 'attn_input' site, so its hidden states cannot be listed; it has {kinds}. Name the "
            f"sites yourself, such as sites='residual_input'."
        )
    return sites
