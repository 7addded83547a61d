"""Computed on one machine, looked at on another: what profiles and pictures need is in the bundle."""

from __future__ import annotations

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
