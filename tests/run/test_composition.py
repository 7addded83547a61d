"""run, ForEach and ForEachPair do what the pipeline called on a TensorDict does, or refuse in words."""

from __future__ import annotations

import pickle
import types

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential, set_skip_existing

import tdgeom as tg
from stage_examples import CountAbove, ShareAbove, TwiceTheGap
from tdgeom.core.keys import optional_in_keys
from tdgeom.core.pipeline import streams_of
from tdgeom.run.plan import make_plan

SITES = ["x", "y"]
N = 40


def rows(seed=0, count=N, width=4):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1


def whole(sites=None):
    """All rows in one TensorDict, with the ids that run would give."""
    tokens = rows() if sites is None else {site: rows(i) for i, site in enumerate(sites)}
    return TensorDict({"tokens": tokens, "row_id": torch.arange(N) << 20})


def split(td, size=9):
    return [td.apply(lambda x, s=s: x[s : s + size], batch_size=[]) for s in range(0, N, size)]


def wrapped(function, reads, writes):
    return TensorDictModule(function, in_keys=reads, out_keys=writes)


def assert_as_called(make, td, **options):
    """The results of run are those of the call, all of them and no others."""
    expected = make()(td.copy())
    pipeline = make()
    per_batch = {key for unit in make_plan(pipeline).batch for key in unit.out_keys}
    found = tg.run(pipeline, split(td), block_rows=16, progress=False, **options)
    keys = set(pipeline.out_keys) - per_batch - {"_"}
    assert keys and {key for key in found.keys(True, True) if key[0] != "run"} == keys & set(
        expected.keys(True, True)
    )
    for key in keys & set(expected.keys(True, True)):
        a, b = found[key], expected[key]
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, equal_nan=True, msg=str(key))


# ------------------------------------------------------------------------------------------ overrides


class Scaled(tg.Stage):
    reads, writes = {"eigenvalues": "D"}, ["scaled"]

    def compute(self, eigenvalues):
        return eigenvalues / eigenvalues.abs().sum(-1, keepdim=True)


class OwnForward(Scaled):
    def forward(self, tensordict, tensordict_out=None, **named):
        out = super().forward(tensordict, tensordict_out, **named)
        return out.set("scaled", -out["scaled"])


class OwnCall(Scaled):
    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        return out.set("scaled", 3 * out["scaled"])


class OwnRead(Scaled):
    def read(self, tensordict):
        return [2 * value.square() for value in super().read(tensordict)]


class OwnUpdate(tg.StreamingMean):
    def update(self, tensordict):
        super().update(tensordict.copy().set("tokens", 2 * tensordict["tokens"]))


class OwnPublish(tg.StreamingMean):
    def publish(self, tensordict):
        out = super().publish(tensordict)
        return out.set(("mean", "mean"), -out["mean", "mean"])


class OwnResult(tg.StreamingMean):
    def result(self):
        return {name: 2 * value for name, value in super().result().items()}


class OwnAccumulate(tg.StreamingMean):
    def accumulate(self, rows):
        super().accumulate(rows.abs())


class StreamForward(tg.StreamingMean):
    def forward(self, tensordict, tensordict_out=None, **named):
        return super().forward(tensordict, tensordict_out, **named).set("extra", torch.ones(()))


class StreamCall(tg.StreamingMean):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Sequence(TensorDictSequential):
    """Doubles what its parts make."""

    def forward(self, tensordict, tensordict_out=None, **kwargs):
        out = super().forward(tensordict, tensordict_out, **kwargs)
        return out.update({key: 2 * out[key] for key in self.out_keys})


class Runner(TensorDictSequential):
    def _run_module(self, module, tensordict, **kwargs):
        return super()._run_module(module, tensordict, **kwargs)


def patched(stage):
    plain = stage.forward
    stage.forward = types.MethodType(lambda self, *args, **kwargs: plain(*args, **kwargs), stage)
    return stage


