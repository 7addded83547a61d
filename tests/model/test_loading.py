"""Which checkpoint is loaded: what from_pretrained takes holds for the configuration too; adapters come on their base."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers

import models
import tdgeom as tg
from tdgeom.model.loading import load_model, model_structure

IDS = torch.arange(12).reshape(2, 6)


def hub_cache(folder: Path, model: torch.nn.Module, **revisions: str) -> str:
    """A cache as the hub's client keeps it, with a model under each named revision."""
    inside = folder / "models--me--tiny"
    for name, commit in revisions.items():
        (inside / "refs").mkdir(parents=True, exist_ok=True)
        (inside / "refs" / name).write_text(commit)
        model.save_pretrained(inside / "snapshots" / commit)
    return str(folder)


@pytest.fixture(scope="module")
def gpt2() -> torch.nn.Module:
    return models.gpt2()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_revision_in_a_cache_of_its_own(tmp_path, gpt2):
    cache = hub_cache(tmp_path, gpt2, main="a" * 40, v2="b" * 40)
    for options in ({"cache_dir": cache}, {"cache_dir": cache, "revision": "v2", "local_files_only": True}):
        assert torch.equal(logits(load_model("me/tiny", model_kwargs=options)), logits(gpt2))


def test_the_configuration_is_that_of_the_subfolder(tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path / "text")
    models.bert().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), model_kwargs={"subfolder": "text"})
    assert type(loaded) is type(gpt2) and torch.equal(logits(loaded), logits(gpt2))


def test_a_configuration_that_is_given_decides_the_class(tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path)
    config = transformers.GPT2Config.from_pretrained(tmp_path, n_layer=1)
    config.architectures = ["GPT2Model"]
    loaded = load_model(str(tmp_path), model_kwargs={"config": config})
    assert type(loaded) is transformers.GPT2Model and len(loaded.h) == 1


def test_the_folder_of_an_adapter_is_its_base_with_the_adapter(tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path / "base")
    base = type(gpt2).from_pretrained(tmp_path / "base").eval()
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"))
    assert type(loaded) is type(gpt2)
    torch.testing.assert_close(logits(loaded), logits(adapted))
    assert (logits(loaded) - logits(gpt2)).abs().max() > 1e-3
    assert type(model_structure(str(tmp_path / "adapter"))) is type(gpt2)
    fresh = tg.untrained_copy(adapted, seed=7)
    assert type(fresh) is type(adapted) and fresh.active_adapter == adapted.active_adapter
    assert [name for name, _ in fresh.named_parameters()] == [name for name, _ in adapted.named_parameters()]
    assert (logits(fresh) - logits(adapted)).abs().max() > 1e-3


def test_no_such_model_is_said_in_a_line():
    with pytest.raises(ValueError, match="could not load the model 'me/none': there is no folder me/none"):
        load_model("me/none", model_kwargs={"revision": "v2"})
