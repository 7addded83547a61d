"""Sites under the names that one guesses: those that mean exactly a kind here, and what to write for the others."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import NamedTuple

__all__ = ["Guess", "read_guess"]

# Words of TransformerLens, easyroutine, pyvene and transformers -> the kind that is the same tensor of the same model. (What
# TransformerLens folds into weights changes its model, not what a word means.)
SAME = {
    "resid_pre": "residual_input",
    "resid_mid": "residual_mid",
    "resid_post": "residual_output",
    "resid_in": "residual_input",
    "resid_out": "residual_output",
    "block_input": "residual_input",
    "block_output": "residual_output",
    "attn_out": "attn_output",
    "mlp_out": "mlp_output",
    "attention_input": "attn_input",
    "pattern": "attn_pattern",
    "attentions": "attn_pattern",
    "cross_attentions": "cross_attn_pattern",
    "result": "head_output",
    "rot_q": "q_rotary",
    "head_query_output": "q",
    "head_attention_value_output": "z",
    "mlp.post": "mlp_act",
    "cross.z": "cross_z",
    "cross.q": "cross_q",
    "cross.k": "cross_k",
    "cross.v": "cross_v",
    "cross.pattern": "cross_attn_pattern",
    "cross.attn_scores": "cross_attn_scores",
    "cross.result": "cross_head_output",
    "cross_attn_out": "cross_attn_output",
}

_NORM_MEANT = "'attn_norm' and 'mlp_norm' are what the norms give, weights included ('attn_input', 'mlp_input' where it is read)"
_OUTPUT = "is an output of the model and no place in it: Capture(model, ..., model_outputs='{word}') brings it along"
# what an answer says of a model, where no model is at hand
_UNKNOWN = {
    "token_embedding": "its module, 'module_output:<path>'",
    "position_embedding": "its module, 'module_output:<path>'",
    "head": "'module_output:<path>'",
    "last": "the last norm gives, 'final_norm' (where there is none, 'residual_output' of the last block)",
    "all": "['residual_input', 'final_norm']",
}
# Words that are near to something here, and not the same.
OTHERS = {
    "hook_embed": "is the embedding of the tokens alone; 'embed' is the input of the first block. Write {token_embedding}",
    "hook_pos_embed": "is the embedding of the positions alone. Write {position_embedding}",
    "pos_embed": "is the embedding of the positions alone. Write {position_embedding}",
    "embeddings": "could be the input of the first block, 'embed', or the embedding of the tokens alone, {token_embedding}",
    "input_embeddings": "is the embedding of the tokens alone, {token_embedding}; 'embed' is the input of the first block",
    "inputs_embeds": "is the embedding of the tokens alone, {token_embedding}; 'embed' is the input of the first block",
    "normalized": f"is what a norm computes before its weights, or with them, as TransformerLens has folded; {_NORM_MEANT}",
    "resid_in_post_layernorm": "is what attention reads, 'attn_input'",
    "ln_final.normalized": "is the last norm before or with its weights, as TransformerLens has folded; 'final_norm' is what it "
    "gives, weights included",
    "ln_final": "is the norm after the last block, 'final_norm'",
    "last_layernorm": "is the norm after the last block, 'final_norm'",
    "scale": f"lies inside a norm, where nothing is read; {_NORM_MEANT}",
    "hook_attn_in": "is the stream before its norm, 'residual_input'; 'attn_input' is what attention reads behind the norm",
    "hook_mlp_in": "is the stream before its norm, 'residual_mid'; 'mlp_input' is what the MLP reads behind the norm",
    "attn_in": "is 'attn_input' where what attention reads is meant, and 'residual_input' for the stream before its norm",
    "mlp_in": "is 'mlp_input' where what the MLP reads is meant, and 'residual_mid' for the stream before its norm",
    "q_input": "is the stream before its norm, 'residual_input'; 'attn_input' is what attention reads behind the norm",
    "k_input": "is the stream before its norm, 'residual_input'; 'attn_input' is what attention reads behind the norm",
    "v_input": "is the stream before its norm, 'residual_input'; 'attn_input' is what attention reads behind the norm",
    "rot_k": "has a key for each key/value head; 'k_rotary' has each query head's own (the same where none are shared)",
    "mlp.pre": "is what the MLP's first projection gives: write its module, 'module_output:<path>'; 'mlp_act' are the neurons, "
    "behind the activation",
    "mlp.pre_linear": "is what the MLP's other projection gives: write its module, 'module_output:<path>'; 'mlp_act' are the "
    "neurons",
    "post": "is 'mlp_act', the neurons, where mlp.hook_post is meant",
    "unembed": "gives the logits: Capture(model, ..., model_outputs='logits') brings them along; the module is {head}",
    "mlp_activation": "is the activation function's own output; 'mlp_act' are the neurons, what the MLP's last projection reads",
    "attention_output": "is 'attn_output', what is added to the stream, norms behind it included; the module's own output "
    "is 'module_output:<path>'",
    "attention_value_output": "is 'z', which has an axis of heads",
    "query_output": "is 'q', which has an axis of heads",
    "key_output": "is 'k', which has an axis of heads",
    "value_output": "is 'v', which has an axis of heads",
    "values": "are 'v', by key/value head, or what the heads give, 'z'",
    "head_out": "is 'head_output', each head's share of what attention adds, or 'z' before the projection",
    "hidden_states": "are several kinds: 'residual_input' of every block and, last, what {last}. Write sites={all}",
    "hidden_state": "is 'residual_input' before a block, 'residual_output' behind it",
    "last_hidden_state": "is what {last}; or, as an output of the model, Capture(model, ..., model_outputs='last_hidden_state')",
    "pooler_output": _OUTPUT,
    "logits": _OUTPUT,
    "loss": _OUTPUT,
    "past_key_values": "are keys and values as cached: 'k' and 'v' as projected, 'k_rotary' as multiplied",
    "residual_stream": "is 'residual_input' before a block, 'residual_output' behind it",
    "residual": "is 'residual_input' before a block, 'residual_output' behind it, 'residual_mid' between attention and MLP",
    "resid": "is 'residual_input' before a block, 'residual_output' behind it, 'residual_mid' between attention and MLP",
    "stream": "is 'residual_input' before a block, 'residual_output' behind it",
    "block": "is 'residual_input' before it, 'residual_output' behind it",
    "layer": "is 'residual_input' before a block, 'residual_output' behind it",
    "attn": "is 'attn_output', what is added to the stream, 'attn_input' or 'attn_pattern'",
    "attention": "is 'attn_output', what is added to the stream, 'attn_input' or 'attn_pattern'",
    "self_attn": "is 'attn_output', what is added to the stream, 'attn_input' or 'attn_pattern'",
    "mlp": "is 'mlp_output', what is added to the stream, 'mlp_input' or 'mlp_act'",
    "head": "is 'head_output', a head's share of what attention adds, or 'z' before the projection",
    "heads": "are 'head_output', a head's share of what attention adds, or 'z' before the projection",
    "neurons": "are 'mlp_act'",
    "queries": "are 'q', and 'q_rotary' as they are multiplied",
    "keys": "are 'k', and 'k_rotary' as they are multiplied",
}  # fmt: skip
_ALSO = {"blocks": "block", "layers": "layer", "h": "layer", "embedding": "embeddings", "ln_f": "ln_final",
         "final_layernorm": "ln_final", "attn_weights": "attention", "attention_weights": "attention"}  # fmt: skip
# parts of a path in front of the word: they say which block, and nothing of the place in it
_HOLDERS = frozenset(
    {"model", "base_model", "transformer", "gpt_neox", "blocks", "block", "layers", "layer", "h"}
)
_BRANCHES = {"attn": "", "self_attn": "", "attention": "", "mlp": "mlp.", "cross_attn": "cross.", "ln1": "ln1.", "ln2": "ln2.",
             "ln_final": "ln_final."}  # fmt: skip
_SIDES = frozenset({"encoder", "decoder"})


class Guess(NamedTuple):
    """What a guessed name stands for: a site's name, or an answer; and the word that was meant, with its stack and layer."""

    site: str | None
    answer: str | None
    word: str
    stack: str | None = None
    layer: int | None = None

    def said(self, **known: str) -> str:
        """The answer, with what is known of a model in it: the paths of its embeddings, what its last block is followed by."""
        return "" if self.answer is None else self.answer.format_map({**_UNKNOWN, **known, "word": self.word})


