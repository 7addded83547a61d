"""What it costs to make and to enter a context, counted in calls of functions, which no other process disturbs."""

from __future__ import annotations

import sys

import models
import tdgeom as tg


def test_contexts_are_made_in_time_linear_in_layers():
    """Four times the layers, four times the calls."""

    def calls_to_make(layers, make):
        model = models.llama(num_hidden_layers=layers)
        make(model)  # what is done once a model is done
        count = 0

        def profile(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            make(model)
        finally:
            sys.setprofile(None)
        return count

    for make in (
        lambda model: tg.Capture(model, ["residual_input", "attn_output", "head_output"]),
        lambda model: tg.Capture(model, ["module_output:model.layers.*.mlp", "module_input:**.self_attn"]),
        lambda model: tg.Intervene(model, {"residual_output": tg.Scale(0.5), "z": tg.Ablate(heads=1)}),
    ):
        few, many = calls_to_make(12, make), calls_to_make(48, make)
        assert many < 4.4 * few


def test_a_context_that_is_entered_often_makes_nothing_anew():
    model = models.gpt2()
    other = {"input_ids": models.text_batch()["input_ids"]}
    edits = {"residual_output": tg.Scale(0.5), "z.1": tg.Patch(inputs=other), "attn_scores.1": tg.Scale(0.9)}
    context = tg.Intervene(model, edits, missing="ignore")  # the block stays empty
    names = []

    with context:
        pass
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
    try:
        with context:
            pass
    finally:
        sys.setprofile(None)
    assert {"resolve_sites", "find_stacks", "find_parts", "read_signature", "check_structure"}.isdisjoint(
        names
    )
