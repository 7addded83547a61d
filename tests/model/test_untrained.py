"""The untrained baseline, and neighbour tables that outlive the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictSequential
from torch import nn

import models
import tdgeom as tg


def loader() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, models.VOCAB, (10, 8, 6), generator=generator)
    labels = torch.randint(0, 2, (10, 8), generator=generator)
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "label": y} for i, y in zip(ids, labels)]


@pytest.mark.parametrize("build", [models.gpt2, models.bert, models.mixtral, models.vit])
def test_a_copy_has_other_weights_and_leaves_the_model_as_it_was(build) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    fresh = tg.untrained_copy(model, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert type(fresh) is type(model) and fresh.training == model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) and fresh.state_dict()[name].shape == value.shape
    weights = [n for n, p in model.named_parameters() if p.ndim > 1]
    assert all(not torch.equal(fresh.state_dict()[name], before[name]) for name in weights)
    again = tg.untrained_copy(model, seed=3).state_dict()
    assert all(torch.equal(again[name], value) for name, value in fresh.state_dict().items())


def test_dtype_and_ties_are_kept() -> None:
    model = models.gpt2().to(torch.bfloat16)
    fresh = tg.untrained_copy(model)
    assert {p.dtype for p in fresh.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in fresh.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_plain_module_is_reset_part_by_part() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    fresh = tg.untrained_copy(model)
    assert all((parameter != 7).any() for parameter in fresh.parameters())
    assert all((parameter == 7).all() for parameter in model.parameters())


def test_parameters_without_an_initialiser_are_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))
            self.head = nn.Linear(3, 3)

    with pytest.raises(ValueError, match=r"fresh values for \['token'\].*reset_parameters.*untrained=MODEL"):
        tg.untrained_copy(Bare())


@pytest.fixture(scope="module")
def both() -> tg.AnalysisResults:
    return tg.analyze_model(
        models.gpt2(),
        loader(),
        metrics=["default", tg.TwoNN(), tg.LabelOverlap(k=4)],
        diagnostics=["normalization_ablation"],
        select={"pool": "mean", "also": ["label"]},
        neighbors=20,
        untrained=True,
        progress=False,
    )


def test_one_table_holds_both_models(both) -> None:
    alone = tg.analyze_model(
        models.gpt2(), loader(), metrics=[tg.TwoNN()], select={"pool": "mean"}, progress=False
    )
    other = tg.untrained_copy(models.gpt2(), seed=0)
    fresh = tg.analyze_model(other, loader(), metrics=[tg.TwoNN()], select={"pool": "mean"}, progress=False)
    for weights, single in (("trained", alone), ("untrained", fresh)):
        rows = both.metrics[both.metrics["weights"] == weights]
        np.testing.assert_allclose(rows["twonn_estimate"], single.metrics["twonn_estimate"], rtol=1e-9)
    assert set(both.novelty["weights"]) == {"trained", "untrained"}
    assert set(both.diagnostics["normalization_ablation"]["weights"]) == {"trained", "untrained"}
    assert {"layer_00", "untrained_layer_00"} <= set(both.eigenvalues)
    profile = tg.intrinsic_dimension_profile(both)
    assert profile["weights"].tolist() == ["trained"] * 3 + ["untrained"] * 3
    assert both.metadata["baseline"] == "untrained"


def test_pictures_and_bundle_of_both(both, tmp_path) -> None:
    folder = both.save(tmp_path / "run")
    written = tg.plot.write_plots(both, tmp_path / "plots")
    assert {path.name for path in written} >= {"spectrum.png", "profile.png"}
    loaded = tg.AnalysisResults.load(folder)
    assert loaded.metrics["weights"].tolist() == both.metrics["weights"].tolist()


def test_neighbour_tables_are_analysed_later_without_the_model(both, tmp_path) -> None:
    loaded = tg.AnalysisResults.load(both.save(tmp_path / "run")).neighbors
    sites = [site for site in both.metrics["site"][:3]]
    later = TensorDictSequential(
        tg.ForEach(tg.TwoNN(source="neighbors"), sites),
        tg.ForEach(tg.LabelOverlap(k=4, source="neighbors"), sites),
        tg.ForEachPair(tg.NeighborhoodOverlap(k=10, source="neighbors"), sites),
    )(loaded)
    trained = both.metrics[both.metrics["weights"] == "trained"].set_index("site")
    for site in sites:
        assert float(later["dimension", site, "twonn", "estimate"]) == trained.loc[site, "twonn_estimate"]
        assert float(later["neighborhood", site, "label_overlap"]) == trained.loc[site, "label_overlap"]
    live = tg.analyze_model(
        models.gpt2(),
        loader(),
        metrics=[tg.NeighborhoodOverlap(k=10)],
        select={"pool": "mean"},
        progress=False,
    )
    pair = f"{sites[0]}->{sites[1]}"
    assert float(later["between", pair, "neighborhood_overlap"]) == live.novelty["neighborhood_overlap"][0]
    assert loaded["sample_row_id"].dtype == torch.int64 and len(loaded["sample_carried", "label"]) == 80


def test_the_sample_itself_is_not_kept(both) -> None:
    assert both.result.get("sample", None) is None and both.result.get("neighbors", None) is None
    assert set(both.neighbors.keys()) == {"neighbors", "sample_carried", "sample_row_id"}


def test_a_loader_that_is_read_once_is_refused() -> None:
    with pytest.raises(ValueError, match="untrained= reads the data twice"):
        tg.analyze_model(models.gpt2(), iter(loader()), untrained=True, progress=False)


def test_a_damaged_table_is_refused(both, tmp_path) -> None:
    from tdgeom.analysis.packed_tensors import unpack

    with pytest.raises(ValueError, match="is no key"):
        unpack({"[[": np.zeros(2)})
