"""Probes as stages: held-out scores, control task, null, errors, state."""

from __future__ import annotations

import io
import json
import pickle
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.probing.scores import SCORES

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def run_probe(probe, data, label=None, block_rows=100, **extra):
    label = data.label if label is None else label
    batches = [
        {"tokens": {"s": data.x[i : i + 70]}, "carried": {"label": label[i : i + 70], "type": data.types[i : i + 70]},
         "row_id": data.row_id[i : i + 70]}
        for i in range(0, len(data.x), 70)
    ]  # fmt: skip
    pipeline = TensorDictSequential(tg.ForEach(probe, ["s"]))
    result = tg.run(pipeline, batches, block_rows=block_rows, progress=False, **extra)
    return result, next(part for part in pipeline.modules() if isinstance(part, tg.Probe))


PROBES = {
    "ridge": lambda **k: tg.LinearProbe(**k),
    "lda": lambda **k: tg.LinearProbe(solver="lda", **k),
    "logistic": lambda **k: tg.LinearProbe(solver="logistic", **k),
    "loo": lambda **k: tg.LinearProbe(selection="loo", **k),
    "mean_difference": lambda **k: tg.MeanDifferenceProbe(**k),
    "sklearn": lambda **k: tg.SklearnProbe(LogisticRegression(max_iter=2000), **k),
    "torch": lambda **k: tg.TorchProbe(
        lambda d, c: torch.nn.Linear(d, c), epochs=20, learning_rate=0.05, **k
    ),
}


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_swaps_for_every_other(data, name):
    result, probe = run_probe(PROBES[name](), data)
    assert set(SCORES) <= set(result["probe", "s"].keys())
    held = F.holdout_mask(F.row_groups(data.row_id), 0.25)
    x, y = data.x[held], data.label[held].numpy()
    assert int(result["probe", "s", "test_rows"]) == int(held.sum())
    assert int(result["probe", "s", "train_rows"]) == int((~held).sum())
    guess, decision = probe.predict(x).numpy(), probe.decision(x).numpy()
    decision = decision - decision.mean(1, keepdims=True)
    expected = {
        "accuracy": metrics.accuracy_score(y, guess),
        "balanced_accuracy": metrics.balanced_accuracy_score(y, guess),
        "auroc": np.mean([metrics.roc_auc_score(y == c, decision[:, c]) for c in range(3)]),
    }
    for score, value in expected.items():
        assert float(result["probe", "s", score]) == pytest.approx(value, abs=1e-9), score
    assert expected["accuracy"] > 0.75 > float(result["probe", "s", "majority_baseline"]) + 0.2
    assert float(result["probe", "s", "p_value"]) == pytest.approx(1 / 201)
    assert abs(float(result["probe", "s", "null_mean"]) - 1 / 3) < 0.06
    # trained on the others: the direct fit on them gives the same probe
    again = PROBES[name]().fit(data.x[~held], data.label[~held], data.row_id[~held])
    if name not in ("torch", "sklearn", "logistic"):
        torch.testing.assert_close(again.decision(x), probe.decision(x), rtol=1e-6, atol=1e-6)
    if name != "torch":
        assert probe.direction().shape == (3, 12) and probe.direction(1).shape == (12,)
        assert float(probe.direction(2).norm()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["ridge", "logistic", "mean_difference"])
