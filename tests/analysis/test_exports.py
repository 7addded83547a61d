"""Results in other tools' formats, each read back with that tool and compared cell by cell."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import models
import tdgeom as tg


def made(steps=(None,), layers=4, kinds=("residual_output",)) -> tg.AnalysisResults:
    rng = np.random.default_rng(0)
    rows = [
        {"step": step, "site": f"{kind}.{layer}", "kind": kind, "layer": layer, "hidden_dim": 8, "d_pr": rng.random() + 3,
         "d_pr_standard_error": 0.25, "k90": int(rng.integers(9)), "near_rank1": layer == 1, "unresolved": "",
         "norm_mean": np.nan if layer == 2 else rng.random()}
        for step in steps for kind in kinds for layer in range(layers)
    ]  # fmt: skip
    metrics = pd.DataFrame(rows)
    pairs = pd.DataFrame(
        {"a": [f"residual_output.{i}" for i in range(layers - 1)], "b": [f"residual_output.{i + 1}" for i in range(layers - 1)],
         "layer": range(layers - 1), "linear_cka_debiased": rng.random(layers - 1)}
    )  # fmt: skip
    curves = pd.DataFrame({"site": ["residual_output.0"], "curve": [rng.random(5)], "said": [None]})
    return tg.AnalysisResults(
        metrics=metrics if steps != (None,) else metrics.drop(columns="step"),
        novelty=pairs,
        diagnostics={"curves": curves},
        eigenvalues={f"layer_{i:02d}": np.sort(rng.random(8))[::-1].copy() for i in range(layers)},
        metadata={"model_id": "a/b", "rows_observed": 1234, "settings": {"seed": 3}, "nothing": float("nan")},
    )


def as_cells(table):
    return table.map(lambda cell: cell.tolist() if isinstance(cell, np.ndarray) else cell)


def test_arrow_and_parquet_come_back_cell_by_cell(tmp_path):
    import pyarrow.parquet as parquet

    results = made()
    tables = results.to_arrow()
    assert set(tables) == {"metrics", "novelty", "diagnostics/curves", "eigenvalues"}
    paths = results.to_parquet(tmp_path / "out")
    assert {path.name for path in paths} == {
        "metrics.parquet",
        "novelty.parquet",
        "diagnostics_curves.parquet",
        "eigenvalues.parquet",
    }
    assert paths == results.to_parquet(tmp_path / "out")  # again, in place
    for name, table in results._tables().items():
        if not len(table.columns):
            continue
        for back in (
            tables[name].to_pandas(),
            pd.read_parquet(tmp_path / "out" / f"{name.replace('/', '_')}.parquet"),
        ):
            pd.testing.assert_frame_equal(as_cells(back), as_cells(table))
    spectra = parquet.read_table(tmp_path / "out/eigenvalues.parquet")
    frame = spectra.to_pandas()
    for name, values in results.eigenvalues.items():
        own = frame[frame["name"] == name].sort_values("rank")
        assert own["rank"].tolist() == list(range(1, 9)) and np.array_equal(own["eigenvalue"], values)
    told = json.loads(spectra.schema.metadata[b"tdgeom"])
    assert told["model_id"] == "a/b" and told["settings"] == {"seed": 3} and told["nothing"] is None


def test_without_the_libraries_it_says_what_to_install(monkeypatch):
    for name, ask in (("pyarrow", tg.AnalysisResults.to_arrow), ("xarray", tg.AnalysisResults.to_xarray)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ModuleNotFoundError, match=f"need {name}: python -m pip install {name}"):
            ask(made())


def test_layer_by_step_by_metric(tmp_path):
    import xarray

    results = made(steps=(0, 10, 30))
    array = results.to_xarray()
    assert array.dims == ("layer", "step", "metric") and array.shape == (4, 3, 5)
    for row in results.metrics.to_dict("records"):
        for metric in array["metric"].values:
            found = float(array.sel(layer=row["layer"], step=row["step"], metric=metric))
            assert found == float(row[str(metric)]) or (np.isnan(found) and np.isnan(row[str(metric)]))
    assert array["site"].values.tolist() == [f"residual_output.{i}" for i in range(4)] and array.attrs == {
        "model_id": "a/b"
    }
    array.to_netcdf(tmp_path / "geometry.nc", engine="scipy")
    xarray.testing.assert_equal(xarray.open_dataarray(tmp_path / "geometry.nc", engine="scipy").load(), array)


def test_several_sites_a_layer_and_pairs():
    results = made(kinds=("attn_output", "mlp_output"))
    array = tg.to_xarray(results)
    assert array.dims == ("site", "metric") and array["layer"].values.tolist() == [0, 1, 2, 3] * 2
    assert array["site"].values.tolist() == results.metrics["site"].tolist()
    pairs = tg.to_xarray(results, pairs=True)
    assert pairs["site"].values[0] == "residual_output.0->residual_output.1"
    assert np.array_equal(
        pairs.sel(metric="linear_cka_debiased").values, results.novelty["linear_cka_debiased"]
    )


def test_tidy_frames_and_untrained_models():
    wide = made(steps=(0, 10)).metrics
    tidy = wide.melt(["step", "site", "layer"], ["d_pr", "k90"], "metric", "value")
    array = tg.to_xarray(tidy)
    assert array.dims == ("layer", "step", "metric")
    assert float(array.sel(layer=3, step=10, metric="d_pr")) == float(wide["d_pr"].iloc[-1])
    both = pd.concat([made().metrics.assign(weights=name) for name in ("trained", "untrained")])
    assert tg.to_xarray(both).dims == ("layer", "weights", "metric")
    with pytest.raises(ValueError, match=r"one row for each of \['layer'\], got {'layer': 0} twice"):
        tg.to_xarray(pd.concat([made().metrics, made().metrics]))
    with pytest.raises(ValueError, match="a table with a column 'site'"):
        tg.to_xarray(pd.DataFrame({"x": [1]}))


def figures(card):
    """The table of a card, as a reader of Markdown takes it apart."""
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return pd.DataFrame(cells[2:], columns=cells[0])


def test_a_model_card_holds_the_figures():
    results = made()
    card = results.to_model_card()
    table = figures(card)
    assert card.startswith(
        "## Geometry of the representations\n\nMeasured on activations of `a/b` on 1,234 rows."
    )
    assert table["site"].tolist() == [f"`{site}`" for site in results.metrics["site"]]
    for shown, value in zip(table["participation ratio (dimensions)"], results.metrics["d_pr"]):
        assert shown == f"{value:.4g} ± 0.25"
    assert [text == "" for text in table["mean norm of a row"]] == [False, False, True, False]
    largest = results.metrics["d_pr"].argmax()
    assert f"- Participation ratio is largest at layer {largest}" in card and "seed 3" in card


def test_a_card_of_a_training_a_deep_model_and_hostile_names():
    results = made(steps=(0, 10), layers=40)
    results.metadata["model_id"] = "x`|<img src=x>\n# y"
    results.metrics["site"] = results.metrics["site"].str.replace("residual", "<b>|residual")
    card = results.to_model_card()
    table = figures(card)
    assert "At step 10." in card and len(table) == 13 and table["site"].iloc[-1] == "`<b>¦residual_output.39`"
    assert "\n# y" not in card and "`x'¦<img src=x> # y`" in card


def test_pictures_are_shown_from_their_folder(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    shown = re.findall(r"!\[.*?\]\((pictures/.*?)\)", made().to_model_card(tmp_path / "pictures"))
    assert shown and all((tmp_path / path).is_file() for path in shown)


def test_a_comparison_has_numbers_of_pairs_and_says_so() -> None:
    ids = torch.randint(1, models.VOCAB, (12, 8), generator=torch.Generator().manual_seed(0))
    found = tg.compare(models.gpt2(), models.gpt2(), [{"input_ids": ids}], progress=False)
    with pytest.raises(ValueError, match="no numbers of single sites here. Remedy: pairs=True"):
        found.to_xarray()
    assert "metric" in found.to_xarray(pairs=True).dims


def test_sites_of_a_long_table_keep_their_order() -> None:
    sites = ["embed", *(f"residual_output.{i}" for i in range(12))]
    table = pd.DataFrame(
        {"site": sites, "layer": [0, *range(12)], "metric": "d_pr", "value": np.arange(13.0)}
    )
    assert list(tg.to_xarray(table)["site"].values) == sites
