"""Standard errors through the whole analysis: beside every measure, changing none, of whole documents."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from scipy.stats import t as student
from tensordict import TensorDict

import models
import tdgeom as tg
from tdgeom.cli.print_results import print_results
from tdgeom.measures.columns import of_chance
from tdgeom.measures.jackknife import NO_ERROR
from tdgeom.measures.registry import MEASURES, SITE_MEASURES
from tdgeom.numerics.document_groups import document_groups

DOCS = Path(__file__).parents[2] / "docs"


def has_none(column):
    """Whether a column is of those that have no error."""
    endings = NO_ERROR.keys() - {"rank"}  # no effective rank
    return column == "gride_rank" or any(column == one or column.endswith(f"_{one}") for one in endings)


def batches(count=14, rows=8, length=7):
    made = []
    for seed in range(count):
        ids = torch.randint(10, models.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


@pytest.fixture(scope="module")
def both():
    model, data = models.gpt2(), batches()
    given = {
        "progress": False,
        "sample_size": 300,
        "metrics": ["default", "rbf_cka", "rsa", "procrustes", "levina_bickel"],
    }
    return tg.analyze_model(model, data, **given), tg.analyze_model(model, data, errors=True, **given)


def test_no_number_changes(both):
    plain, errors = both
    for a, b in ((plain.metrics, errors.metrics), (plain.novelty, errors.novelty)):
        for column in a.columns:
            if a[column].dtype.kind in "fiu":
                np.testing.assert_allclose(b[column], a[column], rtol=1e-9, atol=1e-12, err_msg=column)
            else:
                pd.testing.assert_series_equal(a[column], b[column])
    for name, values in plain.eigenvalues.items():
        np.testing.assert_allclose(errors.eigenvalues[name], values, rtol=1e-9, atol=1e-12)
    assert not [name for name in plain.metrics if name.endswith("_se")]


def test_every_measure_has_its_error_beside_it(both):
    _, errors = both
    who = {"model_key", "model_label", "site", "kind", "layer", "stack", "num_layers", "layer_norm_depth", "relative_depth",
           "tokens_observed", "rows_observed", "hidden_dim", "a", "b", "transition", "novelty_k"}  # fmt: skip
    for table in (errors.metrics, errors.novelty):
        columns = list(table.columns)
        measures = [c for c in columns if c not in who and not c.endswith("_se") and not of_chance(c)]
        for name in measures:
            if has_none(name):
                assert f"{name}_se" not in columns
                continue
            assert columns[columns.index(name) + 1] == f"{name}_se"
            known = table[name].notna()
            # a share of all directions, the novelty of the whole space: no document moves them, and no error is 0
            by_definition = np.isclose(table[name], 1, atol=1e-12) | (table[name].abs() < 1e-12)
            assert ((table[f"{name}_se"] > 0) | by_definition)[known].all(), name
            known = known & ~by_definition
            assert (table.loc[known, f"{name}_se"] < 0.5 * (1 + table.loc[known, name].abs())).all(), name
    assert errors.metadata["settings"]["errors"] == {
        "method": "delete-a-group jackknife", "groups": 20, "by": "document",
    }  # fmt: skip


def test_an_error_is_that_of_the_analyses_without_each_group():
    """d_pr of the second block's input, the model called by hand on what is left."""
    model, data = models.gpt2(), batches()
    found = tg.analyze_model(model, data, errors=10, metrics="spectrum", progress=False).metrics
    ids = torch.cat([batch["input_ids"] for batch in data])
    masks = torch.cat([batch["attention_mask"] for batch in data]).bool()
    positions = (masks.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        states = model(
            input_ids=ids, attention_mask=masks.long(), position_ids=positions, output_hidden_states=True
        )
    x = states.hidden_states[1]
    sequence = torch.arange(len(ids))[:, None].expand(*masks.shape)[masks]
    group = document_groups(sequence << 20, 10)
    x = x[masks].double().numpy()

    def d_pr(kept):
        values = np.linalg.eigvalsh(np.cov(x[kept].T))
        return values.sum() ** 2 / (values**2).sum()

    left = [d_pr(np.ones(len(x), bool)), *(d_pr((group != g).numpy()) for g in range(10))]
    wanted = tg.functional.group_jackknife(torch.tensor(left), torch.bincount(group, minlength=10))
    assert float(found["d_pr"][1]) == pytest.approx(left[0], rel=1e-5)
    assert float(found["d_pr_se"][1]) == pytest.approx(float(wanted.standard_error), rel=1e-3)


def test_documents_of_the_batches_are_the_documents():
    """Sequences that are copies of each other are one document: as many errors as there are texts, not as there are copies."""
    model, data = models.gpt2(), batches(count=6)
    copied = []
    for i, batch in enumerate(data):
        document = torch.arange(8) + 8 * i
        for _ in range(4):
            copied.append({**batch, "document_id": document})
    alone = [{k: v for k, v in batch.items() if k != "document_id"} for batch in copied]
    given = {"errors": True, "metrics": "spectrum", "progress": False}
    once = tg.analyze_model(model, data, **given).metrics["d_pr_se"]
    told = tg.analyze_model(model, copied, **given).metrics["d_pr_se"]
    untold = tg.analyze_model(model, alone, **given).metrics["d_pr_se"]
    for found in (told, untold):  # copies are known by their token ids, too
        assert (found / once).between(0.5, 2.0).all()


def test_errors_travel_with_the_results(both, tmp_path):
    _, errors = both
    errors.save(tmp_path / "run")
    back = tg.AnalysisResults.load(tmp_path / "run")
    np.testing.assert_allclose(back.metrics["d_pr_se"], errors.metrics["d_pr_se"])
    assert ("spectrum", "residual_input.0", "d_pr_se") in errors.result.keys(True)


def test_wrong_requests():
    for wrong in (1, -3, "yes"):
        with pytest.raises(
            ValueError, match=r"errors is True \(20 groups of documents\), False, or a number of groups"
        ):
            tg.AnalysisSettings(errors=wrong)


def test_router_loads_have_errors():
    found = tg.analyze_model(models.mixtral(), batches(), errors=True, progress=False)
    assert len(found.router) and (found.router["router_entropy_se"] > 0).all()
    assert isinstance(found.router["load_se"][0], np.ndarray) and len(found.router["load_se"][0]) == len(
        found.router["load"][0]
    )


def test_a_stage_by_hand_takes_document_ids_from_the_batch():
    td = TensorDict({"acts": {"x": torch.randn(3, 4, 2)}, "document_id": torch.tensor([7, 7, 9])})
    rows = tg.SelectTokens(["x"], documents=True)(td)
    assert rows["carried", "document_id"].tolist() == [7] * 8 + [9] * 4
    rows = tg.SelectTokens(["x"], documents=True)(td.exclude("document_id"))
    assert rows["carried", "document_id"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_two_models_side_by_side():
    """Measures over all rows have the errors of the sample's rows; here the sample is all rows."""
    a, b, data = models.gpt2(), models.bert(), batches()
    measures = ["linear_cka_debiased", "procrustes"]
    plain = tg.compare(a, b, data, measures, layers=[1], progress=False)
    errors = tg.compare(a, b, data, measures, layers=[1], errors=True, progress=False)
    for name in plain.measures:
        np.testing.assert_allclose(errors.novelty[name], plain.novelty[name], rtol=1e-9)
    assert errors.measures == plain.measures
    columns = list(errors.novelty.columns)
    for name in errors.measures:
        assert columns[columns.index(name) + 1] == f"{name}_se" and (errors.novelty[f"{name}_se"] > 0).all()
    assert errors.metadata["settings"]["errors"]["groups"] == 20
    assert errors.matrix("procrustes_se").shape == (1, 1)


@pytest.mark.filterwarnings("ignore:jaccard_knn")
def test_profiles_have_the_errors():
    found = tg.analyze_model(
        models.gpt2(),
        batches(),
        errors=True,
        metrics=["twonn", "jaccard_knn"],
        sample_size=400,
        progress=False,
    )
    dimension, overlap = tg.intrinsic_dimension_profile(found), tg.overlap_profile(found)
    assert (dimension["estimate_se"] > 0).all() and list(dimension["estimate_se"]) == list(
        found.metrics["twonn_estimate_se"]
    )
    assert (overlap["value_se"] > 0).all() and set(overlap["measure"]) == {"jaccard_knn"}


def test_every_column_has_an_error_or_a_reason():
    """Of all measures that have a name, of the ablation and of routers."""
    who = {"model_key", "model_label", "site", "kind", "layer", "stack", "num_layers", "layer_norm_depth",
           "relative_depth", "tokens_observed", "rows_observed", "hidden_dim", "a", "b", "transition", "novelty_k",
           "variant", "tokens", "rows"}  # fmt: skip
    named = ["default", *SITE_MEASURES, *MEASURES]
    named.remove("label_overlap")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = tg.analyze_model(
            models.mixtral(), batches(6), errors=5, metrics=named, layers=[0, 1], sample_size=300, progress=False,
            diagnostics=["normalization_ablation"],
        )  # fmt: skip
    tables = {
        "metrics": found.metrics, "pairs": found.novelty, "router": found.router, **found.diagnostics,
    }  # fmt: skip
    assert {"rankme", "participation_ratio_estimate", "twonn_decimation_estimate"} <= set(found.metrics)
    assert {"cknna", "information_imbalance_ab"} <= set(found.novelty)
    for table, frame in tables.items():
        for name in frame:
            if name in who or name.endswith("_se"):
                continue
            assert has_none(name) != (f"{name}_se" in frame), (table, name)
    table = found.diagnostics["normalization_ablation"]
    assert (table["d_pr_se"] > 0).all() and (table["k90_se"] > 0).all()
    for reason in set(NO_ERROR.values()):
        assert reason in (DOCS / "errors.md").read_text()


def test_intervals_are_about_the_value_less_its_bias(both, tmp_path):
    _, errors = both
    table = tg.intervals(errors)
    row = table[(table["metric"] == "d_pr") & (table["site"] == "residual_input.1")].iloc[0]
    known = errors.metrics.set_index("site").loc["residual_input.1"]
    assert row["value"] == pytest.approx(known["d_pr"]) and row["se"] == pytest.approx(known["d_pr_se"])
    error = np.hypot(known["d_pr_se"], row["bias"] / 3)  # a bias has an error too
    reach = student.ppf(0.975, 19) * error / (row["value"] - row["bias"])
    assert row["bias"] != 0
    assert row["low"] == pytest.approx((row["value"] - row["bias"]) * np.exp(-reach))
    assert row["high"] == pytest.approx((row["value"] - row["bias"]) * np.exp(reach))
    assert set(table["table"]) == {"metrics", "pairs"} and set(table["scale"]) <= {
        "log",
        "logit",
        "fisher",
        "linear",
    }
    biases = table[table["metric"].str.contains("levina")]["bias"]
    assert biases.abs().max() < 1e-9  # subsets know no bias
    errors.save(tmp_path / "run")
    pd.testing.assert_frame_equal(tg.intervals(tmp_path / "run"), table)
    narrow = tg.intervals(errors, level=0.5)
    given = table["reason"] == ""
    assert given.mean() > 0.8 and table["low"].notna().equals(given)
    assert (narrow["high"] - narrow["low"] <= table["high"] - table["low"] + 1e-12)[given].all()


def test_intervals_of_a_comparison_and_of_several_scales():
    found = tg.compare(
        models.gpt2(), models.bert(), batches(), ["linear_cka"], layers=[1], errors=True, progress=False
    )
    table = tg.intervals(found)
    assert list(table["metric"]) == ["linear_cka"] and np.isnan(
        table["bias"][0]
    )  # over all rows, by the sample's error
    assert table["low"][0] < table["value"][0] < table["high"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tg.FewRowsWarning)
        several = tg.analyze_model(
            models.gpt2(),
            batches(),
            errors=True,
            metrics=["gride"],
            layers=[1],
            sample_size=700,
            progress=False,
        )
    steps = tg.intervals(several)
    first = steps[steps["site"] == steps["site"][0]]
    assert list(first["step"]) == list(range(len(several.metrics["gride_estimate"][0])))
    with pytest.raises(ValueError, match="no standard errors.*errors=True"):
        tg.intervals(tg.analyze_model(models.gpt2(), batches(2), metrics="spectrum", progress=False))


def test_intervals_stand_where_errors_are_shown(both, tmp_path):
    """In the tables, the bars of the report and of a plot, and the terminal: the same numbers everywhere."""
    plain, errors = both
    tidy = tg.intervals(errors).set_index(["site", "metric"])
    whole = errors.with_intervals()
    assert type(whole) is type(errors) and "d_pr_low" not in errors.metrics
    columns = list(whole.metrics)
    assert columns[columns.index("d_pr_se") + 1 :][:2] == ["d_pr_low", "d_pr_high"]
    for _, row in whole.metrics.iterrows():
        for end in ("low", "high"):
            wanted = [
                tidy.loc[(row["site"], name), end]
                for name in ("d_pr", "effective_rank", "levina_bickel_estimate")
            ]
            found = [row[f"{name}_{end}"] for name in ("d_pr", "effective_rank", "levina_bickel_estimate")]
            np.testing.assert_array_equal(found, wanted)
    pair = whole.pairs.iloc[0]
    assert pair["linear_cka_low"] == tidy.loc[(f"{pair['a']}->{pair['b']}", "linear_cka"), "low"]
    pd.testing.assert_frame_equal(plain.with_intervals().metrics, plain.metrics)

    page = errors.report(tmp_path / "report.html").read_text()
    low = whole.metrics["d_pr_low"][1]
    assert "Bars are 95 % intervals" in page and "95 % interval, from" in page and f"{low:.4g}"[:5] in page
    assert "95 % interval" not in plain.report(tmp_path / "plain.html").read_text()

    file = io.StringIO()
    print_results(errors, Console(file=file, width=100), "d_pr", True)
    assert (
        f"{low:.3f} to {whole.metrics['d_pr_high'][1]:.3f}"
        in file.getvalue().split("95 % intervals: sites")[1]
    )
    with pytest.raises(ValueError, match="no standard errors"):
        print_results(plain, Console(file=io.StringIO()), "d_pr", True)


def test_a_plot_draws_intervals_that_need_not_hold_the_value(both):
    pytest.importorskip("matplotlib").use("Agg")
    _, errors = both
    whole = errors.with_intervals().metrics
    ax = errors.plot("d_entropy", yerr="interval")
    ends = np.concatenate([np.array(lines.get_segments())[:, :, 1] for lines in ax.collections])
    np.testing.assert_allclose(ends, whole[["d_entropy_low", "d_entropy_high"]])
    with pytest.raises(KeyError, match=r"no column \['d_pr_low', 'd_pr_high'\]"):
        tg.plot.profile(errors.metrics, "d_pr", yerr="interval")
