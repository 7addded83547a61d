"""Probes among other stages: names of carried values, state, surroundings, subclasses and hooks."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from models import VOCAB, bert


def linear_head(features, outputs):
    return torch.nn.Linear(features, outputs)


PROBES = {
    "ridge": lambda **k: tg.LinearProbe(**k),
    "logistic": lambda **k: tg.LinearProbe(solver="logistic", **k),
    "mean_difference": lambda **k: tg.MeanDifferenceProbe(**k),
    "sklearn": lambda **k: tg.SklearnProbe(LogisticRegression(max_iter=2000), **k),
    "torch": lambda **k: tg.TorchProbe(linear_head, epochs=5, learning_rate=0.05, **k),
}
MAKERS = pytest.mark.parametrize("make", PROBES.values(), ids=PROBES)


def named(probe, outputs):
    return dict(zip([key[-1] for key in probe.out_keys], outputs))


# ------------------------------------------------------------------------------------------ carried values


def test_a_site_called_label_and_a_label_called_like_a_site(data):
    """Rows, labels and types of one name each stay what they are."""
    sites = ["label", "s"]
    batch = {
        "tokens": {"label": data.x, "s": -data.x},
        "carried": {"label": data.label, "s": data.types},
        "row_id": data.row_id,
    }
    found = {}
    for labels, control in (("label", "s"), ("s", "label")):
        probe = tg.LinearProbe(alpha=1.0, labels=labels, control=control)
        result = tg.run(tg.ForEach(probe, sites), [batch], progress=False)
        kinds = (data.label, data.types) if labels == "label" else (data.types, data.label)
        for site, x in (("label", data.x), ("s", -data.x)):
            alone = tg.LinearProbe(alpha=1.0, control="types")
            expected = named(alone, alone(x, kinds[0], data.row_id, kinds[1]))
            for name in ("accuracy", "control_accuracy", "test_rows"):
                torch.testing.assert_close(result["probe", site, name], expected[name])
        found[labels] = float(result["probe", "s", "majority_baseline"])
    assert found["label"] != found["s"]


def test_labels_travel_by_their_own_name_through_a_whole_pipeline():
    model = bert().eval()
    sites = ["embed", "residual_output.1"]
    ids = torch.randint(3, VOCAB, (24, 9), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "kind": part % 2, "topic": part[:, 0] % 3} for part in ids.split(6)]
    numbers = {}
    for labels in ("kind", "topic"):
        pipeline = TensorDictSequential(
            tg.Capture(model, sites),
            tg.SelectTokens(sites, also=["kind", "topic"]),
            tg.RowSample(sites, also=["kind", "topic"], size=150),
            tg.ForEach(tg.LinearProbe(labels=labels), sites),
            tg.ForEach(tg.StreamingLabelMoments(labels=labels), sites),
            tg.ForEach(tg.LEACE(), sites),
            tg.ForEachPair(tg.BilinearProbe(labels=labels, out_keys="pairs"), sites, pairs=[tuple(sites)]),
        )
        result = tg.run(pipeline, batches, progress=False)
        numbers[labels] = result["label_moments", "embed", "target_mean"].shape[-1]
        assert result["erasure", "embed", "left"].shape[-1] == numbers[labels] - 1
        assert float(result["pairs", "embed->residual_output.1", "test_rows"]) > 0
    assert numbers == {"kind": 2, "topic": 3}


def test_names_of_carried_values_are_names():
    for make in (tg.LinearProbe, tg.BilinearProbe, tg.StreamingLabelMoments, tg.ProbeScore):
        with pytest.raises(TypeError, match=f"{make.__name__}: labels and control name values"):
            make(labels=("tokens", "label"))
    with pytest.raises(ValueError, match="LinearProbe: labels and control both name 'label'"):
        tg.LinearProbe(control="label")


def test_a_list_of_in_keys_may_leave_the_types_to_the_control(data):
    probe = tg.LinearProbe(in_keys=["x", "y", "row_id"], control="type")
    assert probe.in_keys[-1] == ("carried", "type")
    td = TensorDict({"x": data.x, "y": data.label, "row_id": data.row_id, "carried": {"type": data.types}})
    assert float(probe(td)["probe", "control_accuracy"]) > 0


def test_rows_without_ids_and_labels_are_groups_of_their_own(data):
    """Unlabelled rows take no number that a later row gets, and rows that came twice are found."""
    decision, label = torch.nn.functional.one_hot(data.label).double(), data.label.clone()
    label[::2] = -100
    score = tg.ProbeScore(permutations=0)
    for part in torch.arange(600).split(37):
        score.update(TensorDict({"decision": decision[part], "carried": {"label": label[part]}}))
    assert len(score.rows()["group"].unique()) == len(score.rows()["group"]) == 300
    shards = [tg.SklearnProbe(LogisticRegression(max_iter=2000)) for _ in range(2)]
    for shard, part in zip(shards, torch.arange(600).split(300)):
        shard.update(TensorDict({"tokens": data.x[part], "carried": {"label": data.label[part]}}))
    with pytest.raises(ValueError, match=r"SklearnProbe saw row id \d+ more than once.*'sequence_id'"):
        shards[0].merge_(shards[1]).result()


# ------------------------------------------------------------------------------------------ state


@MAKERS
def test_a_probe_saved_and_loaded_predicts_the_same(data, feed, make):
    probe = feed(make(train_rows=200), (90,), data.x, data.label, data.row_id)
    expected = probe.decision(data.x), probe.result()
    file = io.BytesIO()
    torch.save(probe.state_dict(), file)
    file.seek(0)
    # The twin is fitted on something else before: what it found then must not outlive the new state.
    twin = make(train_rows=200).fit(data.x, (data.label + 1) % 3)
    twin.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(twin.decision(data.x), expected[0], rtol=0, atol=0)
    for name, value in twin.result().items():
        torch.testing.assert_close(value, expected[1][name], rtol=0, atol=0, equal_nan=True)
    # and it goes on from there
    twin.update(
        TensorDict(
            {
                "tokens": data.x[:10],
                "carried": {"label": data.label[:10]},
                "row_id": data.row_id[:10] + (1 << 40),
            }
        )
    )
    assert int(twin.count) == 610


@pytest.mark.parametrize(
    "other",
    [dict(holdout=0.5), dict(seed=1), dict(labels="topic"), dict(control="type"), dict(alpha=2.0), dict(folds=3),
     dict(ignore_index=-1), dict(test_rows=64), dict(solver="lda")],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_a_state_of_other_settings_is_refused_in_words(data, feed, other):
    name = next(iter(other))
    probe = feed(tg.LinearProbe(), (600,), data.x, data.label, data.row_id)
    with pytest.raises(RuntimeError, match=f"another LinearProbe.*{name}"):
        tg.LinearProbe(**other).load_state_dict(probe.state_dict())
    with pytest.raises(ValueError, match=f"cannot merge.*{name}"):
        tg.LinearProbe(**other).merge_(probe)


def test_what_only_scores_may_differ_between_shards(data, feed):
    a = feed(tg.LinearProbe(alpha=1.0), (300,), data.x[:300], data.label[:300], data.row_id[:300])
    b = tg.LinearProbe(alpha=1.0, permutations=0, metrics={"first": lambda guess, label: 1.0})
    feed(b, (300,), data.x[300:], data.label[300:], data.row_id[300:]).merge_(a)
    assert int(b.count) == 600 and float(b.result()["first"]) == 1.0
    # a default that was spelt out is the same setting
    c = tg.LinearProbe(alpha=1.0, holdout=0.25, seed=0)
    c.load_state_dict(a.state_dict())
    torch.testing.assert_close(c.decision(data.x), a.decision(data.x))


def test_state_keeps_the_dtypes_it_was_declared_in(data, feed):
    for make in PROBES.values():
        probe = feed(make(), (100,), data.x.float(), data.label.int(), data.row_id.int())
        state = probe.half().state()
        assert state["test_x"].dtype == torch.float32 and state["test_label"].dtype == torch.int64
        assert all(
            value.dtype == torch.int64 for name, value in state.items() if name.endswith(("ids", "count"))
        )
        assert all(state[name].dtype == torch.float64 for name in state if name.endswith("scatter"))


def test_moments_of_rows_of_another_width_do_not_merge():
    wide, narrow = tg.StreamingLabelMoments(), tg.StreamingLabelMoments()
    wide(torch.randn(9, 3), torch.arange(9) % 2)
    narrow(torch.randn(9, 1), torch.arange(9) % 2)
    with pytest.raises(ValueError, match="rows of width 3, the stage to merge of width 1"):
        wide.merge_(narrow)
    with pytest.raises(ValueError, match=r"expects classes 0\.\.1 .*got values from 0 to 2"):
        tg.StreamingLabelMoments(n_classes=2)(torch.randn(9, 3), torch.arange(9) % 3)


# ------------------------------------------------------------------------------------------ surroundings


@contextlib.contextmanager
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "float64": double,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "meta device": lambda: torch.device("meta"),
}


def everything(make, data, x):
    """Numbers of one probe, streamed and fitted at once."""
    streamed = make(control="type", permutations=20)
    found = dict(named(streamed, streamed(x, data.label, data.row_id, data.types)))
    fitted = make().fit(x, data.label, data.row_id)
    found |= {"decision": fitted.decision(x), "classes": fitted.predict(x)}
    return {
        **found,
        **{
            name: torch.tensor(v, dtype=torch.float64, device="cpu")
            for name, v in fitted.score(x, data.label).items()
        },
    }


@MAKERS
@pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_surroundings_change_no_number(data, make, around):
    x = data.x.float()
    expected = everything(make, data, x)
    with around():
        found = everything(make, data, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.parametrize(
    "make", [tg.BilinearProbe, lambda **k: tg.LowRankBilinearProbe(rank=2, **k)], ids=["full", "low"]
)
def test_surroundings_change_no_number_of_a_pair(data, make, around):
    a, b = data.x[:, :4].float(), data.x[:, 4:7].float()

    def both():
        probe = make(permutations=20, control="type")
        fitted = make().fit(a, b, data.label)
        return [
            *probe(a, b, data.label, data.row_id, data.types),
            fitted.decision(a, b),
            *fitted.score(a, b, data.label).values(),
        ]

    expected = both()
    with around():
        found = both()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------ subclasses and hooks


class Forward(tg.LinearProbe):
    def forward(self, tensordict):
        return super().forward(tensordict)


class Doubled(tg.LinearProbe):
    """Each row counts twice."""

    def accumulate(self, tokens, label, row_id=None, types=None):
        for _ in range(2):
            super().accumulate(tokens, label, row_id, types)
            row_id = row_id + (1 << 50)

    def result(self):
        return {**super().result(), "accuracy": torch.tensor(0.125).double()}


def model_and_batches():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh())
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    return model, [{"x": part, "label": (part[:, 0] > 0).long()} for part in x.split(50)]


def hooked():
    probe = tg.LinearProbe()
    probe.register_forward_hook(lambda *_: None)
    return probe


@pytest.mark.parametrize(
    ("make", "text"),
    [(Forward, r"overrides forward\(\).*Override accumulate"), (hooked, "has forward hooks")],
)
def test_what_neither_run_nor_probing_would_call_is_refused_by_both(make, text):
    model, batches = model_and_batches()
    settings = {"capture": {"in_keys": ["x"]}}
    with pytest.raises(TypeError, match=text):
        tg.Probing(model, "module_input:0", make(), **settings).run(batches)
    around = tg.Probing(model, "module_input:0", make(), **settings)
    with pytest.raises(TypeError, match=text), around.fit() as phase:
        phase.labels = batches[0]["label"]
        model(batches[0]["x"])
    assert not model._forward_hooks


def test_overridden_parts_act_in_probing_as_in_a_run():
    model, batches = model_and_batches()
    settings = {"capture": {"in_keys": ["x"]}}
    table = tg.Probing(model, "module_input:0", Doubled(), **settings).run(batches)
    assert table["accuracy"][0] == 0.125 and table["train_rows"][0] + table["test_rows"][0] == 400
    around = tg.Probing(model, "module_input:0", Doubled(), **settings)
    with around.fit() as phase:
        for batch in batches:
            phase.labels = batch["label"].numpy()
            model(batch["x"])
    assert around.probes["module_input:0"].fitted["train_rows"] == 400


# ------------------------------------------------------------------------------------------ every way to score


@pytest.mark.parametrize("pair", [False, True])
def test_settings_reach_every_way_of_scoring(pair):
    model, batches = model_and_batches()
    wrong = {"error_rate": lambda guess, label: (guess != label).double().mean()}
    if pair:
        sites, kind = ["module_input:0", "module_output:0"], tg.BilinearProbe
        settings = {"pairs": [tuple(sites)]}
    else:
        sites, kind, settings = "module_input:0", tg.LinearProbe, {}
    capture = {"in_keys": ["x"]}
    make = lambda: tg.Probing(model, sites, kind(metrics=wrong, permutations=0), capture=capture, **settings)
    one = make().run(batches)
    over, around = make(), make()
    two = over.run(batches[:3], batches[3:])
    for context, part in ((around.fit, batches[:3]), (around.score, batches[3:])):
        with context() as phase:
            for batch in part:
                phase.labels = batch["label"]
                model(batch["x"])
    for table in (one, two, around.table()):
        assert float(table["error_rate"].iloc[0]) == pytest.approx(1 - float(table["accuracy"].iloc[0]))
    assert float(two["error_rate"].iloc[0]) == pytest.approx(float(around.table()["error_rate"].iloc[0]))


def test_batches_of_rows_and_labels_need_no_names():
    """What a torch DataLoader over a TensorDataset gives: the model's input, then the labels."""
    model, batches = model_and_batches()
    settings = {"capture": {"in_keys": ["x"]}}
    expected = tg.Probing(model, "module_output:0", tg.LinearProbe(), **settings).run(batches)
    pairs = [(batch["x"], batch["label"]) for batch in batches]
    found = tg.Probing(model, "module_output:0", tg.LinearProbe(), **settings).run(pairs)
    assert found["accuracy"].tolist() == expected["accuracy"].tolist()
    with pytest.raises(ValueError, match=r"all \d+ training labels are class 0"):
        words = [{**batch, "label": ["cat"] * 50} for batch in batches]
        tg.Probing(model, "module_output:0", tg.LinearProbe(), **settings).run(words)
    with pytest.raises(KeyError, match="label"):
        tg.Probing(model, "module_output:0", tg.LinearProbe(), **settings).run([{"x": batches[0]["x"]}])


def test_calls_of_ones_own_are_for_one_process(monkeypatch):
    model, _ = model_and_batches()
    monkeypatch.setattr("tdgeom.probing.probing.rank_and_world", lambda: (1, 2))
    with pytest.raises(ValueError, match=r"Probing.fit\(\) is for one process.*probing.run\(loader\)"):
        tg.Probing(model, "module_input:0", tg.LinearProbe()).fit().__enter__()


class Nearest:
    """No more than fit and predict."""

    def fit(self, x, y):
        self.means = torch.stack([torch.as_tensor(x[y == c]).mean(0) for c in range(int(y.max()) + 1)])
        return self

    def predict(self, x):
        return torch.cdist(torch.as_tensor(x), self.means).argmin(1).numpy()


def test_an_estimator_needs_no_more_than_fit_and_predict(data):
    probe = tg.SklearnProbe(Nearest()).fit(data.x, data.label)
    expected = float(
        (Nearest().fit(data.x.numpy(), data.label.numpy()).predict(data.x) == data.label.numpy()).mean()
    )
    assert probe.score(data.x, data.label)["accuracy"] == pytest.approx(expected)
    assert probe.decision(data.x[:1]).shape == (1, 3)
