"""Measures by name: the same numbers as their stages, wherever measures are asked for; packages add their own."""

from __future__ import annotations

import inspect

import pandas as pd
import pytest
import torch

import tdgeom as tg
from tdgeom.measures import registry
from tdgeom.measures.registry import ALIASES, SITE_MEASURES, known_measures, named_stages

MODEL = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
SITES = ["module_output:0", "module_output:2"]


def loader():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(200) % 3
    return [{"input": torch.randn(200, 8, generator=generator), "label": label} for _ in range(2)]


def analyzed(metrics, **settings):
    return tg.analyze_model(
        MODEL, loader(), sites=SITES, metrics=metrics, select={"also": ["label"]}, progress=False, **settings
    )


@pytest.mark.parametrize("name", SITE_MEASURES)
def test_a_name_is_its_stage_with_default_settings(name):
    stage = named_stages([name])[0]
    assert type(stage).__name__.lower().replace("_", "") in name.replace("_", "") or name == "ca_pca"
    by_name, by_stage = analyzed([name]).metrics, analyzed([stage]).metrics
    pd.testing.assert_frame_equal(by_name, by_stage)
    assert len(by_name.columns) > 11  # identity, counts and what was measured


def test_names_families_and_stages_mix_and_a_pair_measure_is_over_all_rows():
    results = analyzed(["novelty", "linear_cka_debiased", "linear_r2_ab", "2nn", tg.RankMe()], sample_size=50)
    rows = torch.cat([batch["input"] for batch in loader()])
    with torch.no_grad():
        a, b = (sites.double() for sites in (MODEL[:1](rows), MODEL(rows)))
    (pair,) = results.pairs.to_dict("records")
    assert results.pairs is results.novelty
    assert pair["linear_cka_debiased"] == pytest.approx(
        float(tg.functional.linear_cka_debiased(a, b)), rel=1e-6
    )
    assert pair["linear_r2_ab"] == pytest.approx(float(tg.functional.linear_r2_ab(a, b)), rel=1e-6)
    assert {"feature_subspace_novelty", "layer_cosine_sim"} <= pair.keys()
    assert {"twonn_estimate", "rankme"} <= set(results.metrics)


def test_every_pure_function_of_a_measure_is_a_name():
    """Functions of rows alone, or of two sides alone, that give one estimate."""
    functions = {
        name
        for name in tg.functional.__all__
        if str(inspect.signature(getattr(tg.functional, name)).return_annotation) == "DimensionEstimate"
        and next(iter(inspect.signature(getattr(tg.functional, name)).parameters)) == "x"
    }
    assert functions and functions <= set(known_measures())


def test_a_package_adds_measures_by_entry_points(monkeypatch):
    class Spread(tg.Stage):
        """The total variance.

        More about it.
        """

        reads = {"sample": "N D"}
        writes = [("spread", "total")]

        def compute(self, sample):
            return sample.var(0).sum()

    class Point:
        def __init__(self, name, made):
            self.name, self.load = name, lambda: made

    points = [Point("spread", Spread), Point("twonn", Spread), Point("broken", 3)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "tdgeom.measures" else [])
    known_measures.cache_clear()
    try:
        with pytest.raises(
            TypeError, match="entry point 'broken' of 'tdgeom.measures' should be a stage class"
        ):
            named_stages(["spread"])
        points.pop()
        assert known_measures()["spread"].says == "The total variance."
        assert isinstance(named_stages(["twonn"])[0], tg.TwoNN)
        found = analyzed(["spread"]).metrics["total"]
        rows = torch.cat([batch["input"] for batch in loader()])
        assert found[0] == pytest.approx(float(MODEL[:1](rows).detach().var(0).sum()), rel=1e-5)
    finally:
        known_measures.cache_clear()


def test_names_that_cannot_be_compared_are_refused_with_the_others():
    with pytest.raises(ValueError, match="metrics: 'twonn' is none.*tg.LinearCKA"):
        named_stages(["twonn"], between=True)
    assert set(ALIASES.values()) <= set(known_measures())
    stages = named_stages(["linear_cka"])
    assert stages[0].source == "moments" and "cross_moments" in str(stages[0].in_keys)
