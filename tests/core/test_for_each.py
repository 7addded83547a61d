"""ForEach and ForEachPair: one stage at many sites, by renaming its keys."""

from __future__ import annotations

import pickle
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn

import tdgeom as tg
from tdgeom.core.for_each_pair import pair_list
from tdgeom.core.keys import optional_in_keys

SITES = ["x.0", "x.1", "x.2"]


def samples(n=20, d=4, sites=SITES):
    return {site: torch.randn(n, d, dtype=torch.float64) for site in sites}


class Shift(tg.Stage):
    """Stateless, with a shared input."""

    reads = {"tokens": "N D", "row_id": "N"}
    writes = [("shifted", "rows"), ("shifted", "total")]

    def compute(self, tokens, row_id):
        return tokens + row_id[:, None], tokens.sum()


class Distance(tg.PairStage):
    """Counts how often each half runs, and reads something of neither side."""

    reads = {("sample", "a"): "N D", ("sample", "b"): "N D", ("weight", "w"): ""}
    writes = [("between", "distance"), ("between", "product")]

    def __init__(self, **keys):
        super().__init__(**keys)
        self.calls = []

    def prepare(self, sample):
        self.calls.append("prepare")
        return sample.mean(0)

    def compare(self, a, b, weight):
        self.calls.append("compare")
        return {"distance": weight * (a - b).norm(), "product": a @ b}


# ------------------------------------------------------------------------------------------ ForEach


def test_the_site_comes_second_in_every_key():
    units = tg.ForEach(tg.StreamingCovariance(), ["x.0", "y/1"])
    assert units.in_keys == [("tokens", "x.0"), ("tokens", "y/1")]
    assert units.out_keys[0] == ("moments", "x.0", "count") and units.out_keys[6] == (
        "moments",
        "y/1",
        "count",
    )
    assert len(units.out_keys) == 12
    assert isinstance(units, tg.ForEach) and isinstance(units, TensorDictSequential)


def test_shared_keys_stay_and_values_are_each_sites_own():
    rows = samples()
    units = tg.ForEach(Shift(), SITES)
    assert units.in_keys == [("tokens", "x.0"), "row_id", ("tokens", "x.1"), ("tokens", "x.2")]
    td = units(TensorDict({"tokens": rows, "row_id": torch.arange(20)}))
    for site in SITES:
        assert torch.equal(td["shifted", site, "rows"], rows[site] + torch.arange(20)[:, None])
        assert torch.equal(td["shifted", site, "total"], rows[site].sum())
    own = tg.ForEach(Shift(), ["x"], shared=[])
    assert own.in_keys == [("tokens", "x"), ("row_id", "x")]
    other = tg.ForEach(Shift(in_keys=["tokens", "place"]), ["x"], shared=["place"])
    assert other.in_keys == [("tokens", "x"), "place"]


def test_a_shared_output_is_refused():
    writer = TensorDictModule(lambda x: x[:, 0], in_keys=["tokens"], out_keys=["row_id"])
    with pytest.raises(
        ValueError, match=r"TensorDictModule writes \['row_id'\], which is shared.*Rename the output"
    ):
        tg.ForEach(writer, SITES)
    with pytest.raises(ValueError, match=r"Distance writes .*'between', 'distance'.*which is shared"):
        tg.ForEachPair(Distance(), SITES, shared=[("between", "distance")])


def test_state_is_copied_and_the_stage_given_stays_untouched():
    stage = tg.StreamingCovariance()
    units = tg.ForEach(stage, SITES)
    rows = samples()
    td = units(TensorDict({"tokens": rows}))
    assert stage.is_empty and stage.in_keys == ["tokens"] and stage.out_keys[0] == ("moments", "count")
    assert len({id(unit.module) for unit in units.module}) == 3
    for site in SITES:
        torch.testing.assert_close(td["moments", site, "covariance"], torch.cov(rows[site].T))


