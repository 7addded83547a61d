"""What a similarity is by chance, beside it in the tables: against the pure functions on rows gathered by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

import models
import tdgeom as tg
from tdgeom import functional as F
from tdgeom.analysis.null_stages import null_stages, with_joint_p


def batches(count: int = 5, rows: int = 6) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(count):
        ids = torch.randint(3, models.VOCAB, (rows, 9), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def hidden(model: torch.nn.Module, given: list[dict[str, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """What each block reads, one row a token, and which sequence each row is of."""
    rows, sequence = [], []
    for number, batch in enumerate(given):
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        kept = batch["attention_mask"].bool()
        rows.append([state[kept] for state in states])
        sequence.append((torch.arange(len(kept))[:, None] + number * 100).expand_as(kept)[kept])
    return [torch.cat(layer) for layer in zip(*rows)], torch.cat(sequence)


def test_every_analysis_says_what_its_cka_is_by_chance() -> None:
    model, data = models.gpt2(), batches()
    table = tg.analyze_model(model, data, metrics=["novelty", "neighborhood_overlap"], progress=False).novelty
    states, document = hidden(model, data)
    for row, (x, y) in zip(table.to_dict(orient="records"), pairwise(states)):
        want = F.linear_cka_null(x, y, document)
        assert row["linear_cka_z"] == pytest.approx(float(want.z), rel=1e-6)
        assert row["linear_cka_p"] == pytest.approx(float(want.p), rel=1e-4)
        assert row["linear_cka_calibrated"] == pytest.approx(float(want.calibrated), rel=1e-6)
        # of all rows here: calibrated is the value on the scale from the null's mean to 1
        assert float(want.null_mean) == pytest.approx(
            row["linear_cka"] - float(want.z * want.null_sd), rel=1e-6
        )
        assert row["linear_cka_p_adjusted"] == pytest.approx(1 / 500)
    assert not [name for name in table if name.endswith(("_draws", "_null_mean", "_null_sd"))]
    assert "neighborhood_overlap_p" not in table


def test_documents_are_those_that_batches_name() -> None:
    model, data = models.gpt2(), batches()
    for number, batch in enumerate(data):  # two sequences a document
        batch["document_id"] = torch.arange(len(batch["input_ids"])) // 2 + 50 * number
    row = tg.analyze_model(model, data, metrics="novelty", progress=False).novelty.iloc[0]
    states, sequence = hidden(model, data)
    document = sequence // 100 * 50 + sequence % 100 // 2
    assert row["linear_cka_z"] == pytest.approx(
        float(F.linear_cka_null(states[0], states[1], document).z), rel=1e-6
    )
    assert row["linear_cka_z"] != pytest.approx(
        float(F.linear_cka_null(states[0], states[1], sequence).z), rel=1e-3
    )


def test_significance_judges_every_measure_and_the_best_of_all_pairs() -> None:
    a, b, data = models.gpt2(), models.bert(), batches(8)
    given = {
        "metrics": ["cka", "neighborhood_overlap", "rsa", "procrustes", "cknna"],
        "progress": False,
        "layers": [0, 1],
        "sample_size": 150,
    }
    plain = tg.compare(a, b, data, **given)
    found = tg.compare(a, b, data, significance=True, **given)
    assert found.measures == plain.measures
    for name in plain.measures:
        np.testing.assert_allclose(found.novelty[name], plain.novelty[name], rtol=1e-9)
    for name in ("linear_cka", "neighborhood_overlap", "rsa", "procrustes", "angular_shape", "cknna"):
        single, joint = found.novelty[f"{name}_p"], found.novelty[f"{name}_p_adjusted"]
        assert single.between(0, 1).all() and joint.between(0, 1).all(), name
        assert (joint >= single - 0.05).all() and (found.novelty[f"{name}_calibrated"] < 1).all(), name
    assert found.metadata["settings"]["significance"] is True
    assert "linear_cka_p_adjusted" in plain.novelty and "rsa_p" not in plain.novelty


def test_few_documents_are_not_judged_and_it_is_said() -> None:
    with pytest.warns(tg.FewRowsWarning, match="calls for 8 documents"):
        found = tg.analyze_model(
            models.gpt2(), batches(1), metrics=["novelty", "rsa"], significance=True, progress=False
        )
    columns = ["linear_cka_p", "linear_cka_p_adjusted", "rsa_p", "rsa_p_adjusted", "layer_cosine_sim_p"]
    assert found.novelty[columns].isna().all(axis=None)
    assert found.novelty["linear_cka"].notna().all()


def test_the_best_of_all_pairs_is_compared_with_the_best_of_each_draw() -> None:
    generator = np.random.default_rng(0)
    shared = generator.standard_normal(300)
    pairs, draws = {}, []
    for number in range(5):
        drawn = 0.2 + 0.1 * (shared + generator.standard_normal(300)) * (number + 1)
        draws.append(drawn)
        mean, deviation = drawn.mean(), drawn.std(ddof=1)
        leaves = {"rsa_z": 1.7, "rsa_null_mean": mean, "rsa_null_sd": deviation}
        pairs[f"x{number}->y"] = {name: torch.tensor(value) for name, value in leaves.items()} | {
            "rsa_draws": torch.as_tensor(drawn)
        }
    result = TensorDict({"between": pairs})
    with_joint_p(result)
    scaled = [(one - one.mean()) / one.std(ddof=1) for one in draws]
    want = (1 + (np.max(scaled, axis=0) >= 1.7).sum()) / 301
    for name in pairs:
        assert float(result["between", name, "rsa_p_adjusted"]) == pytest.approx(want, abs=1 / 301)
        assert sorted(result["between", name].keys()) == ["rsa_p_adjusted", "rsa_z"]


def test_a_null_of_ones_own_stays_as_it_is() -> None:
    own = tg.CKANull()
    assert null_stages([tg.LinearCKA(), own], significance=True) == []
