"""A stage knows what it was made with: as plain data, in its repr, and in what may be merged."""

from __future__ import annotations

import functools
import json
import math
import pickle
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tensordict import TensorDict
from torch import nn

import tdgeom as tg
from stage_examples import CountAbove
from tdgeom.core.stage_settings import differences, plain_setting


class Given(tg.Stage):
    """A stage that keeps whatever it was given."""

    reads, writes = ["sample"], ["given"]

    def __init__(self, value=None, *more, scale=2.0, **keys):
        super().__init__(**keys)
        self.value, self.more, self.scale = value, more, math.log(scale)

    def compute(self, sample):
        return sample * self.scale


class Mapped(tg.StreamingMean):
    """A stream with a function, an estimator or a module among its settings."""

    def __init__(self, function=None, **keys):
        super().__init__(**keys)
        self.function = function


PLAIN = {
    "numbers": (1, 2.5, True, None, "word"),
    "not finite": (math.inf, -math.inf),
    "lists": [1, [2.5, ["x"]], ()],
    "tuples": ((1, 2), ("a", ("b", 3))),
    "slices": (slice(1, None, 2), range(0, 9, 3)),
    "mappings": {"a": 1, "b": {"c": (2,)}},
    "mappings of other keys": {1: "a", ("x", "y"): [slice(3)]},
    "mappings that look like tags": {"tuple": [1], "dtype": 2},
    "sets": frozenset({"b", "a"}),
    "dtypes": (torch.float64, torch.device("cpu"), torch.device("cuda", 1)),
    "a stage": tg.TwoNN(discard=0.2),
    "stages": [tg.RowSample(["x"], size=3), {"inner": tg.SpectrumMetrics(out_keys="here")}],
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_data_makes_the_value_again(name):
    stage = Given(PLAIN[name])
    text = json.dumps(stage.settings(), allow_nan=False)
    twin = Given.from_settings(json.loads(text))
    assert json.dumps(twin.settings()) == text and repr(twin) == repr(stage)
    if "stage" not in name:
        assert twin.value == PLAIN[name] and type(twin.value) is type(PLAIN[name])


def test_values_that_have_a_plain_form_of_their_own():
    assert plain_setting(np.float32(0.5)) == 0.5 and plain_setting(np.int64(3)) == 3
    assert plain_setting(Path("a") / "b") == str(Path("a") / "b")
    assert plain_setting(tg.Site("mlp_output.3")) == "mlp_output.3"
    assert plain_setting(nn.Linear(2, 2)) == {"model": "Linear"}
    assert plain_setting(torch.relu)["function"].endswith(".relu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_small_tensors_are_written_out_and_large_ones_named(dtype):
    small = (torch.arange(6).reshape(2, 3) % 2).to(dtype)
    twin = Given.from_settings(json.loads(json.dumps(Given(small).settings())))
    assert twin.value.dtype == dtype and torch.equal(twin.value, small)
    large = torch.ones(40, 40).to(dtype)
    settings = json.loads(json.dumps(Given(large).settings()))
    assert settings["value"]["shape"] == [40, 40] and len(settings["value"]["tensor_sha256"]) == 64
    with pytest.raises(
        TypeError, match=r"Given.value was tensor of shape \(40, 40\), which plain data cannot hold\. Give it"
    ):
        Given.from_settings(settings)
    assert Given.from_settings(settings, value=large).value is large
    large[0, 0] = 0
    assert Given(large).settings()["value"] != settings["value"]


def test_arguments_by_position_and_any_number_of_them():
    stage = Given("a", "b", "c")
    assert stage.settings()["value"] == "a" and stage.settings()["more"] == ["b", "c"]
    twin = Given.from_settings(json.loads(json.dumps(stage.settings())))
    assert twin.more == ("b", "c") and repr(twin) == repr(stage) == "Given(value='a', more=['b', 'c'])"


def test_an_attribute_that_init_left_in_another_form_is_no_change():
    """``self.scale = log(scale)``: made again from it, the stage would take the logarithm twice."""
    stage = Given(scale=8.0)
    for one in (stage, deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert one.settings()["scale"] == 8.0 and repr(one) == "Given(scale=8.0)"
        assert Given.from_settings(one.settings()).scale == stage.scale
    assert repr(tg.StreamingCrossMoments(["x", "y"])) == "StreamingCrossMoments(sites=['x', 'y'])"


def test_an_attribute_that_was_set_later_is():
    stage = tg.TwoNN()
    stage.discard = 0.3
    assert repr(stage) == "TwoNN(discard=0.3)" and stage.settings()["discard"] == 0.3
    direction = torch.ones(2)
    held = Given(direction)
    held.value = torch.zeros(2)
    assert held.settings()["value"]["tensor"] == [0.0, 0.0]
    a, b = CountAbove(1.0), CountAbove(1.0)
    b.threshold = 2.0
    with pytest.raises(ValueError, match=r"the same settings: threshold is 2.0 there and 1.0 here"):
        a.merge_(b)


def test_two_ways_to_say_one_setting_merge():
    sites = ["x", "y", "z"]
    a = tg.StreamingCrossMoments(sites, pairs="all")
    b = tg.StreamingCrossMoments(sites, pairs=[("x", "y"), ("x", "z"), ("y", "z")])
    rows = TensorDict({"tokens": {site: torch.randn(9, 3) for site in sites}})
    a.update(rows), b.update(rows)
    assert int(a.merge_(b).count) == 18
    assert int(CountAbove(0.5).merge_(CountAbove(threshold=0.5)).is_empty)


def functions():
    def above(limit):
        return lambda value: value > limit

    return {
        "lambdas": (lambda value: value, lambda value: 2 * value),
        "defaults": (lambda value, by=1: value * by, lambda value, by=2: value * by),
        "closures": (above(1), above(2)),
        "partials": (functools.partial(torch.add, other=1), functools.partial(torch.add, other=2)),
        "functions": (torch.sin, torch.cos),
        "estimators": (LogisticRegression(C=1.0), LogisticRegression(C=10.0)),
    }


@pytest.mark.parametrize("name", functions())
def test_what_plain_data_cannot_hold_is_told_apart(name):
    first, second = functions()[name]
    rows = TensorDict(tokens=torch.ones(3, 2))
    one, same, other = Mapped(first), Mapped(functions()[name][0]), Mapped(second)
    for stage in (one, same, other):
        stage.update(rows)
    assert int(one.merge_(same).count) == 6
    with pytest.raises(
        ValueError, match=r"cannot merge .* the same settings: function\..* there and .* here"
    ):
        one.merge_(other)
    with pytest.raises(
        RuntimeError, match=r"the state of another Mapped: function\..* Make the stage as it was"
    ):
        Mapped(second).load_state_dict(one.state_dict())
    with pytest.raises(
        TypeError, match=r"Mapped.function was .* Give it again: from_settings\(settings, function=\.\.\.\)"
    ):
        Mapped.from_settings(json.loads(json.dumps(one.settings())))
    assert Mapped.from_settings(one.settings(), function=first).function is first


def test_a_setting_of_a_stage_inside_a_stage_counts():
    probe = tg.NormalizationAblation(metrics=tg.SpectrumMetrics())
    assert "metrics" not in repr(probe) or "SpectrumMetrics" in repr(probe)
    each = tg.ForEach(tg.TwoNN(discard=0.25), ["x", "y"])
    assert repr(each) == "ForEach(stage=TwoNN(discard=0.25), sites=['x', 'y'])"
    pairs = tg.ForEachPair(tg.LinearCKA(), ["x", "y"], pairs="all")
    assert repr(pairs) == "ForEachPair(stage=LinearCKA(), sites=['x', 'y'], pairs='all')"
    for stage in (each, pairs, tg.ForEach(each, [("a", "b"), ("c", "d")])):
        twin = type(stage).from_settings(json.loads(json.dumps(stage.settings())))
        assert twin.in_keys == stage.in_keys and twin.out_keys == stage.out_keys and repr(twin) == repr(stage)


def test_a_repr_shows_the_defaults_of_its_own_class():
    """Another class of the same name may have others."""

    class TwoNN(tg.TwoNN):
        def __init__(self, discard=0.3, **keys):
            super().__init__(discard=discard, **keys)

    assert repr(TwoNN()) == repr(tg.TwoNN()) == "TwoNN()"
    assert (
        repr(TwoNN(discard=0.1)) == "TwoNN(discard=0.1)"
        and repr(tg.TwoNN(discard=0.3)) == "TwoNN(discard=0.3)"
    )


def test_differences_are_found_at_any_depth():
    assert differences({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}}) == [
        "a.b[1].c is 2 there and 3 here"
    ]
    assert differences({"a": 1}, {"a": 1}) == []
    assert differences({"a": 1}, {}) == ["a is 1 there and None here"]
