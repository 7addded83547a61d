"""Computed on one machine, looked at on another: what profiles and pictures need is in the bundle."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import models
import tdgeom as tg


def loader(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids():
        return torch.randint(3, models.VOCAB, (12, 9), generator=generator)

    return [{"input_ids": ids(), "decoder_input_ids": ids()} for _ in range(4)]


@pytest.mark.filterwarnings("ignore:.*the ceiling:UserWarning")  # few tokens, that come again and again
@pytest.mark.parametrize("mode", ["bundle", "json"])
@pytest.mark.parametrize("model, stacks", [(models.gpt2, None), (models.t5, {"encoder", "decoder"})])
def test_profiles_of_a_loaded_analysis_are_those_of_the_fresh_one(model, stacks, mode, tmp_path):
    fresh = tg.analyze_model(
        model(),
        loader(),
        metrics=["novelty", "twonn", tg.NeighborhoodOverlap(k=5)],
        untrained=True,
        progress=False,
    )
    loaded = tg.AnalysisResults.load(fresh.save(tmp_path / "run", mode))
    for profile in (tg.intrinsic_dimension_profile, tg.overlap_profile):
        frame = profile(fresh)
        assert set(frame["weights"]) == {"trained", "untrained"}
        assert stacks is None or set(frame["stack"]) == stacks
        pd.testing.assert_frame_equal(profile(loaded), frame)
    for name in ("metrics", "novelty"):
        numbers = getattr(fresh.baseline, name).select_dtypes("number")
        pd.testing.assert_frame_equal(getattr(loaded.baseline, name)[numbers.columns], numbers)


def test_half_precision_and_words_of_a_result_are_kept_as_a_bundle_can(tmp_path):
    class Corner(tg.Stage):
        """One number in half precision."""

        reads = {"sample": "N D"}
        writes = [("corner", "value")]

        def compute(self, sample):
            return sample[0, 0].bfloat16()

    fresh = tg.analyze_model(models.gpt2(), loader()[:1], metrics=[Corner()], progress=False)
    loaded = tg.AnalysisResults.load(fresh.save(tmp_path / "run"))
    key = ("corner", "residual_input.0", "value")
    assert loaded.result[key].dtype is torch.float32 and loaded.result[key] == fresh.result[key].float()
    assert loaded.metadata["stopped"] == fresh.result["run", "stopped"]


@pytest.fixture(scope="module")
def whole() -> tg.AnalysisResults:
    return tg.analyze_model(
        models.gpt2(),
        loader(),
        sites=["residual_input", "final_norm"],
        metrics=["default", "twonn", tg.Gride(range_max=8)],
        diagnostics=["normalization_ablation"],
        untrained=True,
        neighbors=5,
        run_metadata={"grant": "1"},
        progress=False,
    )


def same(one: tg.AnalysisResults, other: tg.AnalysisResults) -> None:
    for name in ("metrics", "novelty", "router"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name))
    for name, table in one.diagnostics.items():
        pd.testing.assert_frame_equal(other.diagnostics[name], table)
    assert list(one.eigenvalues) == list(other.eigenvalues)
    for name, values in one.eigenvalues.items():
        np.testing.assert_array_equal(other.eigenvalues[name], values)
    for kept in ("result", "neighbors"):
        own, read = getattr(one, kept), getattr(other, kept)
        assert set(own.keys(True, True)) == set(read.keys(True, True))
        assert all((own[key] == read[key]).all() or own[key].isnan().any() for key in own.keys(True, True))
    assert one.result["run", "stopped"] == other.result["run", "stopped"]


@pytest.mark.parametrize("mode", ["csv", "json"])
def test_everything_that_an_analysis_holds_comes_back(whole, mode, tmp_path):
    loaded = tg.load_results(whole.save(tmp_path / "run", mode))
    same(whole, loaded)
    same(whole.baseline, loaded.baseline)
    assert loaded.baseline.metadata["model_class"] == whole.baseline.metadata["model_class"]
    drawn = [
        sorted(path.name for path in one.write_plots(tmp_path / str(i)))
        for i, one in enumerate((whole, loaded))
    ]
    assert drawn[0] == drawn[1] != []


def test_csv_and_json_stand_side_by_side(whole, tmp_path):
    folder = whole.save(tmp_path / "run", "csv")
    (folder / "notes.txt").write_text("mine")
    assert whole.save(folder, "json") == folder
    names = {path.name for path in folder.rglob("*")}
    assert {"metrics.csv", "metrics.json", "novelty.csv", "novelty.json", "notes.txt"} <= names
    same(whole, tg.AnalysisResults.load(folder))
    (folder / "metrics.csv").unlink()
    with pytest.raises(ValueError, match="metrics.csv is missing"):
        tg.AnalysisResults.load(folder)


def test_what_was_loaded_elsewhere_is_written_beside_in_the_other_format(whole, tmp_path):
    folder = whole.save(tmp_path / "run", "json")
    tg.load_results(folder).save(folder, "csv")
    same(whole, tg.load_results(folder))


@pytest.mark.parametrize("change", ["format", "table", "metadata", "array"])
def test_other_results_never_come_beside_or_over_the_first(whole, change, tmp_path):
    folder = whole.save(tmp_path / "run", "csv")
    other = replace(whole)
    if change == "table":
        other.metrics = other.metrics.assign(d_pr=1.0)
    elif change == "metadata":
        other.metadata = {**other.metadata, "run_name": "another"}
    elif change == "array":
        other.eigenvalues = {**other.eigenvalues, "residual_input.0": other.eigenvalues["residual_input.1"]}
    with pytest.raises(FileExistsError, match="exists already"):
        other.save(folder, "csv" if change == "format" else "json")
    assert not (folder / "metrics.json").exists()
    same(whole, tg.load_results(folder))


def test_metadata_have_the_keys_of_the_seed(whole, tmp_path):
    seed = "artifact_schema_version model_id model_class max_tokens tokens_observed batches_observed num_blocks layers hook_point"
    seed += " hook_targets sample_limit novelty_k metrics diagnostics input_device runtime_sec save_mode run_name tokenizer"
    seed = [*seed.split(), "dataset", "model_config", "software", "run_metadata"]
    assert set(seed) <= set(whole.metadata)
    written = json.loads((whole.save(tmp_path / "run") / "metadata.json").read_text())
    assert {*seed, "artifact_dir"} <= set(written) and written["save_mode"] == "bundle"
    assert written["num_blocks"] == 3 and written["max_tokens"] == 100_000 and written["sample_limit"] == 4096
    assert written["runtime_sec"] == pytest.approx(sum(whole.metadata["runtime_seconds"].values()))
    assert {"python", "torch", "pandas", "transformers"} <= set(written["software"])
    assert written["hook_targets"]["residual_input.1"] == "transformer.h.1"
    moved = shutil.copytree(tmp_path / "run", tmp_path / "moved")
    assert tg.load_results(moved).metadata["artifact_dir"] == str(moved)


def test_a_comparison_comes_back_as_one(tmp_path):
    made = tg.compare(models.gpt2(), models.gpt2(), loader(), metrics=["linear_cka_debiased"], progress=False)
    for loaded in (tg.load_results(made.save(tmp_path / "run")), tg.AnalysisResults.load(tmp_path / "run")):
        assert isinstance(loaded, tg.Comparison)
        pd.testing.assert_frame_equal(loaded.matrix(), made.matrix())
        pd.testing.assert_frame_equal(loaded.metrics, made.metrics)


def test_grids_of_patching_results_of_a_run_and_tables_travel_too(tmp_path):
    ids = torch.randint(3, models.VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    runs = {"input_ids": ids}, {"input_ids": ids.flip(1)}
    grid = tg.activation_patching(models.gpt2(), *runs, answers=(3, 4), progress=False)
    probed = pd.DataFrame(
        {"site": ["embed"], "label": ["07"], "stack": [None], "accuracy": [0.5], "auc": [float("nan")]}
    )
    run = tg.run(tg.StreamingCovariance(), [{"tokens": torch.randn(30, 4)}], progress=False)
    for number, result in enumerate((grid, run)):
        loaded = tg.load_results(tg.save_results(result, tmp_path / str(number)))
        assert list(map(str, loaded.keys(True, True))) == list(map(str, result.keys(True, True)))
        for key in result.keys(True, True):
            torch.testing.assert_close(loaded[key], result[key], rtol=0, atol=0, equal_nan=True)
    assert loaded["run", "stopped"] == "end of data"
    for mode in ("csv", "json"):
        back = tg.load_results(tg.save_results(probed, tmp_path / mode, mode))
        pd.testing.assert_frame_equal(back, probed)
    with pytest.raises(TypeError, match="takes AnalysisResults, a TensorDict or a DataFrame, got list"):
        tg.save_results([1], tmp_path / "list")
