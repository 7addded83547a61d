"""One-pass cross moments against the N x N definitions, for every way of cutting and merging the same rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from tdgeom.core.for_each_pair import ForEachPair
from tdgeom.measures.similarity.cca import CCA, PWCCA, SVCCA
from tdgeom.measures.similarity.linear_cka import LinearCKA, linear_cka_debiased
from tdgeom.measures.similarity.linear_r2 import LinearR2
from tdgeom.measures.similarity.procrustes import Procrustes
from tdgeom.stream.cross_moments import StreamingCrossMoments

PAIR = ["s.0", "s.1"]


def hsic1(k, m):
    """Song et al. 2012, from N x N kernels."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    middle = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return ((k * m).sum() + middle - 2 / (n - 2) * (k.sum(0) @ m.sum(0))) / (n * (n - 3))


def full_debiased(x, y):
    x, y = (np.asarray(side, dtype=np.float64) for side in (x, y))
    k, m = ((s - s.mean(0)) @ (s - s.mean(0)).T for s in (x, y))
    return hsic1(k, m) / np.sqrt(hsic1(k, k) * hsic1(m, m))


def batch(*sites):
    return TensorDict({("tokens", f"s.{i}"): x for i, x in enumerate(sites)}, batch_size=[])


def streamed(sites, size, stage=None, **kwargs):
    stage = stage or StreamingCrossMoments([f"s.{i}" for i in range(len(sites))], **kwargs)
    for start in range(0, len(sites[0]), size):
        stage.update(batch(*(x[start : start + size] for x in sites)))
    return stage


def published(stage):
    return stage.publish(TensorDict({}, batch_size=[]))


def measured(td, measure, sites=PAIR, **kwargs):
    return ForEachPair(measure, sites, **kwargs)(td.clone())["between"]


def rows(n=257, d=40, e=24, offset=0.0, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.logspace(0, -1, d, dtype=torch.float64)
    y = 0.3 * x[:, :e] + torch.randn(n, e, generator=g, dtype=torch.float64)
    return (x + offset).to(dtype), (y - offset).to(dtype)


def leaves(x, y):
    """Every documented leaf, in NumPy."""
    x, y = x.double().numpy(), y.double().numpy()
    u, w = x - x.mean(0), y - y.mean(0)
    a, b = (u**2).sum(1), (w**2).sum(1)
    n = len(x)
    site = lambda x, u, a: {
        "count": n, "mean": x.mean(0), "covariance": u.T @ u / (n - 1), "norm4": (a**2).sum(), "norm2_x": a @ u,
    }  # fmt: skip
    pair = {
        "cross_covariance": u.T @ w / (n - 1),
        "norm2_product": a @ b,
        "x_norm2y": b @ u,
        "y_norm2x": a @ w,
    }
    return {"s.0": site(x, u, a), "s.1": site(y, w, b), "s.0->s.1": pair}


@pytest.mark.parametrize("offset", [0, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 64, 256, 257])  # 256: a last batch of one row
def test_debiased_cka_over_all_rows_equals_the_full_computation(offset, dtype, size):
    x, y = rows(offset=offset, dtype=dtype)
    found = measured(published(streamed((x, y), size)), LinearCKA(estimator="debiased", source="moments"))[
        "s.0->s.1", "linear_cka_debiased"
    ]
    assert found.item() == pytest.approx(full_debiased(x, y), abs=1e-7 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_rows(dtype):
    x, y = rows(256, 768, 768, offset=1000, dtype=dtype)
    td = published(streamed((x, y), 100))
    found = measured(td, LinearCKA(estimator="debiased", source="moments"))["s.0->s.1", "linear_cka_debiased"]
    assert found.item() == pytest.approx(full_debiased(x, y), abs=1e-7)


@pytest.mark.parametrize("size", [1, 50, 257])
@pytest.mark.parametrize("offset", [0, 1000])
def test_every_leaf_is_what_it_is_documented_to_be(size, offset):
    x, y = rows(offset=offset)
    td = published(streamed((x, y), size))["cross_moments"]
    for where, expected in leaves(x, y).items():
        assert set(td[where].keys()) - {"relative_error"} == set(expected)
        for name, value in expected.items():
            scale = np.abs(value).max()
            # sums that cancel, of rows that have lost the offset's digits already
            tolerance = (1e-9 if offset else 1e-12) * scale
            np.testing.assert_allclose(
                td[where, name], value, rtol=0, atol=tolerance, err_msg=f"{where} {name}"
            )


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 5), st.sampled_from([0.0, 1000.0])
)
def test_any_split_order_and_merge_gives_the_same_leaves(sizes, cut, offset):
    x, y = rows(sum(sizes), 6, 4, offset)
    whole = published(streamed((x, y), len(x)))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(cut))
    shards = [StreamingCrossMoments(PAIR) for _ in range(2)]
    start = 0
    for i, size in enumerate(sizes):
        part = order[start : start + size]
        shards[int(i >= cut)].update(batch(x[part], y[part]))
        start += size
    merged = published(shards[0].merge_(shards[1]))
    if len(x) == 1:
        return
    for key in whole.keys(True, True):
        scale = whole[key].abs().max().item()
        tolerance = (1e-9 if offset else 1e-12) * scale
        torch.testing.assert_close(merged[key], whole[key], rtol=0, atol=tolerance, msg=str(key))


