"""Models that are called with a TensorDict or one mapping of features: in both forms, in run, and whole analyses."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

import models
import tdgeom as tg


def policy(*, nested: bool = False) -> tuple[nn.Module, str, nn.Module, TensorDict]:
    """A policy, the site of its first linear layer, that layer, and a batch."""
    torch.manual_seed(0)
    first = nn.Linear(6, 16)
    name = (lambda key: ("agents", key)) if nested else (lambda key: key)
    whole = TensorDictSequential(
        TensorDictModule(nn.Sequential(first, nn.ReLU()), in_keys=[name("obs")], out_keys=[name("h")]),
        TensorDictModule(nn.Linear(16, 2), in_keys=[name("h")], out_keys=[name("action")]),
    ).eval()
    path = next(n for n, module in whole.named_modules() if module is first)
    td = TensorDict({name("obs"): torch.randn(40, 6), "reward": torch.randn(40)}, batch_size=[40])
    return whole, f"module_output:{path}", first, td


@pytest.mark.parametrize("nested", [False, True])
def test_both_forms_of_a_policy(nested):
    model, site, first, td = policy(nested=nested)
    obs, action = (("agents", "obs"), ("agents", "action")) if nested else ("obs", "action")
    with torch.no_grad():
        right, acted = first(td[obs]), model(td.clone())[action]
    capture = tg.Capture(model, site, model_outputs=[action])
    assert capture.in_keys == [obs]
    before = set(td.keys(True, True))
    out = capture(td)
    torch.testing.assert_close(out["acts", site], right)
    torch.testing.assert_close(out[action], acted)
    assert set(td.keys(True, True)) == before | {("acts", site), action}  # not what else the policy writes
    with tg.Capture(model, site) as calls:
        model(td.clone())
    torch.testing.assert_close(calls[0]["acts", site], right)
    assert torch.equal(calls[0][obs], td[obs]) and "reward" not in calls[0].keys()
    with torch.no_grad(), tg.Intervene(model, {site: tg.Scale(0.0)}):
        right = model(td.clone())[action]
    found = tg.Intervene(model, {site: tg.Scale(0.0)}, model_outputs=[action], out_keys=["moved"])(td.clone())
    torch.testing.assert_close(found["moved"], right)
    assert not torch.allclose(right, acted)


def test_a_policy_called_by_keyword_and_one_that_overwrites_its_input():
    model, site, first, td = policy()
    with tg.Capture(model, site) as calls:
        model(obs=td["obs"])
    torch.testing.assert_close(calls[0]["acts", site], first(td["obs"]).detach())
    assert torch.equal(calls[0]["obs"], td["obs"])
    again = TensorDictModule(nn.Linear(6, 6), in_keys=["obs"], out_keys=["obs"])
    with tg.Capture(again, "module_output:module") as calls:
        again(td.clone())
    assert torch.equal(calls[0]["obs"], td["obs"])


def test_other_keys_of_a_batch():
    model, site, first, td = policy()
    renamed = TensorDict({("next", "obs"): td["obs"]}, batch_size=[40])
    for in_keys in ({"obs": ("next", "obs")}, [("next", "obs")]):
        out = tg.Capture(model, site, in_keys=in_keys)(renamed.clone())
        torch.testing.assert_close(out["acts", site], first(td["obs"]).detach())
    with pytest.raises(KeyError, match="expected the model's input 'obs'"):
        tg.Capture(model, site)(renamed.clone())
    with pytest.raises(ValueError, match="expected a key for each"):
        tg.Capture(model, site, in_keys=["a", "b"])


@pytest.mark.parametrize("nested", [False, True])
def test_run_analyze_model_and_probing_take_a_policy(nested):
    model, site, first, td = policy(nested=nested)
    batches = [td[:25].clone().auto_batch_size_(0), td[25:].clone().auto_batch_size_(0)]
    pipeline = TensorDictSequential(tg.Capture(model, site), tg.SelectTokens([site]), tg.Collect([site]))
    obs = ("agents", "obs") if nested else "obs"
    rows = tg.run(pipeline, batches, progress=False)["collected", site]
    torch.testing.assert_close(rows, first(td[obs]).detach())
    results = tg.analyze_model(model, batches, hook_point=site, progress=False)
    assert len(results.metrics) == 1 and results.metrics["rows_observed"].iloc[0] == 40
    for batch in batches:
        batch.set("label", (batch["reward"] > 0).long())
    probing = tg.Probing(model, site, tg.LinearProbe())
    probing.run(batches)
    assert list(probing.table()["site"]) == [site]
    with probing.fit() as phase:
        phase.labels = batches[0]["label"]
        model(batches[0].copy())
    with probing.score() as phase:
        phase.labels = batches[1]["label"]
        model(batches[1].copy())
    assert list(probing.table()["site"]) == [site]


def sentence_encoder(tmp_path, backbone):
    sentences = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(models.VOCAB - 5))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tf.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    backbone.save_pretrained(tmp_path)
    modules = [Transformer(str(tmp_path)), Pooling(16), Normalize()]
    return sentences.SentenceTransformer(modules=modules, device="cpu").eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_sentence_encoders_as_they_are(tmp_path, name, side):
    backbone = {"bert": lambda: models.bert().bert, "gpt2": lambda: models.gpt2().transformer}[name]()
    model = sentence_encoder(tmp_path, backbone)
    model.tokenizer.padding_side = side
    texts, site = ["w1 w2 w3 w4 w5", "w7", "w3 w9 w30"], "residual_output.1"
    alone = []
    with tg.Capture(model, site) as calls:
        for text in texts:
            model.encode([text])
    alone = torch.cat([call["acts", site][0] for call in calls])
    batch = {k: v for k, v in model.preprocess(texts).items() if isinstance(v, torch.Tensor)}
    assert 0 in batch["attention_mask"][:, 0 if side == "left" else -1]
    capture = tg.Capture(model, site)
    assert capture.in_keys[:2] == ["input_ids", "attention_mask"]
    pipeline = TensorDictSequential(capture, tg.SelectTokens([site]), tg.Collect([site]))
    rows = tg.run(pipeline, [batch], progress=False)["collected", site]
    torch.testing.assert_close(rows, alone, rtol=1e-4, atol=1e-4)
    results = tg.analyze_model(model, [batch, batch], sites=site, progress=False)
    assert results.metrics["rows_observed"].iloc[0] == 2 * len(alone)
    if side == "right":
        embedded = tg.Capture(model, site, model_outputs="sentence_embedding")(TensorDict(batch))[
            "sentence_embedding"
        ]
        torch.testing.assert_close(
            embedded, model.encode(texts, convert_to_tensor=True), rtol=1e-4, atol=1e-5
        )
        with tg.Capture(model, site) as calls:
            model.encode(texts, batch_size=3)
        order = sorted(int(n) for n in calls[0]["attention_mask"].sum(1))
        assert order == sorted(int(n) for n in batch["attention_mask"].sum(1))
        assert {"input_ids", "attention_mask", "acts"} <= set(
            calls[0].keys()
        ) and "token_embeddings" not in calls[0].keys()
