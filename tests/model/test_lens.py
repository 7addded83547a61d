"""The lens at the last layer is the model; at other layers it is what the model's own tail makes of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn

import models
import tdgeom as tg
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene
from tdgeom.model.lens.logit_lens import LogitLens, lens_measures, logit_lens
from tdgeom.model.lens.tuned_lens import TunedLens
from tdgeom.model.structure.blocks import find_stacks

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
HEADS = [name for name in models.TEXT_MODELS if not name.endswith("_bare")]
LAST = models.DEPTH - 1


def cohere():
    config = tf.CohereConfig(**models._LLAMA, logit_scale=0.3)
    return models._seeded(tf.CohereForCausalLM, config)


def untied_softcapped():
    return models._seeded(
        tf.Gemma2ForCausalLM,
        tf.Gemma2Config(**models._GEMMA, tie_word_embeddings=False, final_logit_softcapping=2.0),
    )


def granite_scaled():
    return models._seeded(tf.GraniteForCausalLM, tf.GraniteConfig(**models._LLAMA, logits_scaling=3.0))


MORE = {"cohere": cohere, "untied_softcapped": untied_softcapped, "granite_scaled": granite_scaled}


def clean(model):
    return not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules()
    )


@pytest.mark.parametrize("name", [*HEADS, *MORE])
def test_the_last_layer_gives_the_model_s_logits(name):
    model, batch = {**models.TEXT_MODELS, **MORE}[name](), models.text_batch()
    with torch.no_grad():
        expected = model(**batch).logits
    out = logit_lens(model, batch, outputs=["logits", "kl"])
    torch.testing.assert_close(
        out["lens", f"residual_output.{LAST}", "logits"], expected, rtol=1e-4, atol=1e-5
    )
    kl = torch.stack([out["lens", f"residual_output.{i}", "kl"] for i in range(models.DEPTH)])
    assert kl[LAST].abs().max() < 1e-5
    assert kl[0].mean() > 1e-3
    assert clean(model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bert"])
def test_an_inner_layer_is_the_model_with_later_blocks_left_out(name):
    """The reference replaces the last block's output by the layer's with a plain hook."""
    model, batch = models.TEXT_MODELS[name](), models.text_batch()
    acts = Capture(model, "residual_output.0")(TensorDict(batch))["acts", "residual_output.0"]
    last = find_stacks(model)[0].blocks[-1].module
    put = lambda m, a, o: (acts, *o[1:]) if isinstance(o, tuple) else acts
    handle = last.register_forward_hook(put)
    with torch.no_grad():
        expected = model(**batch).logits
    handle.remove()
    lens = LogitLens(model, outputs="logits")
    torch.testing.assert_close(lens(acts=acts), expected, rtol=1e-4, atol=1e-5)
    rows = lens(acts=acts.flatten(0, 1)[5:9])  # rows, one by one
    torch.testing.assert_close(rows, expected.flatten(0, 1)[5:9], rtol=1e-4, atol=1e-5)
    chunked = LogitLens(model, outputs=["entropy"], chunk=4)(acts=acts)
    torch.testing.assert_close(chunked, lens_measures(expected, ["entropy"])["entropy"], rtol=1e-4, atol=1e-5)


def test_by_hand_on_llama_and_without_the_norm():
    model, x = models.llama(), torch.randn(2, 3, models.WIDTH)
    with torch.no_grad():
        normed = model.lm_head(model.model.norm(x))
        plain = model.lm_head(x)
    torch.testing.assert_close(LogitLens(model, outputs="logits")(acts=x), normed)
    torch.testing.assert_close(LogitLens(model, outputs="logits", apply_norm=False)(acts=x), plain)
    with pytest.raises(ValueError, match="no final norm"):
        LogitLens(models.bert(), outputs="logits", apply_norm=False)(acts=x)


def test_pooling_heads_and_two_stacks():
    vit = models.vit()
    out = logit_lens(vit, {"pixel_values": IMAGES}, outputs=["logits"])
    with torch.no_grad():
        expected = vit(pixel_values=IMAGES).logits
    torch.testing.assert_close(out["lens", f"residual_output.{LAST}", "logits"], expected)
    with pytest.raises(ValueError, match="whole sequences"):
        LogitLens(vit, outputs="logits")(acts=torch.randn(3, models.WIDTH))
    t5 = models.t5()
    batch = {**models.text_batch(), "decoder_input_ids": models.text_batch()["input_ids"][:, :4]}
    out = logit_lens(t5, batch, sites="decoder.residual_output", outputs=["logits"])
    with torch.no_grad():
        expected = t5(**batch).logits
    read = out["lens", f"decoder.residual_output.{LAST}", "logits"]
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)
    shared = tf.AlbertForMaskedLM(models.albert().config).eval()
    out = logit_lens(shared, models.text_batch(), outputs=["logits"])
    with torch.no_grad():
        expected = shared(**models.text_batch()).logits
    torch.testing.assert_close(
        out["lens", f"residual_output.{LAST}", "logits"], expected, rtol=1e-4, atol=1e-5
    )


def _llava():
    text = {**models._LLAMA, "model_type": "llama", "num_hidden_layers": 2}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    vision |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5, image_token_id=5)
    return models._seeded(tf.LlavaForConditionalGeneration, config)


def _qwen2_vl():
    text = {
        **models._LLAMA,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 1e4},
    }
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": models.WIDTH, "num_heads": 2, "patch_size": 4}
    config = tf.Qwen2VLConfig(text_config=text, vision_config={**vision, "mlp_ratio": 2}, image_token_id=5)
    return models._seeded(tf.Qwen2VLForConditionalGeneration, config)


def _images(name, length=9):
    """A batch of two texts with an image each: four tokens of patches."""
    ids = torch.randint(10, models.VOCAB, (2, length), generator=torch.Generator().manual_seed(3))
    ids[:, 1:5] = 5
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(4))
    if name == "llava":
        return {**batch, "pixel_values": draw(2, 3, 8, 8)}
    patches = draw(2 * 16, 3 * 2 * 16)
    more = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (ids == 5).int()}
    return {**batch, "pixel_values": patches, **more}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_models_of_images_and_texts(name):
    """The language model is what the head reads, whatever is registered first; images change nothing about that."""
    model, depth = {"llava": _llava, "qwen2_vl": _qwen2_vl}[name](), {"llava": 2, "qwen2_vl": 3}[name]
    last = f"language_model.residual_output.{depth - 1}"
    for batch in (models.text_batch(2), _images(name)):
        with torch.no_grad():
            expected = model(**batch).logits
        for sites in ("residual_output", "language_model.residual_output"):
            out = logit_lens(model, batch, sites=sites, outputs=["logits"])["lens"]
            assert len(out.keys()) == depth
            torch.testing.assert_close(out[last, "logits"], expected, rtol=1e-4, atol=1e-5)
        table = tg.logit_attribution(model, batch, 9, by="head")
        sums = torch.tensor(table.groupby("text")["contribution"].sum().to_numpy()).float()
        torch.testing.assert_close(sums, expected[:, -1, 9], rtol=0, atol=1e-5)
    sites = tg.Capture(model, "language_model.residual_output").sites
    tuned, plain = (
        tg.TunedLens(model, sites, outputs=["kl"]),
        logit_lens(model, batch, outputs=["kl"])["lens"],
    )
    capture = Capture(model, sites, model_outputs="logits")
    untrained = tuned(capture(TensorDict(batch, batch_size=[])))["lens"]
    torch.testing.assert_close(untrained[sites[0], "kl"], plain[sites[0], "kl"], rtol=1e-4, atol=1e-5)
    losses = tuned.fit([TensorDict(batch, batch_size=[])], steps=15, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    other = next(s for s in tg.available_sites(model) if s.site.stack != "language_model").site
    with pytest.raises(ValueError, match="reads the stack 'language_model'.*is of another"):
        logit_lens(model, batch, sites=str(other))
    with pytest.raises(ValueError, match="example= was given for .*whose inputs are made up"):
        LogitLens(model, example=batch)


def test_a_model_whose_inputs_nobody_can_make_up():
    """A head over blocks that take features: the example is what the lens runs the model on."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(2)
            )
            self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 4)

        def forward(self, features):
            for layer in self.layers:
                features = features + layer(features)
            return self.out(self.norm(features))

    class Block(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.mlp = inner

        def forward(self, features):
            return features + self.mlp(features)

    torch.manual_seed(0)
    model = Head()
    model.layers = nn.ModuleList(map(Block, model.layers))
    model.forward = lambda features: model.out(model.norm(model.layers[1](model.layers[0](features))))
    x = torch.randn(3, 5, 6)
    with pytest.raises(ValueError, match="cannot make up inputs for it. Remedy: example="):
        LogitLens(model)
    for example in (x, x[:1, :2]):  # of whatever size
        lens = LogitLens(model, outputs="logits", example={"features": example})
        acts = model.layers[1](model.layers[0](x)).detach()
        torch.testing.assert_close(lens(acts=acts), model(x).detach())


def test_a_tuned_lens_of_a_decoder_counts_the_decoder_s_tokens():
    """Its loss is the mean over what the decoder attends to, whose padding is another than the encoder's."""
    t5, ids = models.t5(), models.text_batch()["input_ids"]
    batch = {**models.text_batch(), "decoder_input_ids": ids[:, :4]}
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 0]] * 3)
    sites = [f"decoder.residual_output.{LAST - 1}"]
    lens = TunedLens(t5, sites, outputs=["kl"])
    td = Capture(t5, sites, model_outputs="logits")(TensorDict(batch))
    kl = lens(td)["lens", sites[0], "kl"]
    torch.testing.assert_close(lens.loss(td).detach(), kl[:, :3].mean(), rtol=1e-4, atol=1e-6)
    assert set(logit_lens(t5, batch)["lens"].keys()) == {
        f"decoder.residual_output.{i}" for i in range(models.DEPTH)
    }


