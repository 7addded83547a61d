"""A training that is watched is the training that is not, bit for bit; and what is measured is what its model holds."""

from __future__ import annotations

import copy
import json
import logging
import random
import warnings

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictSequential
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tdgeom as tg
from tdgeom.files.json_text import plain
from tdgeom.training.time_budget import TimeBudget

STEPS = 6
CHEAP = {"metrics": "spectrum", "budget": None}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.map, self.drop = nn.Linear(6, 6), nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.map(x)))


class Net(nn.Module):
    """Dropout, a norm with running statistics, a counter in a buffer, and a draw of NumPy's in its forward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1  # in eval mode too
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) * (1 + 1e-3 * np.random.rand())


class Plain(Net):
    """Without what a traced graph cannot hold."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Checkpointed(Net):
    def forward(self, x):
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return self.norm(x)


class Noisy(torch.utils.data.Dataset):
    """A probe that draws as it is read, from generators of which the model draws from none while it is evaluated."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return {"x": torch.rand(6) + index + random.random()}


def seeded():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)


def train(watch=None, made=Net, *, autocast=False, compiled=None, generator=None, steps=STEPS):
    """Losses and all else that a training leaves."""
    seeded()
    model = made().train()
    called = model
    if compiled == "outside":
        called = torch.compile(model, backend="eager")
    elif compiled == "inside":
        model.compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []

    def one_step():
        order = None if generator is None else torch.randperm(8, generator=generator)
        x = torch.rand(8, 6)
        loss = called(x if order is None else x[order]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for _ in range(steps):
            if watch is None:
                one_step()
            else:
                with watch.step(called):
                    one_step()
    held = {name: value.clone() for name, value in model.state_dict().items()}
    ends = torch.rand(3).tolist(), np.random.rand(), random.random()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())
    return losses, held, ends, model


def same(one, other):
    assert one[0] == other[0] and one[2] == other[2]
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())


def probe(**changes):
    return DataLoader(Noisy(), batch_size=8, shuffle=True, **changes)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"made": Checkpointed},
        {"autocast": True},
        {"made": Plain, "compiled": "inside"},
        pytest.param({"made": Plain, "compiled": "outside"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_weights_buffers_and_random_numbers_are_those_of_a_training_that_nobody_watched(how):
    watch = tg.GeometryWatch(probe(), every=2, sites="residual_output", in_keys=["x"], **CHEAP)
    same(train(**how), train(watch, **how))
    assert watch.frame()["step"].unique().tolist() == [0, 2, 4, 6]
    if not how.get("compiled"):
        own = tg.GeometryWatch(schedule="log", **CHEAP)
        same(train(**how), train(own, **how))
        assert own.frame()["step"].unique().tolist() == [0, 1, 2, 4]


def test_a_generator_that_probe_and_training_share():
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    watch = tg.GeometryWatch(probe(generator=second), every=1, **CHEAP)
    same(train(generator=first), train(watch, generator=second))
    assert len(watch.values) == STEPS + 1


def test_a_compiled_training_step_cannot_be_read_and_a_failed_one_leaves_no_hook():
    with pytest.raises(ValueError, match="compiled Plain runs a traced graph.*dataloader="):
        train(tg.GeometryWatch(**CHEAP), compiled="inside", made=Plain)
    model, watch = Net(), tg.GeometryWatch(**CHEAP)
    for wrong in (torch.rand(2, 5), "backward"):
        with pytest.raises(RuntimeError), watch.step(model):
            model(torch.rand(2, 6) if wrong == "backward" else wrong)
            raise RuntimeError("in the backward")
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    watch.begin_step(model, 0)  # a trainer's callback hears of no error
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.rand(2, 5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    watch = tg.GeometryWatch(**CHEAP)
    with (
        pytest.raises(RuntimeError, match="no pass of Net was seen"),
        pytest.warns(UserWarning, match="no call"),
        watch.step(model),
    ):
        copy.deepcopy(model)(torch.rand(2, 6))


class Trains(nn.Module):
    """A forward that writes to its weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        with torch.no_grad():
            self.layers[0].weight.mul_(0.99)
        return self.layers[1](self.layers[0](x))


