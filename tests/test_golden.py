"""Every number that representation-geometry gives on the golden layers, three ways: run, stages, functions."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom import functional as F

GOLDEN = Path(__file__).parent / "data" / "golden"
LAYERS = torch.from_numpy(np.load(GOLDEN / "inputs.npz")["layers"])
REFERENCE = json.loads((GOLDEN / "reference.json").read_text())["tools"]["representation-geometry"]
SITES = [f"layer.{i}" for i in range(4)]
PAIRS = [f"{a}->{b}" for a, b in pairwise(SITES)]
FLOAT32_TOOL = 1e-4  # its sample and ablation numbers are computed in float32
EXACT = 1e-6


def close(value, expected, rel):
    assert float(value) == pytest.approx(expected, rel=rel, abs=0)


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def layers(request):
    return LAYERS.to(request.param)


@pytest.fixture(scope="module")
def rel(layers):
    return EXACT if layers.dtype == torch.float64 else FLOAT32_TOOL


@pytest.fixture(scope="module")
def result(layers):
    pipeline = TensorDictSequential(
        tg.ForEach(tg.StreamingCovariance(), SITES),
        tg.RowSample(SITES, size=4096),
        tg.ForEach(tg.EigenSpectrum(k=16), SITES),
        tg.ForEach(tg.SpectrumMetrics(), SITES),
        tg.ForEach(tg.SampleSpectrum(), SITES),
        tg.ForEach(tg.SampleMetrics(), SITES),
        tg.ForEach(tg.NormalizationAblation(), SITES),
        tg.ForEachPair(tg.SubspaceNovelty(k=16), SITES),
        tg.ForEachPair(tg.LinearCKA(), SITES, pairs="all"),
        tg.ForEachPair(tg.LayerCosine(), SITES),
    )
    batches = [
        {"tokens": {site: rows[first : first + 70] for site, rows in zip(SITES, layers)}}
        for first in range(0, 600, 70)
    ]
    return tg.run(pipeline, batches, block_rows=128, progress=False)


@pytest.mark.parametrize("i", range(4))
class TestThroughRun:
    def test_spectrum(self, result, rel, i):
        for name, expected in REFERENCE["spectrum"][i].items():
            close(result["spectrum", SITES[i], name], expected, rel)
        for value, expected in zip(result["eigenvalues", SITES[i]], REFERENCE["eigenvalues_top5"][i]):
            close(value, expected, rel)

    def test_sample_metrics(self, result, i):
        for name, expected in REFERENCE["sample_metrics"][i].items():
            close(result["sample_metrics", SITES[i], name], expected, FLOAT32_TOOL)

    def test_ablation(self, result, i):
        assert set(REFERENCE["ablation"][i]) == {"raw", "token_l2", "token_rms", "feature_standardized"}
        for variant, metrics in REFERENCE["ablation"][i].items():
            for name, expected in metrics.items():
                close(result["ablation", SITES[i], variant, name], expected, FLOAT32_TOOL)


@pytest.mark.parametrize("i", range(3))
def test_novelty_through_run(result, rel, i):
    reference = REFERENCE["novelty"][i]
    close(result["between", PAIRS[i], "feature_subspace_novelty"], reference["feature_subspace_novelty"], rel)
    close(result["between", PAIRS[i], "layer_cosine_sim"], reference["layer_cosine_sim"], FLOAT32_TOOL)
    close(result["between", PAIRS[i], "linear_cka"], reference["linear_cka"], FLOAT32_TOOL)


def test_cka_of_all_pairs_through_run(result, rel):
    found = [
        float(result["between", f"{SITES[i]}->{SITES[j]}", "linear_cka"])
        for i in range(4)
        for j in range(i + 1, 4)
    ]
    table = REFERENCE["linear_cka_float64_same_formula"]
    assert found == pytest.approx([table[i][j] for i in range(4) for j in range(i + 1, 4)], rel=rel)


@pytest.mark.parametrize("i", range(4))
def test_single_stages_on_tensors(layers, rel, i):
    rows = layers[i]
    _, _, covariance, *_ = tg.StreamingCovariance()(tokens=rows)
    values, vectors = tg.EigenSpectrum(k=16)(moments_covariance=covariance)
    metrics = dict(zip(tg.SpectrumMetrics().out_keys, tg.SpectrumMetrics()(eigenvalues=values)))
    for name, expected in REFERENCE["spectrum"][i].items():
        close(metrics["spectrum", name], expected, rel)
    stage = tg.SampleMetrics()
    metrics = dict(zip(stage.out_keys, stage(sample=rows)))
    for name, expected in REFERENCE["sample_metrics"][i].items():
        close(metrics["sample_metrics", name], expected, FLOAT32_TOOL)
    stage = tg.NormalizationAblation()
    metrics = dict(zip(stage.out_keys, stage(sample=rows)))
    for variant, expected_metrics in REFERENCE["ablation"][i].items():
        for name, expected in expected_metrics.items():
            close(metrics["ablation", variant, name], expected, FLOAT32_TOOL)
    if i:
        _, _, before, *_ = tg.StreamingCovariance()(tokens=layers[i - 1])
        _, vectors_before = tg.EigenSpectrum(k=16)(moments_covariance=before)
        novelty, _ = tg.SubspaceNovelty(k=16)(eigenvectors_a=vectors_before, eigenvectors_b=vectors)
        close(novelty, REFERENCE["novelty"][i - 1]["feature_subspace_novelty"], rel)
        cka = tg.LinearCKA()(sample_a=layers[i - 1], sample_b=rows)
        close(cka, REFERENCE["linear_cka_float64_same_formula"][i - 1][i], rel)
        cosine = tg.LayerCosine()(sample_a=layers[i - 1], sample_b=rows)
        close(cosine, REFERENCE["novelty"][i - 1]["layer_cosine_sim"], FLOAT32_TOOL)


def test_pure_functions_on_all_layers_at_once(layers, rel):
    values, vectors = F.eigen_spectrum(F.covariance(layers), k=16)
    spectrum, sample = F.spectrum_metrics(values), F.sample_metrics(layers)
    novelty = F.feature_subspace_novelty(vectors[:-1], vectors[1:])
    cosine = F.layer_cosine_sim(layers[:-1], layers[1:])
    cka = F.linear_cka(layers[:, None], layers[None])
    for i in range(4):
        for name, expected in REFERENCE["spectrum"][i].items():
            close(spectrum[name][i], expected, rel)
        for name, expected in REFERENCE["sample_metrics"][i].items():
            close(sample[name][i], expected, FLOAT32_TOOL)
        for variant, metrics in REFERENCE["ablation"][i].items():
            found = F.spectrum_metrics(F.sample_eigenvalues(F.normalized(layers[i], variant)))
            for name, expected in metrics.items():
                close(found[name], expected, FLOAT32_TOOL)
        for j in range(4):
            close(cka[i, j], REFERENCE["linear_cka_float64_same_formula"][i][j], rel)
    for i in range(3):
        close(novelty[i], REFERENCE["novelty"][i]["feature_subspace_novelty"], rel)
        close(cosine[i], REFERENCE["novelty"][i]["layer_cosine_sim"], FLOAT32_TOOL)
