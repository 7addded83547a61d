"""Curves over nested prefixes, against curves whose limit is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential

import models
import tdgeom as tg
from tdgeom import functional as F

N = torch.tensor([3200, 1600, 800, 400, 200])


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_the_curve_that_made_the_values_is_found(power: float) -> None:
    value = torch.stack([7 - 30 * N.double() ** -power, torch.full((5,), 2.0).double()])
    found = F.settling(value, N)
    assert found.limit.tolist() == pytest.approx([7.0, 2.0])
    assert float(found.power[0]) == power and float(found.coefficient[0]) == pytest.approx(-30.0)
    assert float(found.remaining[0]) == pytest.approx(30 * 3200**-power)
    assert float(F.rows_to_settle(value, N, 0.01)[0]) == pytest.approx((30 / 0.07) ** (1 / power), rel=1e-6)


def test_the_participation_ratio_of_few_rows_is_heading_for_the_truth() -> None:
    """(tr S)²/tr S² of N rows of white noise is near D·N/(N+D): 1/n."""
    x = torch.randn(3200, 40, generator=torch.Generator().manual_seed(0))
    td = tg.Convergence(tg.SampleMetrics())(TensorDict({"sample": x}))
    curve = td["convergence", "sv_participation_ratio", "value"].numpy()
    rows = td["convergence", "rows"].numpy()
    assert curve == pytest.approx(40 * rows / (rows + 40), rel=0.03)
    assert abs(float(td["convergence", "sv_participation_ratio", "limit"]) - 40) < 40 - curve[1]
    few = tg.Convergence(tg.SampleMetrics())(TensorDict({"sample": x[:200]}))
    assert td["convergence", "sv_participation_ratio", "converged"]
    assert not few["convergence", "sv_participation_ratio", "converged"]
    wide = torch.cat([x[:, :2] * 10, x], 1)
    td = tg.Convergence(tg.SampleMetrics())(TensorDict({"sample": wide}))
    assert td["convergence", "sv_stable_rank", "converged"]


def test_every_value_is_the_stages_own_on_the_prefix() -> None:
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    out = tg.Convergence(tg.TwoNN(), levels=3)(TensorDict({"sample": x}))["convergence"]
    assert out["rows"].tolist() == [500, 250, 125] and out["twonn", "value"].dtype is torch.float64
    want = [float(F.twonn(x[:n]).estimate) for n in (500, 250, 125)]
    assert out["twonn", "value"].tolist() == pytest.approx(want)


def test_an_analysis_keeps_its_curves(tmp_path) -> None:
    model = models.gpt2()
    loader = [
        {"input_ids": torch.randint(0, models.VOCAB, (8, 16), generator=torch.Generator().manual_seed(s))}
        for s in range(4)
    ]
    results = tg.analyze_model(
        model,
        loader,
        metrics=["spectrum", "sample", "twonn", "gride"],
        convergence=True,
        progress=False,
        save_dir=tmp_path / "r",
    )
    assert results.metrics["converged"].dtype == bool
    frame = tg.convergence(results)
    assert {"d_pr", "sv_effective_rank", "twonn"} <= set(frame["metric"]) and frame["rows"].max() == 512
    whole = frame[(frame["rows"] == 512) & (frame["metric"] == "d_pr")].set_index("site")["value"]
    assert whole.to_numpy() == pytest.approx(results.metrics.set_index("site")["d_pr"].to_numpy(), rel=1e-6)
    assert "Have the numbers settled?" in results.report(tmp_path / "report.html").read_text()
    assert results.plot("convergence", metric="d_pr").get_xlabel() == "rows"
    again = tg.convergence(tg.AnalysisResults.load(tmp_path / "r"))
    assert again.equals(frame)
    needed = tg.rows_needed(results, "d_pr", 0.1)
    curve = frame[(frame["metric"] == "d_pr") & (frame["site"] == needed["site"][0])]
    want = F.rows_to_settle(
        torch.tensor(curve["value"].to_numpy()), torch.tensor(curve["rows"].to_numpy()), 0.1
    )
    assert needed["rows_needed"][0] == np.ceil(float(want))


def test_curves_are_drawn_and_reported(tmp_path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    sites = ["residual_input.0", "residual_input.1"]
    generator = torch.Generator().manual_seed(0)
    rows = TensorDict({("sample", site): torch.randn(800, 6, generator=generator) for site in sites})
    result = tg.ForEach(tg.Convergence(tg.SampleMetrics()), sites)(rows)
    frame = tg.convergence(result)
    ax = tg.plot.convergence(result, Figure().subplots(), metric="sv_effective_rank")
    drawn = [line for line in ax.get_lines() if line.get_label() in sites]
    for site, line in zip(sites, drawn, strict=True):
        own = frame[(frame["site"] == site) & (frame["metric"] == "sv_effective_rank")].sort_values("rows")
        assert line.get_xdata().tolist() == own["rows"].tolist()
        assert line.get_ydata().tolist() == pytest.approx(own["value"].tolist())
        assert line.get_linestyle() == ("-" if own["converged"].all() else "--")
    assert ax.get_ylabel() == "effective rank of the sample (dimensions)" and ax.get_xscale() == "log"
    with pytest.raises(KeyError, match="no curve of 'gride'"):
        tg.plot.convergence(frame, Figure().subplots(), metric="gride")
    page = tg.write_report(frame, tmp_path / "report.html").read_text()
    assert "Have the numbers settled?" in page and "Settled at 2 of 2 sites." in page


def test_what_has_no_curve_is_said() -> None:
    with pytest.raises(TypeError, match="reads 'sample' alone"):
        tg.Convergence(tg.SpectrumMetrics())
    with pytest.raises(ValueError, match="at least 128 rows"):
        tg.Convergence(tg.TwoNN())(TensorDict({"sample": torch.randn(100, 3)}))
    stage = TensorDictSequential(TensorDictModule(lambda x: x.mean(0), in_keys=["sample"], out_keys=["mean"]))
    with pytest.raises(ValueError, match="single numbers, mean has shapes"):
        tg.Convergence(stage)(TensorDict({"sample": torch.randn(200, 3)}))
    with pytest.raises(ValueError, match="hold no curves"):
        tg.convergence(TensorDict({"spectrum": {"x": {"d_pr": torch.tensor(1.0)}}}))
    td = tg.Convergence(tg.TwoNN())(TensorDict({"sample": torch.randn(200, 3)}))
    with pytest.raises(KeyError, match=r"there is \['twonn'\]"):
        tg.rows_needed(td, "gride")
