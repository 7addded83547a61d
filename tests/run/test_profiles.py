"""Profiles over layers: the numbers of the stages, in a table; their places; their pictures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import models
import tdgeom as tg
from tdgeom.run.site_places import relative_depths, site_places

SITES = ["attn_input.0", "attn_input.1", "attn_input.2", "final_norm"]


@pytest.fixture(scope="module")
def samples() -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    rows = {
        ("sample", site): torch.rand(300, 2 + i, generator=generator)
        @ torch.rand(2 + i, 12, generator=generator)
        for i, site in enumerate(SITES)
    }
    label = torch.randint(0, 3, (300,), generator=generator)
    return TensorDict({**rows, ("sample_carried", "label"): label})


@pytest.fixture(scope="module")
def result(samples) -> TensorDict:
    return TensorDictSequential(
        tg.ForEach(tg.TwoNN(), SITES),
        tg.ForEach(tg.Gride(range_max=16), SITES),
        tg.ForEachPair(tg.NeighborhoodOverlap(k=10), SITES, pairs="all"),
        tg.ForEach(tg.LabelOverlap(k=10), SITES),
    )(samples.clone())


def test_one_row_for_each_site_estimator_and_scale(samples, result) -> None:
    frame = tg.intrinsic_dimension_profile(result)
    assert len(frame) == 4 * (1 + 4)  # Gride at n = 1, 2, 4, 8
    assert list(frame.columns) == [
        "site", "kind", "layer", "stack", "relative_depth", "estimator", "step", "rank", "estimate", "standard_error", "scale",
        "rows", "duplicates", "near_duplicates",
    ]  # fmt: skip
    for site in SITES:
        alone = tg.functional.twonn(samples["sample", site])
        row = frame[(frame["site"] == site) & (frame["estimator"] == "twonn")].iloc[0]
        assert row["estimate"] == float(alone.estimate) and row["scale"] == float(alone.scale)
        assert row["rows"] == 300 and row["duplicates"] == 0
        scales = frame[(frame["site"] == site) & (frame["estimator"] == "gride")]
        assert scales["step"].tolist() == [0, 1, 2, 3] and scales["rank"].tolist() == [1, 2, 4, 8]
        assert np.isnan(row["rank"]) and (np.diff(scales["scale"]) > 0).all()
        np.testing.assert_allclose(
            scales["estimate"], tg.functional.gride(samples["sample", site], range_max=16).estimate
        )


def test_the_dimension_of_planes_is_found(result) -> None:
    frame = tg.intrinsic_dimension_profile(result)
    estimates = frame[frame["estimator"] == "twonn"].set_index("site")["estimate"]
    for i, site in enumerate(SITES):
        assert estimates[site] == pytest.approx(2 + i, rel=0.2)


def test_overlaps_of_pairs_and_labels(samples, result) -> None:
    frame = tg.overlap_profile(result)
    pairs = frame[frame["measure"] == "neighborhood_overlap"]
    assert len(pairs) == 6 and len(frame[frame["measure"] == "label_overlap"]) == 4
    one = pairs[(pairs["site"] == SITES[0]) & (pairs["other"] == SITES[3])].iloc[0]
    expected = tg.functional.neighborhood_overlap(
        samples["sample", SITES[0]], samples["sample", SITES[3]], k=10
    )
    assert one["value"] == float(expected)
    assert (one["relative_depth"], one["other_relative_depth"]) == (0.0, 1.0)
    labels = frame[frame["measure"] == "label_overlap"].set_index("site")["value"]
    expected = tg.functional.label_overlap(
        samples["sample", SITES[1]], samples["sample_carried", "label"], k=10
    )
    assert labels[SITES[1]] == float(expected)


def test_relative_depths() -> None:
    assert list(relative_depths(SITES).values()) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    bert = ["attn_input.0", "attn_input.1", "residual_output.1"]
    assert list(relative_depths(bert).values()) == [0, 0.5, 1]
    assert list(relative_depths(["embed", "residual_output.0", "residual_output.4"]).values()) == [0, 0, 1]
    stacks = relative_depths(["encoder.attn_input.0", "encoder.attn_input.3", "decoder.attn_input.1"])
    assert list(stacks.values()) == [0, 1, 1]
    assert np.isnan(relative_depths(["module_output:head"])["module_output:head"])


@pytest.mark.parametrize(
    "sites, layers",
    [
        (["embed", "residual_output.0", "residual_output.1", "final_norm"], [0, 0, 1, 2]),
        (["attn_input.0", "attn_input.1", "residual_output.1"], [0, 1, 1]),
        (["final_norm", "residual_input.4"], [5, 4]),
        (
            ["encoder.residual_output.1", "encoder.final_norm", "decoder.embed", "decoder.final_norm"],
            [1, 2, 0, 0],
        ),
        (["a/residual_output.3", "a/final_norm", "b/residual_output.1", "b/final_norm"], [3, 4, 1, 2]),
        (["module_output:h.1.mlp", "module_output:h.1.attn", "module_output:h.7.mlp"], [1, 1, 7]),
        (["module_output:0", "module_output:2"], [0, 2]),
        (["module_output:layer1.0", "module_output:layer1.1", "module_output:layer2.0"], [0, 1, 2]),
        (["module_output:wte", "module_output:h.0", "module_output:ln_f"], [0, 1, 2]),
        (["residual_input.0", "residual_input.5", "module_output:lm_head"], [0, 5, 6]),
        (["early", "late"], [0, 1]),
    ],
)
def test_every_site_has_a_layer(sites, layers) -> None:
    assert [part["layer"] for part in site_places(sites).values()] == layers
    assert not np.isnan(list(relative_depths(sites).values())).any()
    rows = TensorDict({("sample", site): torch.rand(40, 3) for site in sites})
    frame = tg.intrinsic_dimension_profile(tg.ForEach(tg.TwoNN(), sites)(rows))
    assert dict(zip(frame["site"], frame["layer"])) == dict(zip(sites, layers))
    for x in ("layer", "relative_depth"):
        ax = tg.plot.intrinsic_dimension(frame, Figure().subplots(), x=x)
        drawn = [bars.lines[0].get_xdata() for bars in ax.containers]
        assert sum(np.isfinite(np.asarray(line, dtype=float)).sum() for line in drawn) == len(sites)


def test_depths_of_two_models_in_one_table_are_each_ones_own() -> None:
    depths = relative_depths(
        ["a/residual_output.0", "a/residual_output.6", "b/residual_output.0", "b/residual_output.2"]
    )
    assert list(depths.values()) == [0, 1, 0, 1]


def test_what_has_no_profile_says_so(samples) -> None:
    with pytest.raises(KeyError, match=r"nothing under 'dimension'.*Put tg.ForEach\(tg.TwoNN\(\).*metrics="):
        tg.intrinsic_dimension_profile(samples)
    with pytest.raises(KeyError, match=r"nothing of .*neighborhood_overlap.*ForEachPair\(tg.Neighborhood"):
        tg.overlap_profile(samples)
    with pytest.raises(ValueError, match="AnalysisResults without a result.*source='neighbors'"):
        tg.overlap_profile(tg.AnalysisResults(pd.DataFrame(), pd.DataFrame()))


def test_hidden_state_sites_are_one_more_than_blocks() -> None:
    assert tg.hidden_state_sites(models.gpt2()) == SITES
    assert tg.hidden_state_sites(models.bert()) == [*SITES[:3], "residual_output.2"]
    both = tg.hidden_state_sites(models.t5())
    assert [site for site in both if site.startswith("decoder")][-1] == "decoder.final_norm"
    with pytest.raises(ValueError, match="Linear has no 'attn_input' site"):
        tg.hidden_state_sites(torch.nn.Linear(2, 2))


def test_pictures_hold_the_numbers(result) -> None:
    frame = tg.intrinsic_dimension_profile(result)
    ax = tg.plot.intrinsic_dimension(result)
    drawn = ax.get_lines()[0]
    twonn = frame[frame["estimator"] == "twonn"]
    np.testing.assert_allclose(drawn.get_xdata(), twonn["relative_depth"])
    np.testing.assert_allclose(drawn.get_ydata(), twonn["estimate"])
    scales = tg.plot.intrinsic_dimension(result, x="scale")
    gride = frame[(frame["estimator"] == "gride") & (frame["site"] == SITES[0])]
    np.testing.assert_allclose(scales.get_lines()[0].get_xdata(), gride["scale"])
    labels = tg.plot.overlap(result).get_legend_handles_labels()[1]
    assert labels == ["neighborhood overlap", "label overlap"]