def test_merging_leaves_the_other_stage_as_it_was():
    x, y = rows(50)
    first, second = streamed((x[:20], y[:20]), 7), streamed((x[20:], y[20:]), 30)
    before = published(second)
    merged = published(first.merge_(second))
    after = published(second)
    for key in before.keys(True, True):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)
    expected = published(streamed((x, y), 50))
    torch.testing.assert_close(
        merged["cross_moments", "s.0->s.1", "x_norm2y"], expected["cross_moments", "s.0->s.1", "x_norm2y"]
    )


def test_merged_shards_of_float32_rows_with_an_offset():
    x, y = rows(600, offset=1000, dtype=torch.float32)
    shards = [streamed((x[a:b], y[a:b]), 64) for a, b in ((0, 1), (1, 130), (130, 600))]
    stage = StreamingCrossMoments(PAIR)
    for shard in shards:
        stage.merge_(shard)
    found = measured(published(stage), LinearCKA(estimator="debiased", source="moments"))
    assert found["s.0->s.1", "linear_cka_debiased"].item() == pytest.approx(full_debiased(x, y), abs=1e-7)


@pytest.mark.parametrize(("dtype", "far"), [(torch.float64, 1), (torch.float32, 30)])
def test_a_jump_of_the_mean_between_batches(dtype, far):
    # the first rows lie far from all others: sums about the first rows' mean would lose their digits
    x, y = rows(300)
    x[:far] += 1e3
    y[:far] -= 1e3
    x, y = x.to(dtype), y.to(dtype)
    found = measured(published(streamed((x, y), 1)), LinearCKA(estimator="debiased", source="moments"))
    assert found["s.0->s.1", "linear_cka_debiased"].item() == pytest.approx(full_debiased(x, y), abs=1e-7)


@pytest.mark.parametrize("far", [20.0, 1500.0])
def test_debiased_cka_with_massive_features_in_float32(far):
    # one entry of the covariance then holds the norm, and no rounding averages out
    x, y = rows(2048, 768, 768)
    x[:, 3] *= far
    y[:, 5] = y[:, 5] * far + 2 * x[:, 3]
    x, y = x.float(), y.float()
    found = measured(published(streamed((x, y), 2048)), LinearCKA(estimator="debiased", source="moments"))
    assert found["s.0->s.1", "linear_cka_debiased"].item() == pytest.approx(full_debiased(x, y), abs=2e-8)