def test_every_site_has_a_stage_of_its_own():
    linear = TensorDictModule(nn.Linear(4, 2), in_keys=["tokens"], out_keys=["low"])
    units = tg.ForEach(linear, SITES)
    weights = {id(unit.module.module.weight) for unit in units.module}
    assert len(weights) == 3 and id(linear.module.weight) not in weights
    stage = tg.SpectrumMetrics()
    each = tg.ForEach(stage, SITES)
    assert len({id(unit.module) for unit in each}) == 3 and all(unit.module is not stage for unit in each)


def test_of_a_sequence_is_the_sequence_of_each():
    inner = TensorDictSequential(
        tg.StreamingCovariance(), TensorDictSequential(tg.EigenSpectrum(k=2), tg.SpectrumMetrics())
    )
    units = tg.ForEach(inner, SITES)
    needed = [key for key in units.in_keys if key not in optional_in_keys(units)]
    assert len(units.module) == 9 and needed == [("tokens", site) for site in SITES]
    rows = samples()
    td = units(TensorDict({"tokens": rows}))
    alone = inner(TensorDict({"tokens": rows["x.1"]}))
    assert td["spectrum", "x.1", "d_pr"] == alone["spectrum", "d_pr"]
    result = tg.run(tg.ForEach(inner, SITES), [{"tokens": rows}], progress=False)
    assert result["spectrum", "x.1", "d_pr"] == alone["spectrum", "d_pr"]


class Hand(TensorDictModuleBase):
    """A plain hand-written module of a user who has never heard of Stage."""

    def __init__(self):
        super().__init__()
        self.in_keys = ["sample"]
        self.out_keys = [("hand", "largest")]

    def forward(self, tensordict):
        return tensordict.set(("hand", "largest"), tensordict["sample"].max())


def test_a_hand_written_module_and_a_wrapped_function():
    rows = samples()
    pipeline = TensorDictSequential(
        tg.ForEach(Hand(), SITES),
        tg.ForEach(TensorDictModule(torch.std, in_keys=["sample"], out_keys=["std"]), SITES),
    )
    td = pipeline(TensorDict({"sample": rows}))
    for site in SITES:
        assert td["hand", site, "largest"] == rows[site].max() and td["std", site] == rows[site].std()


def test_select_subsequence_and_select_out_keys_reach_one_site():
    units = tg.ForEach(TensorDictSequential(tg.EigenSpectrum(), tg.SpectrumMetrics()), SITES)
    part = units.select_subsequence(out_keys=[("spectrum", "x.1", "d_pr")])
    leaves = ("covariance", "count", "relative_error", "effective_sample_size")
    assert part.in_keys == [("moments", "x.1", leaf) for leaf in leaves]
    assert len(part.module) == 2
    one = tg.ForEach(tg.SpectrumMetrics(), ["x.1"]).select_out_keys(("spectrum", "x.1", "k90"))
    td = one(TensorDict({"eigenvalues": {"x.1": torch.rand(5)}}))
    assert one.out_keys == [("spectrum", "x.1", "k90")] and int(td["spectrum", "x.1", "k90"]) > 0


def test_errors_name_the_site():
    rows = {"x.0": torch.ones(4, 2), "x.1": torch.ones(1, 2)}
    with pytest.raises(
        ValueError, match=r"needs at least 2 rows, got 'sample' of shape \(1, 2\).*\[at x.1\]"
    ):
        tg.ForEach(tg.SampleSpectrum(), ["x.0", "x.1"])(TensorDict({"sample": rows}))
    with pytest.raises(KeyError, match=r"SampleSpectrum reads \['sample'\].*\[at x.2\]"):
        tg.ForEach(tg.SampleSpectrum(), ["x.2"])(TensorDict({"sample": rows}))


