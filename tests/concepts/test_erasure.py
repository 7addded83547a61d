"""LEACE: nothing linear is left of a label, and the rows moved as little as possible."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.linear_model import LogisticRegression
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from models import bert
from tdgeom import functional as F


@pytest.fixture(scope="module", params=[2, 4])
def data(request):
    generator = torch.Generator().manual_seed(request.param)
    label = torch.randint(request.param, (2000,), generator=generator)
    mixing = torch.randn(10, 10, generator=generator).double()
    centres = torch.randn(request.param, 10, generator=generator).double()
    return torch.randn(2000, 10, generator=generator).double() @ mixing + 3 * centres[label] + 4, label


def closed_form(x, z):
    """x - W⁺PW(x - μ), W = (Σ^½)⁺, P onto col(WΣ_xz), with matrices in full."""
    x, z = x.numpy(), z.numpy()
    mean = x.mean(0)
    sigma = np.cov(x.T, bias=True)
    cross = (x - mean).T @ (z - z.mean(0)) / len(x)
    half = scipy.linalg.sqrtm(sigma).real
    w = np.linalg.pinv(half)
    basis = scipy.linalg.orth(w @ cross, rcond=1e-8)
    return x - (x - mean) @ (np.linalg.pinv(w) @ basis @ basis.T @ w).T


@pytest.mark.parametrize("sizes", [2000, 77])
def test_streamed_eraser_is_the_closed_form(data, sizes):
    x, label = data
    stream = tg.StreamingLabelMoments(folds=3)
    for part in torch.arange(2000).split(sizes):
        moments = stream(x[part], label[part], part << 20)
    left, right, mean = tg.LEACE()(*moments)
    clean = F.erase(x, left, right, mean)
    hot = torch.nn.functional.one_hot(label).double()
    np.testing.assert_allclose(clean, closed_form(x, hot), rtol=1e-7, atol=1e-7)
    assert left.shape == (10, int(label.max()))
    cross = (clean - clean.mean(0)).T @ (hot - hot.mean(0))
    assert float(cross.abs().max()) < 1e-8 * 2000
    torch.testing.assert_close(clean.mean(0), x.mean(0))  # the mean stays
    torch.testing.assert_close(F.erase(clean, left, right, mean), clean)  # twice is once


def test_no_other_eraser_moves_the_rows_less(data):
    x, label = data
    clean = tg.Erase.fit(x, label)(tokens=x)
    moved = (clean - x).square().sum()
    hot = torch.nn.functional.one_hot(label).double()
    cross = (x - x.mean(0)).T @ (hot - hot.mean(0))
    # the orthogonal projection away from the class means erases too, and moves more
    u = scipy.linalg.orth(cross.numpy(), rcond=1e-8)
    plain = (x - x.mean(0)) @ torch.from_numpy(u @ u.T)
    assert float(moved) < 0.999 * float(plain.square().sum())
    # every eraser x - A(x - μ) has AΣ_xz = Σ_xz; any such change of A moves more
    generator = torch.Generator().manual_seed(0)
    away = torch.eye(10).double() - torch.from_numpy(u @ u.T)
    for _ in range(20):
        change = torch.randn(10, 10, generator=generator).double() @ away * 0.05
        other = clean - (x - x.mean(0)) @ change.T
        assert float(((other - other.mean(0)).T @ (hot - hot.mean(0))).abs().max()) < 1e-6
        assert float((other - x).square().sum()) > float(moved)


def test_a_fresh_probe_is_at_the_majority_baseline(data):
    x, label = data
    row_id = torch.arange(2000) << 20
    before = tg.LinearProbe()(x, label, row_id)[0]
    train = ~F.holdout_mask(F.row_groups(row_id), 0.25)
    eraser = tg.Erase.fit(x[train], label[train])  # fitted on the training part alone
    clean = eraser(tokens=x)
    for probe in (tg.LinearProbe(), tg.LinearProbe(alpha=0.0), tg.LinearProbe(solver="logistic")):
        scores = dict(zip([key[1] for key in probe.out_keys], probe(clean, label, row_id)))
        assert float(before) > float(scores["majority_baseline"]) + 0.2
        assert float(scores["accuracy"]) <= float(scores["majority_baseline"]) + float(
            scores["standard_error"]
        )
    reference = LogisticRegression(max_iter=5000).fit(clean[train].numpy(), label[train].numpy())
    held = ~train
    counts = label[train].bincount()
    baseline = float((label[held] == counts.argmax()).double().mean())
    error = (baseline * (1 - baseline) / int(held.sum())) ** 0.5
    assert reference.score(clean[held].numpy(), label[held].numpy()) <= baseline + error


def test_a_number_is_erased_too():
    x = torch.randn(500, 6).double()
    y = x @ torch.randn(6).double() + 0.1 * torch.randn(500).double()
    clean = tg.Erase.fit(x, y)(tokens=x)
    assert float(np.abs(np.corrcoef(clean.T.numpy(), y.numpy())[-1, :-1]).max()) < 1e-9


def test_directions_without_variance_and_labels_without_relation():
    x = torch.randn(300, 4).double() @ torch.randn(4, 9).double()  # rank 4 in 9 features
    label = torch.arange(300) % 2
    x = x + label[:, None] * x[0]
    clean = tg.Erase.fit(x, label)(tokens=x)
    assert float((clean[label == 0].mean(0) - clean[label == 1].mean(0)).abs().max()) < 1e-9
    assert np.linalg.matrix_rank((clean - clean.mean(0)).numpy(), tol=1e-8) == 3
    with pytest.raises(ValueError, match="no variance"):
        F.leace(F.label_moments(torch.ones(5, 3), torch.eye(2)[torch.arange(5) % 2]))


def test_arrays_are_taken_and_mistakes_named():
    x, label = torch.randn(60, 4), torch.arange(60) % 2
    from_arrays = tg.Erase.fit(x.numpy(), label.tolist())
    assert torch.equal(from_arrays(tokens=x), tg.Erase.fit(x, label)(tokens=x))
    assert torch.equal(tg.Erase.fit(x, ["a", "b"] * 30)(tokens=x), from_arrays(tokens=x))
    with pytest.raises(TypeError, match="Erase.fit expects numbers at label, got dict"):
        tg.Erase.fit(x, {"a": 1})
    result = TensorDict({"erasure": {"residual_output.1": {"left": x, "right": x, "mean": x[0]}}})
    with pytest.raises(
        ValueError, match=r"'left', 'right' and 'mean', got \['erasure'\].*result\['erasure', site\]"
    ):
        tg.Erase(result)
    with pytest.raises(
        ValueError, match=r"Erase of 'residual_output.1' reads \['tokens'\].*in_keys='activation'"
    ):
        tg.Intervene(bert(), {"residual_output.1": from_arrays})


def test_erase_edits_any_shape_in_its_own_dtype():
    x, label = torch.randn(200, 4), torch.arange(200) % 2
    eraser = tg.Erase.fit(x, label, in_keys=("acts", "residual_output.1"))
    assert eraser.in_keys == eraser.out_keys == [("acts", "residual_output.1")]
    td = TensorDict({"acts": {"residual_output.1": torch.randn(2, 7, 4).bfloat16()}})
    out = eraser(td)["acts", "residual_output.1"]
    assert out.shape == (2, 7, 4) and out.dtype == torch.bfloat16
    fresh = tg.Erase.fit(torch.randn(9, 4), torch.arange(9) % 2)
    fresh.load_state_dict(eraser.state_dict())
    torch.testing.assert_close(fresh(tokens=x), eraser.compute(x))
    assert not list(eraser.parameters())


def test_erasure_over_a_stream_in_a_second_pass():
    model, site = bert().eval(), "residual_output.1"
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": (ids := torch.randint(3, 48, (8, 12), generator=generator)), "label": ids % 2}
        for _ in range(6)
    ]
    capture = tg.Capture(model, site)
    select = tg.SelectTokens(capture.sites, also=["label"])
    first = tg.run(
        TensorDictSequential(
            capture, select, tg.ForEach(tg.StreamingLabelMoments(), [site]), tg.ForEach(tg.LEACE(), [site])
        ),
        batches,
        progress=False,
    )
    second = TensorDictSequential(
        capture,
        select,
        tg.ForEach(tg.Erase(out_keys="clean"), [site]),
        tg.ForEach(tg.StreamingLabelMoments(in_keys=["clean", ("carried", "label"), "row_id"]), [site]),
        tg.ForEach(tg.LinearProbe(in_keys=["clean", ("carried", "label"), "row_id"], permutations=0), [site]),
    )
    result = tg.run(second, batches, inputs=first, progress=False)
    before, after = (r["label_moments", site, "cross_scatter"].abs().max() for r in (first, result))
    assert float(after) < 1e-5 * float(before)


def test_erasing_steering_and_projecting_out_inside_a_model():
    """What probes and erasers find goes into a model as it is."""
    model, site = bert().eval(), "residual_output.0"
    ids = torch.randint(3, 48, (40, 10), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "label": part % 2} for part in ids.split(8)]
    probing = tg.Probing(model, site, tg.LinearProbe(alpha=1.0, holdout=0.0, permutations=0))
    probing.run(batches, batches)
    x = tg.Capture(model, site)(input_ids=ids).flatten(0, 1)
    label = (ids % 2).flatten()
    direction = probing.direction(site, 1)
    eraser = tg.Erase.fit(x, label, in_keys="activation")
    with tg.Intervene(model, {site: eraser}), tg.Capture(model, site) as calls, torch.no_grad():
        model(ids)
    inside = calls[0]["acts", site].flatten(0, 1)
    torch.testing.assert_close(inside, eraser.compute(x))
    fresh = tg.LinearProbe(alpha=1.0).fit(inside, label)
    baseline = float(label.bincount().max() / len(label))
    assert fresh.score(inside, label)["accuracy"] <= baseline + 0.02 < probing.table()["accuracy"][0]
    for edit, change in ((tg.Steer(direction, coefficient=2.0), 2.0), (tg.ProjectOut(direction), None)):
        with tg.Intervene(model, {site: edit}), tg.Capture(model, site) as calls, torch.no_grad():
            model(ids)
        after = calls[0]["acts", site].flatten(0, 1).double() @ direction
        expected = x.double() @ direction + change if change else torch.zeros(len(x)).double()
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