def test_a_model_that_looking_would_change_is_refused():
    watch = tg.GeometryWatch([{"x": torch.rand(20, 6)}], **CHEAP)
    with pytest.raises(RuntimeError, match=r"wrote to \['layers.0.weight'\] of Trains"):
        watch.measure(Trains(), 0)


def participation(rows):
    values = np.linalg.eigvalsh(np.cov(rows.double().numpy(), rowvar=False))
    return values.sum() ** 2 / (values**2).sum()


def test_rows_of_training_batches_are_those_of_the_passes_that_train():
    """Two passes in one step, dropout acting, against hooks of our own."""
    seeded()
    model, watch = Net().train(), tg.GeometryWatch(every=1, **CHEAP)
    for step in range(2):
        seen = []
        handle = model.layers[1].register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.detach())
        )
        with watch.step(model):
            for _ in range(2):
                model(torch.rand(40, 6)).sum().backward()
        handle.remove()
        frame = watch.frame().query("metric == 'd_pr'").set_index(["step", "site"])["value"]
        assert frame[step, "residual_output.1"] == pytest.approx(participation(torch.cat(seen)), rel=1e-9)
    assert watch.last.metadata["step"] == 1 and watch.last.metadata["rows_observed"] == 80


def test_no_more_rows_than_asked_for_are_held_while_a_step_runs():
    model, watch = Net().train(), tg.GeometryWatch(max_rows=50, **CHEAP)
    with watch.step(model):
        for _ in range(5):
            model(torch.rand(20, 6)).sum().backward()
        held = watch._reading[1]._calls
        assert len(held) == 3
    assert watch.last.metadata["rows_observed"] == 50


def test_a_probe_is_what_analyze_model_measures_of_the_weights_of_that_step():
    batches = [{"x": torch.rand(30, 6)} for _ in range(3)]
    watch = tg.GeometryWatch(batches, every=3, budget=None, metrics=["spectrum", "sample"])
    _, _, _, model = train(watch)
    asked = {"sites": "residual_output", "metrics": ["spectrum", "sample"], "progress": False}
    then = tg.analyze_model(copy.deepcopy(model), batches, **asked).metrics.set_index("site")
    frame = watch.frame().query("step == 6").set_index(["site", "metric"])["value"]
    for metric in ("d_pr", "rankme" if "rankme" in then else "top1_share", "norm_mean"):
        assert frame["residual_output.1", metric] == pytest.approx(
            then.loc["residual_output.1", metric], rel=1e-12
        )


def test_any_pipeline_made_of_the_model_or_given():
    def made(model):
        capture = tg.Capture(model, "residual_output")
        s = capture.sites
        return TensorDictSequential(
            capture,
            tg.SelectTokens(s),
            tg.ForEach(tg.StreamingMean(), s),
            tg.RowSample(s, size=64),
            tg.ForEach(tg.TwoNN(), s),
            tg.ForEachPair(tg.LinearCKA(), s),
        )

    for dataloader in ([{"x": torch.rand(60, 6)}], None):
        watch = tg.GeometryWatch(dataloader, schedule=[2, 4], budget=None, pipeline=made)
        same(train(), train(watch))
        assert watch.frame()["step"].unique().tolist() == [2, 4] and "twonn_estimate" in set(
            watch.frame()["metric"]
        )
        assert watch.pairs_frame()["site"].unique().tolist() == ["residual_output.0->residual_output.1"]
        assert int(watch.last["run", "step"]) == 4
    with pytest.raises(ValueError, match="metrics= is of the default analysis"):
        tg.GeometryWatch(pipeline=made, metrics="sample")