def test_refusals():
    with pytest.raises(ValueError, match=r"non-empty list of different sites, got \[\]"):
        tg.ForEach(tg.SpectrumMetrics(), [])
    with pytest.raises(ValueError, match=r"non-empty list of different sites, got \['x', 'x'\]"):
        tg.ForEach(tg.SpectrumMetrics(), ["x", "x"])
    with pytest.raises(
        TypeError, match=r"with in_keys and out_keys\), got Linear\. Wrap a function in TensorDictModule"
    ):
        tg.ForEach(nn.Linear(2, 2), SITES)
    with pytest.raises(TypeError, match="got function"):
        tg.ForEach(lambda x: x, SITES)
    with pytest.raises(TypeError, match="ForEachPair already runs over pairs"):
        tg.ForEach(tg.ForEachPair(tg.LinearCKA(), SITES), SITES)


@pytest.mark.parametrize(
    "copy", [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_of_containers_compute_the_same_and_keep_their_own_state(copy):
    pipeline = TensorDictSequential(
        tg.ForEach(tg.StreamingCovariance(), SITES),
        tg.RowSample(SITES, size=8),
        tg.ForEach(tg.EigenSpectrum(k=2), SITES),
        tg.ForEach(tg.NormalizationAblation(), SITES),
        tg.ForEachPair(tg.LinearCKA(), SITES),
        tg.ForEachPair(tg.SubspaceNovelty(k=2), SITES, pairs="all"),
    )
    first = TensorDict({"tokens": samples(), "row_id": torch.arange(20)})
    second = TensorDict({"tokens": samples(), "row_id": torch.arange(20, 40)})
    pipeline(first.copy())
    twin = copy(pipeline)
    expected, found = pipeline(second.copy()), twin(second.copy())
    for key in pipeline.out_keys:
        torch.testing.assert_close(found[key], expected[key], equal_nan=True)
    twin(TensorDict({"tokens": samples(), "row_id": torch.arange(40, 60)}))
    assert int(pipeline.module[0].module[0].module.count) == 40
    assert int(twin.module[0].module[0].module.count) == 60


# ------------------------------------------------------------------------------------------ ForEachPair


def test_prepare_runs_once_a_site_and_compare_once_a_pair():
    stage = Distance()
    pairs = tg.ForEachPair(stage, SITES, pairs="all", shared=[("weight", "w")])
    rows = samples()
    td = pairs(TensorDict({"sample": rows, "weight": {"w": torch.tensor(2.0)}}))
    calls = pairs.units[0].module.calls
    assert calls.count("prepare") == 3 and calls.count("compare") == 3 and stage.calls == []
    for a, b in (("x.0", "x.1"), ("x.0", "x.2"), ("x.1", "x.2")):
        means = rows[a].mean(0), rows[b].mean(0)
        assert torch.equal(td["between", f"{a}->{b}", "distance"], 2 * (means[0] - means[1]).norm())
        torch.testing.assert_close(td["between", f"{a}->{b}", "product"], means[0] @ means[1])


def test_keys_of_pairs():
    pairs = tg.ForEachPair(Distance(), SITES)
    assert pairs.in_keys == [
        ("sample", "x.0"), ("sample", "x.1"), ("weight", "x.0->x.1", "w"),
        ("sample", "x.2"), ("weight", "x.1->x.2", "w"),
    ]  # fmt: skip
    assert pairs.out_keys == [
        ("between", f"{p}", m) for p in ("x.0->x.1", "x.1->x.2") for m in ("distance", "product")
    ]


def test_sides_that_read_different_keys_are_prepared_apart():
    class Regression(tg.PairStage):
        reads = {("sample", "a"): "N D", ("target", "b"): "N D"}
        writes = [("between", "fit")]

        def compare(self, a, b):
            return (a * b).sum()

    sample, target = samples(), samples()
    td = TensorDict({"sample": sample, "target": target})
    tg.ForEachPair(Regression(), SITES, pairs=[("x.0", "x.1"), ("x.1", "x.0")])(td)
    assert td["between", "x.0->x.1", "fit"] == (sample["x.0"] * target["x.1"]).sum()
    assert td["between", "x.1->x.0", "fit"] == (sample["x.1"] * target["x.0"]).sum()


def test_a_site_with_itself_and_both_directions():
    rows = samples()
    pairs = [("x.0", "x.0"), ("x.0", "x.1"), ("x.1", "x.0")]
    td = tg.ForEachPair(tg.LinearCKA(), SITES, pairs=pairs)(TensorDict({"sample": rows}))
    assert float(td["between", "x.0->x.0", "linear_cka"]) == pytest.approx(1)
    forth, back = td["between", "x.0->x.1", "linear_cka"], td["between", "x.1->x.0", "linear_cka"]
    assert float(forth) == pytest.approx(float(back), rel=1e-12) and float(forth) < 0.9


def test_any_module_with_sides_in_its_keys():
    gap = TensorDictModule(
        lambda a, b: (a - b).abs().max(),
        in_keys=[("sample", "a"), ("sample", "b")],
        out_keys=[("between", "gap")],
    )
    rows = samples()
    td = tg.ForEachPair(gap, SITES)(TensorDict({"sample": rows}))
    assert td["between", "x.0->x.1", "gap"] == (rows["x.0"] - rows["x.1"]).abs().max()
    assert td["between", "x.1->x.2", "gap"] == (rows["x.1"] - rows["x.2"]).abs().max()


def test_out_keys_selected_on_the_stage_hold_at_every_pair():
    stage = Distance()
    stage.select_out_keys(("between", "product"))
    rows = samples()
    pairs = tg.ForEachPair(stage, SITES, shared=[("weight", "w")])
    td = pairs(TensorDict({"sample": rows, "weight": {"w": torch.tensor(1.0)}}))
    assert pairs.out_keys == [("between", "x.0->x.1", "product"), ("between", "x.1->x.2", "product")]
    torch.testing.assert_close(
        td["between", "x.0->x.1", "product"], rows["x.0"].mean(0) @ rows["x.1"].mean(0)
    )
    assert "distance" not in td["between", "x.0->x.1"].keys()


def test_pair_lists():
    assert pair_list(SITES) == [("x.0", "x.1"), ("x.1", "x.2")]
    assert pair_list(SITES, "all") == [("x.0", "x.1"), ("x.0", "x.2"), ("x.1", "x.2")]
    assert pair_list(SITES, [("x.2", "x.0")]) == pair_list(SITES, [["x.2", "x.0"]]) == [("x.2", "x.0")]
    mixed = [
        tg.Site(name)
        for name in ("encoder.residual_output.0", "encoder.mlp_output.0", "encoder.residual_output.1",
                     "decoder.residual_output.0", "encoder.mlp_output.1", "decoder.residual_output.2")
    ]  # fmt: skip
    assert pair_list(mixed) == [
        ("encoder.residual_output.0", "encoder.residual_output.1"),
        ("encoder.mlp_output.0", "encoder.mlp_output.1"),
        ("decoder.residual_output.0", "decoder.residual_output.2"),
    ]
    plain = [str(site) for site in mixed]
    assert pair_list(plain) == pair_list(mixed)
    assert pair_list(["a", "b", "c"]) == [("a", "b"), ("b", "c")]


def test_pair_refusals():
    with pytest.raises(ValueError, match=r"names \['y'\], which are not among the sites"):
        tg.ForEachPair(tg.LinearCKA(), SITES, pairs=[("x.0", "y")])
    with pytest.raises(ValueError, match="takes 'consecutive', 'all' or a list of"):
        tg.ForEachPair(tg.LinearCKA(), SITES, pairs="each")
    with pytest.raises(
        ValueError, match=r"no two of the sites \['x.0'\] make a pair under pairs='consecutive'"
    ):
        tg.ForEachPair(tg.LinearCKA(), ["x.0"])
    with pytest.raises(ValueError, match=r"no two of the sites .* make a pair under pairs=\[\]"):
        tg.ForEachPair(tg.LinearCKA(), SITES, pairs=[])
    with pytest.raises(
        TypeError, match=r"carry their side second.*SpectrumMetrics reads \['eigenvalues'.*use ForEach"
    ):
        tg.ForEachPair(tg.SpectrumMetrics(), SITES)
    with pytest.raises(TypeError, match=r"StreamingCovariance streams.*StreamingCrossMoments\(sites, pairs="):
        tg.ForEachPair(tg.StreamingCovariance(), SITES)
    with pytest.raises(TypeError, match="got Linear"):
        tg.ForEachPair(nn.Linear(2, 2), SITES)
    with pytest.raises(TypeError, match=r"LinearCKA compares two: use ForEachPair\(stage, sites\)"):
        tg.ForEach(tg.LinearCKA(), SITES)
    with pytest.raises(ValueError, match="twice"):
        tg.ForEachPair(tg.LinearCKA(), SITES, pairs=[("x.0", "x.1"), ("x.0", "x.1")])


def test_pair_errors_name_the_pair():
    rows = {"x.0": torch.randn(5, 3), "x.1": torch.randn(6, 3)}
    with pytest.raises(ValueError, match=r"same N, got 5 and 6.*\[at x.0->x.1\]"):
        tg.ForEachPair(tg.LinearCKA(), ["x.0", "x.1"])(TensorDict({"sample": rows}))


# ------------------------------------------------------------------------------------------ each site is the stage alone


class Counting(tg.Stage):
    """Keeps Python state."""

    reads, writes = ["sample"], ["calls"]

    def __init__(self, **keys):
        super().__init__(**keys)
        self.calls = []

    def compute(self, sample):
        self.calls.append(float(sample.sum()))
        return torch.tensor(len(self.calls))


class OwnForward(tg.SampleMetrics):
    def forward(self, tensordict, tensordict_out=None, **named):
        out = super().forward(tensordict, tensordict_out, **named)
        return out.set(self.out_keys[0], -out[self.out_keys[0]])


class OwnCall(tg.SampleMetrics):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs).set(self.out_keys[0], torch.tensor(7.0))


def hooked(module, *, pre=False):
    if pre:
        module.register_forward_pre_hook(lambda _, args: (args[0].apply(lambda x: 2 * x + 1),))
    else:
        module.register_forward_hook(lambda m, _, out: out.set(m.out_keys[0], 3 * out[m.out_keys[0]]))
    return module


def patched(module):
    plain = module.forward
    module.forward = lambda *args, **kwargs: plain(*args, **kwargs).set(module.out_keys[0], torch.tensor(5.0))
    return module


class Tripled(TensorDictSequential):
    def forward(self, tensordict, tensordict_out=None, **kwargs):
        out = super().forward(tensordict, tensordict_out, **kwargs)
        return out.set(self.out_keys[0], 3 * out[self.out_keys[0]])


def metrics(kind=TensorDictSequential, **options):
    return kind(tg.SampleSpectrum(), tg.SampleMetrics(), **options)


ALONE = {
    "a stage": lambda: tg.SampleMetrics(),
    "own forward": lambda: OwnForward(),
    "own __call__": lambda: OwnCall(),


    "a hook": lambda: hooked(tg.SampleMetrics()),
    "a hook before": lambda: hooked(tg.SampleMetrics(), pre=True),
    "selected": lambda: tg.SampleMetrics().select_out_keys(("sample_metrics", "sv_stable_rank")),
    "selected and reset": lambda: tg.SampleMetrics().select_out_keys(("sample_metrics", "sv_stable_rank")).reset_out_keys(),
    "a sequence": metrics,
    "named stages": lambda: TensorDictSequential({"first": tg.SampleSpectrum(), "second": tg.SampleMetrics()}),
    "a subclass": lambda: metrics(Tripled),
    "a hooked sequence": lambda: hooked(metrics()),
    "a sequence hooked before": lambda: hooked(metrics(), pre=True),
    "a selected sequence": lambda: metrics().select_out_keys("sample_eigenvalues"),
    "a tolerant sequence": lambda: TensorDictSequential(
        tg.SampleMetrics(), tg.SampleSpectrum(in_keys="nowhere"), partial_tolerant=True
    ).select_out_keys(("sample_metrics", "sv_stable_rank")),
    "a sequence that writes elsewhere": lambda: metrics(inplace=False),
    "a stream": lambda: tg.StreamingCovariance(in_keys="sample"),
    "a stream of one's own update": lambda: StreamOfSquares(in_keys="sample"),
    "a hooked stream": lambda: hooked(tg.StreamingMean(in_keys="sample")),
    "not written": lambda: tg.StreamingMean(in_keys="sample", out_keys=["_", "middle", "_"]),
    "a function": lambda: TensorDictModule(torch.std, ["sample"], ["std"]),
    "a module that reads what may be absent": lambda: tg.NormalizationAblation(),
}  # fmt: skip


class StreamOfSquares(tg.StreamingMean):
    def update(self, tensordict):
        super().update(tensordict.apply(torch.square))


@pytest.mark.parametrize("name", ALONE)
def test_each_site_gives_what_the_stage_alone_gives(name):
    rows = samples(n=30)

    units = tg.ForEach(ALONE[name](), SITES)
    found = units(TensorDict({"sample": rows}))

    for site in SITES:
        alone = ALONE[name]()
        expected = alone(TensorDict({"sample": rows[site]}))

        written = [key for key in expected.keys(True, True) if key in alone.out_keys]
        assert written
        for key in written:
            first, *rest = (key,) if isinstance(key, str) else key
            torch.testing.assert_close(
                found[(first, site, *rest)], expected[key], equal_nan=True, rtol=0, atol=0
            )
    assert not any("_" in ((key,) if isinstance(key, str) else key) for key in found.keys(True, True))


def test_a_stage_that_keeps_python_state_is_copied_a_site():
    stage = Counting()
    units = tg.ForEach(stage, SITES)
    rows = samples()
    for _ in range(2):
        td = units(TensorDict({"sample": rows}))
    assert stage.calls == [] and [int(td["calls", site]) for site in SITES] == [2, 2, 2]
    assert units[1].module.calls == 2 * [float(rows["x.1"].sum())]


class Uncopied(TensorDictModuleBase):
    in_keys, out_keys = ["sample"], ["out"]

    def __deepcopy__(self, memo):
        raise RuntimeError("it holds a file")


def test_a_stage_that_cannot_be_copied_says_so():
    for each, stage in ((tg.ForEach, tg.SampleMetrics()), (tg.ForEachPair, tg.LayerCosine())):
        with pytest.raises(
            TypeError,
            match=r"a forward of this one object, which its copies would still call. Override forward",
        ):
            each(patched(stage), SITES)
    with pytest.raises(
        TypeError,
        match=r"Uncopied cannot be copied: RuntimeError\('it holds a file'\).*in_keys= and out_keys=",
    ):
        tg.ForEach(Uncopied(), SITES)


SITES_OF_EVERY_KIND = {
    "ints": lambda: [0, 1, 2],
    "a range": lambda: range(3),
    "a generator": lambda: (f"layer {i}" for i in range(3)),
    "tuples": lambda: [("m", 0), ("m", 1), ("n", 0)],
    "sites": lambda: (tg.Site(f"embed.{i}") for i in range(3)),
    "a dict's keys": lambda: dict.fromkeys(["a.0", "b/1", "c->d"]).keys(),
}


@pytest.mark.parametrize("name", SITES_OF_EVERY_KIND)
def test_sites_of_every_kind(name):
    sites = SITES_OF_EVERY_KIND[name]
    keys = [tuple(map(str, site if isinstance(site, tuple) else (site,))) for site in sites()]
    td = TensorDict({"row_id": torch.arange(20) << 20})
    for i, key in enumerate(keys):
        td.set(("tokens", *key), samples(sites=["x"])["x"] + i)
    stages = (
        tg.ForEach(tg.StreamingMean(), sites()),
        tg.RowSample(sites(), size=20),
        tg.ForEach(tg.SampleMetrics(), sites()),
        tg.StreamingCrossMoments(sites(), pairs="all"),
        tg.ForEachPair(tg.LinearCKA(), sites(), pairs="all"),
        tg.ForEachPair(tg.LinearCKA(source="moments", out_keys="again"), sites(), pairs="all"),
        tg.Collect(sites()),
    )
    assert stages[0].in_keys == [("tokens", *key) for key in keys]
    pipeline = TensorDictSequential(*stages)
    whole = deepcopy(pipeline)(td.copy())
    parts = [td.apply(lambda x, s=s: x[s : s + 7], batch_size=[]) for s in range(0, 20, 7)]
    found = tg.run(pipeline, parts, progress=False)
    for key in keys:
        torch.testing.assert_close(found[("mean", *key, "mean")], td[("tokens", *key)].mean(0))
        assert torch.equal(found[("collected", *key)], td[("tokens", *key)])
    for key in pipeline.out_keys:
        torch.testing.assert_close(found[key], whole[key], rtol=1e-9, atol=1e-11, equal_nan=True)


def test_of_for_each_is_models_by_sites_for_streams_too():
    inner = tg.ForEach(TensorDictSequential(tg.StreamingCovariance(), tg.EigenSpectrum(k=2)), ["x", "y"])
    units = tg.ForEach(inner, ["a", "b"])
    td = TensorDict({"tokens": {model: samples(sites=["x", "y"]) for model in "ab"}})
    assert ("moments", "b", "y", "mean") in units.out_keys
    found = units(td.copy())
    result = tg.run(deepcopy(units), [td], progress=False)
    for model in "ab":
        for site in "xy":
            covariance = torch.cov(td["tokens", model, site].T)
            torch.testing.assert_close(found["moments", model, site, "covariance"], covariance)
            torch.testing.assert_close(
                result["eigenvalues", model, site], torch.linalg.eigvalsh(covariance).flip(0)
            )
    state = deepcopy(units.state_dict())
    twin = tg.ForEach(
        tg.ForEach(TensorDictSequential(tg.StreamingCovariance(), tg.EigenSpectrum(k=2)), ["x", "y"]),
        ["a", "b"],
    )
    twin.load_state_dict(state)
    twin.merge_(units)
    assert int(twin[0].module.module.count) == 2 * int(units[0].module.module.count)
    other = tg.ForEach(tg.ForEach(tg.StreamingCovariance(), ["x", "y"]), ["b", "a"])
    with pytest.raises(RuntimeError, match=r"the state of site 'a' does not go to 'b'"):
        other.load_state_dict(
            tg.ForEach(tg.ForEach(tg.StreamingCovariance(), ["x", "y"]), ["a", "b"]).state_dict()
        )


# ------------------------------------------------------------------------------------------ each pair is the stage alone


class HalfCKA(tg.LinearCKA):
    def compute(self, *inputs):
        return {name: value / 2 for name, value in zip(self.out_names, self.listed(super().compute(*inputs)))}


class OwnCompare(tg.LayerCosine):
    def compare(self, *sides):
        return -super().compare(*sides)


class OwnPrepare(tg.LayerCosine):
    def prepare(self, sample):
        return super().prepare(sample + 1)


class PairForward(tg.LayerCosine):
    def forward(self, tensordict, tensordict_out=None, **named):
        out = super().forward(tensordict, tensordict_out, **named)
        return out.set(self.out_keys[0], -out[self.out_keys[0]])


class Weighted(tg.LayerCosine):
    """Holds a buffer that a call changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def compare(self, *sides):
        self.calls += 1
        return super().compare(*sides) * self.calls


def swapped(kind):
    return kind(in_keys=[("sample", "b"), ("sample", "a")])


PAIRED = {
    "a stage": lambda: tg.CCA(),
    "own compute": lambda: HalfCKA(),
    "own compare": lambda: OwnCompare(),
    "own prepare": lambda: OwnPrepare(),
    "own forward": lambda: PairForward(),


    "a hook": lambda: hooked(tg.LayerCosine()),
    "a hook before": lambda: hooked(tg.LayerCosine(), pre=True),
    "sides swapped": lambda: swapped(tg.LinearR2),
    "one side's rows elsewhere": lambda: tg.LinearR2(in_keys=[("sample", "a"), ("other", "b")]),
    "selected": lambda: tg.CCA().select_out_keys(("between", "cca_r2")),
    "state of its own": lambda: Weighted(),
    "a function": lambda: TensorDictModule(lambda x, y: (x - y).norm(), [("sample", "a"), ("sample", "b")], [("between", "gap")]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::tdgeom.UndefinedMeasureWarning")
@pytest.mark.parametrize("name", PAIRED)
def test_each_pair_gives_what_the_stage_alone_gives(name):
    rows, other = samples(), samples()
    pairs = tg.ForEachPair(
        PAIRED[name](), SITES, pairs=[("x.0", "x.1"), ("x.1", "x.2"), ("x.0", "x.2"), ("x.2", "x.0")]
    )
    found = pairs(TensorDict({"sample": rows, "other": other}))
    for a, b in pairs.pairs:
        alone = PAIRED[name]()
        expected = alone(TensorDict({"sample": {"a": rows[a], "b": rows[b]}, "other": {"b": other[b]}}))
        for root, leaf in alone.out_keys:
            torch.testing.assert_close(
                found[root, f"{a}->{b}", leaf], expected[root, leaf], rtol=1e-12, atol=0
            )
    assert set(found["between"].keys()) == {f"{a}->{b}" for a, b in pairs.pairs}


def test_hooks_that_come_later_act_on_pairs_too():
    pairs = tg.ForEachPair(tg.LayerCosine(), SITES)
    td = TensorDict({"sample": samples()})
    before = pairs(td.copy())["between", "x.0->x.1", "layer_cosine_sim"]
    hooked(pairs.units[0])
    after = pairs(td.copy())
    torch.testing.assert_close(after["between", "x.0->x.1", "layer_cosine_sim"], 3 * before)
    hooked(pairs.units[1].module)
    torch.testing.assert_close(pairs(td.copy())["between", "x.0->x.1", "layer_cosine_sim"], 9 * before)


def test_no_step_between_hidden_states_is_left_out():
    steps = pair_list(["embed", "residual_output.0", "residual_output.1", "final_norm"])
    assert steps == [
        ("embed", "residual_output.0"),
        ("residual_output.0", "residual_output.1"),
        ("residual_output.1", "final_norm"),
    ]
    two_stacks = [
        f"{stack}.{site}"
        for stack in ("encoder", "decoder")
        for site in ("attn_input.0", "attn_input.1", "residual_output.1")
    ]
    assert pair_list(two_stacks) == [(a, b) for a, b in pairwise(two_stacks) if a[:2] == b[:2]]
    assert pair_list([tg.Site(site) for site in two_stacks]) == pair_list(two_stacks)
    both = [
        "embed",
        "residual_input.0",
        "residual_output.0",
        "residual_input.1",
        "residual_output.1",
        "final_norm",
    ]
    assert pair_list(both) == [
        ("embed", "residual_input.0"),
        ("residual_input.0", "residual_input.1"),
        ("residual_output.0", "residual_output.1"),
        ("residual_output.1", "final_norm"),
    ]
    assert pair_list(["embed", "final_norm"]) == [("embed", "final_norm")]


def test_a_site_in_no_pair_is_named():
    sites = ["residual_input.0", "residual_input.1", "mlp_output.1"]
    with pytest.warns(UserWarning, match=r"leaves out \['mlp_output.1'\].*pairs=\[\(a, b\)") as caught:
        pairs = pair_list(sites)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert pairs == [("residual_input.0", "residual_input.1")]