def hooked(module, function=None, *, pre=False):
    if pre:
        module.register_forward_pre_hook(
            lambda module, args: (args[0].copy().apply(lambda x: 2 * x if x.is_floating_point() else x),)
        )
    else:
        module.register_forward_hook(
            function or (lambda module, args, out: out.update({key: 5 * out[key] for key in module.out_keys}))
        )
    return module


def front():
    return tg.StreamingCovariance(), tg.EigenSpectrum(k=2)


def at_sites(*stages):
    return [tg.ForEach(stage, SITES) for stage in stages]


def then(*stages):
    """Behind a covariance and its spectrum."""
    return lambda: TensorDictSequential(*front(), *[stage() for stage in stages])


def after(*stages):
    """On each batch, then averaged."""
    return lambda: TensorDictSequential(*[stage() for stage in stages], tg.StreamingMean(in_keys="scaled"))


BATCH = {"in_keys": "tokens"}
ONE, TWO = ("spectrum", "k90"), ("spectrum", "d_pr")
MEAN = ("mean", "mean")
COVARIANCE = ("moments", "covariance")


def ends():
    return TensorDictSequential(Scaled(), tg.SpectrumMetrics())


def stream_pair():
    return TensorDictSequential(tg.StreamingMean(), tg.StreamingCovariance())


# what runs per batch and at the end is called whole: everything acts
HONOURED = {
    "compute": then(Scaled),
    "forward at the end": then(OwnForward),
    "forward per batch": after(lambda: OwnForward(**BATCH)),
    "__call__ at the end": then(OwnCall),
    "read": then(OwnRead),
    "one object's forward": then(lambda: patched(Scaled())),
    "update": lambda: OwnUpdate(),
    "publish": lambda: TensorDictSequential(OwnPublish(), Scaled(in_keys=MEAN)),
    "result": lambda: OwnResult(),
    "accumulate": lambda: OwnAccumulate(),
    "stages of users": lambda: TensorDictSequential(CountAbove(1.0), tg.RowSample(size=9), ShareAbove(1.0)),
    "a hook at the end": then(lambda: hooked(Scaled())),
    "a hook before, at the end": then(lambda: hooked(Scaled(), pre=True)),
    "a hook per batch": after(lambda: hooked(Scaled(**BATCH))),
    "a subclass at the end": then(lambda: Sequence(*ends())),
    "a subclass per batch": after(lambda: Sequence(Scaled(**BATCH))),
    "hooks on a sequence at the end": then(lambda: hooked(ends())),
    "hooks before a sequence at the end": then(lambda: hooked(ends(), pre=True)),
    "hooks on a sequence per batch": after(lambda: hooked(TensorDictSequential(Scaled(**BATCH)))),
    "selected of a stage at the end": then(lambda: tg.SpectrumMetrics().select_out_keys(ONE)),
    "selected of a stream": lambda: TensorDictSequential(
        tg.StreamingMean().select_out_keys(MEAN), Scaled(in_keys=MEAN)
    ),
    "selected and reset": lambda: tg.StreamingMean().select_out_keys(MEAN).reset_out_keys(),
    "selected of a sequence of streams": lambda: TensorDictSequential(
        stream_pair().select_out_keys(MEAN, COVARIANCE), tg.EigenSpectrum(k=2)
    ),
    "selected of a sequence at the end": then(lambda: ends().select_out_keys("scaled")),
    "selected of the whole": lambda: then(tg.SpectrumMetrics)().select_out_keys(ONE, "eigenvalues"),
    "a count that is not there": lambda: TensorDictSequential(
        tg.StreamingCovariance().select_out_keys(COVARIANCE), tg.EigenSpectrum(k=2)
    ),
    "an output that is not written": lambda: TensorDictSequential(
        tg.StreamingMean(out_keys=["_", "middle", "_"]),
        Scaled(in_keys="middle", out_keys="_"),
        Scaled(in_keys="middle"),
    ),
    "x to x at the end": then(lambda: Scaled(out_keys="eigenvalues"), tg.SpectrumMetrics),
    "x to x per batch": lambda: TensorDictSequential(
        wrapped(lambda x: 3 * x, ["tokens"], ["tokens"]), tg.StreamingMean()
    ),
    "named stages": lambda: TensorDictSequential(
        {"cov": front()[0], "rest": TensorDictSequential({"eig": front()[1], "own": OwnForward()})}
    ),
}


