"""What the pictures hold, read from their axes."""

from __future__ import annotations

import sys
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from tensordict import TensorDict

import models
import tdgeom as tg
from models import mixtral, text_batch
from tdgeom import plot

matplotlib.use("Agg")


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.fixture(scope="module")
def results():
    batches = [text_batch(8, 12) for _ in range(2)]
    return tg.analyze_model(
        model=mixtral(),
        dataloader=batches,
        diagnostics=["normalization_ablation"],
        novelty_k=4,
        progress=False,
    )


@pytest.fixture
def pairs():
    place = "residual_input.{}".format
    return pd.DataFrame(
        [
            {
                "a": place(i),
                "b": place(j),
                "linear_cka": 1 / (1 + j - i),
                "mine": 10.0 * i + j,
                "r2_ab": i,
                "r2_ba": j,
            }
            for i in range(9, 12)
            for j in range(i + 1, 12)
        ]
    )


def test_spectrum_draws_shares_of_variance_on_log_axes(ax):
    out = plot.spectrum(torch.tensor([3.0, 1.0, 0.0]), ax=ax)
    assert out is ax and ax.get_xscale() == ax.get_yscale() == "log"
    (line,) = ax.get_lines()
    assert line.get_xdata().tolist() == [1, 2]  # the null direction is not drawn as noise
    np.testing.assert_allclose(line.get_ydata(), [0.75, 0.25])
    assert "share" in ax.get_ylabel() and ax.get_legend() is None


def test_spectrum_takes_results_and_mappings(results):
    lines = plot.spectrum(results, Figure().subplots(), normalize=False).get_lines()
    assert [line.get_label() for line in lines] == ["layer 0", "layer 1", "layer 2"]
    np.testing.assert_allclose(
        lines[1].get_ydata(), results.eigenvalues["layer_01"][: len(lines[1].get_ydata())]
    )
    td = TensorDict({"eigenvalues": {"residual_input.0": torch.tensor([2.0, 1.0])}})
    (line,) = plot.spectrum(td, Figure().subplots()).get_lines()
    assert line.get_label() == "residual_input.0"


def test_spectrum_of_many_layers_has_a_colour_bar_instead_of_a_legend(ax):
    plot.spectrum({f"layer_{i:02d}": np.array([2.0, 1.0]) for i in range(20)}, ax)
    assert ax.get_legend() is None
    (bar,) = [other for other in ax.figure.axes if other is not ax]
    assert [tick.get_text() for tick in bar.get_yticklabels()][-1] == "layer 19"


def test_spectrum_cuts_the_cliff_of_a_null_direction(ax):
    values = np.append(np.arange(100.0, 0, -1), 1e-9)
    plot.spectrum(values, ax)
    assert len(ax.get_lines()[0].get_xdata()) == 101
    assert ax.get_ylim()[0] > 1e-6


@pytest.mark.parametrize("values", [{}, np.ones((2, 2)), np.zeros(3), np.array([])])
def test_spectrum_refuses(values):
    with pytest.raises(ValueError, match="spectrum"):
        plot.spectrum(values, Figure().subplots())


def test_profile_sorts_and_names_its_axes(ax):
    frame = pd.DataFrame({"layer": [2, 0, 1], "d_pr": [3.0, 1.0, 2.0], "se": [0.3, 0.1, 0.2]})
    assert plot.profile(frame, "d_pr", yerr="se", ax=ax) is ax
    (container,) = ax.containers
    assert container.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert container.lines[0].get_ydata().tolist() == [1, 2, 3]
    ends = [segment[:, 1].tolist() for segment in container.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [[0.9, 1.1], [1.8, 2.2], [2.7, 3.3]])
    assert ax.get_xlabel() == "layer" and "dimensions" in ax.get_ylabel()


def test_profile_draws_a_line_for_each_hue(ax, results):
    plot.profile(results.diagnostics["normalization_ablation"], "d_pr", hue="variant", ax=ax)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    # rows of one length and of one RMS differ by a factor, so their dimensions are the same line, drawn once
    assert labels == ["raw", "token_l2 = token_rms", "feature_standardized"]
    assert len({container.lines[0].get_color() for container in ax.containers}) == 3