def read_guess(name: str, kinds: Collection[str]) -> Guess:
    """What a name that is no site may mean. ``kinds`` are those there are.

    >>> read_guess("blocks.3.attn.hook_z", ["z"]).site, read_guess("Residual-Input_2", ["residual_input"]).site
    ('z.3', 'residual_input.2')
    >>> read_guess("residual_inputs.2", ["residual_input"]).answer
    "Did you mean 'residual_input.2'?"
    """
    stack, branch, word, layer = _parts(name)
    place = "" if layer is None else f".{layer}"
    side = f"{stack}." if stack else ""

    def spelled(kind: str) -> str:
        return side + kind + ("" if kind in ("embed", "final_norm") else place)

    numbered = re.fullmatch(r"(?:hook_)?([a-z_]+)(\d+)", word)  # resid_pre5
    if numbered and layer is None and (numbered[1] in SAME or numbered[1] in kinds):
        word, layer, place = numbered[1], int(numbered[2]), f".{numbered[2]}"
    plain = word.removeprefix("hook_").removeprefix("extract_")
    readings = [branch + word, word, branch + plain, plain]
    readings = list(dict.fromkeys([*readings, *(_ALSO[one] for one in readings if one in _ALSO)]))
    for reading in readings:
        known = Guess(None, None, reading, stack, layer)
        if reading in OTHERS:
            return known._replace(answer=f"{reading} {OTHERS[reading]}.")
        if reading in SAME and SAME[reading] in kinds:
            return known._replace(site=spelled(SAME[reading]))
        if reading in kinds and branch != "mlp." and ":" not in name:
            return known._replace(site=spelled(reading))
    if plain in _SIDES or not plain:
        return Guess(None, None, plain, stack, layer)
    near = get_close_matches(plain, kinds, n=1, cutoff=0.7) or get_close_matches(
        plain, SAME, n=1, cutoff=0.85
    )
    answer = f"Did you mean {spelled(SAME.get(near[0], near[0]))!r}?" if near else None
    return Guess(None, answer, plain, stack, layer)


