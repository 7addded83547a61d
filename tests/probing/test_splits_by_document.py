"""A document lies on one side of every split and in one fold, however many sequences it is: a coin for each is unpredictable."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from tensordict.nn import TensorDictSequential

import tdgeom as tg
import tdgeom.functional as F

DOCUMENTS, SEQUENCES, TOKENS, WIDTH = 150, 4, 3, 120


def coin_rows(seed=0):
    """(rows, a coin a document, row ids, document ids): sequences of a document are alike, and come far from each other."""
    draw = torch.Generator().manual_seed(seed)
    document = torch.randperm(DOCUMENTS * SEQUENCES, generator=draw) % DOCUMENTS
    own = 2 * torch.randn(DOCUMENTS, WIDTH, generator=draw)
    coin = torch.randint(0, 2, (DOCUMENTS,), generator=draw)
    x = own[document][:, None] + 0.3 * torch.randn(len(document), TOKENS, WIDTH, generator=draw)
    sequence = torch.arange(len(document)).repeat_interleave(TOKENS) << 20
    ids = sequence | torch.arange(TOKENS).repeat(len(document))
    spread = document.repeat_interleave(TOKENS)
    return x.flatten(0, 1), coin[spread], ids, spread


def coin_batches(seed=0, size=24, documents=True):
    x, label, _, document = coin_rows(seed)
    x, label = x.unflatten(0, (-1, TOKENS)), label[::TOKENS]
    batches = zip(x.split(size), label.split(size), document[::TOKENS].split(size))
    return [{"x": a, "label": b, **({"document_id": c} if documents else {})} for a, b, c in batches]


def mlp(features, outputs):
    return torch.nn.Sequential(torch.nn.Linear(features, 64), torch.nn.ReLU(), torch.nn.Linear(64, outputs))


PROBES = {
    "ridge": lambda **k: tg.LinearProbe(**k),
    "leave-one-out": lambda **k: tg.LinearProbe(selection="loo", **k),
    "lda": lambda **k: tg.LinearProbe(solver="lda", alpha=0.1, **k),
    "logistic": lambda **k: tg.LinearProbe(solver="logistic", **k),
    "means": lambda **k: tg.MeanDifferenceProbe(**k),
    "neighbours": lambda **k: tg.SklearnProbe(KNeighborsClassifier(3), **k),
    "module": lambda **k: tg.TorchProbe(mlp, epochs=5, learning_rate=1e-2, **k),
}


def accuracy(make, seeds=2, **settings):
    found = [
        make(seed=s, permutations=0, **settings)(*coin_rows(s))[0] for s in range(seeds)
    ]  # accuracy comes first
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("name", PROBES)
def test_no_probe_knows_the_coin_of_a_document_it_never_saw(name):
    assert 0.25 < accuracy(PROBES[name]) < 0.75


def test_by_sequence_it_would():
    x, label, ids, _ = coin_rows()
    assert float(tg.LinearProbe(permutations=0)(x, label, ids)[0]) > 0.8


def test_probes_of_pairs():
    x, label, ids, document = coin_rows()
    stage = tg.BilinearProbe(alphas=[1.0], permutations=0, train_rows=800)
    assert 0.2 < float(stage(x, x[:, :8], label, ids, document)[0]) < 0.8
    assert float(stage(x, x[:, :8], label, ids)[0]) > 0.85  # one that no document is told of


@pytest.mark.parametrize("how", ["run", "two loaders", "pipeline", "contexts"])
def test_every_way_to_probe_a_model(how):
    model, batches = torch.nn.Identity(), coin_batches()
    settings = dict(capture={"in_keys": ["x"]}) if how != "pipeline" else {}
    probe = tg.LinearProbe(permutations=0)
    if how == "pipeline":
        capture = tg.Capture(model, "module_input:", in_keys=["x"])
        stages = [capture, tg.SelectTokens(capture.sites, also=["label"]), tg.ForEach(probe, capture.sites)]
        result = tg.run(TensorDictSequential(*stages), batches, progress=False)
        assert 0.25 < float(result["probe", capture.sites[0], "accuracy"]) < 0.75
        return
    probing = tg.Probing(model, "module_input:", probe, **settings)
    if how == "run":
        table = probing.run(batches)
        errors = tg.Probing(model, "module_input:", probe, errors=True, **settings).run(batches)
        assert all(errors[name].equals(table[name]) for name in table)  # no score depends on errors=
    elif how == "two loaders":
        table = probing.run(batches, coin_batches(seed=5))
    else:
        for part, rows in ((probing.fit, batches), (probing.score, coin_batches(seed=5))):
            with part() as phase:
                for batch in rows:
                    phase.labels, phase.document_id = batch["label"], batch["document_id"]
                    model(batch["x"])
        twice = tg.Probing(model, "module_input:", probe, **settings).run(batches, coin_batches(seed=5))
        table = probing.table()
        assert table.equals(twice)
    assert 0.25 < float(table["accuracy"][0]) < 0.75


def test_folds_are_of_documents():
    x, label, ids, document = coin_rows()
    counts = tg.StreamingLabelMoments(folds=5)(x, label, ids, document)[0]
    fold = F.fold_index(document, 5, 0)
    assert counts.tolist() == torch.bincount(fold, minlength=5).tolist()
    assert F.row_groups(ids, document).equal(document) and F.row_groups(ids).equal(ids >> 20)
    with pytest.raises(
        ValueError, match=r"row_groups expects document_id, one whole number a row, \(1800,\)"
    ):
        F.row_groups(ids, document[:5])


def test_plain_rows_take_documents():
    """α by folds of documents finds nothing worth fitting; by sequences it trusts what it has seen."""
    x, label, ids, document = coin_rows()
    told = tg.LinearProbe().fit(x, label, ids, document_id=document)
    assert float(told.fitted["alpha"]) > float(tg.LinearProbe().fit(x, label, ids).fitted["alpha"])
    # √(G/(G-1) Σ_g (Σ_i (v_i - v̄))²)/N over documents, written out
    right = (told.predict(x) == label).double()
    sums = torch.stack([(right - right.mean())[document == d].sum() for d in range(DOCUMENTS)])
    wanted = (sums.square().sum() * DOCUMENTS / (DOCUMENTS - 1)).sqrt() / len(x)
    found = told.score(x, label, row_id=ids, document_id=document)
    assert found["standard_error"] == pytest.approx(float(wanted))


def test_scores_of_decisions_are_over_documents():
    x, label, ids, document = coin_rows()
    decision = torch.nn.functional.one_hot((x[:, 0] > 0).long(), 2).double()
    stage = tg.ProbeScore(permutations=0)
    names = dict(zip([key[-1] for key in stage.out_keys], stage(decision, label, ids, document)))
    right = ((x[:, 0] > 0).long() == label).double()
    sums = torch.stack([(right - right.mean())[document == d].sum() for d in range(DOCUMENTS)])
    wanted = (sums.square().sum() * DOCUMENTS / (DOCUMENTS - 1)).sqrt() / len(x)
    assert float(names["standard_error"]) == pytest.approx(float(wanted))


def test_copies_of_a_sequence_lie_on_one_side():
    """A loader that is read three times has no more documents than one reading; a new coin would be on both sides."""
    x, label, _, _ = coin_rows()
    once = [{"x": a, "label": b} for a, b in zip(x[:800].split(8), label[:800].split(8))]  # a row a sequence
    coin = torch.Generator().manual_seed(1)
    once = [{**batch, "label": torch.randint(0, 2, (8,), generator=coin)} for batch in once]
    probe = tg.SklearnProbe(KNeighborsClassifier(1), permutations=0)
    model = torch.nn.Identity()
    table = tg.Probing(model, "module_input:", probe, capture={"in_keys": ["x"]}).run(once * 3)
    assert 0.4 < float(table["accuracy"][0]) < 0.6
