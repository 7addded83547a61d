"""Patches of an image are what differs between images: class, distillation and register tokens are none."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import models
import tdgeom as tg

_SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    "intermediate_size": 32,
}  # fmt: skip
_TEXT = {
    **{k: v for k, v in _SMALL.items() if "size" not in k},
    "hidden_size": 16,
    "intermediate_size": 32,
    "vocab_size": 48,
}
# name -> (model, tokens before the patches, registers among them)
MODELS = {
    "vit": (lambda: tf.ViTModel(tf.ViTConfig(**_SMALL)), 1, 0),
    "deit": (lambda: tf.DeiTModel(tf.DeiTConfig(**_SMALL)), 2, 0),
    "dinov2": (lambda: tf.Dinov2Model(tf.Dinov2Config(**_SMALL)), 1, 0),
    "dinov2_registers": (
        lambda: tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**_SMALL, num_register_tokens=4)), 5, 4,
    ),
    "dinov3": (lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**_SMALL, num_register_tokens=3)), 4, 3),
    "siglip": (lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**_SMALL)), 0, 0),
    "clip": (lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**_SMALL)), 1, 0),
}  # fmt: skip
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
SITE = "residual_output.1"


def build(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def hidden(model, path):
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        model(pixel_values=PIXELS)
    handle.remove()
    return seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("named", ["by the capture", "by name"])
def test_rows_of_patches_and_registers(name, named):
    model, (_, front, registers) = build(name), MODELS[name]
    capture = tg.Capture(model, SITE)
    right = hidden(model, capture.module_paths[SITE])
    assert right.shape[1] == front + 16
    sites = capture.sites if named == "by the capture" else [SITE]  # run tells those that are only named
    wanted = {"patches": slice(front, None), "registers": slice(front - registers, front), "cls": slice(0, 1)}
    for word, where in wanted.items():
        pipeline = TensorDictSequential(capture, tg.SelectTokens(sites, positions=word), tg.Collect(sites))
        if (word == "registers" and not registers) or (word == "cls" and front == registers):
            with pytest.raises(ValueError, match=f"'{word}': the model has {front - registers} class tokens"):
                tg.run(pipeline, [{"pixel_values": PIXELS}], progress=False)
            continue
        rows = tg.run(pipeline, [{"pixel_values": PIXELS}], progress=False)["collected", SITE]
        torch.testing.assert_close(rows, right[:, where].flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_edits_and_attention_by_these_words():
    model = build("dinov2_registers")
    site = tg.Capture(model, SITE).sites[0]
    base = hidden(model, tg.Capture(model, SITE).module_paths[site])
    for word, where in (("patches", range(5, 21)), ("registers", range(1, 5)), ("cls", range(1))):
        with (
            tg.Intervene(model, {SITE: tg.Steer(torch.ones(16), positions=word)}),
            tg.Capture(model, SITE) as calls,
        ):
            model(pixel_values=PIXELS)
        moved = (calls[0]["acts", SITE] - base).abs().amax((0, 2)) > 0.5
        assert moved.nonzero().flatten().tolist() == list(where)
    capture = tg.Capture(model, "attn_pattern.0")
    td = capture(TensorDict({"pixel_values": PIXELS}))
    pattern = td["acts", "attn_pattern.0"]
    groups = tg.GroupAttention(
        capture.sites, {"cls": "cls"}, {"registers": "registers", "patches": "patches"}
    )
    out = groups(td)["acts", "attn_pattern.0"].flatten(2)
    right = torch.stack([pattern[:, :, 0, 1:5].sum(-1), pattern[:, :, 0, 5:].sum(-1)], -1)
    torch.testing.assert_close(out, right.flatten(2), rtol=1e-4, atol=1e-5)


def test_a_text_has_all_but_the_first_and_no_registers():
    model = models.gpt2()
    capture = tg.Capture(model, SITE)
    td = capture(TensorDict(models.text_batch()))
    assert len(tg.SelectTokens(capture.sites, positions="patches")(td)["row_id"]) == 18
    with pytest.raises(ValueError, match="'registers' needs the sites of a model of images"):
        tg.SelectTokens(capture.sites, positions="registers")(td)


def test_both_stacks_of_a_model_of_texts_and_images():
    torch.manual_seed(0)
    model = tf.CLIPModel(tf.CLIPConfig(vision_config=_SMALL, text_config=_TEXT)).eval()
    capture = tg.Capture(model, ["vision_model.residual_output.0", "text_model.residual_output.0"])
    fronts = {str(site): site.image and site.image.front() for site in capture.sites}
    assert fronts["text_model.residual_output.0"] is False
    assert fronts["vision_model.residual_output.0"].count == 1


def test_tokens_behind_the_patches_are_refused():
    torch.manual_seed(0)
    model = tf.YolosModel(tf.YolosConfig(**{**_SMALL, "image_size": [16, 16]}, num_detection_tokens=5)).eval()
    capture = tg.Capture(model, SITE)
    td = capture(TensorDict({"pixel_values": PIXELS}))
    with pytest.raises(ValueError, match=r"no patches at \[0, 17, 18"):
        tg.SelectTokens(capture.sites, positions="patches")(td)


def test_what_a_site_knows_is_copied_and_not_pickled():
    model = build("dinov2_registers")
    select = tg.SelectTokens(tg.Capture(model, SITE).sites, positions="patches")
    td = TensorDict({"acts": {SITE: torch.zeros(2, 21, 16)}})
    assert len(copy.deepcopy(select)(td)["row_id"]) == 32
    assert len(pickle.loads(pickle.dumps(select))(td)["row_id"]) == 40  # no model to ask: all but the first
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    assert len(select(td)["row_id"]) == 32 and not seen  # found once
