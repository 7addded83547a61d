"""The base classes: keys, shapes, errors, state."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg


class Norms(tg.Stage):
    """Two leaves in, one of them optional, two leaves out."""

    reads = {"sample": "N D", ("extra", "weight"): "N"}
    optional = frozenset({"weight"})
    writes = [("norms", "mean"), ("norms", "largest")]

    def compute(self, sample, weight):
        norms = sample.norm(dim=-1)
        weighted = norms if weight is None else norms * weight
        return {"largest": norms.amax(-1), "mean": weighted.mean(-1)}


class Total(tg.Stage):
    reads = ["tokens"]
    writes = ["total"]

    def compute(self, tokens):
        return tokens.sum(-1)


class Gap(tg.PairStage):
    reads = {
        ("sample", "a"): "N D",
        ("other", "a"): "N",
        ("sample", "b"): "M D",
        ("other", "b"): "M",
        "weight": "",
    }
    writes = [("between", "gap")]

    def prepare(self, sample, other):
        return (sample * other[:, None]).mean(0)

    def compare(self, a, b, weight):
        return weight * (a - b).sum()


SAMPLE = torch.tensor([[3.0, 4.0], [6.0, 8.0]])


def test_outputs_by_name_and_in_order():
    assert [float(v) for v in Norms()(sample=SAMPLE)] == [7.5, 10]
    td = Norms()(TensorDict(sample=SAMPLE))
    assert float(td["norms", "mean"]) == 7.5 and float(td["norms", "largest"]) == 10


def test_an_optional_input_present_absent_and_left_out_of_in_keys():
    weight = torch.tensor([0.0, 1.0])
    assert float(Norms()(sample=SAMPLE, extra_weight=weight)[0]) == 5
    assert float(Norms()(TensorDict({"sample": SAMPLE, "extra": {"weight": weight}}))["norms", "mean"]) == 5
    only = Norms(in_keys=["sample"])
    assert only.in_keys == ["sample"]
    assert float(only(TensorDict({"sample": SAMPLE, "extra": {"weight": weight}}))["norms", "mean"]) == 7.5


def test_keys_of_every_form():
    assert Total(in_keys="x", out_keys="y").in_keys == ["x"]
    assert Total(in_keys=("a", "x"), out_keys=("b", "y")).out_keys == [("b", "y")]
    assert Total(in_keys=[("x",)], out_keys=[("y",)]).in_keys == ["x"]
    assert Norms(out_keys="here").out_keys == [("here", "mean"), ("here", "largest")]
    assert Norms(out_keys=["one", ("two", "three")]).out_keys == ["one", ("two", "three")]
    dots = Total(in_keys="layer.0", out_keys=("total", "layer.0"))
    td = dots(TensorDict({"layer.0": torch.ones(3), "layer": {"0": torch.zeros(3)}}))
    assert dots.in_keys == ["layer.0"] and float(td["total", "layer.0"]) == 3


def test_class_level_lists_are_not_shared_between_instances():
    first = Norms()
    first.in_keys.append("oops")
    assert Norms().in_keys == ["sample", ("extra", "weight")] and Norms.reads.keys() == {
        "sample",
        ("extra", "weight"),
    }


def test_refused_keys():
    for keys, error, match in (
        (
            {"in_keys": ["a", "b", "c"]},
            ValueError,
            r"Norms reads 2 leaves, in this order: \['sample', \('extra', 'weight'\)\]",
        ),
        ({"in_keys": []}, ValueError, "Norms reads 2 leaves"),
        (
            {"out_keys": ["a"]},
            ValueError,
            r"Norms writes 2 leaves, in this order: \['mean', 'largest'\]; out_keys has \['a'\]",
        ),
        ({"out_keys": ["a", "a"]}, ValueError, "Norms: out_keys names a key twice"),
        ({"in_keys": ["a", "a"]}, ValueError, "Norms: in_keys names a key twice"),
        (
            {"in_keys": ["a", 3]},
            TypeError,
            r"in_keys takes a list of keys .* or a single key .*, got \['a', 3\]",
        ),
        ({"out_keys": ()}, TypeError, "out_keys takes a list of keys"),
    ):
        with pytest.raises(error, match=match):
            Norms(**keys)
    with pytest.raises(TypeError, match="reads and writes are lists of keys, got 'x'"):
        tg.Stage(reads="x", writes=["y"])


def test_refused_inputs():
    with pytest.raises(
        KeyError, match=r"Norms reads \['sample'\], but the TensorDict has \['other'\]\. Put the stage that"
    ):
        Norms()(TensorDict(other=SAMPLE))
    with pytest.raises(ValueError, match=r"Norms expects 'sample' of shape \(\.\.\., N, D\), got \(2,\)"):
        Norms()(TensorDict(sample=SAMPLE[0]))
    with pytest.raises(
        ValueError,
        match=r"'sample' and \('extra', 'weight'\) to have the same N, got 2 and 3 \(shape \(3,\)\)",
    ):
        Norms()(TensorDict({"sample": SAMPLE, "extra": {"weight": torch.ones(3)}}))
    with pytest.raises(
        ValueError,
        match=r"event dimensions \(N, D\), got \(2, 2\) in a TensorDict of batch size \[2\]: .*covers N",
    ):
        Norms()(TensorDict(sample=SAMPLE, batch_size=[2]))
    with pytest.raises(KeyError, match="Gap reads .*'sample', 'a'"):
        Gap()(TensorDict(sample=SAMPLE))


def test_inputs_that_are_no_tensor_of_the_stage():
    td = TensorDict({"sample": {"x.0": SAMPLE, "x.1": SAMPLE}})
    with pytest.raises(
        TypeError,
        match=r"Norms reads one tensor at 'sample', which holds the sites \['x.0', 'x.1'\]\. For all of them: "
        r"tg.ForEach\(Norms\(\.\.\.\), sites\); for one: in_keys=\[\('sample', 'x.0'\)\]",
    ):
        Norms()(td)
    words = TensorDict(sample=SAMPLE).set_non_tensor("extra", "cat")
    with pytest.raises(TypeError, match=r"Norms reads a tensor at 'extra', got .*Give numbers as a tensor"):
        Norms(in_keys=["sample", "extra"])(words)
    names = TensorDict(sample=SAMPLE)
    names["extra"] = ["a", "b"]
    with pytest.raises(TypeError, match=r"Norms reads a tensor at 'extra', got .*Give numbers as a tensor"):
        Norms(in_keys=["sample", "extra"])(names)
    for stage, known in ((Norms(), "sample, extra_weight"), (tg.StreamingCovariance(), "tokens")):
        with pytest.raises(TypeError, match=rf"tensors by keyword: {known}; got \['x'\]\. Name other inputs"):
            stage(x=SAMPLE)


def test_a_square_sample_under_a_batch_size_is_not_taken_for_rows():
    """D == N: TensorDict itself would accept (D, D) outputs as rows."""
    with pytest.raises(ValueError, match=r"td\.auto_batch_size_\(0\)"):
        tg.EigenSpectrum()(TensorDict({"moments": {"covariance": torch.eye(4)}}, batch_size=[4]))
    assert Norms()(TensorDict(sample=torch.ones(7, 3, 2), batch_size=[7]))["norms", "mean"].shape == (7,)


def test_wrong_outputs_of_compute():
    class Wrong(Norms):
        def compute(self, sample, weight):
            return self.outputs

    stage = Wrong()
    for outputs, match in (
        (
            {"mean": SAMPLE},
            r"Wrong.compute returned \['mean'\], its documented names are \['largest', 'mean'\]",
        ),
        ([SAMPLE] * 3, r"Wrong.compute returned 3 outputs, its documented names are \['mean', 'largest'\]"),
        (SAMPLE, "returned 1 outputs"),
    ):
        stage.outputs = outputs
        with pytest.raises(ValueError, match=match):
            stage(TensorDict(sample=SAMPLE))


def test_compute_must_return_tensors():
    class Number(tg.Stage):
        reads, writes = {"sample": "N D"}, ["number"]

        def compute(self, sample):
            return self.outputs

    stage = Number()
    for outputs, match in (
        (0.5, r"Number.compute returned float, but a tensor .*torch.as_tensor\(value\)"),
        ([0.5], r"Number.compute returned float for 'number', a tensor is needed"),
        ({"number": SAMPLE.numpy()}, r"Number.compute returned ndarray for 'number'"),
        ("text", "Number.compute returned str"),
    ):
        stage.outputs = outputs
        with pytest.raises(TypeError, match=match):
            stage(TensorDict(sample=SAMPLE))


def test_what_a_subclass_must_define_is_said():
    td = TensorDict(tokens=torch.ones(3, 2), sample={"a": SAMPLE, "b": SAMPLE})

    class Empty(tg.Stage):
        reads = ["tokens"]

    class EmptyPair(tg.PairStage):
        reads = [("sample", "a"), ("sample", "b")]

    class Started(tg.StreamingStage):
        reads = ["tokens"]

        def __init__(self):
            super().__init__()
            self.add_state("top", torch.float64)

    class Adding(Started):
        def start(self, tokens):
            return {"top": torch.zeros((), dtype=torch.float64)}

    class Resulting(Adding):
        def accumulate(self, tokens):
            self.top = self.top + 1

    for stage, match in (
        (Empty(), r"Empty defines no compute\(\)"),
        (EmptyPair(), r"EmptyPair defines no compare\(\)"),
        (Started(), r"Started defines no start\(\)"),
        (Adding(), r"Adding defines no accumulate\(\)"),
        (Resulting(), r"Resulting defines no result\(\)"),
    ):
        with pytest.raises(TypeError, match=match):
            stage(td)
    a, b = Resulting(), Resulting()
    a.update(td), b.update(td)
    with pytest.raises(TypeError, match=r"Resulting defines no combine\(\)"):
        a.merge_(b)


def test_a_pair_stage_prepares_each_side_from_its_own_inputs():
    a, b = torch.ones(3, 2), torch.zeros(4, 2)
    inputs = {"sample_a": a, "other_a": torch.full((3,), 2.0), "sample_b": b, "other_b": torch.ones(4)}
    assert float(Gap()(**inputs, weight=torch.tensor(0.5))) == 2
    assert Gap().sides() == ([0, 1], [2, 3], [4])


def test_select_out_keys_writes_the_right_value():
    """``zip(self.out_keys, values)`` would write the first value under the second name."""
    stage = Norms().select_out_keys(("norms", "largest"))
    td = stage(TensorDict(sample=SAMPLE))
    assert float(td["norms", "largest"]) == 10 and "mean" not in td["norms"].keys()
    assert float(stage(sample=SAMPLE)) == 10


def test_stages_compose_with_each_other_and_stay_usable_alone():
    pipeline = TensorDictSequential(Norms(), Total(in_keys=("norms", "mean"), out_keys="total"))
    assert pipeline.in_keys == ["sample", ("extra", "weight")]
    td = pipeline(TensorDict(sample=SAMPLE[None].expand(3, 2, 2)))
    assert float(td["total"]) == 22.5


# ------------------------------------------------------------------------------------------ streaming state


def test_state_is_not_made_by_a_batch_without_rows():
    stage = tg.StreamingMean()
    stage.update(TensorDict(tokens=torch.zeros(0, 3)))
    assert stage.is_empty
    stage.update(TensorDict(tokens=torch.ones(2, 5)))
    assert int(stage.count) == 2


def test_state_of_unlike_stages_does_not_merge():
    class Other(tg.StreamingMean):
        pass

    with pytest.raises(
        ValueError, match="StreamingMean.* cannot merge Other.*the same stage with the same settings"
    ):
        tg.StreamingMean().merge_(Other())
    with pytest.raises(ValueError, match="cannot merge SpectrumMetrics"):
        tg.StreamingMean().merge_(tg.SpectrumMetrics())


def test_own_buffers_and_parameters_beside_the_state():
    class Weighted(tg.StreamingMean):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.full((2,), 2.0))
            self.linear = torch.nn.Linear(2, 2)

        def accumulate(self, rows):
            super().accumulate(rows * self.weight)

    stage = Weighted()
    stage.update(TensorDict(tokens=torch.ones(3, 2)))
    stage.half()
    assert stage.weight.dtype == stage.linear.weight.dtype == torch.float16
    assert stage.centre.dtype == torch.float64 and stage.centre.tolist() == [2, 2]
    other = Weighted().half()
    other.load_state_dict(stage.state_dict())
    assert other.centre.tolist() == [2, 2]
    other.merge_(stage)
    assert int(other.count) == 6
    stage.reset()
    assert stage.is_empty and stage.weight.tolist() == [2, 2]


def test_state_loads_into_a_stage_of_another_width_and_back():
    wide, narrow = tg.StreamingCovariance(), tg.StreamingCovariance()
    wide.update(TensorDict(tokens=torch.randn(9, 6)))
    narrow.update(TensorDict(tokens=torch.randn(9, 2)))
    narrow.load_state_dict(wide.state_dict())
    assert torch.equal(narrow.scatter, wide.scatter) and narrow.scatter.data_ptr() != wide.scatter.data_ptr()
    narrow.update(TensorDict(tokens=torch.randn(9, 6)))
    assert int(narrow.count) == 18 and int(wide.count) == 9
    with pytest.raises(RuntimeError, match="Missing key"):
        narrow.load_state_dict({"mean": torch.zeros(6, dtype=torch.float64)})


def test_rows_of_integers_are_finite():
    assert int(tg.StreamingMean()(tokens=torch.arange(4))[2]) == 4
