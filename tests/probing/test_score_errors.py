"""Errors of a probe's scores: the delete-a-group jackknife of the held-out documents, written out here with scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from tensordict import TensorDict

import tdgeom as tg
from tdgeom.numerics.document_groups import document_groups
from tdgeom.probing.splits import holdout_mask

TOKENS = 6


def labelled_batches(sequences=120, seed=0, regression=False):
    """Two sequences a document, whose tokens are alike."""
    generator = torch.Generator().manual_seed(seed)
    document = torch.arange(sequences) // 2
    own = torch.randn(sequences // 2, 1, 4, generator=generator)[document]
    x = own + torch.randn(sequences, TOKENS, 4, generator=generator)
    label = x[..., 0] + torch.randn(sequences, TOKENS, generator=generator)
    label = label if regression else (label > 0).long()
    return [
        {"x": a, "label": b, "document_id": c}
        for a, b, c in zip(x.split(30), label.split(30), document.split(30))
    ]


def probing(probe, **settings):
    return tg.Probing(torch.nn.Identity(), "module_input:", probe, capture={"in_keys": ["x"]}, **settings)


def jackknife(values, rows):
    """Busing, Meijer and van der Leeden (1999)."""
    whole, left = values[0], np.array(values[1:])
    used = rows > 0
    m, left, g, n = rows[used], left[used], used.sum(), rows.sum()
    pseudo = n / m * whole - (n / m - 1) * left
    estimate = g * whole - ((1 - m / n) * left).sum()
    return np.sqrt(((pseudo - estimate) ** 2 / (n / m - 1)).sum() / g)


SCORES = {
    "accuracy": lambda y, d: (d.argmax(1) == y).mean(),
    "balanced_accuracy": lambda y, d: balanced_accuracy_score(y, d.argmax(1)),
    "auroc": lambda y, d: roc_auc_score(y, d[:, 1] - d[:, 0]),
}


@pytest.mark.parametrize("twice", [False, True])
def test_errors_are_of_the_held_out_documents(twice):
    """Of a probe's own part, and of a second loader; a document that is two sequences counts once."""
    train, test = labelled_batches(), labelled_batches(seed=1)
    asked = probing(tg.LinearProbe(permutations=0), errors=True)
    plain = probing(tg.LinearProbe(permutations=0))
    given = (train, test) if twice else (train,)
    with_errors, without = asked.run(*given), plain.run(*given)
    assert not [name for name in without if name.endswith("_se")]
    for name in without:
        np.testing.assert_array_equal(with_errors[name], without[name])
    rows = test if twice else train
    x, label, document = (torch.cat([batch[k] for batch in rows]) for k in ("x", "label", "document_id"))
    (fitted,) = asked.probes.values()
    held = torch.ones(len(x) * TOKENS, dtype=torch.bool)
    if not twice:
        held = holdout_mask(document.repeat_interleave(TOKENS), 0.25, 0)
    decided = fitted.decision(x.flatten(0, 1)[held]).numpy()
    y, ids = label.flatten()[held].numpy(), document.repeat_interleave(TOKENS)[held]
    group = document_groups(ids << 20, 20).numpy()
    for name, score in SCORES.items():
        values = [score(y, decided), *(score(y[group != g], decided[group != g]) for g in range(20))]
        wanted = jackknife(values, np.bincount(group, minlength=20))
        assert with_errors[name][0] == pytest.approx(values[0])
        assert with_errors[f"{name}_se"][0] == pytest.approx(wanted, rel=1e-6), name


def test_sequences_are_the_documents_of_batches_that_name_none():
    batches = [{k: v for k, v in batch.items() if k != "document_id"} for batch in labelled_batches()]
    own = [{**batch, "document_id": torch.arange(30) + 30 * i} for i, batch in enumerate(batches)]
    probe = tg.LinearProbe(permutations=0)
    a, b = (probing(probe, errors=10).run(data) for data in (batches, own))
    assert a["accuracy_se"][0] == b["accuracy_se"][0] > 0


def test_numbers_own_metrics_and_control_tasks_have_errors():
    regression = probing(tg.LinearProbe(permutations=0), errors=True).run(labelled_batches(regression=True))
    assert 0 < regression["r2_se"][0] < 0.2 and np.isnan(regression["accuracy_se"][0])
    batches = [{**batch, "types": (batch["x"][..., 1] > 0).long()} for batch in labelled_batches()]
    half = {"half": lambda guess, label: float((guess == label).double().mean()) / 2}
    probe = tg.LinearProbe(permutations=0, control="types", metrics=half)
    table = probing(probe, errors=True).run(batches)
    assert table["half_se"][0] == pytest.approx(table["accuracy_se"][0] / 2)
    assert table["selectivity_se"][0] > 0 and table["control_accuracy_se"][0] > 0


def test_a_bilinear_probe_and_a_probe_in_a_pipeline_have_them():
    x, y = torch.randn(400, 3), torch.randn(400, 3)
    label = (x[:, 0] * y[:, 0] > 0).long()
    ids = (torch.arange(400) // 4) << 20 | torch.arange(400) % 4
    td = TensorDict({"sample": {"a": x, "b": y}, "sample_carried": {"label": label}, "sample_row_id": ids})
    bilinear = tg.BilinearProbe(errors=True, permutations=0)(td)["probe"]
    assert 0 < float(bilinear["accuracy_se"]) < 0.2

    def rows(part):
        return TensorDict(
            {"tokens": x[part], "carried": {"label": (x[part, 0] > 0).long()}, "row_id": ids[part]}
        )

    alone = tg.LinearProbe(errors=20, permutations=0)(rows(slice(None)))["probe"]
    halves = tg.LinearProbe(errors=20, permutations=0)
    halves(rows(slice(152))), halves(rows(slice(152, None)))
    assert float(halves.result()["accuracy_se"]) == pytest.approx(float(alone["accuracy_se"]))


def test_wrong_numbers_of_groups_and_too_few_documents():
    with pytest.raises(
        ValueError, match=r"LinearProbe: errors is True \(20 groups of documents\), False, or a number"
    ):
        tg.LinearProbe(errors=1)
    one = [{**batch, "document_id": torch.zeros(30, dtype=torch.long)} for batch in labelled_batches()]
    with pytest.warns(tg.FewRowsWarning, match=r"LinearProbe: 1 group\(s\) of documents have rows"):
        table = probing(tg.LinearProbe(permutations=0), errors=True).run(labelled_batches(), one)
    assert np.isnan(table["accuracy_se"][0])
