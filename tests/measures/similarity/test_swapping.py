"""One pair measure for another under one name: a list of out_keys names the leaf."""

from __future__ import annotations

import inspect

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg

SITES = ["x", "y", "z"]
PUBLIC = [
    getattr(tg, name)
    for name in sorted(tg.__all__)
    if inspect.isclass(getattr(tg, name))
    and issubclass(getattr(tg, name), tg.PairStage)
    and name not in ("Calibrated", "LeaveOutPair")  # they go around another
]
FEW = {"NeighborhoodOverlap": {"k": 5}, "JaccardKNN": {"k": 5}, "CKNNA": {"k": 5}}  # neighbours of 60 rows


def made(kind, **keys):
    return kind(**FEW.get(kind.__name__, {}), **keys)


ONE_OUTPUT = [kind for kind in PUBLIC if kind is not tg.PairStage and len(kind().out_keys) == 1]


def finished():
    """Samples and eigenvectors of three sites."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(60, 6, generator=g)
    td = TensorDict({})
    for i, site in enumerate(SITES):
        sample = first + i * torch.randn(60, 6, generator=g)
        td["sample", site] = sample
        td["eigenvectors", site] = torch.linalg.eigh(torch.cov(sample.T))[1][:, -3:]
    return td


def test_most_measures_have_one_output():
    names = {kind.__name__ for kind in ONE_OUTPUT}
    assert {"LinearCKA", "SVCCA", "RBFCKA", "RSA", "CKNNA", "DistanceCorrelation", "SoftMatching"} <= names
    assert {"NeighborhoodOverlap", "JaccardKNN", "LayerCosine"} <= names


@pytest.mark.parametrize("kind", ONE_OUTPUT, ids=lambda kind: kind.__name__)
def test_a_list_names_the_leaf(kind):
    plain = tg.ForEachPair(made(kind), SITES, pairs="all")
    named = tg.ForEachPair(made(kind, out_keys=[("between", "similarity")]), SITES, pairs="all")
    assert named.in_keys == plain.in_keys
    assert named.out_keys == [("between", pair, "similarity") for pair in ("x->y", "x->z", "y->z")]
    expected, found = plain(finished()), named(finished())
    for a, b in zip(named.out_keys, plain.out_keys, strict=True):
        assert torch.equal(found[a], expected[b])
    assert set(found["between", "x->y"].keys()) == {"similarity"}


@pytest.mark.parametrize(
    "kind", [tg.LinearCKA, tg.RSA, tg.NeighborhoodOverlap], ids=lambda kind: kind.__name__
)
def test_in_a_run_and_its_table(kind):
    pipeline = TensorDictSequential(
        tg.RowSample(SITES, size=50),
        tg.ForEachPair(made(kind, out_keys=[("between", "similarity")]), SITES),
        tg.ForEachPair(tg.LinearCKA(estimator="debiased"), SITES),
    )
    x = torch.randn(120, 4)
    batch = {"tokens": {"x": x, "y": x.flip(1) ** 2, "z": x[:, :2]}}
    result = tg.run(pipeline, [batch], progress=False)
    frame = tg.to_frame(result, "between")
    assert {"similarity", "linear_cka_debiased"} <= set(frame.columns)
    alone = made(kind)(sample_a=result["sample", "x"], sample_b=result["sample", "y"])
    assert result["between", "x->y", "similarity"] == alone


@pytest.mark.parametrize(
    "kind", [tg.CCA, tg.PWCCA, tg.Procrustes, tg.LinearR2], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("wanted", [0, 1])
def test_one_of_two_outputs(kind, wanted):
    leaves = ["_", "_"]
    leaves[wanted] = ("between", "similarity")
    found = tg.ForEachPair(kind(out_keys=leaves), SITES)(finished())
    plain = kind()
    expected = plain(sample_a=finished()["sample", "x"], sample_b=finished()["sample", "y"])[wanted]
    assert found["between", "x->y", "similarity"] == expected
    assert set(found["between", "x->y"].keys()) == {"similarity"}
