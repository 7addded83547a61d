"""Alarms: rare where nothing changes, prompt where something does, and never set off by one value."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

import tdgeom as tg
from benchmarks.alarms import alarmed, alarmed_by_batches, autoregressive, correlated_batches

NAME = "geometry/residual_output.3/d_pr"


def course(seed=0, steps=80, noise=0.02, level=40.0):
    """A positive metric with correlated noise."""
    rng = np.random.default_rng(seed)
    x = np.zeros(steps)
    for t in range(1, steps):
        x[t] = 0.7 * x[t - 1] + rng.standard_normal()
    return level * np.exp(noise * x)


def fed(alarms, values, name=NAME, first=0):
    return [
        alarm
        for step, value in enumerate(values, first)
        for alarm in alarms.update(step, {name: float(value)})
    ]


@pytest.mark.parametrize(
    ("metric", "before", "after", "kind"),
    [
        ("d_pr", 40.0, 8.0, "rank drop"),
        ("numerical_rank", 768, 200, "rank drop"),  # no noise at all
        ("top1_share", 0.2, 0.99, "collapse"),
        ("cos_sim_mean", 0.3, 0.97, "collapse"),
        ("total_variance", 5.0, 0.0, "collapse"),
        ("feature_subspace_novelty", 0.1, 0.6, "novelty jump"),
    ],
)
def test_a_change_is_noticed_within_a_block(metric, before, after, kind):
    noise = course(level=1.0, noise=0.0 if metric == "numerical_rank" else 0.01)
    values = np.where(np.arange(80) < 70, before * noise, after)
    found = fed(tg.ChangeAlarms(), values, f"geometry/a.0_to_a.1/{metric}")
    assert [(alarm.kind, alarm.step) for alarm in found] == [(kind, 72)]  # once, with the third value
    assert found[0].metric == f"geometry/a.0_to_a.1/{metric}"
    assert found[0].before == pytest.approx(before, rel=0.1) and found[0].now == pytest.approx(
        after, rel=0.02, abs=1e-9
    )
    assert f"{kind}: geometry/a.0_to_a.1/{metric} went from" in str(found[0])


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (course(), "nothing changes"),
        (np.where(np.arange(80) == 70, 1.0, course()), "one value is off"),
        (course() * np.exp(-0.03 * np.arange(80)), "a fall that has been under way"),
        (np.where(np.arange(80) < 70, course(), 0.9 * course()), "too little to count"),
        (np.where(np.arange(80) < 70, course(), 5 * course()), "the other way"),
        (np.where(np.arange(80) < 30, course(), 0.1 * course()), "too early to know"),
    ],
)
def test_what_is_no_alarm(values, why):
    assert not fed(tg.ChangeAlarms(), values), why


def test_after_an_alarm_a_new_course_begins():
    values = np.concatenate([course(), course(level=10), course(level=2)])
    assert [alarm.step for alarm in fed(tg.ChangeAlarms(), values)] == [82, 162]


def test_a_metric_that_is_no_number_any_more_is_told():
    (found,) = fed(tg.ChangeAlarms(), [40.0, 41.0, math.nan, math.nan])
    assert (found.kind, found.step) == ("undefined", 2)


def test_more_metrics_ask_for_more_evidence():
    values = np.where(np.arange(80) < 70, course(noise=0.03), 0.65 * course(noise=0.03))
    many = tg.ChangeAlarms()
    found = [many.update(t, {f"{n}/d_pr": float(v) for n in range(2000)}) for t, v in enumerate(values)]
    assert fed(tg.ChangeAlarms(), values) and not any(found)


def test_results_of_a_run_and_rules_of_ones_own():
    alarms = tg.ChangeAlarms(
        rules={"loss": tg.AlarmRule("spike", falls=False, scale="linear", least=1.0)}, reference=8
    )
    values = torch.cat([torch.ones(40) + 0.01 * torch.arange(40).sin(), torch.full((3,), 9.0)])
    found = [alarms.update(t, TensorDict({("mean", "loss"): v, "d_pr": -v})) for t, v in enumerate(values)]
    assert [one.kind for step in found for one in step] == ["spike"]
    with pytest.raises(ValueError, match=r"'mean/loss' is watched, so it is one number; got shape \(2,\)"):
        alarms.update(99, TensorDict({("mean", "loss"): torch.ones(2)}))


def test_a_state_as_plain_data_goes_on():
    values = np.where(np.arange(80) < 70, course(), 5.0)
    first, second = tg.ChangeAlarms(), tg.ChangeAlarms()
    assert not fed(first, values[:50])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [alarm.step for alarm in fed(second, values[50:], first=50)] == [72]
    with pytest.raises(ValueError, match="was kept under"):
        tg.ChangeAlarms(block=4).load_state_dict(first.state_dict())


def test_a_training_that_goes_back_begins_anew():
    alarms = tg.ChangeAlarms()
    fed(alarms, course())
    with pytest.warns(UserWarning, match="step 3 after step 79: training has gone back"):
        alarms.update(3, {NAME: 40.0})
    assert not fed(alarms, [5.0] * 5, first=4)


def test_settings_that_cannot_be_are_refused():
    for settings in ({"block": 0}, {"reference": 2}, {"false_alarms": 0}, {"horizon": 0}):
        with pytest.raises(ValueError, match="ChangeAlarms: block and horizon"):
            tg.ChangeAlarms(**settings)
    with pytest.raises(ValueError, match="scale is one of"):
        tg.AlarmRule("x", scale="cubic")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "phi"), [("Gaussian", 0.9), ("Gaussian", 0.99), ("t with 4 degrees of freedom", 0.5)]
)
def test_the_rate_of_false_alarms_on_200_stationary_runs(noise, phi):
    rule = {"x": tg.AlarmRule("any", falls=False, scale="linear", least=1e-9)}
    assert alarmed(autoregressive(noise, phi, 200, 300, seed=7), horizon=300, rules=rule) <= 10  # 5 %


@pytest.mark.slow
def test_the_rate_on_200_runs_of_correlated_batches():
    metrics = correlated_batches(200, 150, seed=3)
    tight = {name: tg.AlarmRule("any", least=1e-9) for name in metrics}
    assert alarmed_by_batches(metrics, horizon=150, rules=tight) <= 10
