"""Normalisation ablation: every variant against explicit NumPy, and variants of one's own."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.measures.normalization import VARIANTS
from tdgeom.measures.spectrum_metrics import SPECTRUM_MARKS, SPECTRUM_METRICS


def rows(n=80, d=10, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 3, d).double() + 1
    x[:, 4] *= 40
    return x.to(dtype)


def explicit(x, variant, position):
    x = x.double().numpy()
    if variant == "token_l2":
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    if variant == "token_rms":
        return x / np.sqrt((x**2).mean(1, keepdims=True))
    if variant == "feature_standardized":
        return (x - x.mean(0)) / x.std(0, ddof=1)
    if variant == "remove_top_pc":
        centred = x - x.mean(0)
        u, s, vt = np.linalg.svd(centred, full_matrices=False)
        s[0] = 0
        return (u * s) @ vt
    if variant == "drop_outlier_features":
        variance = x.var(0, ddof=1)
        return np.where(variance > 25 * np.sort(variance)[(x.shape[1] - 1) // 2], 0, x)
    if variant == "without_first_token":
        return x[position > 0]
    return x


POSITION = torch.arange(80) % 7
ROW_ID = (torch.arange(80) // 7 << POSITION_BITS) | POSITION


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_against_numpy(variant):
    x = rows()
    found = tg.NormalizationAblation(variants=[variant])(TensorDict(sample=x, sample_row_id=ROW_ID))
    normalised = explicit(x, variant, POSITION.numpy())
    values = np.linalg.eigvalsh(np.cov(normalised.T))[::-1].clip(0)
    values[values < 1e-12 * values[0]] = 0
    expected = F.spectrum_metrics(torch.from_numpy(values.copy()))
    for name in SPECTRUM_METRICS:
        # sqrt of a rounding-level eigenvalue is what effective_rank sees of a removed direction
        rel = 1e-5 if name == "effective_rank" else 1e-8
        value = float(found["ablation", variant, name])
        assert value == pytest.approx(float(expected[name]), rel=rel, nan_ok=True), name
    np.testing.assert_allclose(
        F.normalized(x, variant, POSITION).numpy(),
        normalised,
        rtol=1e-9,
        atol=1e-9 * np.abs(normalised).max(),
    )


def test_l2_and_rms_differ_by_scale_only():
    x = rows()
    l2, rms = (F.sample_eigenvalues(F.normalized(x, v)) for v in ("token_l2", "token_rms"))
    torch.testing.assert_close(rms, 10 * l2, rtol=1e-10, atol=1e-14)


def test_default_variants_and_their_order():
    stage = tg.NormalizationAblation()
    assert list(dict.fromkeys(key[1] for key in stage.out_keys)) == [
        "raw", "token_l2", "token_rms", "feature_standardized"
    ]  # fmt: skip
    assert len(stage.out_keys) == 4 * len(SPECTRUM_METRICS + SPECTRUM_MARKS)
    assert [key[2] for key in stage.out_keys[-3:]] == list(SPECTRUM_MARKS)


def test_variants_of_ones_own_see_rows_and_positions():
    seen = []

    def clipped(sample):
        return sample.clamp(-1, 1)

    def tail(sample, position):
        seen.append(position)
        return sample[position >= 3]

    stage = tg.NormalizationAblation(variants={"clipped": clipped, "tail": tail, "plain": "raw"})
    x = rows()
    td = stage(TensorDict(sample=x, sample_row_id=ROW_ID))
    assert torch.equal(seen[0], POSITION)
    for name, kept in (("clipped", x.clamp(-1, 1)), ("tail", x[POSITION >= 3]), ("plain", x)):
        expected = F.spectrum_metrics(F.sample_eigenvalues(kept))
        for metric in SPECTRUM_METRICS:
            assert float(td["ablation", name, metric]) == pytest.approx(
                float(expected[metric]), rel=1e-9, nan_ok=True
            )


@pytest.mark.parametrize(
    "variant",
    [torch.nn.GELU(), torch.tanh, partial(torch.pow, exponent=3), lambda x, p=3: x**p],
    ids=["module", "builtin", "partial", "default"],
)
def test_a_variant_may_be_any_callable_of_the_sample(variant):
    x = rows()
    td = tg.NormalizationAblation(variants={"own": variant})(TensorDict(sample=x))
    expected = F.spectrum_metrics(F.sample_eigenvalues(variant(x)))["d_pr"]
    assert float(td["ablation", "own", "d_pr"]) == pytest.approx(float(expected), rel=1e-9)


def test_a_bound_method_of_the_sample_alone():
    class Shift:
        def by_one(self, sample):
            return sample.square()

    x = rows()
    td = tg.NormalizationAblation(variants={"own": Shift().by_one})(TensorDict(sample=x))
    expected = F.spectrum_metrics(F.sample_eigenvalues(x.square()))["d_pr"]
    assert float(td["ablation", "own", "d_pr"]) == pytest.approx(float(expected), rel=1e-9)


def test_another_stage_as_metrics_from_rows_or_from_eigenvalues():
    class Width(tg.Stage):
        reads = {"sample": "N D"}
        writes = [("anything", "spread"), ("anything", "rows")]

        def compute(self, sample):
            return sample.std(), torch.tensor(sample.shape[0])

    x = rows()
    stage = tg.NormalizationAblation(variants=["raw", "without_first_token", "token_rms"], metrics=Width())
    td = stage(TensorDict(sample=x, sample_row_id=ROW_ID))
    assert stage.out_keys[:2] == [("ablation", "raw", "spread"), ("ablation", "raw", "rows")]
    torch.testing.assert_close(td["ablation", "raw", "spread"], x.std())
    assert int(td["ablation", "without_first_token", "rows"]) == int((POSITION > 0).sum())
    torch.testing.assert_close(td["ablation", "token_rms", "spread"], F.normalized(x, "token_rms").std())
    largest = TensorDictModule(lambda v: v[..., 0], in_keys=["eigenvalues"], out_keys=["largest"])
    td = tg.NormalizationAblation(metrics=largest)(TensorDict(sample=x))
    torch.testing.assert_close(td["ablation", "raw", "largest"], F.sample_eigenvalues(x)[0])


def test_roots_and_lists_of_out_keys():
    stage = tg.NormalizationAblation(variants=["raw", "token_l2"], out_keys=("mine", "here"))
    assert stage.out_keys[0] == ("mine", "here", "raw", "d_pr")
    names = [f"k{i}" for i in range(2 * len(SPECTRUM_METRICS + SPECTRUM_MARKS))]
    td = tg.NormalizationAblation(variants=["raw", "token_l2"], out_keys=names)(TensorDict(sample=rows()))
    plain = tg.NormalizationAblation(variants=["raw", "token_l2"])(TensorDict(sample=rows()))
    for own, key in zip(names, [("ablation", v, m) for v in ("raw", "token_l2") for m in SPECTRUM_METRICS]):
        assert float(td[own]) == pytest.approx(float(plain[key]), nan_ok=True)
    with pytest.raises(ValueError, match="writes 38 leaves"):
        tg.NormalizationAblation(variants=["raw", "token_l2"], out_keys=names[:3])


def test_errors():
    with pytest.raises(ValueError, match=r"unknown variants \['l2'\]; one of \['raw', 'token_l2'"):
        tg.NormalizationAblation(variants=["l2"])
    with pytest.raises(ValueError, match="unknown variants"):
        tg.NormalizationAblation(variants=[])
    with pytest.raises(TypeError, match="variants is a list of names or a mapping, got 'raw'"):
        tg.NormalizationAblation(variants="raw")
    with pytest.raises(ValueError, match=r"must read 'eigenvalues' or 'sample' alone, LinearCKA reads"):
        tg.NormalizationAblation(metrics=tg.LinearCKA())
    with pytest.raises(
        ValueError, match="'without_first_token' needs 'sample_row_id', which RowSample writes"
    ):
        tg.NormalizationAblation(variants=["without_first_token"])(TensorDict(sample=rows()))
    with pytest.raises(ValueError, match=r"variant 'l2' is unknown: one of \['raw'"):
        F.normalized(rows(), "l2")


def test_constant_columns_and_rows_of_zeros_stay_finite():
    x = rows()
    x[:, 2] = 7.0
    x[5] = 0.0
    td = tg.NormalizationAblation()(TensorDict(sample=x))
    for variant in ("raw", "token_l2", "token_rms", "feature_standardized"):
        assert td["ablation", variant, "d_pr"].isfinite()
    assert (F.normalized(x, "token_l2")[5] == 0).all()
    x[5] = x[6]
    td = tg.NormalizationAblation()(TensorDict(sample=x))
    assert (F.normalized(x, "feature_standardized")[:, 2] == 0).all()
    standard = np.corrcoef(np.delete(x.numpy(), 2, 1).T)
    expected = np.linalg.eigvalsh(standard)[::-1]
    assert float(td["ablation", "feature_standardized", "top1_share"]) == pytest.approx(
        expected[0] / expected.sum(), rel=1e-9
    )


def test_a_constant_column_far_from_zero_is_not_noise_in_float32():
    x = rows(dtype=torch.float32)
    x[:, 2] = 1234.567
    values = F.sample_eigenvalues(F.normalized(x, "feature_standardized"))
    td = tg.NormalizationAblation(variants=["feature_standardized"])(TensorDict(sample=x))
    expected = np.linalg.eigvalsh(np.corrcoef(np.delete(x.double().numpy(), 2, 1).T))[::-1]
    assert float(td["ablation", "feature_standardized", "top1_share"]) == pytest.approx(
        expected[0] / expected.sum(), rel=1e-4
    )
    assert float(values[0] / values.sum()) == pytest.approx(expected[0] / expected.sum(), rel=1e-4)


def test_batched_over_layers_equals_one_by_one():
    x = torch.stack([rows(), rows() * 2 + torch.randn(80, 10)])
    names = [name for name in VARIANTS if name != "without_first_token"] + ["without_first_token"]
    stage = tg.NormalizationAblation(variants=names)
    together = stage(TensorDict(sample=x, sample_row_id=ROW_ID))
    for i in range(2):
        alone = stage(TensorDict(sample=x[i], sample_row_id=ROW_ID))
        for key in stage.out_keys:
            if key[-1] == "effective_rank" and key[1] == "remove_top_pc":
                continue  # the removed direction is rounding noise, and its root is not small
            assert float(together[key][i]) == pytest.approx(float(alone[key]), rel=1e-8, nan_ok=True), key


def test_first_tokens_found_through_a_run():
    acts = torch.randn(6, 5, 4, dtype=torch.float64)
    mask = torch.ones(6, 5, dtype=torch.int64)
    mask[0, :2] = 0
    pipeline = TensorDictSequential(
        tg.SelectTokens(["x"]),
        tg.RowSample(["x"], size=100),
        tg.ForEach(tg.NormalizationAblation(variants=["without_first_token"]), ["x"]),
    )
    result = tg.run(pipeline, [{"acts": {"x": acts}, "attention_mask": mask}], progress=False)
    rest = torch.cat([acts[0, 3:], acts[1:, 1:].flatten(0, 1)])
    expected = F.spectrum_metrics(F.sample_eigenvalues(rest))["d_pr"]
    found = result["ablation", "x", "without_first_token", "d_pr"]
    assert float(found) == pytest.approx(float(expected), rel=1e-9)
