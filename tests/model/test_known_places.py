"""What one context has found about a model is used by the next, and never about another model than the one at hand."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import models
import tdgeom as tg
from tdgeom.model.calls.known_places import known_places
from tdgeom.model.calls.verified import verified

SITES = ["module_output:0", "module_input:1", "residual_output.1"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).eval()


def batch() -> TensorDict:
    return TensorDict({"x": torch.randn(4, 3)}, batch_size=[])


def read(model: nn.Module, site: str) -> torch.Tensor:
    td = batch()
    capture = tg.Capture(model, site, in_keys=["x"])
    seen: list[torch.Tensor] = []
    module, side = model.get_submodule(capture.module_paths[capture.sites[0]]), capture.resolved[0].side
    if side == "input":
        handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda m, args, output: seen.append(output))
    acts = capture(td)["acts", site]
    handle.remove()
    torch.testing.assert_close(acts, seen[-1], rtol=0, atol=0)
    return acts


@pytest.mark.parametrize("site", SITES)
def test_the_places_are_found_once_for_all_contexts(site):
    model = net()
    first, second = (
        tg.Capture(model, site, in_keys=["x"]),
        tg.Intervene(model, {site: tg.Scale(2.0)}, in_keys=["x"]),
    )
    assert first._bound.places is second._bound.places


@pytest.mark.parametrize("site", SITES)
def test_a_module_that_is_put_in_anothers_place_is_hooked(site):
    model = net()
    read(model, site)
    for index in range(3):
        model[index] = nn.Linear(3, 3)
    read(model, site)


def test_a_new_forward_and_a_list_that_has_grown_are_found_anew():
    model = net()
    places = tg.Capture(model, SITES[0], in_keys=["x"])._bound.places
    model.append(nn.ReLU())
    grown = tg.Capture(model, SITES[0], in_keys=["x"])._bound.places
    assert grown is not places and not places.is_as_found()
    model[0].forward = lambda x: x
    replaced = tg.Capture(model, SITES[0], in_keys=["x"])._bound.places
    assert replaced is not grown
    # what somebody has put there may refer to the model, and is not kept
    assert tg.Capture(model, SITES[0], in_keys=["x"])._bound.places is not replaced


@pytest.mark.parametrize("where", ["root", "layer"])
def test_what_was_compiled_since_is_refused_by_the_next_context(where):
    model = net()
    tg.Capture(model, SITES[0], in_keys=["x"])
    module = model if where == "root" else model[0]
    module.forward = torch.compile(module.forward, backend="eager")
    for make in (
        lambda: tg.Capture(model, SITES[0], in_keys=["x"]),
        lambda: tg.Intervene(model, {SITES[0]: tg.Scale(2.0)}, in_keys=["x"]),
    ):
        if where == "layer":  # its hooks fire around the compiled forward
            make()
        else:
            with pytest.raises(RuntimeError, match="compiled"):
                make()


@pytest.mark.parametrize("site", [*SITES, "module_output:<root>"])
def test_a_model_that_nobody_holds_any_more_is_gone(site):
    model = net()
    for _ in range(2):
        tg.Capture(model, site, in_keys=["x"])(batch())
        with tg.Intervene(model, {site: tg.Scale(2.0)}):
            model(torch.randn(2, 3))
    assert verified(model)["places"]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_context_that_was_used_is_let_go_at_once():
    model = models.gpt2().eval()
    td = TensorDict({"input_ids": models.text_batch()["input_ids"]}, batch_size=[])
    gc.disable()  # nothing may wait for the collector: what was read may be large
    try:
        capture = tg.Capture(model, "residual_output")
        intervene = tg.Intervene(model, {"residual_output.0": tg.Steer(torch.ones(models.WIDTH))})
        capture(td.copy()), intervene(td.copy())
        gone = [weakref.ref(capture), weakref.ref(intervene)]
        del capture, intervene
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_the_number_of_sets_of_places_is_bounded():
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(80)])
    for index in range(80):
        tg.Capture(model, f"module_output:{index}", in_keys=["x"])
    assert len(verified(model)["places"]) <= 64
    entry = tg.Capture(model, "module_output:79", in_keys=["x"]).resolved
    assert known_places(model, entry) is known_places(model, entry)


def test_a_path_that_shares_its_module_reads_that_module_and_a_second_call_is_refused():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": shared})
    model.forward = lambda x: model["b"](x)
    acts = tg.Capture(model, "module_output:b", in_keys=["x"])(td := batch())["acts", "module_output:b"]
    torch.testing.assert_close(acts, shared(td["x"]).detach())
    model.forward = lambda x: model["a"](model["b"](x))
    with pytest.raises(RuntimeError, match="fired 2 times"):
        tg.Capture(model, "module_output:b", in_keys=["x"])(batch())


def test_the_same_site_of_two_models_keeps_its_own_tokens():
    image, text = models.vit().eval(), models.gpt2().eval()
    path = "module_output:encoder.layer.0" if hasattr(image, "encoder") else None
    path = path or f"module_output:{tg.available_sites(image)[1].module_path}"
    site = tg.Capture(image, path).sites[0]
    assert site.image
    other = tg.Capture(text, "module_output:transformer.h.0").sites[0]
    assert other.image is False
    assert tg.Capture(image, site).sites[0].image is site.image


def test_settings_are_those_of_the_call_however_late_they_are_asked_for():
    model, sites, outputs = net(), ["residual_output.0"], []
    capture = tg.Capture(model, sites, in_keys=(keys := ["x"]), classes=[nn.Linear], model_outputs=outputs)
    sites.append("residual_output.1"), keys.append("y"), outputs.append("logits")
    told = capture.settings()
    assert told["sites"] == ["residual_output.0"] and told["in_keys"] == ["x"] and told["model_outputs"] == []
    assert list(told)[:3] == ["model", "sites", "layers"] and told["model"] == {"model": "Sequential"}
    assert told["calls"] is None and told["withhold"] == {"tuple": []}
    again = tg.Steer.from_settings(tg.Steer(torch.ones(2), coefficient=3.0).settings())
    assert again.coefficient == 3.0 and again.all_settings()["positions"] == "all"
