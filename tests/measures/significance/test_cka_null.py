"""The closed form of linear CKA's permutation null against permutations, and its p-values against their level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

import tdgeom as tg
from tdgeom import functional as F


def rows(n: int, width: int, seed: int, heavy: bool = False) -> Tensor:
    generator = np.random.default_rng(seed)
    drawn = generator.standard_t(4, (n, width)) if heavy else generator.standard_normal((n, width))
    return torch.as_tensor(drawn * generator.gamma(1.0, size=width))


def plain_cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    return norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


@pytest.mark.parametrize(
    ("n", "width", "heavy"), [(12, 4, False), (40, 64, False), (300, 20, True), (30, 200, True)]
)
def test_mean_and_spread_are_those_of_permutations(n: int, width: int, heavy: bool) -> None:
    x, y = rows(n, width, 0, heavy), rows(n, width + 3, 1, heavy)
    null = F.linear_cka_null(x, y)
    generator = np.random.default_rng(2)
    draws = np.array([plain_cka(x.numpy(), y.numpy()[generator.permutation(n)]) for _ in range(6000)])
    error = draws.std() / len(draws) ** 0.5
    assert abs(float(null.null_mean) - draws.mean()) < 4 * error
    assert float(null.null_sd) == pytest.approx(draws.std(), rel=0.06)


def test_all_permutations_of_five_rows_exactly() -> None:
    from itertools import permutations

    x, y = rows(5, 3, 0).numpy(), rows(5, 2, 1).numpy()
    draws = np.array([plain_cka(x, y[list(order)]) for order in permutations(range(5))])
    null = F.linear_cka_null(torch.as_tensor(x), torch.as_tensor(y))
    assert float(null.null_mean) == pytest.approx(draws.mean(), rel=1e-10)
    assert float(null.null_sd) == pytest.approx(draws.std(), rel=1e-10)


def test_the_value_judged_is_the_cka_and_calibrates_to_one() -> None:
    x, y = rows(80, 6, 0), rows(80, 9, 1)
    null = F.linear_cka_null(x, y)
    value = plain_cka(x.numpy(), y.numpy())
    assert float(null.z * null.null_sd + null.null_mean) == pytest.approx(value, rel=1e-9)
    assert float(null.calibrated) == pytest.approx(
        (value - float(null.null_mean)) / (1 - float(null.null_mean))
    )
    same = F.linear_cka_null(x, 3 * x + 1)
    assert float(same.calibrated) == pytest.approx(1.0) and float(same.p) < 1e-8


@given(scale=st.floats(1e-12, 1e12), offset=st.floats(-1e3, 1e3))
@settings(max_examples=15, deadline=None)
def test_scale_and_offset_change_nothing(scale: float, offset: float) -> None:
    x, y = rows(30, 4, 0), rows(30, 5, 1)
    before, after = F.linear_cka_null(x, y), F.linear_cka_null(scale * (x + offset), y)
    for a, b in zip(before, after):
        assert float(a) == pytest.approx(float(b), rel=1e-6)


def test_p_values_of_independent_sides_are_uniform() -> None:
    found = []
    for seed in range(400):
        x, y = rows(50, 8, 2 * seed), rows(50, 60, 2 * seed + 1)
        found.append(float(F.linear_cka_null(x, y).p))
    for level in (0.05, 0.2, 0.5):
        share = np.mean(np.array(found) <= level)
        assert abs(share - level) < 3.3 * (level * (1 - level) / len(found)) ** 0.5, (level, share)


def test_one_row_of_each_document_is_judged() -> None:
    x, y, document = rows(40, 3, 0), rows(40, 4, 1), torch.arange(40) % 13
    by_hand = F.linear_cka_null(x[:13], y[:13])
    for a, b in zip(F.linear_cka_null(x, y, document), by_hand):
        assert float(a) == pytest.approx(float(b), rel=1e-12)
    stage = tg.CKANull()
    out = stage(sample_a=x, sample_b=y, sample_row_id=(document << 20) + torch.arange(40))
    assert [float(value) for value in out] == pytest.approx([float(value) for value in by_hand])
    assert float(out[stage.out_names.index("linear_cka_null_rows")]) == 13


def test_moments_of_all_rows_give_the_same() -> None:
    x, y = rows(200, 5, 0, heavy=True), rows(200, 7, 1)
    td = TensorDict({("tokens", "x"): x, ("tokens", "y"): y})
    td = tg.StreamingCrossMoments(["x", "y"])(td)
    stage = tg.ForEachPair(tg.CKANull(source="moments", by="row"), ["x", "y"])
    got = stage(td)["between", "x->y"]
    want = F.linear_cka_null(x, y)
    for name, value in want._asdict().items():
        assert float(got[f"linear_cka_{name}"]) == pytest.approx(float(value), rel=1e-8), name


def test_what_cannot_be_judged_is_said() -> None:
    with pytest.raises(ValueError, match="does not know which rows are of one document"):
        tg.CKANull(source="moments")
    with pytest.raises(ValueError, match="document of shape"):
        F.linear_cka_null(rows(9, 2, 0), rows(9, 2, 1), torch.arange(8))
    with pytest.warns(tg.UndefinedMeasureWarning, match="null of linear CKA"):
        assert F.linear_cka_null(torch.ones(9, 2), rows(9, 2, 1)).p.isnan()