def test_profile_takes_results_and_words(results):
    ax = plot.profile(results, "d_pr", "relative_depth", ax=Figure().subplots())
    assert ax.containers[0].lines[0].get_xdata().tolist() == [0, 0.5, 1]
    ax = plot.profile(results.novelty, "linear_cka", "transition", ax=Figure().subplots())
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0->1", "1->2"]


def test_profile_refuses_what_it_would_draw_wrongly(results):
    with pytest.raises(ValueError, match=r"hue=; candidates: \['variant'\]"):
        plot.profile(results.diagnostics["normalization_ablation"], "d_pr")
    with pytest.raises(KeyError, match=r"no column \['nothing'\]"):
        plot.profile(results, "nothing")


def grid(ax):
    return ax.images[0].get_array()


def test_matrix_is_completed_by_symmetry_in_numerical_order(ax, pairs):
    assert plot.matrix(pairs.iloc[::-1], "linear_cka", ax) is ax
    np.testing.assert_allclose(grid(ax), [[1, 1 / 2, 1 / 3], [1 / 2, 1, 1 / 2], [1 / 3, 1 / 2, 1]])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["9", "10", "11"]
    assert "layer" in ax.get_xlabel()


def test_matrix_leaves_blank_what_was_not_measured(pairs):
    values = grid(plot.matrix(pairs, "mine", Figure().subplots(), symmetric=False))
    assert values.mask.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert grid(plot.matrix(pairs, "mine", Figure().subplots(), diagonal=5.0)).diagonal().tolist() == [
        5,
        5,
        5,
    ]


def test_matrix_of_a_directed_measure_uses_both_directions(pairs):
    for name in ("r2_ab", "r2_ba"):
        values = grid(plot.matrix(pairs, name, Figure().subplots()))
        assert values[0, 2] == 9 and values[2, 0] == 11 and values.mask.diagonal().all()


def test_matrix_reads_results_and_arrays(results, ax):
    td = TensorDict({"between": {"residual_input.0->residual_input.1": {"linear_cka": torch.tensor(0.25)}}})
    assert grid(plot.matrix(td, ax=ax)).tolist() == [[1, 0.25], [0.25, 1]]
    assert [text.get_text() for text in ax.texts] == ["1.00", "0.25", "0.25", "1.00"]
    assert grid(plot.matrix(torch.eye(40), ax=Figure().subplots())).shape == (40, 40)
    assert grid(plot.matrix(results.novelty, "linear_cka", Figure().subplots())).shape == (3, 3)


def test_matrix_takes_results_for_their_table_of_pairs(results, ax):
    drawn = plot.matrix(results, "linear_cka", ax).images[0].get_array()
    expected = plot.matrix(results.novelty, "linear_cka", Figure().subplots()).images[0].get_array()
    np.testing.assert_array_equal(drawn.filled(-1), expected.filled(-1))


def test_matrix_between_two_models_is_a_rectangle():
    frame = pd.DataFrame(
        [
            {"a": f"residual_input.{i}", "b": f"b/residual_output.{j}", "m": i + j}
            for i in range(2)
            for j in range(3)
        ]
    )
    ax = plot.matrix(frame, "m", Figure().subplots())
    assert grid(ax).tolist() == [[0, 1, 2], [1, 2, 3]]
    assert ax.get_ylabel() == "layer, residual_input" and ax.get_xlabel() == "b layer, residual_output"


def test_matrix_refuses(pairs, ax):
    with pytest.raises(ValueError, match="measure=, one of"):
        plot.matrix(pairs, ax=ax)
    with pytest.raises(KeyError, match="no measure 'nothing'"):
        plot.matrix(pairs, "nothing", ax)
    with pytest.raises(ValueError, match="2-D"):
        plot.matrix(np.ones(3), ax=ax)