@pytest.mark.parametrize("name", HONOURED)
def test_honoured(name):
    assert_as_called(HONOURED[name], whole())


def at_end(*stages):
    return lambda: [*at_sites(*front()), *[stage() for stage in stages]]


def each(stage):
    return tg.ForEach(stage, SITES)


def unit_of(container, change):
    """A container of which one unit was changed."""
    change(container[0])
    return container


def sampled(*stages):
    return lambda: [tg.RowSample(SITES, size=9), *[stage() for stage in stages]]


EACH_HONOURED = {
    "read": at_end(lambda: each(OwnRead())),
    "forward": at_end(lambda: each(OwnForward())),
    "__call__": at_end(lambda: each(OwnCall())),
    "update": lambda: at_sites(OwnUpdate()),
    "publish": lambda: at_sites(OwnPublish()),
    "hooked stages": at_end(
        lambda: each(hooked(Scaled())), lambda: each(hooked(Scaled(out_keys="pre"), pre=True))
    ),
    "a subclass": at_end(lambda: each(Sequence(Scaled()))),
    "a hooked sequence": at_end(lambda: each(hooked(ends(), pre=True))),
    "a hook on ForEach": at_end(lambda: hooked(each(Scaled()))),
    "a hook before ForEach": at_end(lambda: hooked(each(Scaled()), pre=True)),
    "hooks on a unit": at_end(lambda: unit_of(each(Scaled()), hooked)),
    "hooks before a unit that shares threads": lambda: [
        *at_sites(tg.StreamingCovariance()),
        unit_of(each(tg.EigenSpectrum()), lambda unit: hooked(unit, pre=True)),
    ],
    "selected before": at_end(lambda: each(tg.SpectrumMetrics().select_out_keys(ONE, TWO))),
    "selected after": at_end(lambda: each(tg.SpectrumMetrics()).select_out_keys(("spectrum", "y", "k90"))),
    "selected of a unit": at_end(
        lambda: unit_of(
            each(tg.SpectrumMetrics()), lambda unit: unit.select_out_keys(("spectrum", "x", "k90"))
        )
    ),
    "selected of streams before": lambda: at_sites(tg.StreamingMean().select_out_keys(MEAN)),
    "selected of streams after": lambda: [each(tg.StreamingMean()).select_out_keys(("mean", "x", "mean"))],
    "selected of a streaming unit": lambda: [
        unit_of(each(tg.StreamingCovariance()), lambda u: u.select_out_keys(("moments", "x", "covariance"))),
        each(tg.EigenSpectrum(k=2)),
    ],
    "selected and reset": lambda: [
        each(tg.StreamingMean()).select_out_keys(("mean", "x", "mean")).reset_out_keys()
    ],
    "of a sequence": lambda: at_sites(
        TensorDictSequential({"cov": front()[0], "eig": front()[1], "own": OwnForward()})
    ),
    "of each": lambda: [tg.ForEach(tg.ForEach(TensorDictSequential(*front()), SITES), ["m"])],
    "pairs": sampled(
        lambda: tg.ForEachPair(TwiceTheGap(), SITES), lambda: tg.ForEachPair(tg.LayerCosine(), SITES)
    ),
    "selected pairs": sampled(
        lambda: tg.ForEachPair(tg.CCA(), SITES).select_out_keys(("between", "x->y", "cca_r2"))
    ),
    "hooked pairs": sampled(lambda: hooked(tg.ForEachPair(tg.LayerCosine(), SITES))),
}


@pytest.mark.filterwarnings("ignore::tdgeom.UndefinedMeasureWarning")
@pytest.mark.parametrize("name", EACH_HONOURED)
def test_honoured_at_every_site(name):
    td = whole(SITES)
    if name == "of each":
        td = TensorDict({"tokens": {"m": td["tokens"]}, "row_id": td["row_id"]})
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_as_called(lambda: TensorDictSequential(*EACH_HONOURED[name]()), td)
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------ refusals


