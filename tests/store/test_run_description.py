"""What a run says of itself, and its id."""

from __future__ import annotations

import pytest
import torch

import models
import tdgeom as tg
from tdgeom.store.run_description import describe_run
from tdgeom.store.run_ids import id_of, new_id, number_of, valid_id


def test_ids():
    run = new_id()
    assert valid_id(run) and id_of(number_of(run)) == run and new_id() != run
    for text in (
        "",
        "r",
        "../r0000000000",
        "R00000000000A",
        "r00000000000a\n",
        "r00000000000aa",
        None,
        7,
        b"r00000000000a",
    ):
        assert not valid_id(text)


def test_a_model_and_a_capture_describe_themselves():
    model = models.gpt2()
    capture = tg.Capture(model, ["residual_input.0"])
    about = describe_run(model=model, capture=capture, positions=slice(1, None), interventions=[tg.Ablate()])
    assert about.model == "GPT2LMHeadModel" and about.details["config"]["n_layer"] == models.DEPTH
    assert about.details["capture"] == {
        "sites": ["residual_input.0"],
        "modules": {"residual_input.0": "transformer.h.0"},
    }
    assert about.details["positions"] == "slice(1, None, None)"
    assert about.details["interventions"][0]["made"] == "Ablate"


def test_a_stage_is_kept_as_its_settings():
    about = describe_run(metadata={"measures": [tg.TwoNN(discard=0.2)]})
    [kept] = about.details["metadata"]["measures"]
    assert kept["made"] == "TwoNN" and kept["settings"]["discard"] == 0.2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": 3}, "model= takes a text"), ({"experiment": ""}, "experiment= takes a text"),
        ({"tag": [None]}, "tag= takes a text"), ({"dataset": "x" * 5000}, "dataset= takes a text"),
        ({"revision": "\ud800"}, "no valid Unicode"), ({"metadata": {"x": "\ud800"}}, "cannot be kept as JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_described_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        describe_run(**given)


def test_values_nested_too_deep_are_refused():
    deep = []
    deep.append(deep)
    with pytest.raises(ValueError, match="cannot be kept as JSON"):
        describe_run(metadata={"x": deep})
    deep = [0]
    for _ in range(80):
        deep = [deep]
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        describe_run(metadata={"x": deep})


def test_numbers_in_a_description_become_plain():
    about = describe_run(metadata={"x": torch.tensor(3.0).item(), "y": (1, 2), "z": float("nan")})
    assert about.details["metadata"] == {"x": 3.0, "y": [1, 2], "z": None}
