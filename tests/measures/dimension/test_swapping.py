"""One estimator stands in for another: the same keys read, the same root written, at one site and at many."""

from __future__ import annotations

import inspect

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom.measures.dimension.decimation import Decimation
from tdgeom.measures.dimension.estimate import DimensionEstimate, DimensionStage

SETTINGS = {"Gride": {"range_max": 8}, "LocalPCA": {"k": 20}, "CAPCA": {"k": 12}}
STAGES = sorted(
    name
    for name in tg.__all__
    if inspect.isclass(getattr(tg, name)) and issubclass(getattr(tg, name), (DimensionStage, Decimation))
)
LEAVES = list(DimensionEstimate._fields)
every = pytest.mark.parametrize("name", STAGES)


def stages(name: str):
    """The stage with each of its sources, all under one root."""
    kind = getattr(tg, name)
    sources = list(getattr(kind, "sources", ["sample"]))
    for source in sources:
        chosen = {"source": source} if len(sources) > 1 else {}
        yield source, kind(**SETTINGS.get(name, {}), **chosen, out_keys=("dimension", "id"))


def rows(seed: int) -> torch.Tensor:
    return torch.randn(80, 6, generator=torch.Generator().manual_seed(seed))


def before(sites: list[str]) -> list:
    return [
        tg.ForEach(tg.StreamingCovariance(), sites),
        tg.ForEach(tg.EigenSpectrum(k=2), sites),
        tg.ForEach(tg.NearestNeighbors(40), sites),
    ]


@every
def test_one_root_serves_every_estimator_and_source(name: str) -> None:
    sites = ["x", "y"]
    given = {site: rows(seed) for seed, site in enumerate(sites)}
    for _, stage in stages(name):
        assert [key[-1] for key in stage.out_keys][: len(LEAVES)] == LEAVES  # what only one has stands behind
        assert all(key[:2] == ("dimension", "id") for key in stage.out_keys)
        pipeline = TensorDictSequential(*before(sites), tg.ForEach(stage, sites))
        result = pipeline(TensorDict({"tokens": given, "sample": given}))
        for site in sites:
            found = result["dimension", site, "id"]
            assert sorted(found.keys()) == sorted(key[-1] for key in stage.out_keys)
            alone = {key: result[(key[0], site, *key[1:])] for key in map(whole, stage.in_keys)}
            expected = stage(TensorDict(alone))["dimension", "id"]
            for leaf in LEAVES:
                torch.testing.assert_close(found[leaf], expected[leaf], rtol=0, atol=0, equal_nan=True)


def whole(key: str | tuple[str, ...]) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


@every
def test_every_key_that_is_read_is_declared(name: str) -> None:
    """Nothing but ``in_keys`` is needed, and without any one of them the stage says which it misses."""
    source = {"tokens": rows(0), "sample": rows(0)}
    everything = TensorDictSequential(
        tg.StreamingCovariance(), tg.EigenSpectrum(k=2), tg.NearestNeighbors(40)
    )(TensorDict(source))
    for _, stage in stages(name):
        alone = everything.select(*stage.in_keys)
        assert stage(alone.copy())["dimension", "id", "estimate"].isfinite().all()
        for key in set(stage.in_keys) - set(stage.optional_in_keys):
            with pytest.raises(KeyError, match="reads"):
                stage(alone.copy().exclude(key))


def test_the_tables_of_both_searches_serve_every_estimator() -> None:
    exact, near = (
        TensorDictSequential(tg.NearestNeighbors(40, backend=backend))(TensorDict({"sample": rows(0)}))
        for backend in ("exact", "approximate")
    )
    for name in STAGES:
        for source, stage in stages(name):
            if source == "neighbors":
                torch.testing.assert_close(
                    stage(near)["dimension", "id"]["scale"], stage(exact)["dimension", "id"]["scale"]
                )


@every
def test_tables_with_copies_give_the_same_in_one_graph(name: str) -> None:
    """Where no value can be looked at, a table that may hold copies does not stand in for a search."""
    x = torch.cat((rows(0), rows(0)[:9]))
    table = tg.NearestNeighbors(40)(TensorDict({"sample": x}))
    for source, stage in stages(name):
        if source == "neighbors":
            torch._dynamo.reset()
            compiled = torch.compile(lambda td, stage=stage: stage(td), fullgraph=True, backend="eager")
            found, expected = (run(table.copy())["dimension", "id"] for run in (compiled, stage))
            for leaf in LEAVES:
                torch.testing.assert_close(found[leaf], expected[leaf], rtol=1e-12, atol=0)
