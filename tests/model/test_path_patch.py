"""A path patch against hand-written passes: the sender's share exchanged in front of the receiver's norm, all else as it was."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import transformers as tf
from tensordict import TensorDict

import models
import tdgeom as tg

HEADS = 4
GPT2 = dict(
    block="transformer.h.{}", o="attn.c_proj", q="attn.c_attn", k="attn.c_attn", v="attn.c_attn", first="ln_1", second="ln_2",
    mlp="mlp", down="mlp.c_proj", end="transformer.ln_f", fused="whole",
)  # fmt: skip
LLAMA = dict(
    block="model.layers.{}", o="self_attn.o_proj", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
    first="input_layernorm", second="post_attention_layernorm", mlp="mlp", down="mlp.down_proj", end="model.norm",
)  # fmt: skip
NEOX = dict(
    block="gpt_neox.layers.{}", o="attention.dense", q="attention.query_key_value", k="attention.query_key_value",
    v="attention.query_key_value", first="input_layernorm", second="post_attention_layernorm", mlp="mlp",
    down="mlp.dense_4h_to_h", end="gpt_neox.final_layer_norm", fused="head", beside=True,
)  # fmt: skip
GEMMA2 = {**LLAMA, "second": "pre_feedforward_layernorm", "behind": "post_attention_layernorm"}
FIRST = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "gpt_neox": NEOX,
    "gpt_neox_sequential": {**NEOX, "beside": False},
    "gemma2": GEMMA2,
}
SENDER = 1  # a head of layer 0


def prompts():
    clean = models.text_batch()["input_ids"]
    other = clean.clone()
    other[:, 1], other[:, 4] = clean[:, 2], (clean[:, 4] + 3) % 40 + 3
    return clean, other


def watched(model, ids, **more):
    """What every module took first and gave first."""
    seen = {}

    def keep(path):
        def hook(module, args, kwargs, output):
            given = args[0] if args else next(iter(kwargs.values()))
            gave = output[0] if isinstance(output, tuple) else output
            if isinstance(given, torch.Tensor) and isinstance(gave, torch.Tensor):
                seen[path] = given.clone(), gave.clone()

        return hook

    with ExitStack() as stack, torch.no_grad():
        for path, module in model.named_modules():
            stack.callback(module.register_forward_hook(keep(path), with_kwargs=True).remove)
        model(input_ids=ids, **more)
    return seen


def columns(model, arch, kind, head):
    """Where a head's query, key or value lies in what its projection gives, and where its share lies in the input of o."""
    width = model.get_submodule(f"{arch['block'].format(0)}.{arch['o']}").weight
    size = width.shape[0 if isinstance(model, tf.GPT2LMHeadModel) else 1] // HEADS
    place = {"q": 0, "k": 1, "v": 2}.get(kind, 0)
    if kind == "z" or "fused" not in arch:
        shared = getattr(model.config, "num_key_value_heads", HEADS) or HEADS
        index = head // (HEADS // shared) if kind in ("k", "v") else head
        return slice(index * size, (index + 1) * size)
    start = (place * HEADS + head) * size if arch["fused"] == "whole" else (3 * head + place) * size
    return slice(start, start + size)


