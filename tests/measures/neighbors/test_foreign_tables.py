"""Tables of other libraries and of files, the row itself in any column: converted, or refused if given as they come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors as Plain
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F


def rows(copies: int = 0) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(300, 6))
    return np.concatenate((x, x[:copies]))


def plain(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    return Plain(n_neighbors=k).fit(x).kneighbors(x)


ARRAYS = {
    "self first": lambda d, i: (d, i),
    "int32 and float32": lambda d, i: (d.astype(np.float32), i.astype(np.int32)),
    "lists": lambda d, i: (d.tolist(), i.tolist()),
    "tensors": lambda d, i: (torch.from_numpy(d), torch.from_numpy(i)),
    "without self": lambda d, i: (d[:, 1:], i[:, 1:]),
    "self last, unsorted": lambda d, i: (d[:, ::-1], i[:, ::-1]),
    "padded": lambda d, i: (np.pad(d, ((0, 0), (0, 3)), constant_values=np.inf), np.pad(i, ((0, 0), (0, 3)), constant_values=-1)),
}  # fmt: skip


@pytest.mark.parametrize("how", list(ARRAYS))
def test_every_consumer_gives_what_it_gives_of_our_own_table(how):
    x = rows()
    given = ARRAYS[how](*plain(x, 41))
    table = tg.neighbors_from(*given)
    right = tg.NearestNeighbors(40)(TensorDict(sample=torch.from_numpy(x)))
    assert set(table["neighbors"].keys()) == set(right["neighbors"].keys())
    assert torch.equal(table["neighbors", "index"], right["neighbors", "index"])
    rtol = 1e-6 if "float32" in how else 1e-12
    torch.testing.assert_close(
        table["neighbors", "distance"], right["neighbors", "distance"], rtol=rtol, atol=0
    )
    label = torch.arange(300) % 5
    for td in (table, right):
        td["sample"], td["sample_carried"] = torch.from_numpy(x), TensorDict(label=label)
        for stage in (tg.TwoNN, tg.Gride, tg.LevinaBickel, tg.TLE, tg.LocalPCA, tg.LabelOverlap):
            settings = {"Gride": {"range_max": 32}, "LocalPCA": {"k": 12}}.get(stage.__name__, {})
            stage(**settings, source="neighbors")(td)
    for estimator in ("twonn", "gride", "levina_bickel", "tle", "local_pca"):
        for leaf in ("estimate", "standard_error", "rows", "duplicates"):
            key = ("dimension", estimator, leaf)
            torch.testing.assert_close(table[key], right[key], rtol=10 * rtol, atol=0)
        assert table["dimension", estimator, "near_duplicates"] == -1
    overlap = ("neighborhood", "label_overlap")
    torch.testing.assert_close(table[overlap], right[overlap], rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [9, 41])
def test_copies_in_a_foreign_table_are_found_from_their_distance(k):
    x = rows(copies=30)
    d, i = plain(x, k)
    table = tg.neighbors_from(d.round(12), i)
    right = F.distinct_neighbors(torch.from_numpy(x), 2)
    assert table["neighbors", "duplicates"] == 30
    first = table["neighbors", "distinct_distance"][:, :2]
    torch.testing.assert_close(first, right.distance, rtol=1e-9, atol=0, equal_nan=True)


def test_two_tables_and_sites():
    x, y = rows(), rows() @ np.random.default_rng(1).normal(size=(6, 4))
    td = tg.neighbors_from(*plain(x, 31), site="a")
    td["neighbors"].update(tg.neighbors_from(*plain(y, 31), site="b")["neighbors"])
    for stage in (tg.NeighborhoodOverlap(source="neighbors"), tg.JaccardKNN(source="neighbors")):
        value = stage(td)["between", stage.measure]
        expected = type(stage)()(sample_a=torch.from_numpy(x), sample_b=torch.from_numpy(y))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    found = tg.ForEach(tg.TwoNN(source="neighbors"), ["a", "b"])(td)
    assert found["dimension", "a", "twonn", "estimate"] > found["dimension", "b", "twonn", "estimate"]


def test_ratios_serve_twonn_and_gride():
    """As files of ratios hold them: r2/r1, r4/r2, r8/r4, to any power of two."""
    x = torch.from_numpy(rows())
    r = F.nearest_neighbors(x, 16).distance
    mus = (r[:, [1, 3, 7, 15]] / r[:, [0, 1, 3, 7]]).numpy()
    for method in ("fit", "ml"):
        for given in (mus, mus[:, 0]):
            found = tg.TwoNN(method=method, source="neighbors")(tg.neighbors_from(mus=given))
            expected = F.twonn(x, method=method).estimate
            torch.testing.assert_close(found["dimension", "twonn", "estimate"], expected, rtol=1e-12, atol=0)
    found = tg.Gride(range_max=16, source="neighbors")(tg.neighbors_from(mus=mus))["dimension", "gride"]
    for leaf in ("estimate", "standard_error"):
        torch.testing.assert_close(found[leaf], getattr(F.gride(x, range_max=16), leaf), rtol=1e-12, atol=0)


def test_distances_or_indices_alone():
    d, i = plain(rows(), 12)
    estimate = F.twonn(torch.from_numpy(rows())).estimate
    found = tg.TwoNN(source="neighbors")(tg.neighbors_from(d))["dimension", "twonn", "estimate"]
    torch.testing.assert_close(found, estimate, rtol=1e-12, atol=0)
    table = tg.neighbors_from(index=i)
    assert list(table["neighbors"].keys()) == ["index"] and table["neighbors", "index"].shape == (300, 11)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d, i: tg.neighbors_from(), "got none of them"),
        (
            lambda d, i: tg.neighbors_from(i, d),
            r"order of the arguments is neighbors_from\(distance, index\)",
        ),
        (lambda d, i: tg.neighbors_from(d, i[:, :5]), "of one shape, got .300, 12. and .300, 5."),
        (lambda d, i: tg.neighbors_from(d, i + 40), "lies in 0..299 .* got 3"),
        (lambda d, i: tg.neighbors_from(-d, i), "distances are at least 0"),
        (lambda d, i: tg.neighbors_from(d, 0 * i), "besides itself"),
        (lambda d, i: tg.neighbors_from(d, np.repeat(i[:, 1:4], 4, 1)), "names a neighbour twice"),
        (lambda d, i: tg.neighbors_from(d[:, 0], i[:, 0]), r"of shape \(N, K\), got \(300,\)"),
        (lambda d, i: tg.neighbors_from(mus=d), "at least 1, got"),
        (lambda d, i: tg.neighbors_from(d, mus=d), "not both"),
    ],
)
def test_what_is_no_table_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*plain(rows(), 12))


def consumers(d: torch.Tensor, i: torch.Tensor):
    """Every function and stage that takes a table, called with one as it comes."""
    x, label, none = torch.from_numpy(rows()), torch.arange(300) % 3, torch.tensor(0)
    for stage in (tg.TwoNN, tg.Gride, tg.LevinaBickel, tg.MOM, tg.LocalKNN):
        settings = {"range_max": 4} if stage is tg.Gride else {} if stage is tg.TwoNN else {"k": 4}
        yield lambda stage=stage, settings=settings: stage(**settings, source="neighbors")(d, none)
    for stage in (tg.TLE, tg.LocalPCA, tg.CAPCA):
        yield lambda stage=stage: stage(k=5, source="neighbors")(x, i, d, none)
    for stage in (tg.NeighborhoodOverlap, tg.JaccardKNN):
        yield lambda stage=stage: stage(k=5, source="neighbors")(i, i)
    yield lambda: tg.LabelOverlap(k=5, source="neighbors")(i, label)
    yield lambda: F.label_overlap_of(i, label, k=5)
    yield lambda: F.conditional_ranks(x, i[:, :3])
    yield lambda: F.common_neighbors(i, i)
    yield lambda: F.twonn_from_distances(d)
    yield lambda: F.tle_from_neighbors(x, d, i, k=5)


def test_every_consumer_refuses_a_table_with_the_rows_themselves():
    d, i = map(torch.from_numpy, plain(rows(), 12))
    for index in (i, i.int()):
        for call in consumers(d, index):
            with pytest.raises(
                ValueError, match=r"(the row itself|distances of 0).*tg.neighbors_from\(distance, index\)"
            ):
                call()


def test_padding_and_distances_out_of_order_are_refused():
    d, i = map(torch.from_numpy, plain(rows(), 12))
    d, i = d[:, 1:], i[:, 1:].clone()
    with pytest.raises(ValueError, match="do not ascend.*neighbors_from"):
        tg.TwoNN(source="neighbors")(d.flip(-1), torch.tensor(0))
    i[5, 10] = -1
    with pytest.raises(ValueError, match="outside of 0..299, or is padded.*neighbors_from"):
        tg.LabelOverlap(k=5, source="neighbors")(i, torch.arange(300) % 3)