def test_measures():
    logits, final = torch.randn(4, 6), torch.randn(4, 6)
    out = lens_measures(
        logits,
        ["probabilities", "top_tokens", "top_probabilities", "entropy", "kl"],
        final=final,
        top=3,
    )
    p, q = final.softmax(-1), logits.softmax(-1)
    torch.testing.assert_close(out["kl"], (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(out["entropy"], torch.distributions.Categorical(logits=logits).entropy())
    assert torch.equal(out["top_tokens"], logits.argsort(-1, descending=True)[:, :3])
    torch.testing.assert_close(out["top_probabilities"], q.gather(-1, out["top_tokens"]))
    one = lens_measures(logits, ["logit_diff", "accuracy"], directions=[2, 5])
    assert torch.equal(one["logit_diff"], logits[:, [2, 5]])
    assert torch.equal(one["accuracy"][:, 0], (logits.argmax(-1) == 2).float())
    pairs = lens_measures(logits, ["logit_diff", "accuracy"], directions=[(2, 5)])
    assert torch.equal(pairs["logit_diff"][:, 0], logits[:, 2] - logits[:, 5])
    assert torch.equal(pairs["accuracy"][:, 0], (logits[:, 2] > logits[:, 5]).float())
    half = lens_measures(torch.tensor([12.0, 0.0]).half(), ["entropy"])["entropy"]
    assert half.dtype == torch.float32
    assert 0 < half < 1e-3
    with pytest.raises(ValueError, match="needs directions="):
        lens_measures(logits, ["accuracy"])
    with pytest.raises(ValueError, match="'kl' needs the model's own logits"):
        lens_measures(logits, ["kl"])


def test_in_a_pipeline_and_inside_contexts():
    model, batch = models.llama(), TensorDict(models.text_batch())
    capture = Capture(model, "residual_output", model_outputs="logits")
    lens = LogitLens(model, outputs=["top_tokens", "kl"], top=2)
    pipeline = TensorDictSequential(capture, tg.ForEach(lens, capture.sites))
    td = pipeline(batch.copy())
    assert td["lens", "residual_output.1", "top_tokens"].shape == (3, 7, 2)
    assert list(pipeline.parameters()) == []
    # the edits of a context reach the activations, not the lens
    edits = Intervene(model, {"residual_output": tg.Scale(1.5)}, missing="ignore")
    with pytest.warns(UserWarning, match="no call"), edits, Capture(model, "final_norm") as calls:
        inside = lens(acts=td["acts", "residual_output.1"], logits=td["logits"])
    assert calls == []
    torch.testing.assert_close(inside[1], td["lens", "residual_output.1", "kl"])
    assert clean(model)
    means = TensorDictSequential(
        capture,
        tg.SelectTokens(capture.sites, also=["logits"]),
        *[
            LogitLens(
                model, outputs=["kl"], in_keys=[("tokens", s), ("carried", "logits")], out_keys=("lens", s)
            )
            for s in capture.sites
        ],
        tg.ForEach(tg.StreamingMean(in_keys=("lens", "kl"), out_keys="mean_kl"), capture.sites),
    )
    result = tg.run(means, [batch])
    expected = td["lens", "residual_output.0", "kl"].mean()
    torch.testing.assert_close(result["mean_kl", "residual_output.0", "mean"].squeeze().float(), expected)


def test_failures_leave_the_model_as_it_was():
    model = models.llama()
    lens = LogitLens(model, outputs="logits")
    broken = model.lm_head.forward
    model.lm_head.forward = lambda x: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        lens(acts=torch.randn(2, models.WIDTH))
    del model.lm_head.forward
    assert broken is not None
    assert clean(model)
    assert not any(m.training for m in model.modules())
    with pytest.raises(ValueError, match="width 16"):
        lens(acts=torch.randn(2, 5))
    with pytest.raises(ValueError, match="without. Remedy: the model with its head"):
        LogitLens(models.llama().model)
    with pytest.raises(ValueError, match="found none"):
        LogitLens(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"inputs by name, such as \{'input_ids': ids\}, got Tensor"):
        tg.logit_lens(model, torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="names among logits"):
        LogitLens(model, outputs=["logit"])
    twin = pickle.loads(pickle.dumps(lens))
    with pytest.raises(RuntimeError, match="without its model"):
        twin(acts=torch.randn(2, models.WIDTH))
    assert copy.deepcopy(lens)._tail.model is model


def test_tuned_lens():
    model = models.llama()
    capture = Capture(model, "residual_output", layers=[0, 1], model_outputs="logits")
    batches = [models.text_batch(8, 9), models.text_batch(8, 9)]
    lens = TunedLens(model, capture.sites, outputs=["kl", "logits"])
    plain = logit_lens(model, batches[0], layers=[0, 1], outputs=["kl", "logits"])
    td = lens(capture(TensorDict(batches[0])))
    for site in capture.sites:  # untrained, it is the logit lens
        torch.testing.assert_close(
            td["lens", site, "logits"], plain["lens", site, "logits"], rtol=1e-4, atol=1e-5
        )
    before = copy.deepcopy(model.state_dict())
    losses = lens.fit(batches, steps=60, learning_rate=5e-3)
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    trained = lens(capture(TensorDict(batches[0])))["lens", "residual_output.0", "kl"].mean()
    assert trained < 0.5 * plain["lens", "residual_output.0", "kl"].mean()
    twin = TunedLens(model, capture.sites, outputs=["kl", "logits"])
    twin.load_state_dict(lens.state_dict())
    torch.testing.assert_close(
        twin(capture(TensorDict(batches[0])))["lens", "residual_output.0", "kl"].mean(), trained
    )
    assert len(lens.state_dict()) == 4
    with pytest.raises(ValueError, match="list of concrete sites"):
        TunedLens(model, "residual_output")
    with pytest.raises(ValueError, match="used up"):
        lens.fit(iter([]), steps=1)


def test_a_lens_over_stored_rows(tmp_path):
    """The entropy that is read from what a store keeps is that of the model's own last layer."""
    model, ids = models.llama(), models.text_batch()["input_ids"]
    store, capture = tg.ActivationStore(tmp_path), tg.Capture(model, "residual_output")
    sites = capture.sites
    stages = [capture, tg.SelectTokens(sites), tg.StoreActivations(store, sites)]
    tg.run(TensorDictSequential(*stages), [{"input_ids": ids}], progress=False)
    read = tg.ForEach(tg.LogitLens(model, outputs=["entropy"], in_keys="tokens"), sites)
    mean = tg.ForEach(tg.StreamingMean(in_keys=[("lens", "entropy")], out_keys="entropy"), sites)
    result = tg.run(TensorDictSequential(read, mean), store.rows(store.query().ids[-1]), progress=False)
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits.double().softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    torch.testing.assert_close(result["entropy", sites[-1], "mean"], entropy, rtol=1e-5, atol=0)
    assert float(result["entropy", sites[-1], "count"]) == ids.numel()
    # the sites of a stored run also go by other libraries' names
    rows = store.rows(store.query().ids[-1], sites=["blocks.1.hook_resid_post"])
    assert ("tokens", "residual_output.1") in next(iter(rows)).keys(True)


def test_a_tuned_lens_over_stored_rows_and_over_weights_that_are_elsewhere(tmp_path):
    model, batch = models.llama(), models.text_batch()
    capture, store = tg.Capture(model, "residual_output"), tg.ActivationStore(tmp_path)
    stages = [capture, tg.SelectTokens(capture.sites), tg.StoreActivations(store, capture.sites)]
    tg.run(TensorDictSequential(*stages), [batch], progress=False)
    keys = [("tokens", site) for site in capture.sites]
    tuned = TunedLens(model, capture.sites, outputs=["entropy"], in_keys=keys)
    mean = tg.ForEach(tg.StreamingMean(in_keys=[("lens", "entropy")], out_keys="entropy"), capture.sites)
    rows = store.rows(store.query().ids[-1])
    result = tg.run(TensorDictSequential(tuned, mean), rows, progress=False)
    with torch.no_grad():
        p = model(**batch).logits.double().softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(
        result["entropy", capture.sites[-1], "mean"].squeeze(), entropy, rtol=1e-5, atol=0
    )

    away = models.llama()
    for module in away.modules():
        home = {n: p.detach().clone() for n, p in module._parameters.items() if p is not None}

        def put(module=module, home=home, device="cpu"):
            for name, value in home.items():
                module._parameters[name] = nn.Parameter(value.to(device), requires_grad=False)

        def forward(*args, own=module.forward, put=put, **kwargs):
            put()
            found = own(*args, **kwargs)
            put(device="meta")
            return found

        if home:
            put(device="meta")
            module.forward = forward
    losses = []
    for one in (away, model):
        lens = TunedLens(one, ["residual_output.0"], outputs=["kl"])
        assert all(p.device.type == "cpu" for p in lens.parameters())
        losses.append(lens.fit([batch], steps=3, learning_rate=1e-2))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-7)
    assert losses[0][-1] < losses[0][0]
