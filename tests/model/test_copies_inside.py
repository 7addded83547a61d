"""Whatever takes a model along while contexts are open takes a model without them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import models
import tdgeom as tg
from editing import hook_count, logits
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "old pickle": lambda model: pickle.loads(pickle._dumps(model, protocol=2)),
    "torch.save": saved,
    "of a part": lambda model: _with_part(model),
}


def _with_part(model):
    whole = copy.deepcopy(model)
    whole.model = copy.deepcopy(model.model)
    whole.model.layers[1] = copy.deepcopy(model.model.layers[1])
    return whole


OPEN = {
    "edits": lambda model: [
        Intervene(model, {"residual_output.0": tg.Scale(0.0), "head_output.1": tg.Ablate(heads=1)})
    ],
    "patterns": lambda model: [Capture(model, ["attn_pattern", "z"])],
    "edited patterns": lambda model: [Intervene(model, {"attn_scores.1": tg.Scale(0.5)})],
    "several": lambda model: [
        Capture(model, ["attn_pattern", "residual_output"]),
        Intervene(model, {"residual_output.1": tg.Scale(0.0), "attn_pattern.0": tg.Scale(0.5)}),
        Capture(model, "attn_output"),
    ],
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("opened", OPEN)
def test_a_copy_computes_what_the_model_does_alone(opened, copied):
    model, batch = models.llama(), models.text_batch()
    kept = []
    model.model.layers[0].register_forward_hook(_noted)  # somebody else's: it goes along
    base = logits(model, batch)
    contexts = OPEN[opened](model)
    for context in contexts:
        context.__enter__()
    kept.append(COPIES[copied](model))
    inside = logits(model, batch)  # the contexts still act, and once
    kept.append(COPIES[copied](model))
    for context in reversed(contexts):
        context.__exit__(None, None, None)
    assert torch.allclose(inside, base, atol=1e-4) == (opened == "patterns")
    for twin in kept:
        assert torch.equal(logits(twin, batch), base)
        assert hook_count(twin) == hook_count(model) == 1
        assert not any({"__deepcopy__", "__reduce_ex__", "forward"} & set(vars(m)) for m in twin.modules())
        assert not any(m._forward_hooks_with_kwargs or m._forward_hooks_always_called for m in twin.modules())
    assert not any({"__deepcopy__", "__reduce_ex__", "forward"} & set(vars(m)) for m in model.modules())
    assert torch.equal(logits(model, batch), base)


def _noted(*_):
    return None


def test_a_saved_folder_is_the_model_alone(tmp_path):
    import transformers as tf

    model, batch = models.llama(), models.text_batch()
    base = logits(model, batch)
    with (
        Intervene(model, {"residual_output.0": tg.Scale(0.0), "attn_scores.1": tg.Scale(0.5)}),
        Capture(model, "attn_pattern"),
    ):
        model.save_pretrained(tmp_path)
        logits(model, batch)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, batch), base)
    assert hook_count(loaded) == 0


def test_models_that_copy_in_a_way_of_their_own():
    class Own(torch.nn.Linear):
        def __deepcopy__(self, memo):
            twin = Own(self.in_features, self.out_features)
            twin.load_state_dict(self.state_dict())
            twin.copied = True
            return twin

        def __getstate__(self):
            return {**self.__dict__, "pickled": True}

    torch.manual_seed(0)
    model = torch.nn.Sequential(Own(4, 4), torch.nn.Linear(4, 4))
    x = torch.randn(2, 4)
    base = model(x)
    with Intervene(model, {"module_output:0": tg.Scale(0.0)}):
        twin = copy.deepcopy(model)
        model(x)
    assert twin[0].copied and torch.equal(twin(x), base)
    shared = torch.nn.Sequential(model[0], model[0])  # one module at two places stays one
    with Capture(model, "module_output:0"):
        again = copy.deepcopy(shared)
        model(x)
    assert again[0] is again[1]
    state = Own.__reduce_ex__(model[0], 4)[2]
    with Intervene(model, {"module_output:0": tg.Scale(0.0)}):
        inside = model[0].__reduce_ex__(4)[2]
        model(x)
    assert inside.keys() == state.keys() and inside["pickled"]


def test_shallow_copies():
    model, batch = models.llama(), models.text_batch()
    with Capture(model, "residual_output"):
        layer, raw = copy.copy(model.model.layers[0]), copy.copy(vars(model.model.layers[1]))
        model(**batch)
    assert not layer._forward_hooks and not {"__deepcopy__", "__reduce_ex__"} & set(vars(layer))
    twin = object.__new__(type(layer))
    vars(twin).update(raw)  # as replicas are made: what hung on the original is taken along
    with pytest.raises(RuntimeError, match="shallow copy that was made inside a context.*Remedy"):
        copy.deepcopy(twin)
