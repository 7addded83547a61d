"""Whole models in wrappers: several devices or processes, offloaded weights, adapters."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import nn

import models
import tdgeom as tg
from editing import EVERY, hook_count, logits, sites_of
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene

SETTINGS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def by_hand(model):
    """Weights that are there only inside each module's forward, by forwards of somebody's own."""
    for module in model.modules():
        if not module._parameters:
            continue
        home = {n: p.detach().clone() for n, p in module._parameters.items() if p is not None}

        def load(module, home, device):
            for name, value in home.items():
                module._parameters[name] = nn.Parameter(value.to(device), requires_grad=False)

        def forward(*args, _module=module, _home=home, _load=load, _plain=module.forward, **kwargs):
            _load(_module, _home, "cpu")
            try:
                return _plain(*args, **kwargs)
            finally:
                _load(_module, _home, "meta")

        load(module, home, "meta")
        module.forward = forward
    return model


def accelerated(how, folder):
    accelerate = pytest.importorskip("accelerate")
    model = models.llama()
    return accelerate.cpu_offload(model) if how == "cpu" else accelerate.disk_offload(model, str(folder))


def adapters(kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, use_dora=kind == "dora")
    return peft.get_peft_model(models.llama(), config).eval()


@contextlib.contextmanager
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


WRAPPED = {
    "by hand": lambda folder: (by_hand(models.llama()), models.llama()),
    "cpu offload": lambda folder: (accelerated("cpu", folder), models.llama()),
    "disk offload": lambda folder: (accelerated("disk", folder), models.llama()),
    "distributed": lambda folder: (nn.parallel.DistributedDataParallel(models.llama()), models.llama()),
    "data parallel": lambda folder: (nn.DataParallel(models.llama()), models.llama()),
    "lora": lambda folder: (adapters("lora"), adapters("lora").merge_and_unload()),
    "dora": lambda folder: (adapters("dora"), adapters("dora").merge_and_unload()),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("padded", [False, True])
def test_every_kind_is_that_of_the_model_inside(name, padded, tmp_path):
    with one_process() if name == "distributed" else contextlib.nullcontext():
        wrapped, plain = WRAPPED[name](tmp_path)
        batch = models.text_batch()
        if padded:
            batch["attention_mask"][0, :3] = 0
        kinds = sites_of(plain, ["embed", *EVERY, "final_norm"])
        assert sites_of(wrapped, kinds) == kinds and len(kinds) == 15
        close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert Capture(wrapped, "embed").device == torch.device("cpu")
        right = Capture(plain, kinds, model_outputs="logits")(TensorDict(batch))
        for _ in range(2):
            found = Capture(wrapped, kinds, model_outputs="logits")(TensorDict(batch))
            assert found["acts"].keys() == right["acts"].keys()
            for key in right.keys(True, True):
                close(found[key], right[key])
        alone = Capture(wrapped, "head_output.1")(TensorDict(batch))
        close(alone["acts", "head_output.1"], right["acts", "head_output.1"])
        with torch.no_grad(), Capture(wrapped, kinds) as calls:
            base = wrapped(**batch).logits
        with torch.no_grad(), Capture(plain, kinds) as reference:
            close(base, plain(**batch).logits)
        assert len(calls) == 1 and calls[0]["input_ids"].equal(batch["input_ids"])
        for site, value in reference[0]["acts"].items():
            close(calls[0]["acts", site], value)
        for site in (
            "residual_output.1",
            "head_output.1",
            "attn_scores.0",
            "z.1",
            "mlp_act.0",
            "residual_mid.1",
        ):
            edit = {site: tg.Scale(0.3, positions=slice(1, None))}
            with torch.no_grad(), Intervene(wrapped, edit, missing="raise"):
                edited = wrapped(**batch).logits
            with torch.no_grad(), Intervene(plain, edit):
                close(edited, plain(**batch).logits)
            assert not torch.allclose(edited, base)
        lens, other = (tg.logit_lens(model, batch, outputs="logits")["lens"] for model in (wrapped, plain))
        for site, value in other.items():
            close(lens[site, "logits"], value["logits"])
        assert hook_count(wrapped) == sum("forward" in vars(module) for module in wrapped.modules())
        close(logits(wrapped, batch), base)


@pytest.mark.parametrize("name", ["cpu offload", "lora"])
def test_generating_through_a_wrapper(name, tmp_path):
    wrapped, plain = WRAPPED[name](tmp_path)
    batch = models.text_batch()
    batch["attention_mask"][0, :2] = 0
    vector = torch.linspace(-1, 1, models.WIDTH)
    edit = {"residual_output.1": tg.Steer(vector, coefficient=4.0, positions="last")}
    found = []
    for model in (wrapped, plain):
        with (
            torch.no_grad(),
            Intervene(model, edit, missing="raise"),
            Capture(model, ["residual_output", "z.2"]) as calls,
        ):
            tokens = model.generate(**batch, **SETTINGS)
        found.append((tokens, calls))
    (tokens, calls), (right, reference) = found
    assert torch.equal(tokens, right) and len(calls) == len(reference) == 3
    for call, other in zip(calls, reference, strict=True):
        assert set(call.keys(True, True)) == set(other.keys(True, True))
        for key in call.keys(True, True):
            torch.testing.assert_close(call[key], other[key], rtol=1e-4, atol=1e-5)


def test_an_analysis_of_offloaded_weights(tmp_path):
    batch = models.text_batch(8, 16)
    tables = [
        tg.analyze_model(model, [batch], metrics="spectrum", progress=False).metrics
        for model in (accelerated("cpu", tmp_path), models.llama())
    ]
    for column in ("d_pr", "effective_rank"):
        assert tables[0][column].to_numpy() == pytest.approx(tables[1][column].to_numpy(), rel=1e-4)