def by_hand(model, arch, receiver):
    """Logits with the sender's share of the receiver's input exchanged."""
    clean, other = prompts()
    at = lambda layer, name: f"{arch['block'].format(layer)}.{arch[name]}"
    module = model.get_submodule
    mine, theirs = watched(model, clean), watched(model, other)
    z = mine[at(0, "o")][0]
    patched = z.clone()
    own = columns(model, arch, "z", SENDER)
    patched[..., own] = theirs[at(0, "o")][0][..., own]
    behind = module(at(0, "behind")) if "behind" in arch else lambda x: x
    kind, layer, head = receiver
    with torch.no_grad():
        change = behind(module(at(0, "o"))(patched)) - behind(module(at(0, "o"))(z))
        if kind == "final_norm":
            taken = mine[arch["end"]][0] + change
            logits = model.get_output_embeddings()(module(arch["end"])(taken))
            cap = getattr(model.config, "final_logit_softcapping", None)
            return cap * torch.tanh(logits / cap) if cap else logits
        stream = mine[arch["block"].format(layer)][0]
        if kind == "mlp_input":
            added = mine[at(layer, "behind" if "behind" in arch else "o")][1]
            stream = stream if arch.get("beside") else stream + added
            new = module(at(layer, "second"))(stream + change)
            handle = module(at(layer, "mlp")).register_forward_pre_hook(lambda m, args: (new,))
        else:
            place = columns(model, arch, kind, head)
            new = module(at(layer, kind))(module(at(layer, "first"))(stream + change))

            def hook(m, args, output):
                output = output.clone()
                output[..., place] = new[..., place]
                return output

            handle = module(at(layer, kind)).register_forward_hook(hook)
        try:
            return model(input_ids=clean).logits
        finally:
            handle.remove()


def patched(model, receiver, through="residual"):
    clean, other = prompts()
    donor = tg.Capture(model, "z.0")(TensorDict({"input_ids": other}))
    kind, layer, head = receiver
    edit = tg.PathPatch(
        {"z.0": tg.Patch(donor, heads=[SENDER])}, heads=None if head is None else [head], through=through
    )
    site = kind if layer is None else f"{kind}.{layer}"
    return tg.Intervene(model, {site: edit})(TensorDict({"input_ids": clean}))["logits"]


@pytest.mark.parametrize("name", list(FIRST))
def test_every_receiver_is_what_a_hand_written_pass_gives(name):
    model = models.TEXT_MODELS[name]().double()
    with torch.no_grad():
        base = model(input_ids=prompts()[0]).logits
    every = [("q", 2, 3), ("k", 2, 0), ("v", 1, 2), ("mlp_input", 2, None), ("final_norm", None, None)]
    every += [] if FIRST[name].get("beside") else [("mlp_input", 0, None)]
    for receiver in every:
        found, expected = patched(model, receiver), by_hand(model, FIRST[name], receiver)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert (found - base).abs().max() > 1e-7, receiver


def held_by_hand(model, ids, other, sender, held, receiver, **more):
    """The freeze by plain hooks: modules ``held`` give what they gave, a slice of what the sender takes is another run's."""
    mine, theirs = watched(model, ids, **more), watched(model, other, **more)
    (path, own), (target, place), new = sender, receiver, {}

    def take(module, args):
        value = args[0].clone()
        value[..., own] = theirs[path][0][..., own]
        return (value,)

    def keep(module, args, output):
        new["value"] = output.clone()

    def give(module, args, output):
        output = output.clone()
        output[..., place] = new["value"][..., place]
        return output

    module = model.get_submodule
    with torch.no_grad():
        with ExitStack() as stack:
            for name in held:
                stack.callback(module(name).register_forward_hook(lambda m, a, o, n=name: mine[n][1]).remove)
            stack.callback(module(path).register_forward_pre_hook(take).remove)
            stack.callback(module(target).register_forward_hook(keep).remove)
            model(input_ids=ids, **more)
        with ExitStack() as stack:
            stack.callback(module(target).register_forward_hook(give).remove)
            return model(input_ids=ids, **more).logits


def test_norms_in_the_stream_act_on_the_change():
    model = models.bert().double()
    at = "bert.encoder.layer.{}".format
    held = [f"{at(i)}.output.dense" for i in range(3)] + [f"{at(i)}.attention.output.dense" for i in (1, 2)]
    sender = f"{at(0)}.attention.output.dense", slice(4, 8)
    expected = held_by_hand(model, *prompts(), sender, held, (f"{at(2)}.attention.self.key", slice(8, 12)))
    torch.testing.assert_close(patched(model, ("k", 2, 2)), expected, rtol=1e-9, atol=1e-11)