def test_the_budget_puts_looks_off_and_says_so(monkeypatch):
    """A clock of our own: a step takes 1 s, a look 3 s."""
    now = [0.0]
    monkeypatch.setattr("tdgeom.training.time_budget.time.perf_counter", lambda: now[0])
    watch = tg.GeometryWatch([{"x": torch.rand(20, 6)}], every=10, budget=0.1, metrics="spectrum")
    look = watch.look.results

    def slow(*args):
        now[0] += 3
        return look(*args)

    monkeypatch.setattr(watch.look, "results", slow)
    model = Net()
    with pytest.warns(UserWarning, match="a look takes 3 s.*budget=0.1"):
        for _ in range(200):
            with watch.step(model):
                now[0] += 1
    steps = watch.frame()["step"].unique().tolist()
    assert steps == [0, 60, 90, 120, 150, 180]  # at 60: 3 + 3 <= 0.1 * 60
    account = watch.overhead
    assert (
        account["share"] <= 0.1
        and account["looks"] == 6
        and account["put_off"] == 20 - 5
        and account["seconds"] == 18
    )


def test_the_longest_of_the_last_two_looks_counts():
    budget = TimeBudget(0.5)
    budget.looking, budget.longest = 1.0, 1.0
    assert budget.allows(4.0) and not budget.allows(3.9)


def test_schedules():
    def due(**asked):
        watch = tg.GeometryWatch(**asked)
        return [step for step in range(35) if watch.due(step)]

    assert due(every=10) == [0, 10, 20, 30]
    assert due(schedule="log") == [0, 1, 2, 4, 8, 16, 32]
    assert due(schedule=range(3, 12, 4)) == [3, 7, 11]
    assert due(schedule=lambda step: step % 17 == 1) == [1, 18]
    steps = tg.log_spaced_steps(10_000, 30)
    assert steps[:3] == [0, 1, 2] and steps[-1] == 10_000 and len(steps) <= 30
    ratios = np.diff(np.log(steps[10:]))
    assert ratios == pytest.approx(np.full(len(ratios), np.log(10_000) / 28), rel=0.1)
    for wrong in ({"every": 0}, {"every": [1]}, {"schedule": "often"}, {"schedule": [1.5]}, {"schedule": -3}):
        with pytest.raises(ValueError, match="GeometryWatch: (every|schedule)"):
            tg.GeometryWatch(**wrong)
    with pytest.raises(ValueError, match="read again at every look"):
        tg.GeometryWatch(iter([]))
    with pytest.raises(ValueError, match="share of the training time"):
        tg.GeometryWatch(budget=0)
    with pytest.raises(TypeError, match="GeometryWatch takes no argument 'evry'. Write every="):
        tg.GeometryWatch(evry=3)


class Tracker:
    """As Weights & Biases and Trackio log."""

    def __init__(self):
        self.seen = []

    def log(self, data, step=None, commit=None):
        self.seen.append((step, data))


class Ml:
    """As MLflow and Lightning's loggers do."""

    def __init__(self):
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen.append((step, metrics))


class Scalars:
    """As a SummaryWriter."""

    def __init__(self):
        self.seen = {}

    def add_scalar(self, tag, scalar_value, global_step=None):
        self.seen.setdefault(global_step, {})[tag] = scalar_value

    def flush(self):
        pass


def test_every_log_gets_the_same_values_under_flat_names(tmp_path):
    import re

    tracker, ml, scalars, called = Tracker(), Ml(), Scalars(), {}
    file = tmp_path / "deep" / "geometry.jsonl"
    log = [tracker, ml, scalars, str(file), lambda values, step: called.update({step: values})]
    watch = tg.GeometryWatch(
        [{"x": torch.rand(40, 6)}], every=3, budget=None, metrics=["spectrum", "linear_cka"], log=log
    )
    train(watch)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6]
    for (step, values), line in zip(tracker.seen, lines):
        assert plain(values) == plain(called[step]) == plain(scalars.seen[step]) == plain(dict(ml.seen)[step])
        assert plain({"step": step, **values}) == line
        frame = watch.frame().query(f"step == {step}")
        for row in frame.to_dict("records"):
            assert values[f"geometry/{row['site']}/{row['metric']}"] == pytest.approx(
                row["value"], rel=0, nan_ok=True
            )
        assert "geometry/residual_output.0_to_residual_output.1/linear_cka" in values
        assert all(re.fullmatch(r"[\w./ :-]+", name) for name in values)  # what MLflow takes
    assert lines[-1]["geometry/overhead"] > 0