def test_batch_split_order_and_merge_change_nothing(data, name, feed):
    make = lambda: PROBES[name](test_rows=64, train_rows=128, control="type")
    args = (data.x, data.label, data.row_id, data.types)
    whole = feed(make(), (600,), *args).result()
    order = torch.randperm(600)
    small = feed(make(), (1, 50, 9), *(t[order] for t in args)).result()
    a = feed(make(), (40,), *(t[:250] for t in args))
    b = feed(make(), (64,), *(t[250:] for t in args))
    merged = a.merge_(b).result()
    assert int(whole["test_rows"]) == 64
    for key, value in whole.items():
        torch.testing.assert_close(small[key], value, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(merged[key], value, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_auroc_of_two_classes_and_imbalance(make_data):
    data = make_data(classes=2)
    keep = (data.label == 0) | (torch.arange(600) % 8 == 0)
    for name in ("x", "label", "row_id", "types"):
        setattr(data, name, getattr(data, name)[keep])
    result, probe = run_probe(tg.LinearProbe(), data)
    held = F.holdout_mask(F.row_groups(data.row_id), 0.25)
    decision = probe.decision(data.x[held])
    y = data.label[held].numpy()
    assert float(result["probe", "s", "auroc"]) == pytest.approx(
        metrics.roc_auc_score(y, decision[:, 1].numpy())
    )
    baseline = DummyClassifier().fit(data.x[~held].numpy(), data.label[~held].numpy())
    expected = baseline.score(data.x[held].numpy(), y)
    assert float(result["probe", "s", "majority_baseline"]) == pytest.approx(expected)
    assert expected > 0.8


def test_regression_scores(data):
    result, probe = run_probe(tg.LinearProbe(alpha=0.0), data, data.y)
    held = F.holdout_mask(F.row_groups(data.row_id), 0.25)
    fit = LinearRegression().fit(data.x[~held].numpy(), data.y[~held].numpy())
    assert float(result["probe", "s", "r2"]) == pytest.approx(
        fit.score(data.x[held].numpy(), data.y[held].numpy())
    )
    assert result["probe", "s", "accuracy"].isnan()
    assert probe.predict(data.x).shape == (600,)
    assert 0 < float(result["probe", "s", "standard_error"]) < 0.02
    two = torch.stack((data.y, data.x[:, 0]), 1)
    result, probe = run_probe(tg.LinearProbe(alpha=1e-6), data, two)
    assert probe.predict(data.x).shape == (600, 2) and probe.direction().shape == (2, 12)


def test_standard_error_holds_up_under_groups():
    # Whole groups right or wrong together: the naive error is far too small, the clustered one is right.
    generator = torch.Generator().manual_seed(0)
    errors, means = [], []
    group = torch.arange(400) // 20
    for _ in range(300):
        right = (torch.rand(20, generator=generator) < 0.7).double()[group]
        means.append(float(right.mean()))
        errors.append(float(F.clustered_error(right, group)))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    naive = (0.7 * 0.3 / 400) ** 0.5
    assert np.mean(errors) > 3 * naive


def test_r2_error_is_the_spread_over_repeats():
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(200):
        y = torch.randn(300, 1, generator=generator).double()
        scores = F.probe_scores(y + 0.7 * torch.randn(300, 1, generator=generator), y, torch.arange(300))
        values.append(float(scores["r2"]))
        errors.append(float(scores["standard_error"]))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_permutation_null_is_uniform_without_a_relation_and_keeps_groups_whole():
    generator = torch.Generator().manual_seed(1)
    small = 0
    group = torch.arange(200) // 10
    for seed in range(100):
        # guesses alike within a sequence, labels one a sequence, independent of each other
        guess = torch.randint(2, (20,), generator=generator)[group]
        label = torch.randint(2, (20,), generator=generator)[group]
        _, p = F.permutation_null(
            lambda y, g=guess: (y == g).double().mean(), label, group, repeats=99, seed=seed
        )
        small += float(p) <= 0.05
    assert small <= 12  # 5 expected; rows permuted on their own would give near 40


def share_called(sets, make):
    """Of sets of (decision, label, group) without a relation, how many have p <= 0.05."""
    small = 0
    for seed in range(sets):
        generator = torch.Generator().manual_seed(seed)
        scores = F.probe_scores(*make(generator), permutations=99, seed=seed)
        small += float(scores["p_value"]) <= 0.05
    return small / sets


@pytest.mark.parametrize("task", ["classes", "numbers"])
def test_documents_of_other_lengths_are_no_relation(task):
    """Of a label whose documents are longer, and answers that know nothing: one answer for all, or one a document."""

    def made(generator, constant):
        label = torch.arange(40) % 2
        group = torch.repeat_interleave(torch.arange(40), torch.where(label == 1, 12, 5))
        noise = torch.randn(40, generator=generator).double() * (not constant) + 0.3
        answer, label = noise[group], label[group]
        if task == "numbers":
            return answer[:, None], label.double()[:, None], group
        return torch.stack((-answer, answer), 1), label, group

    assert share_called(4, lambda generator: made(generator, True)) == 0
    assert share_called(100, lambda generator: made(generator, False)) <= 0.12


@pytest.mark.parametrize("flipped", [1, 40])
def test_a_document_of_several_labels_is_still_one_document(flipped):
    def made(generator):
        group = torch.arange(400) // 10
        label = torch.randint(2, (40,), generator=generator)[group]
        label[torch.randperm(400, generator=generator)[:flipped]] ^= 1
        answer = torch.randn(40, generator=generator)[group] + 0.3 * torch.randn(400, generator=generator)
        return torch.stack((-answer, answer), 1).double(), label, group

    assert share_called(100, made) <= 0.12
    generator = torch.Generator().manual_seed(0)
    _, label, group = made(generator)
    seen = torch.where(torch.rand(400, generator=generator) < 0.2, 1 - label, label)
    scores = F.probe_scores(torch.eye(2).double()[seen], label, group, permutations=199)
    assert float(scores["p_value"]) == 1 / 200


@pytest.mark.parametrize("numbers", [False, True])
def test_where_documents_are_alike_in_length_p_is_that_of_shuffled_documents(numbers):
    generator = torch.Generator().manual_seed(2)
    group = torch.arange(120) // 4
    label = torch.randint(3, (30,), generator=generator)[group]
    decision = torch.randn(120, 3, generator=generator).double() + 0.5 * torch.eye(3)[label]
    if numbers:
        label, decision = label.double()[:, None], 0.3 * decision.argmax(1, keepdim=True).double() + 0.7

    def score(y):
        if numbers:
            return 1 - (y - decision).square().sum() / (y - y.mean()).square().sum()
        return (decision.argmax(1) == y).double().mean()

    null, p = F.permutation_null(score, label, group, repeats=199, seed=3)
    found = F.probe_scores(decision, label, group, permutations=199, seed=3)
    torch.testing.assert_close(torch.stack((found["null_mean"], found["p_value"])), torch.stack((null, p)))


def test_control_task_exposes_a_memory(make_data):
    data = make_data(n=3000, d=64)
    codes = torch.randn(40, 64, generator=torch.Generator().manual_seed(5)).double()
    data.types = data.types % 40
    # Rows that name their type alone, and a label that is a random function of the type.
    data.x = codes[data.types] + 0.1 * torch.randn(3000, 64, generator=torch.Generator().manual_seed(6))
    table = torch.randint(3, (40,), generator=torch.Generator().manual_seed(7))
    data.label = table[data.types]
    for probe in (
        tg.LinearProbe(control="type"),
        tg.LinearProbe(solver="logistic", control="type"),
    ):
        result, _ = run_probe(probe, data)
        assert float(result["probe", "s", "accuracy"]) > 0.9
        assert float(result["probe", "s", "control_accuracy"]) > 0.9
        assert abs(float(result["probe", "s", "selectivity"])) < 0.1


def test_control_task_fails_where_the_label_is_in_the_rows(data):
    result, _ = run_probe(tg.LinearProbe(control="type"), data)
    score = {k: float(result["probe", "s", k]) for k in ("accuracy", "control_accuracy", "selectivity")}
    assert score["selectivity"] == pytest.approx(score["accuracy"] - score["control_accuracy"])
    assert score["control_accuracy"] < 0.5 < 0.75 < score["accuracy"]


def test_streamed_control_probe_is_the_probe_fitted_on_control_labels(data):
    _, probe = run_probe(tg.LinearProbe(alpha=1.0, control="type"), data)
    held = F.holdout_mask(F.row_groups(data.row_id), 0.25)
    random = F.control_labels(data.types, probe.fitted["counts"], probe.seed)
    direct = tg.LinearProbe(alpha=1.0).fit(data.x[~held], random[~held])
    torch.testing.assert_close(probe.fitted["control"]["weight"], direct.fitted["weight"])
    for kind in data.types.unique():
        assert len(random[data.types == kind].unique()) == 1


def test_mean_difference_golden():
    x = torch.from_numpy(np.load(GOLDEN / "inputs.npz")["layers"][0])
    label = (torch.from_numpy(np.load(GOLDEN / "inputs.npz")["labels"]) < 2).long()
    expected = json.loads((GOLDEN / "reference.json").read_text())["tools"]["tdhook"][
        "mean_difference_labels_lt2"
    ]
    probe = tg.MeanDifferenceProbe().fit(x, label)
    torch.testing.assert_close(
        probe.fitted["coef"][:5], torch.tensor(expected["coef_first5"]).double(), rtol=1e-4, atol=0
    )
    assert float(probe.fitted["intercept"]) == pytest.approx(expected["intercept"], rel=1e-4)
    assert probe.score(x, label)["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-12)
    plain = tg.MeanDifferenceProbe(normalize=False).fit(x, label)
    means = [x[label == c].double().mean(0) for c in (0, 1)]
    torch.testing.assert_close(plain.fitted["coef"], means[1] - means[0])
    assert (plain.predict(x) == probe.predict(x)).all()


def test_mean_difference_of_more_classes_is_the_nearest_mean(data):
    probe = tg.MeanDifferenceProbe().fit(data.x, data.label)
    means = torch.stack([data.x[data.label == c].mean(0) for c in range(3)])
    assert (probe.predict(data.x) == torch.cdist(data.x, means).argmin(1)).all()


def test_sklearn_probe_takes_any_estimator_and_leaves_it_alone(data):
    forest = RandomForestClassifier(20, random_state=0)
    result, probe = run_probe(tg.SklearnProbe(forest), data)
    assert float(result["probe", "s", "accuracy"]) > 0.7 and not hasattr(forest, "estimators_")
    with pytest.raises(TypeError, match="no direction"):
        probe.direction()
    tg.SklearnProbe(make_pipeline(StandardScaler(), LogisticRegression())).fit(data.x, data.label)
    regression = tg.SklearnProbe(LinearRegression()).fit(data.x, data.y)
    assert regression.score(data.x, data.y)["r2"] > 0.9
    binary = tg.SklearnProbe(LogisticRegression(max_iter=2000)).fit(data.x, (data.label > 0).long())
    assert binary.decision(data.x).shape == (600, 2)
    with pytest.raises(TypeError, match="fit and predict"):
        tg.SklearnProbe(LogisticRegression)


def test_torch_probe_is_repeatable_and_hides_its_randomness(data):
    before = torch.get_rng_state()
    a = PROBES["torch"](seed=4).fit(data.x, data.label)
    assert torch.equal(torch.get_rng_state(), before)
    b = PROBES["torch"](seed=4).fit(data.x, data.label)
    assert torch.equal(a.decision(data.x), b.decision(data.x))
    module = torch.nn.Linear(12, 3)
    start = deepcopy(module.state_dict())
    tg.TorchProbe(module, epochs=1).fit(data.x, data.label)
    assert all(torch.equal(value, start[name]) for name, value in module.state_dict().items())
    with pytest.raises(ValueError, match=r"must turn rows \(N, 12\) into \(N, 3\)"):
        tg.TorchProbe(torch.nn.Linear(12, 5)).fit(data.x, data.label)


def test_bilinear_ridge_is_kernel_ridge_on_products():
    x, y, t = torch.randn(60, 4).double(), torch.randn(60, 3).double(), torch.randn(60, 1).double()
    weight, bias, _, error = F.bilinear_ridge(x, y, t, [0.7])
    products = (x[:, :, None] * y[:, None, :]).flatten(1)
    ridge_weight, ridge_bias = F.ridge_probe(F.label_moments(products, t), 0.7)
    torch.testing.assert_close(weight.flatten(1), ridge_weight)
    torch.testing.assert_close(bias, ridge_bias)
    assert float(error) == pytest.approx(float(F.ridge_loo(products, t, [0.7]).mean()))
    kernel = products - products.mean(0)
    reference = KernelRidge(alpha=0.7).fit(kernel.numpy(), (t - t.mean()).numpy())
    ours = torch.einsum("nd,kde,ne->nk", x, weight, y) + bias - t.mean()
    np.testing.assert_allclose(ours.numpy(), reference.predict(kernel.numpy()), atol=1e-8)


@pytest.mark.parametrize("make", [tg.BilinearProbe, lambda: tg.LowRankBilinearProbe(rank=2)])
def test_bilinear_probes_see_what_no_linear_probe_can(make):
    x, y = torch.randn(1200, 5) + 1, torch.randn(1200, 5) - 2
    label = ((x[:, 0] - 1) * (y[:, 1] + 2) > 0).long()
    ids = torch.arange(1200) << 20
    pipeline = TensorDictSequential(
        tg.RowSample(["x", "y"], also=["label"]), tg.ForEachPair(make(), ["x", "y"], pairs=[("x", "y")])
    )
    result = tg.run(
        pipeline, [{"tokens": {"x": x, "y": y}, "carried": {"label": label}, "row_id": ids}], progress=False
    )
    assert float(result["probe", "x->y", "accuracy"]) > 0.85
    assert 250 < int(result["probe", "x->y", "test_rows"]) < 350
    linear = tg.LinearProbe().fit(torch.cat((x, y), 1), label)
    assert linear.score(torch.cat((x, y), 1), label)["accuracy"] < 0.62


def test_bilinear_control_and_plain_call():
    x, y = torch.randn(300, 3), torch.randn(300, 3)
    label = ((x * y).sum(1) > 0).long()
    probe = tg.BilinearProbe(control="type")
    out = probe(x, y, label, torch.arange(300) << 20, torch.arange(300) % 100)
    named = dict(zip(SCORES, out))
    assert float(named["selectivity"]) > 0.25
    assert float(named["accuracy"] - named["selectivity"]) == pytest.approx(float(named["control_accuracy"]))


def test_second_pass_scores_every_row(data):
    first, probe = run_probe(tg.LinearProbe(holdout=0.0), data)
    second = TensorDictSequential(tg.ForEach(tg.ProbePredict(), ["s"]), tg.ForEach(tg.ProbeScore(), ["s"]))
    batches = [
        {
            "tokens": {"s": data.x[i : i + 50]},
            "carried": {"label": data.label[i : i + 50]},
            "row_id": data.row_id[i : i + 50],
        }
        for i in range(0, 600, 50)
    ]
    result = tg.run(second, batches, inputs=first, progress=False)
    direct = probe.score(data.x, data.label, row_id=data.row_id)
    for name in ("accuracy", "auroc", "standard_error", "p_value"):
        assert float(result["probe_score", "s", name]) == pytest.approx(direct[name])
    assert float(result["probe_score", "s", "test_rows"]) == 600
    assert first["probe", "s", "accuracy"].isnan()


def test_groups_stay_together_and_the_seed_moves_them(data):
    group = F.row_groups(data.row_id)
    a, b = F.holdout_mask(group, 0.4, 0), F.holdout_mask(group, 0.4, 1)
    assert all(len(a[group == g].unique()) == 1 for g in group.unique())
    assert not torch.equal(a, b)
    assert not bool(F.holdout_mask(group, 0.0).any())


def test_rows_without_labels_are_left_out(data):
    label = data.label.clone()
    label[::3] = -100
    used = label >= 0
    probe = tg.LinearProbe(alpha=1.0).fit(data.x, label)
    torch.testing.assert_close(
        probe.fitted["weight"], tg.LinearProbe(alpha=1.0).fit(data.x[used], label[used]).fitted["weight"]
    )
    assert probe.score(data.x, label)["test_rows"] == int(used.sum())


def test_preprocess_and_metrics(data):
    norm = lambda x: x / x.norm(dim=-1, keepdim=True)
    probe = tg.LinearProbe(
        alpha=0.1, preprocess=norm, metrics={"kappa": lambda guess, y: metrics.cohen_kappa_score(y, guess)}
    )
    result, fitted = run_probe(probe, data)
    held = F.holdout_mask(F.row_groups(data.row_id), 0.25)
    expected = metrics.cohen_kappa_score(data.label[held], fitted.predict(data.x[held]))
    assert float(result["probe", "s", "kappa"]) == pytest.approx(expected)
    plain = tg.LinearProbe(alpha=0.1).fit(norm(data.x[~held]), data.label[~held])
    torch.testing.assert_close(plain.fitted["weight"], fitted.fitted["weight"])
    with pytest.raises(ValueError, match="one row for each row"):
        tg.LinearProbe(preprocess=lambda x: x.mean(0)).fit(data.x, data.label)
    with pytest.raises(ValueError, match="exist already"):
        tg.LinearProbe(metrics={"auroc": max})


def test_state_survives_saving_loading_copying(data, feed):
    probe = feed(tg.LinearProbe(control="type"), (100,), data.x, data.label, data.row_id, data.types)
    expected = probe.result()
    buffer = io.BytesIO()
    torch.save(probe.state_dict(), buffer)
    buffer.seek(0)
    fresh = tg.LinearProbe(control="type")
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (fresh, deepcopy(probe), pickle.loads(pickle.dumps(probe)), probe.half()):
        for name, value in twin.result().items():
            torch.testing.assert_close(value, expected[name], equal_nan=True)
    assert fresh.direction().shape == (3, 12)
    probe.reset()
    with pytest.raises(ValueError, match="not fitted"):
        probe.predict(data.x)


def test_plain_tensors_by_name_and_under_the_wrong_name(data):
    probe = tg.LinearProbe(alpha=1.0)
    a = probe(tokens=data.x, label=data.label, row_id=data.row_id)
    b = tg.LinearProbe(alpha=1.0)(data.x, data.label, data.row_id)
    torch.testing.assert_close(a, b, equal_nan=True)
    with pytest.raises(TypeError, match="labels"):
        probe(tokens=data.x, labels=data.label)
    own = tg.LinearProbe(alpha=1.0, in_keys=["x", "y"], out_keys="out")
    td = own(TensorDict({"x": data.x, "y": data.label}))
    assert float(td["out", "accuracy"]) > 0.5


ERRORS = {
    "shape": (lambda d: (d.x, d.label[:-1]), "one class a row"),
    "matrix": (lambda d: (d.x, d.label[:, None].repeat(1, 2)), "one class a row"),
    "negative": (lambda d: (d.x, d.label - 5), "Number the classes from 0"),
    "gap": (lambda d: (d.x, d.label * 2), r"class \[1, 3\] is missing"),
    "one class": (lambda d: (d.x, d.label * 0), "at least two classes"),
    "constant": (lambda d: (d.x, d.y * 0 + 2), "is constant"),
    "none": (lambda d: (d.x, d.label * 0 - 100), "no labelled rows|no rows"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("kind", ["ridge", "sklearn"])
def test_errors_say_what_came_and_what_to_do(data, name, kind):
    make, text = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        PROBES[kind]().fit(*make(data))


@pytest.mark.parametrize("name", ["ridge", "lda", "logistic", "mean_difference", "sklearn", "torch"])
def test_rows_that_no_probe_can_read_are_refused(data, name):
    x, y = data.x, data.label
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        PROBES[name]().fit(torch.where(x > 2, torch.nan, x), y)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        PROBES[name]().fit(x, data.y / 0)
    with pytest.raises(ValueError, match=r"\(N, D\), got \(1, 600, 12\)"):
        PROBES[name]().fit(x[None], y)
    with pytest.raises(TypeError, match=r"expects numbers at label, got datetime64"):
        PROBES[name]().fit(x, np.array(["2020-01-01"] * 600, dtype="datetime64"))
    probe = PROBES[name]().fit(x, y)
    with pytest.raises(ValueError, match="NaN or Inf"):
        probe.predict(x / 0)
    if "weight" in probe.fitted:
        with pytest.raises(ValueError, match=r"fitted on rows of width \[12\], got \[3\]"):
            probe.score(x[:, :3], y)
    with pytest.raises(ValueError, match="all 600 training labels are class 0"):
        tg.BilinearProbe().fit(x, x, ["cat"] * 600)


def test_arrays_and_lists_are_rows_too(data):
    reference = tg.LinearProbe(alpha=1.0).fit(data.x, data.label)
    probe = tg.LinearProbe(alpha=1.0).fit(data.x.numpy(), data.label.tolist())
    torch.testing.assert_close(probe.fitted["weight"], reference.fitted["weight"])
    assert torch.equal(probe.predict(data.x.numpy()), reference.predict(data.x))
    found, expected = probe.score(data.x.numpy(), data.label.numpy()), reference.score(data.x, data.label)
    assert found == pytest.approx(expected, nan_ok=True)


def test_a_class_missing_from_a_part_of_the_split(data):
    held = F.holdout_mask(F.row_groups(data.row_id), 0.25)
    for part, text in ((held, "training part"), (~held, "held-out rows")):
        label = data.label.clone()
        label[~part & (label == 2)] = 0
        with pytest.raises(ValueError, match=text):
            run_probe(tg.LinearProbe(), data, label)
    with pytest.raises(ValueError, match="no document fell into the held-out part"):
        tg.LinearProbe(holdout=0.01)(data.x[:30], data.label[:30], data.row_id[:30])


def test_kinds_of_labels_and_widths_do_not_mix(data, feed):
    for kind in ("ridge", "sklearn"):
        probe = feed(PROBES[kind](), (100,), data.x, data.label, data.row_id)
        with pytest.raises(ValueError, match="now gets"):
            feed(probe, (100,), data.x, data.y, data.row_id)
        with pytest.raises(ValueError, match="now gets"):
            feed(probe, (100,), data.x[:, :5], data.label, data.row_id)
        with pytest.raises(ValueError, match="fitted for classification"):
            probe.score(data.x, data.y)
    with pytest.raises(ValueError, match="needs 'row_id'"):
        tg.StreamingLabelMoments(folds=3)(data.x, data.label)


@pytest.mark.parametrize(
    "settings",
    [dict(solver="svm"), dict(alpha=-1.0), dict(alpha=[]), dict(folds=1), dict(balanced=True), dict(holdout=1.0),
     dict(solver="lda", alpha=[0.1, 0.2]), dict(test_rows=1)],
)  # fmt: skip
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match="LinearProbe"):
        tg.LinearProbe(**settings)


def test_direction_asks_for_a_class_that_exists(data):
    probe = tg.LinearProbe().fit(data.x, data.label)
    with pytest.raises(ValueError, match=r"classes 0\.\.2"):
        probe.direction(3)
    with pytest.raises(ValueError, match="not fitted"):
        tg.LinearProbe().direction()


def test_duplicated_or_bfloat_rows_keep_their_precision(data):
    x = data.x.bfloat16()
    a = tg.LinearProbe(alpha=1.0).fit(x, data.label)
    b = tg.LinearProbe(alpha=1.0).fit(x.double(), data.label)
    torch.testing.assert_close(a.fitted["weight"], b.fitted["weight"])
