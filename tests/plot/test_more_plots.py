"""Pictures beside lines, matrices and spectra, and what a result draws of itself."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from tensordict import TensorDict

import tdgeom as tg
from reported import compared, made_up
from tdgeom import plot

matplotlib.use("Agg")


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.fixture(scope="module")
def results():
    run = made_up()
    ablation = run.tables["diagnostics/normalization_ablation"]
    return tg.AnalysisResults(
        run.tables["metrics"].drop(
            columns=[name for name in run.tables["metrics"] if name.startswith("gride")]
        ),
        run.tables["novelty"],
        run.tables["router"],
        {"normalization_ablation": ablation},
        run.eigenvalues,
        dict(run.metadata),
    )


class Words:
    """A tokenizer that calls token 7 ``<7>``, with a sign that mathematics would take."""

    def decode(self, ids):
        return " ".join(f"<{i}$^$" for i in ids)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def labels(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def test_a_column_of_errors_is_drawn_unasked(results, ax):
    (container,) = plot.profile(results, "d_pr", ax=ax).containers
    ends = [np.ptp(segment[:, 1]) for segment in container.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, 1.0)  # ± 0.5
    (container,) = plot.profile(results, "d_pr", yerr=None, ax=Figure().subplots()).containers
    assert not container.has_yerr


def test_a_measure_with_a_range_has_the_whole_of_it(results):
    low, high = plot.profile(results, "isoscore", ax=Figure().subplots()).get_ylim()
    assert -0.1 < low <= 0 and 1 <= high < 1.1
    frame = pd.DataFrame({"layer": [0, 1], "cos_sim_mean": [-0.5, 0.5]})
    assert plot.profile(frame, "cos_sim_mean", ax=Figure().subplots()).get_ylim()[0] < -1
    pairs = pd.DataFrame({"a": ["x.0", "x.1"], "b": ["x.1", "x.2"], "linear_cka": 0.5, "mine": [7.0, 9.0]})
    assert plot.matrix(pairs, "linear_cka", Figure().subplots(), diagonal=None).images[0].get_clim() == (0, 1)
    assert plot.matrix(pairs, "mine", Figure().subplots(), diagonal=None).images[0].get_clim() == (7, 9)
    assert plot.matrix(pairs, "linear_cka", Figure().subplots(), vmax=0.5).images[0].get_clim() == (0, 0.5)


def test_a_cell_has_no_minus_before_a_nought(ax):
    plot.matrix(np.array([[-0.001, -0.0], [-0.01, 1.0]]), ax=ax)
    assert [text.get_text() for text in ax.texts] == ["0.00", "0.00", "-0.01", "1.00"]


def test_a_profile_of_several_scales_says_where_they_are_drawn(ax):
    table = pd.DataFrame({"layer": [0, 1], "estimate": [np.ones(3), np.ones(3)]})
    with pytest.raises(ValueError, match="several values in a row.*scale_profile"):
        plot.profile(table, "estimate", ax=ax)


def test_ablation_names_lines_that_coincide(results, ax):
    assert plot.ablation(results, "top1_share", ax) is ax
    drawn = [text.get_text() for text in ax.get_legend().get_texts()]
    assert drawn == ["raw", "token_l2 = token_rms", "feature_standardized"]
    with pytest.raises(KeyError, match="diagnostics="):
        plot.ablation(tg.AnalysisResults(results.metrics, results.novelty))


def test_router_loads(results, ax):
    grid = plot.router(results, ax).images[0].get_array()
    np.testing.assert_allclose(grid, np.stack(results.router["load"]))
    assert labels(ax.yaxis)[2] == "2" and ax.get_xlabel() == "expert"
    with pytest.raises(KeyError, match="no router"):
        plot.router(pd.DataFrame({"site": []}))


def test_scale_profile_has_a_line_a_layer(ax):
    sites = ["residual_input.0", "residual_input.1"]
    rows = TensorDict({("sample", site): torch.rand(300, 4) for site in sites})
    result = tg.ForEach(tg.TwoNN(), sites)(tg.ForEach(tg.Gride(range_max=16), sites)(rows))
    plot.scale_profile(result, ax)
    assert [c.get_label() for c in ax.containers] == sites and ax.get_xscale() == "log"
    for site, container in zip(sites, ax.containers):
        own = result["dimension", site, "gride"]
        np.testing.assert_allclose(container.lines[0].get_xdata(), own["scale"])
        np.testing.assert_allclose(container.lines[0].get_ydata(), own["estimate"])
    with pytest.raises(KeyError, match=r"several scales there are \['gride'\], with one \['twonn'\]"):
        plot.scale_profile(result, estimator="twonn")


def test_patching_grid(ax):
    kinds = {"residual_input": torch.tensor([[0.5, -0.25, 1.5]]), "z": torch.zeros(1, 3)}
    result = TensorDict({("recovered", kind): grid for kind, grid in kinds.items()})
    for kind in kinds:
        result["layers", kind], result["columns", kind] = torch.tensor([4]), torch.tensor([0, 1, 2])
    plot.patching_grid(result, "residual_input", ax, columns=["The", "Tower", "$x^$"])
    assert ax.images[0].get_array().tolist() == [[0.5, -0.25, 1.5]]
    assert ax.images[0].get_clim() == (-0.25, 1.5) and labels(ax.yaxis) == ["4"]
    assert plot.patching_grid(result, "z", Figure().subplots()).images[0].get_clim() == (0, 1)
    ax.figure.canvas.draw()
    with pytest.raises(KeyError, match=r"one of \['residual_input', 'z'\]"):
        plot.patching_grid(result)
    with pytest.raises(ValueError, match="3 columns, got 2"):
        plot.patching_grid(result, "z", columns=["a", "b"])
    several = {"layers": torch.tensor([4]), "columns": torch.tensor([0, 1])}
    several["recovered"] = TensorDict({"kl": torch.tensor([[0.0, 0.5]]), "own": torch.tensor([[1.0, 0.25]])})
    result = TensorDict({(root, "z"): value for root, value in several.items()})
    drawn = plot.patching_grid(result, ax=Figure().subplots(), metric="own")
    assert drawn.images[0].get_array().tolist() == [[1.0, 0.25]] and drawn.get_title().endswith(", own")
    for metric in (None, "other"):
        with pytest.raises(KeyError, match=r"metric= is one of \['kl', 'own'\]"):
            plot.patching_grid(result, metric=metric)


def test_attribution(ax):
    layers = pd.array([None, 0, 0, 0, 1, 1], dtype="Int64")
    kinds = ["embed", "head", "head", "mlp_output", "head", "head"]
    names = ["embed", "head.0[0]", "head.0[1]", "mlp_output.0", "head.1[0]", "head.1[1]"]
    heads = pd.array([None, 0, 1, None, 0, 1], dtype="Int64")
    each = pd.DataFrame({"component": names, "kind": kinds, "layer": layers, "head": heads})
    numbers = [1.0, 0.5, -2.0, 0.25, 1.0, 0.0]
    table = pd.concat(
        [each.assign(text=t, answer="$x^$", contribution=np.array(numbers) * (1 + t)) for t in (0, 1)]
    )
    plot.attribution(table, ax=ax)
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.75, -3.0], [1.5, 0.0]])
    assert ax.images[0].get_clim() == (-3, 3) and labels(ax.yaxis) == ["0", "1"]
    neurons = table.assign(kind=table["kind"].replace("head", "neuron"))
    neurons.attrs["soft_cap"] = 30.0
    bars = plot.attribution(neurons, ax=Figure().subplots(), top=2)
    assert [bar.get_width() for bar in bars.patches] == [-3.0, 1.5]
    assert "before its cap at 30" in bars.get_xlabel()
    with pytest.raises(ValueError, match="answer= is one of"):
        plot.attribution(table, "y")
    with pytest.raises(KeyError, match="no .'answer', 'component', 'kind', 'contribution'."):
        plot.attribution(pd.DataFrame({"x": [1]}))
    with pytest.raises(ValueError, match="a table without rows"):
        plot.attribution(table[:0])
    with pytest.raises(ValueError, match="top= is how many bars of neurons are drawn, at least 1, got 0"):
        plot.attribution(neurons, top=0)


def test_attention_of_one_head(ax):
    pattern = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    plot.attention(pattern, ["a", "$b^$"], ax)
    assert ax.images[0].get_array().tolist() == pattern.tolist() and ax.images[0].get_clim() == (0, 1)
    assert labels(ax.yaxis) == ["a", "$b^$"]
    ax.figure.canvas.draw()  # a dollar in a token is no formula
    with pytest.raises(ValueError, match=r"pattern\[example, head\]"):
        plot.attention(pattern.expand(3, 2, 2), ["a", "b"])


def test_lens_table_writes_the_first_guess_into_each_cell(ax):
    result = TensorDict({})
    for layer in range(2):
        place = ("lens", f"residual_output.{layer}")
        result[(*place, "top_tokens")] = torch.arange(12).reshape(2, 3, 2) + 100 * layer
        result[(*place, "top_probabilities")] = torch.full((2, 3, 2), 0.25 + layer / 2)
    plot.lens_table(result, Words(), ["x", "y", "$z^$"], ax, example=1, last=2)
    assert texts(ax) == ["<8$^$", "<10$^$", "<108$^$", "<110$^$"]
    assert ax.images[0].get_array().tolist() == [[0.25, 0.25], [0.75, 0.75]]
    assert labels(ax.xaxis) == ["y", "$z^$"] and labels(ax.yaxis) == ["0", "1"]
    ax.figure.canvas.draw()
    with pytest.raises(KeyError, match="logit_lens"):
        plot.lens_table(TensorDict({}), Words())


def test_concept_examples_show_value_and_text(ax):
    exemplars = TensorDict(
        {"values": torch.tensor([[3.0, 2.0]]), "context": torch.tensor([[[-1, 5, 6], [7, 8, -1]]])}
    )
    plot.concept_examples(exemplars, Words(), 0, ax, before=1)
    assert [bar.get_width() for bar in ax.patches] == [3, 2]
    assert texts(ax) == ["[[<5$^$]] <6$^$", "<7$^$ [[<8$^$]]"]
    ax.figure.canvas.draw()


def test_results_plot_themselves(results, ax):
    axes = results.plot()
    assert len(axes) == 6
    assert [one.get_ylabel() for one in axes][1:3] == [
        "participation ratio\n(dimensions)",
        "intrinsic dimension, TwoNN\n(dimensions)",
    ]
    matplotlib.pyplot.close("all")
    assert results.plot("spectrum", ax) is ax and len(ax.get_lines()) == 6
    drawn = results.plot("linear_cka", Figure().subplots()).containers[0].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, results.novelty["linear_cka"])
    with pytest.raises(KeyError, match="Did you mean 'effective_rank'"):
        results.plot("efective_rank")
    with pytest.raises(ValueError, match="nothing to draw"):
        tg.AnalysisResults(pd.DataFrame(), pd.DataFrame()).plot()


def test_a_comparison_plots_its_matrix(ax):
    run = compared()
    comparison = tg.Comparison(run.tables["metrics"], run.tables["novelty"], metadata=dict(run.metadata))
    grid = comparison.plot(ax=ax).images[0].get_array()
    np.testing.assert_allclose(grid, comparison.matrix("linear_cka_debiased"))


def test_names_from_outside_are_no_formulas(ax):
    hurt = r"$\frac{$"
    frame = pd.DataFrame(
        {
            "layer": [0, 1] * 2,
            "d_pr": [1.0, 2, 3, 4],
            "mine": [hurt] * 2 + ["b"] * 2,
            "place": ["$^$", "b"] * 2,
        }
    )
    plot.profile(frame, "d_pr", "place", hue="mine", ax=ax).figure.canvas.draw()
    plot.spectrum(
        {hurt: np.array([2.0, 1.0]), "b": np.array([2.0, 1.0])}, Figure().subplots()
    ).figure.canvas.draw()
    plot.matrix(
        pd.DataFrame({"a": [hurt], "b": ["$^$"], "m": [1.0]}), "m", Figure().subplots()
    ).figure.canvas.draw()
