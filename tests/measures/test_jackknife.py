"""The delete-a-group jackknife against its formulas written out, and intervals that cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.measures.jackknife import NO_ERROR, SCALES, scale_of


def without_each(x, sizes, statistic):
    ends = np.cumsum(sizes)
    return np.array([statistic(x), *(statistic(np.delete(x, slice(b - m, b))) for m, b in zip(sizes, ends))])


def delete_m(values, sizes):
    """Busing, Meijer and van der Leeden (1999), as it is written there."""
    whole, left = values[0], values[1:]
    m, n, g = np.array(sizes, float), float(sum(sizes)), len(sizes)
    h = n / m
    estimate = g * whole - ((1 - m / n) * left).sum()
    pseudo = h * whole - (h - 1) * left
    return whole - estimate, math.sqrt(((pseudo - estimate) ** 2 / (h - 1)).sum() / g)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.integers(0, 10**6))
def test_groups_of_any_sizes(sizes, seed):
    x = np.random.default_rng(seed).gamma(2.0, size=sum(sizes) + 3)
    sizes = [*sizes, 3]
    values = without_each(x, sizes, lambda v: np.log(1 + (v**2).mean()))
    bias, error = delete_m(values, sizes)
    found = F.group_jackknife(torch.tensor(values), torch.tensor(sizes))
    assert float(found.bias) == pytest.approx(bias, rel=1e-6, abs=1e-12)
    assert float(found.standard_error) == pytest.approx(error, rel=1e-6, abs=1e-12)
    assert float(found.degrees) == len(sizes) - 1 and float(found.estimate) == values[0]


def test_equal_groups_are_the_textbook_formulas():
    x = np.random.default_rng(0).normal(size=60)
    values = without_each(x, [3] * 20, np.var)
    left = values[1:]
    found = F.group_jackknife(torch.tensor(values), torch.full((20,), 3))
    assert float(found.bias) == pytest.approx(19 * (left.mean() - values[0]))
    assert float(found.standard_error) == pytest.approx(
        math.sqrt(19 / 20 * ((left - left.mean()) ** 2).sum())
    )


def test_the_mean_has_the_error_of_its_groups_and_the_variance_its_bias():
    x = np.random.default_rng(1).normal(size=200)
    found = F.group_jackknife(torch.tensor(without_each(x, [1] * 200, np.mean)), torch.ones(200))
    assert float(found.standard_error) == pytest.approx(x.std(ddof=1) / math.sqrt(200))
    assert float(found.bias) == pytest.approx(0, abs=1e-12)
    plain = F.group_jackknife(torch.tensor(without_each(x, [1] * 200, np.var)), torch.ones(200))
    assert float(plain.estimate - plain.bias) == pytest.approx(x.var(ddof=1))  # n - 1 in place of n, exactly


def test_groups_without_rows_count_for_nothing():
    x = np.random.default_rng(2).normal(size=50)
    values = without_each(x, [10] * 5, np.median)
    found = F.group_jackknife(torch.tensor(values), torch.full((5,), 10))
    more = F.group_jackknife(
        torch.tensor([values[0], 99.0, *values[1:], math.nan]), torch.tensor([0, 10, 10, 10, 10, 10, 0])
    )
    for a, b in zip(found, more):
        assert float(a) == pytest.approx(float(b))


def test_leading_dimensions_and_wrong_shapes():
    values, rows = torch.randn(3, 4, 8), torch.arange(1, 8)
    together = F.group_jackknife(values, rows)
    assert together.standard_error.shape == (3, 4)
    alone = F.group_jackknife(values[2, 1], rows)
    torch.testing.assert_close(together.standard_error[2, 1], alone.standard_error)
    with pytest.raises(ValueError, match=r"expects \(\.\.\., G\+1\) values.*\(3, 4, 8\) and \(8,\)"):
        F.group_jackknife(values, torch.ones(8))


def test_what_is_not_known_has_no_error():
    assert F.group_jackknife(torch.tensor([1.0, 2.0]), torch.tensor([5])).standard_error.isnan()
    assert F.group_jackknife(torch.tensor([1.0, 2.0, math.nan]), torch.tensor([5, 5])).standard_error.isnan()
    assert F.group_jackknife(torch.tensor([math.nan, 2.0, 1.0]), torch.tensor([5, 5])).standard_error.isnan()
    equal = F.group_jackknife(torch.full((6,), 0.1), torch.arange(1, 6))
    assert float(equal.standard_error) == 0 and float(equal.bias) == 0


@pytest.mark.parametrize(
    ("scale", "forth", "back"),
    [
        ("linear", lambda x: x, lambda x: x),
        ("log", np.log, np.exp),
        ("fisher", np.arctanh, np.tanh),
        ("logit", lambda x: np.log(x / (1 - x)), lambda x: 1 / (1 + np.exp(-x))),
    ],
)
def test_intervals_are_students_on_their_scale(scale, forth, back):
    x, error, step = 0.7, 0.05, 1e-6
    slope = (forth(x + step) - forth(x - step)) / (2 * step)
    reach = student.ppf(0.95, 7) * error * slope
    low, high = F.error_interval(torch.tensor(x), torch.tensor(error), 7, scale=scale, level=0.9)
    assert float(low) == pytest.approx(back(forth(x) - reach), rel=1e-6)
    assert float(high) == pytest.approx(back(forth(x) + reach), rel=1e-6)


def test_an_estimate_outside_of_its_scale_is_taken_as_it_is():
    x = torch.tensor([-0.01, 1.0, 1.2])
    for scale in ("fisher", "logit", "log"):
        low, high = F.error_interval(x, torch.full((3,), 0.1), 19, scale=scale)
        assert (
            torch.isfinite(low).all() and torch.isfinite(high).all() and (low < x).all() and (x < high).all()
        )
    reach = student.ppf(0.975, 19) * 0.1
    assert float(F.error_interval(x, torch.full((3,), 0.1), 19, scale="fisher")[0][2]) == pytest.approx(
        1.2 - reach
    )
    assert F.error_interval(x, x, 0)[0].isnan().all()


def test_mistakes_say_what_to_do():
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="scale is 'linear', 'log', 'fisher' or 'logit', got 'cubic'"):
        F.error_interval(one, one, 3, scale="cubic")
    with pytest.raises(ValueError, match="level lies between 0 and 1, got 95"):
        F.error_interval(one, one, 3, level=95)
    with pytest.raises(
        TypeError, match=r"keys is a list of keys such as \[\('spectrum', 'd_pr'\)\], got 'd_pr'"
    ):
        tg.Jackknife("d_pr")
    with pytest.raises(
        ValueError, match=r"expects \('spectrum', 'd_pr'\) of shape \(3 \+ 1, \.\.\.\).*Replicates\(stage\)"
    ):
        td = TensorDict({"spectrum": {"d_pr": torch.ones(5)}, "replicates": {"rows": torch.ones(3)}})
        tg.Jackknife([("spectrum", "d_pr")])(td)


def test_the_stage_puts_the_value_back_and_errors_beside_it():
    rows = torch.tensor([4, 4, 4, 4, 4])
    values = 3 + torch.arange(6, dtype=torch.float64) / 10
    td = TensorDict(
        {"spectrum": {"d_pr": values, "numerical_rank": torch.arange(6)}, "replicates": {"rows": rows}}
    )
    keys = [("spectrum", "d_pr"), ("spectrum", "numerical_rank")]
    out = tg.Jackknife(keys, full=True)(td)
    found = F.group_jackknife(values, rows)
    assert float(out["spectrum", "d_pr"]) == 3.0 and int(out["spectrum", "numerical_rank"]) == 0
    assert float(out["spectrum", "d_pr_se"]) == float(found.standard_error)
    assert float(out["spectrum", "d_pr_bias"]) == float(found.bias)
    low, high = F.error_interval(values[0], found.standard_error, 4, scale="log")
    assert (float(out["spectrum", "d_pr_low"]), float(out["spectrum", "d_pr_high"])) == (
        float(low),
        float(high),
    )
    assert "numerical_rank_se" not in out["spectrum"].keys()
    values = 3 + torch.arange(6, dtype=torch.float64) / 50  # a bias that can be taken off
    found = F.group_jackknife(values, rows)
    td["spectrum", "d_pr"] = values
    td["spectrum", "numerical_rank"] = torch.arange(6)
    corrected = tg.Jackknife(keys, full=True, corrected=True, scale="linear")(td)
    middle = (corrected["spectrum", "d_pr_low"] + corrected["spectrum", "d_pr_high"]) / 2
    assert float(middle) == pytest.approx(float(values[0] - found.bias))


def test_few_groups_are_told():
    td = TensorDict({"x": torch.tensor([1.0, 2.0, 3.0]), "replicates": {"rows": torch.tensor([5, 5])}})
    with pytest.warns(
        tg.FewRowsWarning, match=r"2 group\(s\) of documents have rows.*rows of more documents"
    ):
        tg.Jackknife(["x"])(td)


def test_every_scale_is_of_a_measure_that_has_an_error():
    assert not set(SCALES) & NO_ERROR.keys()
    assert (scale_of("balanced_accuracy"), scale_of("gride_estimate"), scale_of("linear_cka")) == (
        "logit",
        "log",
        "fisher",
    )
