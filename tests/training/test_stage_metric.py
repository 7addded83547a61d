"""Streaming stages as torchmetrics: the library's own loops, copies, collections and ranks give what one pass gives."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
from tensordict import TensorDict

import tdgeom as tg
from metric_ranks import rows, spectrum

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:tdgeom.UndefinedMeasureWarning", "ignore:.*:tdgeom.FewRowsWarning"
)
TESTS = Path(__file__).parents[1]


def d_pr(x):
    values = np.linalg.eigvalsh(np.cov(np.asarray(x), rowvar=False))
    return values.sum() ** 2 / (values**2).sum()


def test_batches_add_up_and_forward_gives_the_batch_alone():
    metric, x = tg.as_metric(spectrum(), metrics="d_pr"), rows()
    assert isinstance(metric, torchmetrics.Metric)
    for part in x.split(30):
        assert float(metric(tokens=part)) == pytest.approx(d_pr(part), rel=1e-12)
    assert float(metric.compute()) == pytest.approx(d_pr(x), rel=1e-12)
    assert metric.update_count == 3


def test_reset_begins_anew_and_the_stage_given_is_untouched():
    stage, x = tg.StreamingMean(), rows()
    stage.update(TensorDict(tokens=torch.full((5, 4), 100.0)))
    metric = tg.as_metric(stage, metrics=["mean"])
    metric.update(x)
    metric.reset()
    metric.update(x[:7])
    np.testing.assert_allclose(metric.compute(), x[:7].numpy().mean(0), rtol=1e-12)
    assert int(stage.count) == 5
    metric.reset()
    with (
        pytest.warns(UserWarning, match="was called before"),
        pytest.raises(ValueError, match="has seen no rows"),
    ):
        metric.compute()


@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "clone"])
def test_a_state_goes_on_elsewhere(way):
    x, first, second = rows(), tg.as_metric(tg.StreamingCovariance()), tg.as_metric(tg.StreamingCovariance())
    first.update(x[:50])
    if way == "state_dict":
        second.load_state_dict(first.state_dict())
    elif way == "file":
        torch.save(first.state_dict(), held := io.BytesIO())
        second.load_state_dict(torch.load(io.BytesIO(held.getvalue()), weights_only=True))
    else:
        second = pickle.loads(pickle.dumps(first)) if way == "pickle" else first.clone()
    second.update(x[50:])
    np.testing.assert_allclose(second.compute()["covariance"], np.cov(x.numpy(), rowvar=False), rtol=1e-12)
    assert int(first.compute()["count"]) == 50 and int(second.compute()["count"]) == 90


def test_states_of_other_stages_are_refused():
    first = tg.as_metric(tg.StreamingMean())
    first.update(rows())
    with pytest.raises(ValueError, match=r"state of another metric: .*halflife is None there and 5.0 here"):
        tg.as_metric(tg.StreamingMean(halflife=5)).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="state of another metric"):
        tg.as_metric(tg.StreamingCovariance()).merge_state(first)
    with pytest.raises(ValueError, match="takes a metric that as_metric made"):
        first.merge_state({"other": 1})


@pytest.mark.parametrize("halflife", [None, 9])
@pytest.mark.parametrize("state", [False, True])
def test_merging_adds_what_came_later(halflife, state):
    x = rows()
    a, b, whole = (tg.as_metric(tg.StreamingMean(halflife=halflife), metrics=["mean"]) for _ in range(3))
    a.update(x[:60]), b.update(x[60:]), whole.update(x)
    a.compute()  # what has been computed is not kept
    a.merge_state(b.metric_state if state else b)
    np.testing.assert_allclose(a.compute(), whole.compute(), rtol=1e-12)
    one = tg.as_metric(tg.StreamingMean(halflife=halflife), metrics=["mean"])
    for part in x.split(30):  # forward, too, keeps the order
        one(part)
    np.testing.assert_allclose(one.compute(), whole.compute(), rtol=1e-12)


def test_in_a_collection_beside_others():
    x = rows()
    collection = torchmetrics.MetricCollection(
        {
            "moments": tg.as_metric(tg.StreamingMean(), metrics=["mean", "count"]),
            "again": tg.as_metric(tg.StreamingMean(), metrics=["variance"]),
            "geometry": tg.as_metric(spectrum(), metrics=["d_pr"]),
            "loss": torchmetrics.MeanMetric(),
        },
        prefix="train/",
    )
    for part in x.split(30):
        batch = collection(tokens=part, value=part.mean())
        assert float(batch["train/geometry"]) == pytest.approx(d_pr(part))
    found = collection.compute()
    assert float(found["train/geometry"]) == pytest.approx(d_pr(x)) and int(found["train/count"]) == 90
    np.testing.assert_allclose(found["train/again"], x.numpy().var(0, ddof=1), rtol=1e-12)
    assert float(found["train/loss"]) == pytest.approx(float(x.mean()), rel=1e-5)
    collection.reset()
    collection.update(tokens=x[:9], value=x.mean())
    assert int(collection.compute()["train/count"]) == 9


def test_sites_that_begin_alike_are_not_taken_for_one():
    """A collection lets one metric stand for all whose states agree after the first batch."""

    def make(site):
        return tg.as_metric(tg.ForEach(tg.StreamingMean(), [site]), metrics=["mean"])

    collection = torchmetrics.MetricCollection({"a": make("a"), "b": make("b")})
    for scale in (0.0, 1.0):
        collection.update({("tokens", "a"): torch.full((3, 1), scale), ("tokens", "b"): torch.zeros(3, 1)})
    found = collection.compute()
    assert (float(found["a"]), float(found["b"])) == (0.5, 0.0)


def test_outputs_by_name_and_rows_in_every_form():
    x = rows()
    two = tg.ForEach(tg.StreamingMean(), ["a", "b"])
    metric = tg.as_metric(two, metrics=["mean/a/mean", "mean/b/count"])
    metric.update(TensorDict({("tokens", "a"): x, ("tokens", "b"): x}))
    metric.update(a=x, b=x)
    metric.update(x, x)
    found = metric.compute()
    assert set(found) == {"mean/a/mean", "mean/b/count"} and int(found["mean/b/count"]) == 270
    assert set(tg.as_metric(tg.StreamingMean())(x)) == {"mean", "variance", "count"}
    with pytest.raises(
        TypeError, match=r"tensors in this order or by name: \['a', 'b'\]; got 0 in order and \['a'\] by name"
    ):
        metric.update(a=x)


def test_dtypes_never_touch_the_state():
    metric = tg.as_metric(tg.StreamingMean(), metrics=["mean"]).half()
    metric.update(rows())
    assert metric.to(torch.float16).compute().dtype == torch.float64


@pytest.mark.parametrize(
    ("stage", "error", "match"),
    [
        (tg.SpectrumMetrics(), TypeError, "nothing in it adds up rows"),
        (tg.SelectTokens(["x"]), TypeError, "nothing in it adds up rows"),
        (
            tg.Pipeline(tg.SelectTokens(["x"]), tg.ForEach(tg.StreamingMean(), ["x"])),
            ValueError,
            "SelectTokens makes rows of each batch",
        ),
    ],
    ids=["no stream", "no stream either", "rows of batches"],
)
def test_what_does_not_stream_is_refused(stage, error, match):
    with pytest.raises(error, match=match):
        tg.as_metric(stage)


def test_unknown_outputs_are_refused():
    with pytest.raises(ValueError, match=r"metrics=\['d_pr'\] are not among the outputs"):
        tg.as_metric(tg.StreamingMean(), metrics=["d_pr"])


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives(tmp_path):
    program = [sys.executable, str(TESTS / "metric_ranks.py")]
    ranks = [
        subprocess.Popen([*program, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    x = rows()
    sample = tg.RowSample(["x"], size=8)(TensorDict({("tokens", "x"): x, "row_id": torch.arange(90)}))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert float(found["values"]["d_pr"]) == pytest.approx(d_pr(x), rel=1e-12)
        np.testing.assert_allclose(found["values"]["covariance"], np.cov(x.numpy(), rowvar=False), rtol=1e-12)
        assert torch.equal(found["sampled"]["x"], sample["sample", "x"])
        np.testing.assert_allclose(found["one_sided"]["mean"], x[:70].numpy().mean(0), rtol=1e-12)
        assert int(found["own again"]) == [70, 20][rank]
        assert int(found["step"]) == 20  # the batches of both
        twice = torch.cat((x, x))
        np.testing.assert_allclose(
            found["later"]["covariance"], np.cov(twice.numpy(), rowvar=False), rtol=1e-12
        )
        for refusal in (found["forgetting"], found["sync_"]):
            assert "2 processes that share the data out have none that came later" in refusal