def test_what_logs_nothing_is_refused(monkeypatch):
    with pytest.raises(TypeError, match=r"file such as 'geometry.jsonl'"):
        tg.GeometryWatch(log="geometry.txt")
    with pytest.raises(TypeError, match="logging.Logger give a function"):
        tg.GeometryWatch(log=logging.getLogger("x"))
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        tg.GeometryWatch(log="tensorboard")


class Alarm:
    def update(self, step, metrics):
        return [f"{len(metrics)} metrics"] if step == 3 else []


def test_alarms_are_warned_of_and_kept():
    watch = tg.GeometryWatch([{"x": torch.rand(40, 6)}], every=3, alarms=Alarm(), **CHEAP)
    with pytest.warns(UserWarning, match="step 3: [0-9]+ metrics"):
        train(watch)
    assert [step for step, _ in watch.messages] == [3]


def test_change_alarms_hear_what_the_logs_get():
    """A layer that collapses in the middle of a training, and the library's own alarms."""
    model, alarms = Plain(), tg.ChangeAlarms(block=1, reference=10, horizon=10)
    watch = tg.GeometryWatch([{"x": torch.randn(60, 6)}], every=1, alarms=alarms, **CHEAP)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(22):
            with watch.step(model), torch.no_grad():
                model.layers[0].map.weight.add_(1e-4 * torch.randn(6, 6))
                if step == 19:
                    model.layers[0].map.bias.fill_(20.0)
                    model.layers[0].map.weight[1:] = 30.0
    assert {message.step for _, message in watch.messages} == {20}
    told = [str(one.message) for one in said if "GeometryWatch: step 20: " in str(one.message)]
    assert len(told) == len(watch.messages) > 0
    assert any(text.startswith("GeometryWatch: step 20: rank drop: geometry/") for text in told)


def test_the_first_look_fails_loudly_and_later_ones_let_training_go_on():
    model = Net()
    with pytest.raises(IndexError, match="layers run from 0 to 1"):
        tg.GeometryWatch([{"x": torch.rand(9, 6)}], sites="residual_output.9", **CHEAP).measure(model, 0)
    watch = tg.GeometryWatch([{"x": torch.rand(20, 6)}], every=1, **CHEAP)
    with watch.step(model):
        pass
    with torch.no_grad():
        model.layers[0].map.weight.fill_(torch.nan)
    with pytest.warns(UserWarning, match="step 2 is not measured.*residual_output.0"), watch.step(model):
        pass
    assert sorted(watch.values) == [0, 1]
    with pytest.warns(UserWarning, match="another Net"):
        watch.measure(Net(), 3)


def test_a_probe_that_gives_other_data_is_told_of():
    count = [0]

    class Fresh:
        def __iter__(self):
            count[0] += 1
            yield {"x": torch.full((20, 6), float(count[0])) + torch.rand(20, 6)}

    watch = tg.GeometryWatch(Fresh(), every=3, **CHEAP)
    with pytest.warns(UserWarning, match="other data than at the first look"):
        train(watch)


def test_each_step_is_kept_as_a_bundle(tmp_path):
    watch = tg.GeometryWatch([{"x": torch.rand(40, 6)}], every=3, save_dir=tmp_path / "steps", **CHEAP)
    train(watch)
    folders = sorted((tmp_path / "steps").iterdir())
    assert [folder.name for folder in folders] == ["step-00000000", "step-00000003", "step-00000006"]
    loaded = [tg.load_results(folder) for folder in folders]
    assert [one.metadata["step"] for one in loaded] == [0, 3, 6]


def test_loader_of_tuples_takes_names():
    watch = tg.GeometryWatch(
        DataLoader(TensorDataset(torch.rand(40, 6)), batch_size=20), in_keys=["x"], **CHEAP
    )
    assert watch.measure(Net(), 7).metadata["step"] == 7
    assert watch.frame()["step"].unique().tolist() == [7]
