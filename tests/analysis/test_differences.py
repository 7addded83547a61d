"""What differs between two runs: against NumPy, and as often as its level says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats

import models
import tdgeom as tg
from tdgeom.cli import main
from tdgeom.measures.jackknife import group_jackknife


def loader(seed: int, batches: int = 10) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, models.VOCAB, (12, 8), generator=g)} for _ in range(batches)]


def analyzed(model: torch.nn.Module, seed: int, **settings) -> tg.AnalysisResults:
    return tg.analyze_model(
        model, loader(seed), metrics=["spectrum", "novelty"], errors=True, progress=False, **settings
    )


def changed(model: torch.nn.Module, size: float) -> torch.nn.Module:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp" in name:
                weight.add_(size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    return model


def test_a_run_differs_from_itself_in_nothing_and_is_paired() -> None:
    one, same = analyzed(models.gpt2(), 0), analyzed(models.gpt2(), 0)
    frame = tg.difference(one, same)
    assert not frame["differs"].any() and frame["paired"].all() and (frame["difference"] == 0).all()
    assert set(frame["table"]) == {"metrics", "pairs"} and {"d_pr", "linear_cka"} <= set(frame["metric"])


def test_the_error_of_a_paired_difference_is_that_of_the_groups_differences() -> None:
    a, b = analyzed(models.gpt2(), 0), analyzed(changed(models.gpt2(), 0.05), 0)
    frame = tg.difference(a, b).set_index(["site", "metric"])
    apart = tg.difference(a, b, paired=False).set_index(["site", "metric"])
    site = a.metrics["site"].iloc[-1]
    row = frame.loc[(site, "d_pr")]
    parts = [one.result["spectrum_parts", site, "d_pr"].numpy()[1:] for one in (a, b)]
    assert row["se"] == pytest.approx(np.sqrt(((parts[1] - parts[0]) ** 2).sum()))
    assert (parts[0] ** 2).sum() ** 0.5 == pytest.approx(a.metrics.set_index("site").loc[site, "d_pr_se"])
    slopes = [1 / row["a"], 1 / row["b"]]
    error = np.sqrt(((slopes[1] * parts[1] - slopes[0] * parts[0]) ** 2).sum())
    want = 2 * stats.t.sf(abs(np.log(row["b"] / row["a"])) / error, 19)
    assert row["p"] == pytest.approx(want) and row["se"] < apart.loc[(site, "d_pr"), "se"]


def test_welch_where_documents_differ() -> None:
    a, b = analyzed(models.gpt2(), 0), analyzed(models.gpt2(), 1)
    frame = tg.difference(a, b)
    assert not frame["paired"].any()
    row = frame[frame["metric"] == "stable_rank"].iloc[0]
    sides = [one.metrics.set_index("site").loc[row["site"], "stable_rank_se"] for one in (a, b)]
    scaled = [sides[0] / row["a"], sides[1] / row["b"]]  # of logarithms
    degrees = np.hypot(*scaled) ** 4 / sum(s**4 / 19 for s in scaled)
    t = np.log(row["b"] / row["a"]) / np.hypot(*scaled)
    assert row["p"] == pytest.approx(2 * stats.t.sf(abs(t), degrees))
    assert row["se"] == pytest.approx(np.hypot(*sides))


def test_halves_of_one_corpus_are_called_different_no_oftener_than_the_level() -> None:
    """The largest of all metrics and sites, by Holm: 16 pairs of runs of one model on documents of one kind."""
    model = models.gpt2()
    false = [
        tg.difference(*(analyzed(model, 2 * s + half, max_rows=400) for half in (0, 1)))["differs"].any()
        for s in range(16)
    ]
    assert np.mean(false) <= 0.05 + 2.5 * (0.05 * 0.95 / len(false)) ** 0.5


def test_parts_are_the_jackknifes() -> None:
    g = torch.Generator().manual_seed(0)
    values, rows = torch.randn(8, dtype=torch.float64, generator=g), torch.randint(1, 9, (7,), generator=g)
    from tensordict import TensorDict

    td = tg.Jackknife([("x", "y")], parts=True, rows="rows")(TensorDict({"x": {"y": values}, "rows": rows}))
    assert float(td["error_parts", "x", "y"][1:].square().sum().sqrt()) == pytest.approx(
        float(td["x", "y_se"])
    )
    assert float(td["x", "y_se"]) == pytest.approx(float(group_jackknife(values, rows).standard_error))


def test_what_cannot_be_compared_is_said(tmp_path) -> None:
    plain = tg.analyze_model(models.gpt2(), loader(0), metrics="spectrum", progress=False)
    one = analyzed(models.gpt2(), 0)
    with pytest.raises(ValueError, match=r"no standard errors.*errors=True \(--errors\)"):
        tg.difference(one, plain)
    other = analyzed(models.gpt2(), 0, sites="mlp_output")
    with pytest.raises(ValueError, match="no metric with an error at a common site"):
        tg.difference(one, other)
    pooled = analyzed(models.gpt2(), 0, select={"pool": "mean"})
    with pytest.raises(ValueError, match="rows of one run are tokens, of the other sequences"):
        tg.difference(one, pooled)
    with pytest.raises(ValueError, match=r"no metric \['nonsense'\]"):
        tg.difference(one, one, metrics=["nonsense"])
    short = analyzed(models.gpt2(), 0, layers=[0, 1])
    assert any("residual_input" in line for line in tg.difference(one, short).attrs["only_in_one"])


def test_the_command_line_exits_by_what_it_finds(tmp_path, capsys) -> None:
    for name, model, seed in (
        ("a", models.gpt2(), 0),
        ("same", models.gpt2(), 0),
        ("b", changed(models.gpt2(), 0.5), 0),
    ):
        analyzed(model, seed, save_dir=tmp_path / name)
    a, same, b = (str(tmp_path / name) for name in ("a", "same", "b"))
    assert main(["diff", a, same]) == 0 and "0 of" in capsys.readouterr().out
    assert main(["diff", a, b, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["differ"] == len(told["rows"]) > 0
    assert all(row["differs"] and row["p_adjusted"] <= 0.05 for row in told["rows"])
    assert main(["diff", a, str(tmp_path / "nowhere")]) == 2
    frame = tg.difference(a, b)
    assert int(frame["differs"].sum()) == told["differ"]


@pytest.mark.filterwarnings("ignore::tdgeom.FewRowsWarning", "ignore::tdgeom.UndefinedMeasureWarning")
def test_cells_of_several_values_are_compared_one_by_one(tmp_path) -> None:
    """Gride has an estimate a scale: each is a metric of its own, in memory and from disk."""
    runs = [
        tg.analyze_model(
            models.gpt2(), loader(seed), metrics=["gride"], errors=True, progress=False, sample_size=256
        )
        for seed in (0, 1)
    ]
    frame = tg.difference(*runs)
    site = runs[0].metrics["site"].iloc[0]
    cells = [np.asarray(run.metrics["gride_estimate"].iloc[0]) for run in runs]
    found = frame[(frame["site"] == site) & frame["metric"].str.startswith("gride_estimate")].sort_values(
        "metric"
    )
    assert list(found["metric"]) == [f"gride_estimate[{place}]" for place in range(len(cells[0]))]
    np.testing.assert_allclose(found["difference"], cells[1] - cells[0])
    for name, run in zip("ab", runs):
        run.save(tmp_path / name)
    again = tg.difference(*(tg.AnalysisResults.load(tmp_path / name) for name in "ab"))
    np.testing.assert_allclose(again["p"], frame["p"], rtol=1e-6)
