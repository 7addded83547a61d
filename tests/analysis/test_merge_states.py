"""The tables of an analysis from what jobs left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tensordict.nn import TensorDictModule
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import tdgeom as tg


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=50, bos_token_id=0, eos_token_id=0)
    ).eval()


def mixtral() -> torch.nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def t5() -> torch.nn.Module:
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=50)
    return T5ForConditionalGeneration(config).eval()


def batches(decoder: bool = False) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(5):
        ids = torch.randint(1, 50, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        own = {"decoder_input_ids": ids[:, :6]} if decoder else {}
        found.append({"input_ids": ids, "attention_mask": mask, **own})
    return found


def merged(folder: Path, model: torch.nn.Module, data: Any, **asked: Any) -> tg.AnalysisResults:
    files = [folder / f"part-{number}.state" for number in (1, 2)]
    for number, file in enumerate(files, 1):
        assert tg.analyze_model(model, data, shard=(number, 2), state=file, progress=False, **asked) is None
    results = tg.merge_states(files)
    assert isinstance(results, tg.AnalysisResults)
    return results


@pytest.mark.filterwarnings("ignore::tdgeom.FewRowsWarning", "ignore::tdgeom.UndefinedMeasureWarning")
@pytest.mark.parametrize("make", [gpt2, mixtral, t5])
def test_tables_of_parts_are_those_of_the_whole(tmp_path: Path, make: Any) -> None:
    """All families, an ablation, a measure by name, routers, and the stacks of an encoder-decoder."""
    asked = {
        "metrics": ["default", tg.TwoNN(discard=0.2)],
        "diagnostics": ["normalization_ablation"],
        "sample_size": 64,
    }
    data = batches(decoder=make is t5)
    expected = tg.analyze_model(make(), data, progress=False, **asked)
    found = merged(tmp_path, make(), data, **asked)
    for name in ("metrics", "novelty", "router"):
        one, other = getattr(found, name), getattr(expected, name)
        if other is None or not len(other):
            assert one is None or not len(one)
            continue
        pd.testing.assert_frame_equal(one, other, rtol=1e-8, atol=1e-10)
    pd.testing.assert_frame_equal(
        found.diagnostics["normalization_ablation"], expected.diagnostics["normalization_ablation"], rtol=1e-8
    )
    timing = {"runtime_seconds", "runtime_sec", "data_sha256", "stopped", "loader"}
    for name in expected.metadata.keys() - timing:
        assert found.metadata[name] == expected.metadata[name], name
    found.save(tmp_path / "bundle")
    again = tg.load_results(tmp_path / "bundle")
    pd.testing.assert_frame_equal(again.metrics, found.metrics)


@pytest.mark.filterwarnings("ignore::tdgeom.FewRowsWarning", "ignore::tdgeom.UndefinedMeasureWarning")
def test_a_stage_that_data_cannot_hold_is_given_again(tmp_path: Path) -> None:
    def spread(sample: torch.Tensor) -> torch.Tensor:
        return sample.var(-2).sum(-1)

    stage = TensorDictModule(spread, in_keys=["sample"], out_keys=[("spectrum", "spread")])
    settings = tg.AnalysisSettings(metrics=["spectrum", stage], sample_size=64)
    file = tmp_path / "state"
    tg.analyze_model(
        gpt2(), batches(), metrics=["spectrum", stage], sample_size=64, state=file, progress=False
    )
    with pytest.raises(TypeError, match="Give settings=AnalysisSettings"):
        tg.merge_states([file])
    found = tg.merge_states([file], settings=settings)
    expected = tg.analyze_model(
        gpt2(), batches(), metrics=["spectrum", stage], sample_size=64, progress=False
    )
    pd.testing.assert_series_equal(found.metrics["spread"], expected.metrics["spread"])
    with pytest.raises(
        ValueError, match="not the settings of then: settings.sample_size is 64 there and 32 here"
    ):
        tg.merge_states([file], settings=tg.AnalysisSettings(metrics=["spectrum", stage], sample_size=32))


def test_what_a_part_cannot_give_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state= leaves the state of a part and no results, so save_dir="):
        tg.analyze_model(gpt2(), batches(), state=tmp_path / "s", save_dir=tmp_path / "d", progress=False)
    with pytest.raises(ValueError, match="so untrained="):
        tg.analyze_model(gpt2(), batches(), state=tmp_path / "s", untrained=True, progress=False)