@pytest.mark.parametrize(("count", "size"), [(1, 300), (1, 3000), (2, 3000), (16, 3000)])
def test_debiased_cka_with_massive_rows_in_float32(count, size):
    """One row with nearly all variance: all but a millionth of Σ(u·w)² is what rows have with themselves."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 64, generator=g, dtype=torch.float64)
    y = 0.5 * x + torch.randn(1500, 64, generator=g, dtype=torch.float64)
    massive = torch.randperm(1500, generator=g)[:count]
    x[massive, 7] += size
    y[massive, 7] += size * (1 + 0.01 * torch.randn(count, generator=g, dtype=torch.float64))
    x, y = x.float(), y.float()
    expected = full_debiased(x.double(), y.double())
    td = published(streamed((x, y), 700))
    found = measured(td, LinearCKA(estimator="debiased", source="moments"))["s.0->s.1", "linear_cka_debiased"]
    assert found.item() == pytest.approx(expected, abs=1e-6)
    assert linear_cka_debiased(x, y).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast_once(dtype):
    x, y = (side.to(dtype) for side in rows())
    found = measured(published(streamed((x, y), 100)), LinearCKA(estimator="debiased", source="moments"))
    assert found["s.0->s.1", "linear_cka_debiased"].item() == pytest.approx(
        full_debiased(x.double(), y.double()), abs=1e-7
    )


@pytest.mark.parametrize(
    "stage", [LinearCKA, CCA, PWCCA, SVCCA, Procrustes, LinearR2], ids=lambda stage: stage.__name__
)
@pytest.mark.parametrize("offset", [0, 10])
def test_source_moments_gives_the_value_of_the_sample_form(stage, offset):
    x, y = rows(offset=offset)
    x[:, 5] = 0.1 + offset  # a constant feature
    td = published(streamed((x, y), 64))
    td["sample"] = batch(x, y)["tokens"]
    extra = {"ridge": 0.2} if stage is LinearR2 else {"estimator": "both"} if stage is LinearCKA else {}
    found, expected = measured(td, stage(source="moments", **extra)), measured(td, stage(**extra))
    for name, value in expected["s.0->s.1"].items():
        torch.testing.assert_close(found["s.0->s.1", name], value, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("stage", [CCA, PWCCA, LinearR2], ids=lambda stage: stage.__name__)
def test_moments_of_float32_blocks_with_a_massive_feature(stage):
    x, y = rows(2000, 12, 8)
    x[:, 3] *= 1500
    td = published(streamed((x.float(), y.float()), 300))
    td["sample"] = batch(x.float(), y.float())["tokens"]
    found, expected = measured(td, stage(source="moments")), measured(td, stage())
    for name, value in expected["s.0->s.1"].items():
        torch.testing.assert_close(found["s.0->s.1", name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("offset", [0, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_features_that_depend_on_each_other(dtype, offset):
    """float32 products leave noise where the covariance is singular: it is no direction."""
    g = torch.Generator().manual_seed(0)
    few = torch.randn(3000, 8, generator=g, dtype=torch.float64)
    sides = few[:, :5], few[:, 3:]
    wide = [side @ torch.randn(5, d, generator=g, dtype=torch.float64) for side, d in zip(sides, (40, 30))]
    td = published(streamed([(side + offset).to(dtype) for side in wide], 700))
    for stage in (CCA, LinearR2):
        td["sample"] = batch(*(wide if stage is LinearR2 else sides))["tokens"]
        found, expected = measured(td, stage(source="moments")), measured(td, stage())
        for name, value in expected["s.0->s.1"].items():
            torch.testing.assert_close(found["s.0->s.1", name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("pairs", ["all", "consecutive", [("s.2", "s.0"), ("s.1", "s.3")]])
def test_pairs_of_sites_of_different_width(pairs):
    g = torch.Generator().manual_seed(0)
    sites = [torch.randn(90, d, generator=g, dtype=torch.float64) for d in (5, 3, 8, 4)]
    names = [f"s.{i}" for i in range(4)]
    td = published(streamed(sites, 32, pairs=pairs))
    found = measured(td, LinearCKA(estimator="debiased", source="moments"), names, pairs=pairs)
    wanted = {"all": 6, "consecutive": 3}.get(pairs if isinstance(pairs, str) else "", 2)
    assert len(found.keys()) == wanted
    for pair in found.keys():
        i, j = (int(site[-1]) for site in pair.split("->"))
        expected = full_debiased(sites[i], sites[j])
        assert found[pair, "linear_cka_debiased"].item() == pytest.approx(expected, abs=1e-12)
        u, w = (s - s.mean(0) for s in (sites[i], sites[j]))
        cross = td["cross_moments", pair]
        torch.testing.assert_close(cross["cross_covariance"], u.mT @ w / 89)
        torch.testing.assert_close(cross["x_norm2y"], u.mT @ w.square().sum(1))
        torch.testing.assert_close(cross["y_norm2x"], w.mT @ u.square().sum(1))


def test_published_leaves_are_copies():
    x, y = rows(50)
    stage = streamed((x, y), 50)
    first = published(stage)
    kept = first.clone()
    stage.update(batch(x + 1, y))
    for key in kept.keys(True, True):
        torch.testing.assert_close(first[key], kept[key], rtol=0, atol=0)


def test_state_dict_reset_and_half():
    x, y = rows(50)
    stage = streamed((x, y), 20)
    other = StreamingCrossMoments(PAIR)
    other.load_state_dict(stage.state_dict())
    other.half()
    a, b = published(stage), published(other)
    for key in a.keys(True, True):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
    other.reset()
    assert other.is_empty
    with pytest.raises(ValueError, match="no rows"):
        published(other)


def test_update_compiles_to_one_graph():
    x, y = rows(60, 6, 4)
    plain, compiled = StreamingCrossMoments(PAIR), StreamingCrossMoments(PAIR)
    for stage in (plain, compiled):
        stage.update(batch(x[:20], y[:20]))
    torch.compile(compiled.update, fullgraph=True, backend="eager")(batch(x[20:], y[20:]))
    plain.update(batch(x[20:], y[20:]))
    for (name, a), b in zip(plain.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_state_above_the_memory_limit_is_refused_before_it_is_made():
    x, y = rows(4, 300, 300)
    with pytest.raises(ValueError, match=r"sketch=1024.*pairs="):
        streamed((x, y), 4, memory=3 * 8 * 300**2 - 1)
    assert not streamed((x, y), 4, memory=3 * 8 * 300**2).is_empty
    wide = torch.zeros(1, 65536)  # two covariances and a cross covariance: 103 GB
    with pytest.raises(ValueError, match="96.0 GiB"):
        streamed((wide, wide), 1)


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="non-empty list of different sites"):
        StreamingCrossMoments(["a", "a"])
    with pytest.raises(ValueError, match="not among the sites"):
        StreamingCrossMoments(["a", "b"], pairs=[("a", "c")])
    with pytest.raises(ValueError, match="equal groups"):
        StreamingCrossMoments(["a", "b"], sketch=100, groups=16)
    x, y = rows(20)
    stage = streamed((x, y), 20)
    with pytest.raises(ValueError, match=r"widths \[40, 24\].*\[39, 24\]"):
        stage.update(batch(x[:, 1:], y))
    with pytest.raises(ValueError, match="same N"):
        stage.update(batch(x[1:], y))
    with pytest.raises(ValueError, match="NaN or Inf"):
        stage(batch(x * torch.nan, y))
    with pytest.raises(ValueError, match="width"):
        stage.merge_(streamed((y, x), 20))
    with pytest.raises(ValueError, match="same settings"):
        stage.merge_(streamed((x, y), 20, pairs=[("s.1", "s.0")]))


def test_another_root_for_the_leaves():
    stage = StreamingCrossMoments(["a", "b"], out_keys="cm")
    assert ("cm", "a->b", "cross_covariance") in stage.out_keys
    assert ("cm", "b", "norm4") in stage.out_keys


def _sketched(sites, seed, sketch=64, groups=16, estimator="both"):
    stage = StreamingCrossMoments(PAIR, sketch=sketch, groups=groups, seed=seed)
    td = published(streamed(sites, 100, stage))
    return measured(td, LinearCKA(estimator=estimator, source="sketch"))["s.0->s.1"]


def test_a_sketch_is_unbiased_and_knows_its_error():
    x, y = rows(120, 90, 70, offset=10)
    td = published(streamed((x, y), 50))
    exact = measured(td, LinearCKA(estimator="both", source="moments"))["s.0->s.1"]
    runs = [_sketched((x, y), seed, sketch=192) for seed in range(40)]
    for name in ("linear_cka", "linear_cka_debiased"):
        values = torch.stack([run[name] for run in runs])
        errors = torch.stack([run[f"{name}_standard_error"] for run in runs])
        spread = values.std()
        assert (values.mean() - exact[name]).abs() < 3 * spread / len(runs) ** 0.5, name
        assert 0.6 < errors.square().mean().sqrt() / spread < 1.7, name
        assert spread < 0.1


def test_a_sketch_of_independent_rows_is_at_zero():
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(200, 300, generator=g, dtype=torch.float64) for _ in range(2))
    run = _sketched((x, y), 0, sketch=256, estimator="debiased")
    value, error = run["linear_cka_debiased"], run["linear_cka_debiased_standard_error"]
    assert (value - full_debiased(x, y)).abs() < 4 * error < 0.2


def test_a_sketch_of_identical_sites_is_exactly_one():
    x, _ = rows(100, 50)
    run = _sketched((x, x.clone()), 0)
    for name in ("linear_cka", "linear_cka_debiased"):
        assert run[name].item() == pytest.approx(1, abs=1e-12)
        assert run[f"{name}_standard_error"].item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_sketch_does_not_depend_on_batches_or_merging(size):
    x, y = rows(100, 50, 30, offset=100)
    whole = published(streamed((x, y), 100, sketch=32, groups=8))
    parts = [streamed((x[a:b], y[a:b]), size, sketch=32, groups=8) for a, b in ((0, 30), (30, 100))]
    merged = published(parts[0].merge_(parts[1]))
    for key in whole.keys(True, True):
        tolerance = 1e-6 * whole[key].abs().max().item()
        torch.testing.assert_close(merged[key], whole[key], rtol=0, atol=tolerance, msg=str(key))
    assert whole["cross_moments", "s.0->s.1", "cross_covariance"].shape == (32, 32)
    assert whole["cross_moments", "s.0", "mean"].shape == (50,)


def test_leaves_of_a_sketch_are_not_taken_for_exact_ones():
    x, y = rows(100, 50, 30)
    td = published(streamed((x, y), 100, sketch=32, groups=8))
    with pytest.raises(ValueError, match="norm4"):
        measured(published(streamed((x, y), 100)), LinearCKA(source="sketch"))
    with pytest.raises(ValueError, match="same D"):
        measured(td, CCA(source="moments"))
    with pytest.raises(ValueError, match="source='sketch'"):
        measured(td, LinearCKA(source="moments"))
    as_wide = published(streamed((x, x), 100, sketch=50, groups=5))  # as many projections as features
    for measure in (CCA, SVCCA, PWCCA, LinearR2, Procrustes):
        with pytest.raises(
            ValueError, match=rf"{measure.__name__} expects exact moments.*\(50, 50\) and a table as norm4"
        ):
            measured(as_wide, measure(source="moments"))


@pytest.mark.parametrize(
    "sites",
    [[3, 4], [("m", "x.0"), ("m", "x.1")], (f"x.{i}" for i in range(2))],
    ids=["numbers", "tuples", "generator"],
)
def test_sites_are_numbers_tuples_or_a_generator(sites):
    sites = list(sites) if isinstance(sites, list) else sites
    stage = StreamingCrossMoments(sites)
    x, y = rows(100, 6, 5)
    td = stage(TensorDict({stage.in_keys[0]: x, stage.in_keys[1]: y}))
    names = list(stage.sites)
    listed = [key[1:] for key in stage.in_keys]
    measure = ForEachPair(
        LinearCKA(source="moments"), [site if len(site) > 1 else site[0] for site in listed]
    )
    measure(td)
    expected = LinearCKA()(sample_a=x, sample_b=y)
    assert td["between", f"{names[0]}->{names[1]}", "linear_cka"].item() == pytest.approx(
        expected.item(), rel=1e-6
    )
