"""Rows labelled -100 have no label, wherever one is read: the numbers are those of the rows that have one."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F


def labelled(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, labels with -100 in their midst, and which rows have one."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (240,), generator=g)
    x = torch.randn(240, 6, generator=g, dtype=torch.float64) + 2.0 * label[:, None]
    used = torch.rand(240, generator=g) < 0.5
    return x, torch.where(used, label, -100), used


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("settings", [{"k": 6}, {"class_fraction": 0.1}])
def test_label_overlap(balanced, settings):
    x, label, used = labelled()
    expected = F.label_overlap(x[used], label[used], balanced=balanced, **settings)
    for given in (label, label.float()):
        torch.testing.assert_close(F.label_overlap(x, given, balanced=balanced, **settings), expected)
    torch.testing.assert_close(tg.LabelOverlap(balanced=balanced, **settings)(x, label), expected)
    td = tg.NearestNeighbors(239)(TensorDict(sample=x, sample_carried=TensorDict(label=label)))
    tg.LabelOverlap(balanced=balanced, **settings, source="neighbors")(td)
    torch.testing.assert_close(td["neighborhood", "label_overlap"], expected)
    other = torch.where(used, label, 7)
    torch.testing.assert_close(
        F.label_overlap(x, other, balanced=balanced, ignore_index=7, **settings), expected
    )
    both, labels = torch.stack((x, x.flip(0))), torch.stack((label, label.flip(0)))
    for function in (F.label_overlap, torch.vmap(lambda a, b, **s: F.label_overlap(a, b, **s))):
        torch.testing.assert_close(function(both, labels, balanced=balanced, **settings), expected.expand(2))


def test_a_short_table_looks_at_the_labelled_neighbours_it_has():
    x, label, _ = labelled()
    index = F.nearest_neighbors(x, 8).index
    with pytest.warns(UserWarning, match="fewer labelled neighbours in the table of 8 columns"):
        value = F.label_overlap_of(index, label, k=6)
    share = []
    for i in range(240):
        near = [label[j] for j in index[i] if label[j] != -100][:6]
        if label[i] != -100 and near:
            share.append(sum(bool(other == label[i]) for other in near) / len(near))
    assert float(value) == pytest.approx(sum(share) / len(share))


def test_without_any_label_there_is_no_overlap():
    x, label, _ = labelled()
    with pytest.warns(tg.UndefinedMeasureWarning, match="no row has a label"):
        assert F.label_overlap(x, torch.full_like(label, -100), k=3).isnan()


def test_class_means_fisher_directions_and_erasure():
    x, label, used = labelled()
    ids = torch.arange(240) << 20
    moments = []
    for rows, given, row_id in ((x, label, ids), (x[used], label[used], ids[used])):
        td = TensorDict({"tokens": rows, "carried": {"label": given}, "row_id": row_id})
        td = tg.StreamingLabelMoments()(td)
        moments.append({leaf: value for leaf, value in td["label_moments"].items()})
    assert torch.equal(moments[0]["count"].sum(0), moments[1]["count"].sum(0))
    pooled, expected = (F.pool_folds(found) for found in moments)
    for mean, right in zip(F.class_means(pooled), F.class_means(expected)):
        torch.testing.assert_close(mean, right)
    for leaf, value in F.fisher_basis(pooled).items():
        torch.testing.assert_close(value.abs(), F.fisher_basis(expected)[leaf].abs(), rtol=1e-6, atol=1e-9)
    for given, right in zip(F.leace(pooled).values(), F.leace(expected).values()):
        torch.testing.assert_close(given.abs(), right.abs(), rtol=1e-6, atol=1e-9)
    erase, alone = tg.Erase.fit(x, label), tg.Erase.fit(x[used], label[used])
    for own, other in zip(erase.buffers(), alone.buffers()):
        torch.testing.assert_close(own.abs(), other.abs())


@pytest.mark.parametrize(
    "make",
    [lambda: tg.LinearProbe(), lambda: tg.LinearProbe(solver="ridge"), lambda: tg.MeanDifferenceProbe()],
    ids=["logistic", "ridge", "mean difference"],
)
def test_probes(make):
    x, label, used = labelled()
    label = torch.where(label == 2, -100, label)
    used = used & (label != -100)
    probe, alone = make().fit(x, label), make().fit(x[used], label[used])
    assert torch.equal(probe.predict(x), alone.predict(x))
    assert probe.score(x, label)["accuracy"] == alone.score(x[used], label[used])["accuracy"]
