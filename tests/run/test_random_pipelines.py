"""Random pipelines of public stages: run, the plain call, any split, merged shards, copies and subsequences agree."""

from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential

import tdgeom as tg
from stage_examples import CountAbove, ShareAbove
from tdgeom.core.pipeline import streams_of

pytestmark = pytest.mark.filterwarnings("ignore::tdgeom.UndefinedMeasureWarning")

SITES = ["x", "y"]
N = 30


class Twice(torch.nn.Module):
    """x -> x, by a module that can be pickled."""

    def forward(self, x):
        return 2 * x


def each(stage):
    return tg.ForEach(stage, SITES)


def pair(stage):
    return tg.ForEachPair(stage, SITES)


# what is read -> stages that may follow it
STREAMS = {
    "moments": lambda: each(tg.StreamingCovariance()),
    "sample": lambda: tg.RowSample(SITES, size=20),
    "mean": lambda: each(tg.StreamingMean()),
    "sketch": lambda: each(tg.StreamingSketch(k=2, size=3)),
    "collected": lambda: tg.Collect(SITES),
    "count_above": lambda: each(CountAbove(0.5)),
}
ENDS = {
    "moments": [lambda: each(tg.RankMe()), lambda: each(tg.ParticipationRatio()), lambda: each(tg.EigenSpectrum(k=2))],
    "eigenvalues": [lambda: each(tg.SpectrumMetrics()), lambda: pair(tg.SubspaceNovelty(k=2))],
    "sample": [
        lambda: each(tg.SampleSpectrum()), lambda: each(tg.SampleMetrics()), lambda: each(tg.TwoNN()),
        lambda: each(tg.NormalizationAblation()), lambda: each(tg.NearestNeighbors(4)), lambda: pair(tg.LinearCKA()),
        lambda: pair(tg.LayerCosine()), lambda: each(ShareAbove()), lambda: pair(tg.CCA()),
    ],
    "neighbors": [lambda: each(tg.TwoNN(source="neighbors", out_keys=("dimension", "again")))],
    "collected": [], "mean": [], "sketch": [], "count_above": [],
}  # fmt: skip


@st.composite
def pipelines(draw):
    """A function that makes one pipeline, the same each time it is called."""
    makers = []
    if draw(st.booleans()):
        twice = draw(st.sampled_from(SITES))
        makers.append(lambda: TensorDictModule(Twice(), [("tokens", twice)], [("tokens", twice)]))
    roots = draw(st.lists(st.sampled_from(sorted(STREAMS)), min_size=1, max_size=4, unique=True))
    makers += [STREAMS[root] for root in roots]
    for root in roots:
        ends = draw(st.lists(st.sampled_from(range(len(ENDS[root]))), unique=True)) if ENDS[root] else []
        makers += [ENDS[root][number] for number in sorted(ends)]
    made = [maker() for maker in makers]
    for root in ("eigenvalues", "neighbors"):
        written = any(key[0] == root for part in made for key in part.out_keys if isinstance(key, tuple))
        if written and draw(st.booleans()):
            makers += ENDS[root]
    shape = draw(st.sampled_from(["plain", "nested", "named", "pipeline"]))

    def make():
        parts = [maker() for maker in makers]
        if shape == "nested" and len(parts) > 1:
            return TensorDictSequential(TensorDictSequential(*parts[:1]), TensorDictSequential(*parts[1:]))
        if shape == "named":
            return TensorDictSequential({f"part {number}": part for number, part in enumerate(parts)})
        return tg.Pipeline(*parts) if shape == "pipeline" else TensorDictSequential(*parts)

    return make


def data() -> TensorDict:
    generator = torch.Generator().manual_seed(3)
    tokens = {site: torch.randn(N, 4, generator=generator, dtype=torch.float64) for site in SITES}
    return TensorDict({"tokens": tokens, "row_id": torch.arange(N) << 20})


def parts_of(td: TensorDict, sizes: list[int]) -> list[TensorDict]:
    edges = [0]
    while edges[-1] < N:
        edges.append(min(N, edges[-1] + sizes[len(edges) % len(sizes)]))
    return [td.apply(lambda x, a=a, b=b: x[a:b], batch_size=[]) for a, b in pairwise(edges)]


def same(found: TensorDict, expected: TensorDict, keys) -> None:
    for key in keys:
        a, b = found.get(key), expected.get(key)
        if key[0] == "eigenvectors":
            a, b = a.abs(), b.abs()  # a sign is nobody's
        torch.testing.assert_close(
            a.double(), b.double(), rtol=1e-6, atol=1e-9, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


def results(pipeline) -> list:
    return [key for key in pipeline.out_keys if key[0] != "tokens"]


@settings(max_examples=20)
@given(
    pipelines(),
    st.lists(st.integers(1, 13), min_size=1, max_size=3),
    st.sampled_from([1, 7, 16, 2048]),
    st.data(),
)
def test_all_ways_agree(make, sizes, block, chosen):
    td = data()
    expected = make()(td.copy())
    keys = results(make())

    for loader in ([td], parts_of(td, sizes)):
        same(tg.run(make(), loader, block_rows=block, progress=False), expected, keys)

    copy = pickle.loads(pickle.dumps(make()))
    same(copy(td.copy()), expected, keys)

    parts = parts_of(td, sizes)
    shards = [make() for _ in parts]
    for shard, part in zip(shards, parts):
        shard.select_subsequence(out_keys=streamed(shard))(part.copy())
    for other in shards[1:]:
        tg.merge_(shards[0], other)
    merged = TensorDict({}, batch_size=[])
    for stream in streams_of(shards[0]):
        stream.publish(merged)
    same(merged, expected, streamed(shards[0]))

    key = chosen.draw(st.sampled_from(sorted(keys, key=str)))
    alone = make().select_subsequence(out_keys=[key])
    same(alone(td.copy()), expected, [key])


def streamed(pipeline) -> list:
    return [key for stream in streams_of(pipeline) for key in stream.out_keys]
