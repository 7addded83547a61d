"""``analyze_model``: its tables against single stages, its options, its errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential

import models
import tdgeom as tg


def loader(batches: int = 6, low: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(low, models.VOCAB, (batches, 4, 12), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


@pytest.fixture(scope="module")
def results() -> tg.AnalysisResults:
    return tg.analyze_model(models.gpt2(), loader(), diagnostics=["normalization_ablation"], progress=False)


def test_tables_hold_the_numbers_of_the_pipeline(results) -> None:
    capture = tg.Capture(models.gpt2(), "residual_input")
    s = capture.sites
    stages = [capture, tg.SelectTokens(s), tg.ForEach(tg.StreamingCovariance(), s), tg.RowSample(s)]
    stages += [
        tg.ForEach(tg.EigenSpectrum(), s),
        tg.ForEach(tg.SpectrumMetrics(), s),
        tg.ForEachPair(tg.LinearCKA(), s),
    ]
    direct = tg.run(TensorDictSequential(*stages), loader())
    np.testing.assert_allclose(results.metrics["d_pr"], tg.to_frame(direct, "spectrum")["d_pr"], rtol=1e-12)
    np.testing.assert_allclose(
        results.novelty["linear_cka"], tg.to_frame(direct, "between")["linear_cka"], rtol=1e-6
    )
    np.testing.assert_allclose(results.eigenvalues["layer_01"], direct["eigenvalues", str(s[1])], rtol=1e-12)


def test_d_pr_is_that_of_the_hidden_states(results) -> None:
    hidden = []
    for batch in loader():
        with torch.no_grad():
            hidden.append(models.gpt2()(**batch, output_hidden_states=True).hidden_states[1].flatten(0, 1))
    values = np.linalg.eigvalsh(np.cov(torch.cat(hidden).double().numpy().T))
    assert results.metrics["d_pr"][1] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-5)


def test_identity_columns(results) -> None:
    table = results.metrics
    count = len(table)
    assert table["layer"].tolist() == list(range(count)) and set(table["num_layers"]) == {count}
    np.testing.assert_allclose(table["layer_norm_depth"], np.arange(count) / (count - 1))
    np.testing.assert_allclose(table["relative_depth"], np.arange(count) / (count - 1))
    assert set(table["tokens_observed"]) == {6 * 4 * 12}
    assert set(table["hidden_dim"]) == {models.gpt2().config.n_embd}
    assert set(table["model_label"]) == {"GPT2LMHeadModel"} and set(table["model_key"]) == {"gpt2lmheadmodel"}
    assert results.novelty["transition"].tolist() == [f"{i}->{i + 1}" for i in range(count - 1)]
    assert results.novelty["layer"].tolist() == list(range(count - 1))
    assert set(results.diagnostics["normalization_ablation"]["variant"]) == {
        "raw",
        "token_l2",
        "token_rms",
        "feature_standardized",
    }
    assert list(results.eigenvalues) == [f"layer_{i:02d}" for i in range(count)]


def test_metadata_says_what_changes_a_number(results) -> None:
    metadata = results.metadata
    assert metadata["stopped"] == "end of data" and metadata["batches_observed"] == 6
    assert metadata["settings"]["sample_size"] == 4096 and metadata["settings"]["seed"] == 0
    assert metadata["settings"]["ablation_variants"][0] == "raw"
    assert metadata["hook_targets"]["residual_input.0"].endswith("h.0")
    assert metadata["parameter_count"] == sum(p.numel() for p in models.gpt2().parameters())
    assert metadata["software"]["torch"] and metadata["runtime_seconds"]["batch"] > 0
    json.dumps(results.to_dict(), allow_nan=False)


def test_numbers_of_few_rows_are_told_recorded_and_marked() -> None:
    with pytest.warns(tg.FewRowsWarning, match="few rows") as seen:
        few = tg.analyze_model(model=models.gpt2(), dataloader=loader(), max_rows=10, progress=False)
    told = [str(w.message) for w in seen if issubclass(w.category, tg.FewRowsWarning)]
    assert (
        len(told) == 1 and "SpectrumMetrics: few rows, 10" in told[0] and told[0] in few.metadata["warnings"]
    )
    assert (
        few.metrics["few_rows"].all() and few.metrics["sv_few_rows"].all() and few.novelty["few_rows"].all()
    )
    assert (few.metrics["numerical_rank"] <= 9).all() and (few.novelty["k_used"] <= 9).all()
    assert set(few.metrics["unresolved"]) == {""} and "linear_cka_debiased" in few.novelty


def test_the_budget_is_exact_and_recorded() -> None:
    short = tg.analyze_model(models.gpt2(), loader(), max_rows=50, layers="0,-1", progress=False)
    assert set(short.metrics["tokens_observed"]) == {50} and short.metadata["stopped"] == "max_rows"
    last = short.metadata["layers"][-1]
    assert short.metadata["layers"] == [0, last] and short.novelty["transition"].tolist() == [f"0->{last}"]


class Widest(tg.Stage):
    reads = {"eigenvalues": "D"}
    writes = [("spectrum", "widest")]

    def compute(self, eigenvalues: torch.Tensor) -> torch.Tensor:
        return eigenvalues[..., 0]


class Gap(tg.PairStage):
    reads = {("sample", "a"): "N D", ("sample", "b"): "N D"}
    writes = [("between", "gap")]

    def compare(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).norm(dim=-1).mean(-1)


def test_stages_of_ones_own_become_columns() -> None:
    spread = TensorDictModule(lambda x: x.std(), in_keys=["sample"], out_keys=[("custom", "spread")])
    mine = tg.analyze_model(
        models.gpt2(),
        loader(),
        metrics=[Widest(), Gap(), spread, tg.TwoNN(), tg.StreamingMean()],
        progress=False,
    )
    np.testing.assert_allclose(mine.metrics["widest"], [values[0] for values in mine.eigenvalues.values()])
    assert mine.novelty["gap"].gt(0).all() and mine.metrics["spread"].gt(0).all()
    assert mine.metrics["twonn_estimate"].gt(0).all()
    assert {len(mean) for mean in mine.metrics["mean"]} == {models.gpt2().config.n_embd}
    assert "d_pr" not in mine.metrics and "linear_cka" not in mine.novelty
    assert mine.metadata["settings"]["metrics"][0] == "Widest"


def test_families() -> None:
    only = tg.analyze_model(models.gpt2(), loader(), metrics="spectrum", progress=False)
    assert "d_pr" in only.metrics and "cos_sim_mean" not in only.metrics and only.novelty.empty
    only = tg.analyze_model(models.gpt2(), loader(), metrics=["sample"], progress=False)
    assert "cos_sim_mean" in only.metrics and "d_pr" not in only.metrics and only.eigenvalues == {}


def test_a_mixture_of_experts_has_a_router_table() -> None:
    moe = tg.analyze_model(models.mixtral(), loader(), progress=False)
    assert moe.router["site"].tolist() == [f"router_logits.{i}" for i in range(len(moe.metrics))]
    assert set(moe.router["routed_assignments"]) == {6 * 4 * 12 * models.mixtral().config.num_experts_per_tok}
    without = tg.analyze_model(models.mixtral(), loader(), output_router_logits=False, progress=False)
    assert without.router.empty
    with pytest.raises(ValueError, match="has no router_logits site"):
        tg.analyze_model(models.gpt2(), loader(), output_router_logits=True, progress=False)


def test_both_stacks_of_an_encoder_decoder() -> None:
    batches = [{**batch, "decoder_input_ids": batch["input_ids"][:, :5]} for batch in loader()]
    both = tg.analyze_model(models.t5(), batches, progress=False)
    assert set(both.metrics["stack"]) == {"encoder", "decoder"}
    assert set(both.metrics.query("stack == 'decoder'")["tokens_observed"]) == {6 * 4 * 5}
    assert all(
        "->" in pair and a.split(".")[0] == b.split(".")[0]
        for pair, a, b in both.novelty[["transition", "a", "b"]].values
    )
    with pytest.raises(ValueError, match="an iterator that can be read once"):
        tg.analyze_model(models.t5(), iter(batches), progress=False)


def test_several_kinds_are_named_by_site() -> None:
    mixed = tg.analyze_model(models.gpt2(), loader(), sites=["residual_output", "final_norm"], progress=False)
    assert mixed.metrics["site"].tolist()[-1] == "final_norm" and "final_norm" in mixed.eigenvalues
    count = len(mixed.metrics) - 1
    assert mixed.metrics["layer"].tolist() == list(
        range(count + 1)
    )  # the final norm stands behind the last block
    np.testing.assert_allclose(mixed.metrics["relative_depth"], np.arange(count + 1) / count)
    few = tg.analyze_model(
        models.gpt2(), loader(), sites=["residual_output", "final_norm"], layers=[0], progress=False
    )
    assert few.metrics["layer"].tolist() == [0, count]


def test_selection_reaches_the_rows() -> None:
    skipped = tg.analyze_model(
        models.gpt2(), loader(), select={"skip_first": 2}, metrics="spectrum", progress=False
    )
    assert set(skipped.metrics["tokens_observed"]) == {6 * 4 * 10}
    assert skipped.metadata["settings"]["select"] == {"skip_first": 2}


def test_a_saved_model_directory(tmp_path) -> None:
    model = models.gpt2()
    model.save_pretrained(tmp_path / "model")
    named = tg.analyze_model(
        str(tmp_path / "model"), loader(), save_mode="bundle", save_dir=tmp_path / "run", progress=False
    )
    direct = tg.analyze_model(model, loader(), progress=False)
    np.testing.assert_allclose(named.metrics["d_pr"], direct.metrics["d_pr"], rtol=1e-12)
    assert named.metadata["model_class"] == "GPT2LMHeadModel"
    again = tg.AnalysisResults.load(tmp_path / "run")
    np.testing.assert_array_equal(again.metrics["d_pr"], named.metrics["d_pr"])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"metrics": ["spectra"]}, ValueError, "metrics: 'spectra' is none. Did you mean 'spectrum'\\?"),
        ({"metrics": ["TwoNN"]}, ValueError, "Did you mean 'twonn'\\?"),
        ({"metrics": [print]}, TypeError, "takes family names and TensorDict modules"),
        ({"diagnostics": ["nope"]}, ValueError, "unknown diagnostics \\['nope'\\]"),
        ({"dataloader": None}, ValueError, "needs a dataloader"),
        ({"model": None}, ValueError, "analyze_model needs a model"),
        (
            {"model": None, "model_name": "no/such-model"},
            ValueError,
            "could not load the model 'no/such-model'",
        ),
        ({"dataloader": []}, ValueError, "run got no rows"),
        ({"layers": [99]}, IndexError, "layer 99 is out of range"),
    ],
)
def test_errors(options, error, text) -> None:
    given = {"model": models.gpt2(), "dataloader": loader(1), "progress": False, **options}
    with pytest.raises(error, match=text):
        tg.analyze_model(**given)


def test_a_folder_alone_is_saved_to_and_refused_before_the_model_runs(tmp_path) -> None:
    saved = tg.analyze_model(models.gpt2(), loader(1), save_dir=tmp_path / "run", progress=False)
    assert saved.artifact_dir == tmp_path / "run"
    assert (tmp_path / "run" / "metadata.json").is_file()

    def never():
        raise AssertionError("the loader was read")
        yield

    with pytest.raises(FileExistsError, match="exists already"):
        tg.analyze_model(models.gpt2(), never(), save_dir=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="save_mode takes 'bundle', 'csv' or 'json', got 'parquet'"):
        tg.analyze_model(models.gpt2(), never(), save_mode="parquet", save_dir=tmp_path / "new")


def test_results_show_in_a_line_and_as_a_table_in_notebooks(results) -> None:
    shape = f"{len(results.metrics)} x {len(results.metrics.columns)}"
    assert repr(results).startswith(f"AnalysisResults(GPT2LMHeadModel: metrics {shape}, novelty ")
    assert "normalization_ablation" in repr(results)
    assert results._repr_html_().count("<tr") == len(results.metrics) + 1


def test_tuples_are_named_by_in_keys() -> None:
    pairs = [(batch["input_ids"], batch["attention_mask"]) for batch in loader(2)]
    named = tg.analyze_model(models.gpt2(), pairs, in_keys=["input_ids", "attention_mask"], progress=False)
    direct = tg.analyze_model(models.gpt2(), loader(2), progress=False)
    np.testing.assert_array_equal(named.metrics["d_pr"], direct.metrics["d_pr"])


@pytest.mark.parametrize("name", ["documents", "sites"])
def test_what_an_analysis_selects_itself_is_refused(name) -> None:
    for owner, call in (("analyze_model", lambda **s: tg.analyze_model(models.gpt2(), loader(), **s)),
                        ("compare", lambda **s: tg.compare(models.gpt2(), models.gpt2(), loader(), **s))):  # fmt: skip
        with pytest.raises(ValueError, match=f"{owner}: select={{'{name}': ...}} is not offered"):
            call(select={name: True})


@pytest.mark.parametrize("select", [{}, {"pool": "mean"}, {"positions": "last-2"}, {"positions": [0, 2]}])
def test_the_capture_is_recorded_and_can_be_made_again(select, tmp_path) -> None:
    model = models.gpt2()
    sites = ["mlp_output", "residual_output.-1"]
    results = tg.analyze_model(
        model, loader(), sites=sites, metrics="spectrum", select=select, progress=False
    )
    loaded = tg.AnalysisResults.load(results.save(tmp_path / "run"))
    spec = tg.CaptureSpec.from_dict(loaded.metadata["capture"])
    assert spec.reduce == select.get("pool") and spec.positions == select.get("positions", "all")
    capture = spec.build(model)[0]
    assert [str(site) for site in capture.sites] == loaded.metadata["sites"]
    assert {str(s): path for s, path in capture.module_paths.items()} == loaded.metadata["hook_targets"]


def test_an_interrupted_analysis_goes_on(tmp_path) -> None:
    class Stop(Exception):
        pass

    class Once:
        """A loader that breaks off the first time it is read."""

        broken = False

        def __iter__(self):
            for index, batch in enumerate(loader()):
                if index == 4 and not self.broken:
                    self.broken = True
                    raise Stop
                yield batch

    batches, options = Once(), {"checkpoint": tmp_path / "state", "every": 2, "progress": False}
    with pytest.raises(Stop):
        tg.analyze_model(models.gpt2(), batches, **options)
    assert (tmp_path / "state").exists()
    resumed = tg.analyze_model(models.gpt2(), batches, **options)
    whole = tg.analyze_model(models.gpt2(), loader(), progress=False)
    np.testing.assert_allclose(resumed.metrics["d_pr"], whole.metrics["d_pr"], rtol=1e-9)
    np.testing.assert_allclose(resumed.novelty["linear_cka"], whole.novelty["linear_cka"], rtol=1e-9)
    assert not list(tmp_path.iterdir())


def test_an_ablation_of_ones_own_is_in_the_table_of_ablations(tmp_path) -> None:
    def clipped(rows: torch.Tensor) -> torch.Tensor:
        return rows.clamp(-1, 1)

    own = tg.NormalizationAblation(variants={"clipped": clipped})
    for asked in (
        {"diagnostics": [own]},
        {"metrics": ["spectrum", own]},
        {"diagnostics": ["normalization_ablation", own]},
    ):
        results = tg.analyze_model(
            models.gpt2(),
            loader(),
            progress=False,
            save_dir=tmp_path / str(len(asked)),
            overwrite=True,
            **asked,
        )
        table = tg.AnalysisResults.load(results.artifact_dir).diagnostics["normalization_ablation"]
        row = table[(table["variant"] == "clipped") & (table["site"] == "residual_input.1")].iloc[0]
        want = (
            tg.to_frame(results.result, "ablation")
            .query("variant == 'clipped' and site == 'residual_input.1'")
            .iloc[0]
        )
        assert row["d_pr"] == pytest.approx(want["d_pr"])
    assert {"raw", "token_l2", "clipped"} <= set(table["variant"])


@pytest.mark.filterwarnings("ignore::tdgeom.FewRowsWarning", "ignore::tdgeom.UndefinedMeasureWarning")
def test_rows_that_are_not_finite_can_be_left_out_and_are_counted() -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

        def forward(self, x):
            return self.layers(x)

    rows = torch.randn(40, 4)
    rows[7, 1] = torch.nan
    asked = {"sites": "module_output:layers.*", "in_keys": ["x"], "metrics": ["spectrum"], "progress": False}
    with pytest.raises(ValueError, match="nonfinite='drop' .of run, analyze_model and compare"):
        tg.analyze_model(Broken(), [{"x": rows}], **asked)
    found = tg.analyze_model(Broken(), [{"x": rows}], nonfinite="drop", **asked)
    assert found.metadata["dropped_rows"] == 1 and found.metadata["rows_observed"] == 39