def with_hook(pipeline):
    pipeline.register_forward_hook(lambda *_: None)
    return pipeline


REFUSED = {
    "a stream's forward": (lambda: StreamForward(), "overrides forward.*Override accumulate.. or result.. instead"),
    "a stream's __call__": (lambda: StreamCall(), "overrides __call__.*Override accumulate.. or result.. instead"),
    "one stream's forward": (lambda: patched(tg.StreamingMean()), "overrides forward"),
    "at a site": (lambda: each(StreamForward()), "StreamForward at x overrides forward"),
    "one site's forward": (lambda: unit_of(each(tg.StreamingMean()), patched), "StreamingMean at x overrides forward"),
    "a hook on a stream": (lambda: hooked(tg.StreamingMean()), "has forward hooks, which run would not call"),
    "a hook before a stream": (lambda: hooked(tg.StreamingMean(), pre=True), "has forward hooks"),
    "a hooked stream at a site": (lambda: each(hooked(tg.StreamingMean())), "StreamingMean at x has forward hooks"),
    "a hook on a streaming unit": (lambda: unit_of(each(tg.StreamingMean()), hooked), "has forward hooks"),
    "a hook on ForEach of streams": (lambda: hooked(each(tg.StreamingMean())), "inside this ForEach .* it has forward hooks"),
    "a hook on the whole": (lambda: with_hook(TensorDictSequential(*front())), "it has forward hooks"),
    "a subclass of streams": (lambda: Sequence(*front()), "inside this Sequence .* it overrides forward"),
    "one sequence's forward": (lambda: patched(TensorDictSequential(*front())), "it overrides forward"),
    "another way to run parts": (lambda: Runner(*front()), "it overrides _run_module"),
    "streams that write elsewhere": (lambda: TensorDictSequential(*front(), inplace=False), "it writes elsewhere"),
    "tolerant streams": (lambda: TensorDictSequential(*front(), partial_tolerant=True), "skips parts"),
    "selected of streams and ends inside": (
        lambda: TensorDictSequential(TensorDictSequential(*front()).select_out_keys("eigenvalues")),
        "select_out_keys left",
    ),
    "written anew after it was read": (
        lambda: TensorDictSequential(tg.StreamingMean(), wrapped(lambda x: x, ["tokens"], ["tokens"]), tg.Collect()),
        r"writes 'tokens' after StreamingMean has read it.*Write it under another key",
    ),
    "a function that names no keys, behind streams": (
        lambda: TensorDictSequential(tg.StreamingMean(), lambda td: td),
        "names no keys, so run cannot tell.*Give it its keys",
    ),
    "a stream inside a module": (
        lambda: wrapped(tg.StreamingMean(), ["tokens"], ["m"]),
        r"holds the streaming stage StreamingMean where run cannot reach its update",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_words(name):
    make, match = REFUSED[name]
    td = whole(SITES) if "site" in name or "unit" in name or "ForEach" in name else whole()
    with pytest.raises((TypeError, ValueError), match=match) as error:
        tg.run(make(), split(td), progress=False)
    assert len(str(error.value)) > 60


@pytest.mark.parametrize(
    ("stage", "match"),
    [
        (
            lambda: hooked(TensorDictSequential(*front())),
            "cannot open this TensorDictSequential .* it has forward hooks",
        ),
        (lambda: Sequence(*front()), "cannot open this Sequence .* it overrides forward"),
        (lambda: TensorDictSequential(*front()).select_out_keys("eigenvalues"), "select_out_keys left"),
        (lambda: TensorDictSequential(*front(), partial_tolerant=True), "partial_tolerant"),
    ],
)
def test_for_each_of_streams_refuses_what_it_would_pass_over(stage, match):
    with pytest.raises(TypeError, match=match):
        tg.ForEach(stage(), SITES)


def test_a_selection_on_a_copied_stage_is_refused_and_says_where_to_make_it():
    for stage, td in (
        (tg.SpectrumMetrics(), TensorDict({"eigenvalues": {s: rows(1)[0].abs() for s in SITES}})),
        (tg.StreamingMean(), whole(SITES)),
    ):
        units = tg.ForEach(stage.select_out_keys(stage.out_keys[0]), SITES)
        units[0].module.reset_out_keys()
        with pytest.raises(
            ValueError,
            match=r"at x now writes .* and did write .* Call select_out_keys before ForEach, or on the ForEach",
        ):
            units(td)


@pytest.mark.parametrize("skip", [tg.StreamingMean, lambda: TensorDictSequential(*front(), Scaled())])
def test_batches_that_hold_what_would_be_skipped(skip):
    td = whole()
    pipeline = skip()
    stage = pipeline if isinstance(pipeline, tg.Stage) else pipeline[-1]
    for key in stage.out_keys:
        td.set(key, torch.ones(N))
    with (
        set_skip_existing(True),
        pytest.raises(ValueError, match=rf"{type(stage).__name__} would be skipped \(set_skip_existing\)"),
    ):
        tg.run(pipeline, split(td), progress=False)
    with set_skip_existing(True):
        assert_as_called(skip, whole())


def test_an_optional_input_of_the_end_that_only_batches_hold():
    """A call would read it from the batch, a run would not: neither is guessed."""
    td = whole().set("sample_eigenvalues", torch.ones(N, 4))
    with pytest.raises(
        ValueError,
        match=r"SampleMetrics runs once at the end and would read 'sample_eigenvalues', which batches hold",
    ):
        tg.run(TensorDictSequential(tg.RowSample(size=20), tg.SampleMetrics()), split(td), progress=False)


# ------------------------------------------------------------------------------------------ parents and leaves


def total(values):
    return sum(value.sum() for value in values.values(True, True))


PARENTS = {
    "read by the end": [*at_sites(*front()), wrapped(total, ["eigenvalues"], ["mine"])],
    "read by the end, in the middle": [
        *at_sites(*front()), wrapped(total, ["eigenvalues"], ["mine"]), *at_sites(tg.SpectrumMetrics())
    ],
    "read two levels up": [*at_sites(*front()), wrapped(total, ["moments"], ["mine"]), *at_sites(tg.RankMe())],
    "written as a whole": [
        *at_sites(*front()),
        wrapped(lambda e: e.apply(lambda x: x / 2), ["eigenvalues"], ["halves"]),
        wrapped(torch.sum, [("halves", "x")], ["mine"]),
        wrapped(total, ["halves"], ["again"]),
    ],
    "read per batch": [
        wrapped(lambda t: t.apply(lambda x: x + 1), ["tokens"], ["moved"]), *at_sites(tg.StreamingMean(in_keys="moved")),
        wrapped(lambda m: total(m), ["mean"], ["mine"]),
    ],
    "written to a leaf of it": [
        *at_sites(tg.StreamingMean()), wrapped(torch.sqrt, [("mean", "x", "variance")], [("mean", "x", "deviation")]),
        wrapped(total, [("mean", "x")], ["mine"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PARENTS)
def test_a_parent_is_its_leaves(name):
    make = lambda: TensorDictSequential(*PARENTS[name])
    td = whole(SITES)
    tg.reset(make())
    expected = make()(td.copy())["mine"].clone()
    for keep in (None, ["mine"], ["mine", "spectrum"], ["mine", "eigenvalues"], ["moments", "mine"]):
        written = {key[0] if isinstance(key, tuple) else key for key in make().out_keys}
        if keep is not None and not set(keep) <= written:
            continue
        found = tg.run(make(), split(td), progress=False, keep=keep)
        torch.testing.assert_close(found["mine"], expected, rtol=1e-9, atol=0)
        assert keep is None or set(found.keys()) == {*keep, "run"}


def test_two_writers_of_a_parent_and_its_leaf_are_refused():
    whole_root = wrapped(lambda e: TensorDict({"d_pr": e.sum()}), ["eigenvalues"], ["spectrum"])
    for parts in ((tg.SpectrumMetrics(), whole_root), (whole_root, tg.SpectrumMetrics())):
        with pytest.raises(ValueError, match="both write .*'spectrum'.*Give one of them another root"):
            make_plan(TensorDictSequential(*front(), *parts))


# ------------------------------------------------------------------------------------------ any stages in any order


class Twice(torch.nn.Module):
    """x -> x, by a module that can be pickled."""

    def forward(self, x):
        return 2 * x


class Total(torch.nn.Module):
    """Of all that is under a parent key."""

    def forward(self, values):
        return total(values)


BOTH = [("m", "x"), ("n", "x")]  # models by sites


def nested(stage):
    return tg.ForEach(tg.ForEach(stage, ["x"]), ["m", "n"])


def flat(stage):
    return tg.ForEach(stage, BOTH)


def across(stage):
    return tg.ForEachPair(stage, BOTH, pairs="all")


def renamed(module, reads, writes):
    return TensorDictModule(module(), in_keys=[reads], out_keys=[writes])


AT_SITES = {
    "covariance": tg.StreamingCovariance,
    "mean": tg.StreamingMean,
    "sketch": lambda: tg.StreamingSketch(k=2, size=3),
    "count above": lambda: CountAbove(0.5),
    "label moments": lambda: tg.StreamingLabelMoments(n_classes=2),
    "squares": lambda: renamed(Twice, "tokens", "squares"),
    "mean of squares": lambda: tg.StreamingMean(in_keys="squares", out_keys="mean_square"),
    "eigenvalues": lambda: tg.EigenSpectrum(k=2),
    "spectrum": tg.SpectrumMetrics,
    "spectrum of the sketch": lambda: tg.SpectrumMetrics(source="sketch", out_keys="sketched"),
    "rankme": tg.RankMe,
    "sample spectrum": tg.SampleSpectrum,
    "sample metrics": tg.SampleMetrics,
    "ablation": lambda: tg.NormalizationAblation(variants=["raw", "token_l2"]),
    "neighbors": lambda: tg.NearestNeighbors(4),
    "dimension": tg.TwoNN,
    "dimension of a table": lambda: tg.TwoNN(source="neighbors", out_keys=("dimension", "again")),
    "share above": lambda: ShareAbove(0.5),
    "eraser": tg.LEACE,
}
STAGES = {
    **{
        f"{name}, {container.__name__}": lambda make=make, container=container: container(make())
        for name, make in AT_SITES.items() for container in (flat, nested)
    },
    "sample": lambda: tg.RowSample(BOTH, size=20),
    "collected": lambda: tg.Collect(BOTH),
    "cross moments": lambda: tg.StreamingCrossMoments(BOTH, pairs="all"),
    "cka": lambda: across(tg.LinearCKA()),
    "cka of moments": lambda: across(tg.LinearCKA(source="moments", out_keys="again")),
    "gap": lambda: across(TwiceTheGap()),
    "novelty": lambda: across(tg.SubspaceNovelty(k=2)),
    "r2, swapped": lambda: across(tg.LinearR2(in_keys=[("sample", "b"), ("sample", "a")])),
    "twice one site's rows": lambda: renamed(Twice, ("tokens", "m", "x"), ("tokens", "m", "x")),
    "twice one site's eigenvalues": lambda: renamed(Twice, ("eigenvalues", "n", "x"), ("eigenvalues", "n", "x")),
    "total": lambda: renamed(Total, "eigenvalues", "total"),
}  # fmt: skip
SHAPES = {
    "plain": TensorDictSequential,
    "pipeline": tg.Pipeline,
    "named": lambda *parts: TensorDictSequential({f"stage {n}": part for n, part in enumerate(parts)}),
    "nested": lambda *parts: TensorDictSequential(tg.Pipeline(*parts[:1]), TensorDictSequential(*parts[1:])),
}


# who writes what others read, in an order that works
WRITERS = {
    "tokens": "twice one site's rows",
    "squares": "squares",
    "moments": "covariance",
    "sample": "sample",
    "sketch": "sketch",
    "cross_moments": "cross moments",
    "label_moments": "label moments",
    "eigenvalues": "eigenvalues",
    "sample_eigenvalues": "sample spectrum",
    "neighbors": "neighbors",
}
FIRST = [*WRITERS.values(), "twice one site's eigenvalues"]


def place(name):
    name = name.split(",")[0]
    return FIRST.index(name) if name in FIRST else len(FIRST)


def completed(names):
    """With the writers of what they read."""
    roots = {key[0] if isinstance(key, tuple) else key for name in names for key in STAGES[name]().in_keys}
    have = {name.split(",")[0] for name in names}
    missing = [
        WRITERS[root] for root in sorted(roots & set(WRITERS) - {"tokens"}) if WRITERS[root] not in have
    ]
    if not missing:
        return names
    return completed([*names, *(name if name in STAGES else f"{name}, {flat.__name__}" for name in missing)])


@st.composite
def pipelines(draw):
    """A function that makes one pipeline, the same each time; most are in an order that works, some are not."""
    one = st.sampled_from(sorted(STAGES))
    names = draw(st.lists(one, min_size=1, max_size=5, unique_by=lambda name: name.split(",")[0]))
    if draw(st.integers(0, 4)):
        names = sorted(completed(names), key=place)
    chosen = draw(st.one_of(st.none(), st.integers(0, len(names) - 1)))
    part = draw(st.integers(0, 6))
    shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]

    def make():
        stages = [STAGES[name]() for name in names]
        if chosen is not None:
            keys = stages[chosen].out_keys
            stages[chosen].select_out_keys(*keys[part % len(keys) :][:3])
        return shape(*stages)

    return make


def attempt(call):
    """What a call gives, or the words in which it is refused; other errors are faults."""
    try:
        return call()
    except (ValueError, TypeError, KeyError) as error:
        assert len(str(error)) > 40, error
        return str(error)


def agree(found, expected, keys):
    for key in keys:
        a, b = found[key].double(), expected[key].double()
        if "eigenvectors" in key:
            a, b = a.abs(), b.abs()  # a sign is nobody's
        torch.testing.assert_close(
            a, b, rtol=1e-6, atol=1e-9, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.filterwarnings("ignore::tdgeom.UndefinedMeasureWarning")
@settings(max_examples=50)
@given(pipelines(), st.integers(3, 20), st.sampled_from([1, 16, 2048]), st.integers(0, 1000))
def test_equal_or_refused(make, size, block_rows, number):
    tokens = {model: {"x": rows(i, 40)} for i, model in enumerate("mn")}
    td = TensorDict(
        {
            "tokens": tokens,
            "row_id": torch.arange(N) << 20,
            "carried": {"label": (torch.arange(N) % 3 == 0).long()},
        }
    )
    expected = attempt(lambda: make()(td.copy()))
    found = attempt(lambda: tg.run(make(), split(td, size), block_rows=block_rows, progress=False))
    event(
        f"call: {'refused' if isinstance(expected, str) else 'works'}, run: {'refused' if isinstance(found, str) else 'works'}"
    )
    if isinstance(expected, str):
        assert isinstance(found, str), expected
        return
    written = set(expected.keys(True, True)) & set(make().out_keys) - set(td.keys(True, True))
    assume(written)
    if not isinstance(found, str):
        per_batch = {key for unit in make_plan(make()).batch for key in unit.out_keys}
        keys = {key for key in found.keys(True, True) if key[0] != "run"}
        assert keys == written - per_batch
        agree(found, expected, keys)
    assert torch.equal(td["tokens", "m", "x"], rows(0, 40)), "the batch is not altered"

    agree(pickle.loads(pickle.dumps(make()))(td.copy()), expected, written)

    streamed = [key for stream in streams_of(make()) for key in stream.out_keys]
    if streamed:
        shards = [make() for _ in split(td, size)]
        for shard, part in zip(shards, split(td, size)):
            shard.select_subsequence(out_keys=streamed)(part.copy())
        for other in reversed(shards[1:]):
            tg.merge_(shards[0], other)
        merged = TensorDict({})
        for stream in streams_of(shards[0]):
            stream.publish(merged)
        agree(merged, expected, set(merged.keys(True, True)) & written)

    key = sorted(written, key=str)[number % len(written)]
    part = make().select_subsequence(out_keys=[key])
    found = attempt(lambda: part(td.copy()))
    needed = set(make().in_keys) - set(optional_in_keys(make()))
    if needed <= set(td.keys(True, True)):  # else a selection hides what a later stage reads
        agree(found, expected, [key])
    else:
        assert isinstance(found, str) or torch.equal(found[key].nan_to_num(), expected[key].nan_to_num())


# ------------------------------------------------------------------------------------------ two selections, complex rows


def activations():
    acts = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]])
    return TensorDict({"acts": {"x": acts}, "attention_mask": mask, "label": torch.arange(6)})


def two_selections():
    last = [("last", "x"), ("last", "label"), "last_row_id"]
    return TensorDictSequential(
        tg.SelectTokens(["x"]),
        tg.SelectTokens(["x"], positions="last", also=["label"], out_keys=last),
        each_x(tg.StreamingMean()),
        tg.Collect(["x"], in_keys=[("last", "x"), "last_row_id"], out_keys=["ends", "ends_row_id"]),
        tg.StreamingMean(in_keys=[("last", "label")], out_keys="label_mean"),
        tg.RowSample(["x"], size=50),
    )


def each_x(stage):
    return tg.ForEach(stage, ["x"])


@pytest.mark.parametrize("block_rows", [1, 4, 2048])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_two_row_selections_in_one_run(size, block_rows):
    td = activations()
    expected = two_selections()(td.copy())
    batches = [td.apply(lambda x, s=s: x[s : s + size], batch_size=[]) for s in range(0, 6, size)]
    found = tg.run(two_selections(), batches, block_rows=block_rows, progress=False)
    assert int(found["run", "rows"]) == int(td["attention_mask"].sum()) == len(found["sample_row_id"])
    assert torch.equal(found["ends"], td["acts", "x"][:, -1]) and float(found["label_mean", "mean"]) == 2.5
    for key in (
        "ends",
        "ends_row_id",
        ("mean", "x", "mean"),
        ("sample", "x"),
        "sample_row_id",
        ("label_mean", "variance"),
    ):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-12, atol=0)


def test_one_stage_reads_rows_of_one_selection():
    mixed = two_selections()
    mixed[3] = tg.Collect(["x"], in_keys=[("last", "x"), "row_id"], out_keys=["ends", "ends_row_id"])
    with pytest.raises(
        ValueError, match=r"Collect reads .* rows of two selections \(\['last_row_id', 'row_id'\]\)"
    ):
        tg.run(mixed, [activations()], progress=False)
    with pytest.raises(ValueError, match="max_rows and sharded count the rows of one selection"):
        tg.run(two_selections(), [activations()], max_rows=3, progress=False)


STREAMS = {
    "mean": tg.StreamingMean, "covariance": tg.StreamingCovariance, "sketch": lambda: tg.StreamingSketch(k=2, size=3),
    "own": lambda: CountAbove(), "at a site": lambda: tg.ForEach(tg.StreamingMean(), ["x"]),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_complex_rows_are_kept_as_they_are_or_refused(name):
    z = torch.randn(12, 3, dtype=torch.complex128)
    tokens = {"x": z} if name == "at a site" else z
    batch = {"tokens": tokens, "row_id": torch.arange(12)}
    with pytest.raises(
        TypeError, match=r"expects real numbers at .*, got torch.complex128 of shape .*torch.view_as_real"
    ):
        tg.run(STREAMS[name](), [batch], progress=False)
    held = tg.run(
        TensorDictSequential(tg.RowSample(size=12), tg.Collect()),
        [{"tokens": z, "row_id": torch.arange(12)}],
        progress=False,
    )
    assert torch.equal(held["collected"], z) and held["sample"].dtype == z.dtype
