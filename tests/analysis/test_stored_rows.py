"""The analysis of stored rows is that of the model whose rows they are, and needs no model."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch.utils.data import DataLoader

import models
import tdgeom as tg

WANTED = ["default", "twonn", tg.Gride(range_max=8)]


def loader():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, models.VOCAB, (6, 12, 9), generator=generator)
    return [{"input_ids": one, "label": torch.arange(12) % 3} for one in ids]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    store = tg.ActivationStore(tmp_path_factory.mktemp("store"))
    capture = tg.Capture(models.gpt2(), ["residual_input", "final_norm"])
    select = tg.SelectTokens(capture.sites, also=["label"])
    keep = tg.StoreActivations(
        store, capture.sites, also=["label"], model="my/GPT2", dataset="noise", shard_bytes=9_000
    )
    tg.run(TensorDictSequential(capture, select, keep), loader(), progress=False)
    return store.rows(keep.run_id)


@pytest.fixture(scope="module")
def live():
    options = {"sites": ["residual_input", "final_norm"], "diagnostics": ["normalization_ablation"]}
    return tg.analyze_model(models.gpt2(), loader(), metrics=WANTED, progress=False, **options)


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    apart = ["model_key", "model_label", "tokens_observed", "tokens", "rows"]
    pd.testing.assert_frame_equal(
        found.drop(columns=apart, errors="ignore"),
        expected.drop(columns=apart, errors="ignore"),
        rtol=1e-6,
        atol=1e-9,
    )


@pytest.mark.parametrize("form", ["first", "loader", "with a label", "shuffled", "DataLoader"])
def test_tables_are_those_of_the_live_model(kept, live, form) -> None:
    options = {"metrics": WANTED, "diagnostics": ["normalization_ablation"], "progress": False}
    made = {
        "first": lambda: tg.analyze_model(kept, **options),
        "loader": lambda: tg.analyze_model(dataloader=kept, **options),
        "with a label": lambda: tg.analyze_model("my/GPT2", kept, **options),
        "shuffled": lambda: tg.analyze_model(kept.shuffled(seed=1), **options),
        "DataLoader": lambda: tg.analyze_model(
            dataloader=DataLoader(kept.shuffled(), batch_size=None), **options
        ),
    }[form]()
    same(made.metrics, live.metrics)
    same(made.novelty, live.novelty)
    same(made.diagnostics["normalization_ablation"], live.diagnostics["normalization_ablation"])
    assert list(made.eigenvalues) == list(live.eigenvalues)
    expected = "stored rows" if form == "DataLoader" else "my/GPT2"
    assert set(made.metrics["model_label"]) == {expected} and made.metadata["model_id"] == expected
    pd.testing.assert_frame_equal(
        tg.intrinsic_dimension_profile(made), tg.intrinsic_dimension_profile(live), rtol=1e-6
    )


def test_sites_labels_and_saving(kept, tmp_path) -> None:
    options = {"metrics": [tg.LabelOverlap(k=5)], "select": {"also": ["label"]}, "progress": False}
    made = tg.analyze_model(
        kept, sites="residual_input", save_dir=tmp_path / "run", checkpoint=tmp_path / "state", **options
    )
    assert made.metrics["site"].tolist() == [f"residual_input.{i}" for i in range(3)]
    every = kept[:]
    expected = tg.functional.label_overlap(
        every["tokens", "residual_input.1"], every["carried", "label"], k=5
    )
    assert made.metrics["label_overlap"][1] == pytest.approx(float(expected))
    loaded = tg.load_results(tmp_path / "run")
    assert loaded.metadata["stored_run"] == kept.run and loaded.metadata["row_unit"] == "rows"
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_rows_of_ones_own_and_names_of_ones_own() -> None:
    rows = [
        {
            "tokens": {"early": torch.randn(50, 3), "late": torch.randn(50, 3)},
            "row_id": torch.arange(50) + 50 * i,
        }
        for i in (0, 1)
    ]
    made = tg.analyze_model(dataloader=[TensorDict(one) for one in rows], metrics="spectrum", progress=False)
    assert made.metrics[["site", "layer"]].values.tolist() == [["early", 0], ["late", 1]]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda rows: tg.analyze_model(rows, untrained=True), "untrained= and verify= run the model"),
        (lambda rows: tg.analyze_model(rows, sites="mlp_output"), r"no site \['mlp_output'\]; there is"),
        (
            lambda rows: tg.analyze_model(rows, select={"skip_first": 1}),
            "skip_first has nothing to choose from",
        ),
        (lambda rows: tg.analyze_model(rows, layers=[0]), "layers has nothing to choose from"),
        (lambda rows: tg.analyze_model(dataloader=iter(rows)), "this iterator can be read once"),
        (lambda rows: tg.analyze_model(dataloader=loader()), "needs a model: .* the first batch has"),
    ],
)
def test_what_needs_a_model_says_so(kept, call, said) -> None:
    with pytest.raises(ValueError, match=said):
        call(kept)
