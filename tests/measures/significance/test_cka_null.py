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


def clustered(document: Tensor, width: int, seed: int) -> Tensor:
    """Rows that lean to a direction of their document and to the row before."""
    generator = np.random.default_rng(seed)
    own = generator.standard_normal((int(document.max()) + 1, width))[document.numpy()]
    steps = generator.standard_normal((len(document), width))
    for i in range(1, len(document)):
        steps[i] += 0.6 * steps[i - 1] * bool(document[i] == document[i - 1])
    return torch.as_tensor(own + steps) * torch.arange(1, width + 1).pow(-0.5)


def pairs_of_documents(x: np.ndarray, y: np.ndarray, document: np.ndarray) -> np.ndarray:
    """What each two documents add, row by row and about the means of all other documents: the definition, in loops."""
    names = np.unique(document)
    found = np.zeros((len(names), len(names)))
    size = [np.linalg.norm((z - z.mean(0)) @ (z - z.mean(0)).T) for z in (x, y)]
    for i, d in enumerate(names):
        for j, e in enumerate(names):
            if d == e:
                continue
            left = (document != d) & (document != e)
            parts = []
            for z, norm in zip((x, y), size):
                two = left[:, None] & left & (document[:, None] != document)  # rows of two further documents
                mean = z[np.nonzero(two)[0]].mean(0)
                apart = (z @ z.T)[two].mean()
                u, v = z[document == d], z[document == e]
                parts.append((u @ v.T - (u @ mean)[:, None] - (v @ mean)[None] + apart) / norm)
            found[i, j] = (parts[0] * parts[1]).sum()
    return found


def test_documents_are_compared_about_the_mean_of_all_others() -> None:
    document = torch.as_tensor(np.random.default_rng(0).integers(0, 11, 40)).sort().values
    x, y = clustered(document, 5, 0) + 3, clustered(document, 4, 1)
    order = torch.as_tensor(np.random.default_rng(1).permutation(40))
    null = F.linear_cka_null(x[order], y[order], document[order] * 7)
    pairs = pairs_of_documents(x.numpy(), y.numpy(), document.numpy())
    sizes = np.unique(document.numpy(), return_counts=True)[1]
    effect = sizes.sum() ** 2 / (sizes**2).sum()
    deviation = (2 * (pairs**2).sum() * effect / (effect - 2)) ** 0.5
    value = plain_cka(x.numpy(), y.numpy())
    assert float(null.null_mean) == pytest.approx(value - pairs.sum(), rel=1e-9)
    assert float(null.null_sd) == pytest.approx(deviation, rel=1e-9)
    assert float(null.z) == pytest.approx(pairs.sum() / deviation, rel=1e-9)
    assert float(null.calibrated) == pytest.approx(pairs.sum() / (1 - value + pairs.sum()), rel=1e-9)


def test_the_null_over_documents_is_that_of_documents_moved_by_brute_force() -> None:
    document = torch.arange(80).repeat_interleave(4)
    found, by_force = [], []
    for seed in range(6):
        x, y = clustered(document, 12, 2 * seed), clustered(document, 9, 2 * seed + 1)
        null = F.linear_cka_null(x, y, document)
        generator = np.random.default_rng(seed)
        blocks = y.numpy().reshape(80, 4, -1)
        draws = np.array(
            [plain_cka(x.numpy(), blocks[generator.permutation(80)].reshape(320, -1)) for _ in range(800)]
        )
        found.append((float(null.null_mean), float(null.null_sd)))
        by_force.append((draws.mean(), draws.std()))
    ratio = np.array(found) / np.array(by_force)
    assert abs(ratio[:, 0] - 1).max() < 0.15 and abs(ratio[:, 0].mean() - 1) < 0.05
    assert abs(ratio[:, 1] - 1).max() < 0.35 and abs(ratio[:, 1].mean() - 1) < 0.12


@pytest.mark.parametrize("longest", [1, 12])
def test_p_values_over_documents_are_uniform_however_long_they_are(longest: int) -> None:
    found = []
    for seed in range(300):
        lengths = np.random.default_rng(10**6 + seed).integers(1, longest + 1, 25)
        document = torch.as_tensor(np.repeat(np.arange(25), lengths))
        x, y = clustered(document, 20, 2 * seed), clustered(document, 20, 2 * seed + 1)
        found.append(float(F.linear_cka_null(x, y, document).p))
    for level in (0.05, 0.2, 0.5):
        share = np.mean(np.array(found) <= level)
        assert abs(share - level) < 3.3 * (level * (1 - level) / len(found)) ** 0.5, (level, share)


def test_the_stage_reads_documents_and_their_draws_judge_the_best_of_many() -> None:
    document = torch.arange(120) % 30
    x, y = clustered(document.sort().values, 6, 0)[document.argsort().argsort()], rows(120, 5, 1)
    want = F.linear_cka_null(x, y, document)
    ids = (document << 20) + torch.arange(120)
    stage = tg.CKANull(draws=199)
    out = dict(zip(stage.out_names, stage(sample_a=x, sample_b=y, sample_row_id=ids)))
    for name, value in want._asdict().items():
        assert float(out[f"linear_cka_{name}"]) == pytest.approx(float(value)), name
    draws = out["linear_cka_draws"]
    assert (
        draws.shape == (199,)
        and abs(float(draws.mean() - want.null_mean)) < 4 * float(want.null_sd) / 199**0.5
    )
    assert float(draws.std()) == pytest.approx(float(want.null_sd), rel=0.25)
    # two sequences that carry one document are one
    halves = torch.arange(120) % 60
    carried = dict(
        zip(stage.out_names, stage(sample_a=x, sample_b=y, sample_row_id=halves << 20, document_id=document))
    )
    assert float(carried["linear_cka_z"]) == pytest.approx(float(want.z))
    few = tg.CKANull(sample_size=60)(sample_a=x, sample_b=y, sample_row_id=ids)
    assert float(few[-1]) == 60 and float(few[2]) == pytest.approx(
        float(F.linear_cka_null(x[:60], y[:60], document[:60]).z)
    )


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
    with pytest.warns(tg.UndefinedMeasureWarning, match="null of linear CKA"):
        assert F.linear_cka_null(torch.ones(9, 2), rows(9, 2, 1), torch.arange(9)).p.isnan()
    with pytest.warns(tg.FewRowsWarning, match="calls for 8 documents"):
        assert F.linear_cka_null(rows(9, 2, 0), rows(9, 2, 1), torch.arange(9) // 2).p.isnan()
    with pytest.raises(ValueError, match="Leave draws out"):
        tg.CKANull(by="row", draws=9)