def test_write_plots_makes_every_picture_and_opens_none(results, tmp_path):
    before = matplotlib.pyplot.get_fignums() if "matplotlib.pyplot" in sys.modules else []
    written = plot.write_plots(results, tmp_path / "plots")
    names = ["spectrum", "profile", "between_layers", "ablation", "router"]
    assert [path.stem for path in written] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in written)
    from matplotlib import pyplot

    assert pyplot.get_fignums() == before


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, results, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "tdgeom\[report\]"'):
        plot.spectrum([2.0, 1.0])
    with pytest.raises(ModuleNotFoundError, match="report"):
        plot.write_plots(results, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


@pytest.fixture(scope="module")
def two_models() -> dict[str, tg.AnalysisResults]:
    batch = [
        {"input_ids": torch.randint(3, models.VOCAB, (12, 9), generator=torch.Generator().manual_seed(i))}
        for i in (0, 1)
    ]
    wanted = ["spectrum", "twonn", tg.Gride(range_max=8), tg.NeighborhoodOverlap(k=3)]
    made = {"one": models.gpt2(), "other": models.bert()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the ceiling")  # few tokens, that come again and again
        return {
            name: tg.analyze_model(net, batch, metrics=wanted, progress=False) for name, net in made.items()
        }


@pytest.mark.parametrize("form", ["mapping", "list", "tables", "one table", "labels"])
def test_several_models_are_lines_of_one_picture(two_models, form) -> None:
    tables = {name: one.metrics for name, one in two_models.items()}
    labels = ["GPT2LMHeadModel", "BertForMaskedLM"]
    given, names = {
        "mapping": (two_models, ["one", "other"]),
        "list": (list(two_models.values()), labels),
        "tables": (tables, ["one", "other"]),
        "one table": (pd.concat(tables, names=["model"]).reset_index("model"), ["one", "other"]),
        "labels": (pd.concat(tables.values()), labels),
    }[form]
    for hue, said in ((None, names), ("kind", [f"{name}, residual_input" for name in names])):
        ax = plot.profile(given, "d_pr", hue=hue, ax=Figure().subplots())
        assert [line.get_label() for line in ax.containers] == said
        for line, table in zip(ax.containers, tables.values()):
            np.testing.assert_array_equal(line.lines[0].get_ydata(), table["d_pr"])


def test_profiles_of_several_models(two_models) -> None:
    dimension = tg.intrinsic_dimension_profile(two_models)
    assert dimension.columns[0] == "model" and set(dimension["model"]) == {"one", "other"}
    for given in (
        two_models,
        dimension,
        {name: part for name, part in dimension.groupby("model", sort=False)},
    ):
        ax = plot.intrinsic_dimension(given, Figure().subplots())
        assert [line.get_label() for line in ax.containers] == ["twonn, one", "twonn, other"]
    scales = plot.intrinsic_dimension(two_models, Figure().subplots(), x="scale")
    assert len(scales.containers) == 6 and scales.containers[0].get_label() == "one, residual_input.0"
    overlaps = plot.overlap(two_models, Figure().subplots(), x="layer")
    assert [line.get_label() for line in overlaps.containers] == [
        "neighborhood overlap, one",
        "neighborhood overlap, other",
    ]
    lines = plot.spectrum(two_models, Figure().subplots()).get_lines()
    assert [line.get_label() for line in lines][::3] == ["one, layer 0", "other, layer 0"]
    twice = list(two_models.values())[:1] * 2
    assert set(tg.overlap_profile(twice)["model"]) == {"GPT2LMHeadModel", "GPT2LMHeadModel (2)"}
    with pytest.raises(ValueError, match="no results are given"):
        tg.overlap_profile([])


def test_a_matrix_of_two_kinds_of_weights_is_refused() -> None:
    table = pd.DataFrame(
        {"a": ["x.0"] * 2, "b": ["x.1"] * 2, "weights": ["trained", "untrained"], "linear_cka": [0.8, 0.9]}
    )
    with pytest.raises(ValueError, match="several rows of 'x.0' and 'x.1': keep one kind"):
        plot.matrix(table, "linear_cka")
    with pytest.raises(ValueError, match="a table without rows"):
        plot.matrix(table[:0], "linear_cka")