def test_mlps_in_between_may_compute_anew():
    model = models.gpt2().double()
    held = ["transformer.h.1.attn.c_proj", "transformer.h.2.attn.c_proj"]
    own = columns(model, GPT2, "z", SENDER), columns(model, GPT2, "q", 3)
    expected = held_by_hand(
        model,
        *prompts(),
        ("transformer.h.0.attn.c_proj", own[0]),
        held,
        ("transformer.h.2.attn.c_attn", own[1]),
    )
    found = patched(model, ("q", 2, 3), through="mlp")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert (found - patched(model, ("q", 2, 3))).abs().max() > 1e-7


def test_a_head_of_the_encoder_is_sent_to_keys_of_the_decoder():
    model, (clean, other) = models.t5().double(), prompts()
    spoken = {"decoder_input_ids": clean[:, :4].flip(1)}
    held = [
        n
        for n, _ in model.named_modules()
        if n.endswith((".o", ".wo")) and n != "encoder.block.0.layer.0.SelfAttention.o"
    ]
    key = "decoder.block.1.layer.1.EncDecAttention.k"
    sender = "encoder.block.0.layer.0.SelfAttention.o", slice(4, 8)
    expected = held_by_hand(model, clean, other, sender, held, (key, slice(0, 4)), **spoken)
    donor = tg.Capture(model, "encoder.z.0")(TensorDict({"input_ids": other, **spoken}))
    edit = tg.PathPatch({"encoder.z.0": tg.Patch(donor, heads=[1])}, heads=[0])
    found = tg.Intervene(model, {"decoder.cross_k.1": edit})(TensorDict({"input_ids": clean, **spoken}))
    torch.testing.assert_close(found["logits"], expected, rtol=1e-9, atol=1e-11)


def test_padding_and_the_context_form_change_nothing():
    model, (clean, other) = models.llama().double(), prompts()
    donor = tg.Capture(model, "z.0")(TensorDict({"input_ids": other}))
    path = {"z.0": tg.Patch(donor, heads=[SENDER])}
    expected = patched(model, ("k", 2, 0))
    with (
        tg.Intervene(model, {"k.2": tg.PathPatch(path, heads=[0], clean={"input_ids": clean})}),
        torch.no_grad(),
    ):
        torch.testing.assert_close(model(input_ids=clean).logits, expected)
        with pytest.raises(ValueError, match="other tokens than the clean run"):
            model(input_ids=other)
    wide = torch.nn.functional.pad(clean, (2, 0))
    batch = TensorDict({"input_ids": wide, "attention_mask": (wide > 0).long()})
    padded = tg.Intervene(model, {"k.2": tg.PathPatch(path, heads=[0])})(batch)["logits"]
    torch.testing.assert_close(padded[:, 2:], expected, rtol=1e-8, atol=1e-9)


def test_what_cannot_be_sent_is_refused():
    model, (clean, other) = models.gpt2(), prompts()
    donor = tg.Capture(model, ["z", "residual_input"])(TensorDict({"input_ids": other}))
    batch, path = TensorDict({"input_ids": clean}), {"z.1": tg.Patch(donor, heads=[SENDER])}
    for site in ("q.1", "mlp_input.0"):
        with pytest.raises(ValueError, match="nothing of z.1 reaches it along the direct path"):
            tg.Intervene(model, {site: tg.PathPatch(path)})(batch.copy())
    beside = models.TEXT_MODELS["gpt_neox"]()
    edit = tg.PathPatch({"z.1": tg.Ablate(heads=[0])})
    with pytest.raises(ValueError, match="or beside it"):
        tg.Intervene(beside, {"mlp_input.1": edit})(batch.copy())
    with pytest.raises(ValueError, match="a sender is what a part gives"):
        tg.Intervene(model, {"q.2": tg.PathPatch({"residual_input.1": tg.Patch(donor)})})(batch.copy())
    with pytest.raises(ValueError, match="a sender is one place"):
        tg.Intervene(model, {"q.2": tg.PathPatch({"z": tg.Patch(donor)})})(batch.copy())
    with pytest.raises(ValueError, match="clean=inputs"):
        tg.Intervene(model, {"q.2": tg.PathPatch(path)}).__enter__()
    with pytest.raises(ValueError, match="in module form the batch is the clean run"):
        tg.Intervene(model, {"q.2": tg.PathPatch(path, clean={"input_ids": clean})})(batch.copy())
    with pytest.raises(RuntimeError, match="has no run of the path"):
        tg.PathPatch(path)(activation=torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="through= expects"):
        tg.PathPatch(path, through="attention")
    same = tg.Capture(model, "z")(batch.copy())
    with pytest.warns(UserWarning, match="changed nothing there"):
        tg.Intervene(model, {"q.2": tg.PathPatch({"z.1": tg.Patch(same)})})(batch.copy())