def _parts(name: str) -> tuple[str | None, str, str, int | None]:
    """The stack, the branch, the word and the layer of a name, however it is written.

    >>> _parts("blocks.0.mlp.hook_post"), _parts("encoder_hidden_states[3]"), _parts("resid_out_2")
    ((None, 'mlp.', 'hook_post', 0), ('encoder', '', 'hidden_states', 3), (None, '', 'resid_out', 2))
    """
    text = re.sub(r"\s+", "_", name.strip())
    text = re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z])", "_", text)
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text).lower()  # ResidualInput
    text = re.sub(r"[\[/:]?\[?(-?\d+)\]", r".\1", text)
    text = re.sub(r"(?<=[a-z])[_:/](-?\d+)$", r".\1", text)
    steps = [step for step in re.split(r"[./]", text) if step]
    numbers = [step for step in steps if re.fullmatch(r"-?\d+", step)]
    layer = int(numbers[0]) if len(numbers) == 1 else None
    words: Sequence[str] = [step for step in steps if step not in numbers]
    if len(numbers) > 1 or not words:
        return None, "", "", layer
    *before, word = words
    stack = next((step for step in before if step in _SIDES), None)
    if match := re.fullmatch(r"(encoder|decoder)_(.+)", word):
        stack, word = match.groups()
    before = [step for step in before if step not in _HOLDERS and step not in _SIDES]
    if any(step not in _BRANCHES for step in before):
        return stack, "", "", layer
    return stack, _BRANCHES[before[-1]] if before else "", word, layer