def test_a_state_space_block_could_carry_a_change_and_is_refused():
    sizes = dict(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
    )
    mamba = dict(mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4, mamba_chunk_size=4)
    config = tf.BambaConfig(vocab_size=48, pad_token_id=0, attn_layer_indices=[0, 2], **sizes, **mamba)
    model, batch = tf.BambaForCausalLM(config).eval(), TensorDict({"input_ids": prompts()[0]})
    edit = tg.PathPatch({"z.0": tg.Ablate(heads=[0])})
    with pytest.raises(ValueError, match="of layer 1 of BambaForCausalLM do not add up"):
        tg.Intervene(model, {"q.2": edit})(batch)


TOKENS, PLACES = 8, 10


def induction_toy():
    """Two layers of attention whose weights are written by hand: head 0.0 looks at the token before, head 1.1 for what it was.

    The stream holds the token, its place, the token before it and the token predicted, each one-hot in columns of its own.
    """
    token, place, before, said = torch.arange(2 * TOKENS + 2 * PLACES).split([TOKENS, PLACES, TOKENS, PLACES])
    width = 2 * TOKENS + 2 * PLACES
    config = tf.GPT2Config(
        vocab_size=TOKENS, n_positions=PLACES, n_embd=width, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = tf.GPT2LMHeadModel(config).eval().double()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
    inner = model.transformer
    with torch.no_grad():
        inner.wte.weight[range(TOKENS), token] = 1
        inner.wpe.weight[range(PLACES), place] = 1
        half = width // 2

        def head(layer, number, query, key, value, out):
            """Columns of the stream that are read as queries, keys and values, and those that values are written to."""
            attention, start = inner.h[layer].attn, number * half
            for part, columns, size in ((0, query, 6.0), (1, key, 6.0), (2, value, 1.0)):
                attention.c_attn.weight[columns, part * width + start + torch.arange(len(columns))] = size
            attention.c_proj.weight[start + torch.arange(len(out)), out] = 1

        head(0, 0, place[1:], place[:-1], token, before)
        head(1, 1, token, before, token, said[:TOKENS])
        model.lm_head.weight[range(TOKENS), said[:TOKENS]] = 1
    return model


def test_the_path_of_a_hand_written_induction_circuit_is_found():
    """A B C D A is followed by B, since the head of layer 1 looks for what came behind an A: it reads that as its key."""
    model = induction_toy()
    clean, other = torch.tensor([[0, 1, 2, 3, 4, 1]]), torch.tensor([[0, 5, 2, 3, 4, 1]])
    margin = lambda logits: float(
        logits[0, -1, 2] - logits[0, -1].clone().index_fill(0, torch.tensor(2), -9).max()
    )
    batch = TensorDict({"input_ids": clean})
    with torch.no_grad():
        whole, lost = (margin(model(input_ids=ids).logits) for ids in (clean, other))
    assert whole > 0.5 and lost < 0.1
    donor = tg.Capture(model, "z.0")(TensorDict({"input_ids": other}))

    def after(head, site, receivers):
        path = tg.PathPatch({"z.0": tg.Patch(donor, heads=[head])}, heads=receivers)
        return margin(tg.Intervene(model, {site: path})(batch.copy())["logits"])

    assert after(0, "k.1", [1]) < 0.1  # all of the effect goes along this path
    for site, receivers in (("q.1", [1]), ("v.1", [1]), ("k.1", [0]), ("final_norm", None)):
        assert abs(after(0, site, receivers) - whole) < 5e-2
