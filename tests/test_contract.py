"""The contract of DESIGN, held by every public stage: found by reflection, so that a new stage is held to it too."""

from __future__ import annotations

import inspect
import io
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from sklearn.linear_model import LogisticRegression
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential

import tdgeom as tg
from stage_examples import (
    EXAMPLES,
    NOT_STAGES,
    ids,
    is_streaming,
    kind_of,
    linear_head,
    optional_inputs,
    rows,
)
from tdgeom.core.stage_settings import plain_setting
from tdgeom.core.streaming_stage import tensor_text, text_tensor

PUBLIC = sorted(
    name
    for name in tg.__all__
    if inspect.isclass(getattr(tg, name)) and issubclass(getattr(tg, name), TensorDictModuleBase)
)
USERS = [name for name in EXAMPLES if name not in PUBLIC]
STAGES = [name for name in PUBLIC if name in EXAMPLES] + USERS


def stages(check=None):
    """The stages a check has a meaning for; the others say in the table why not."""
    return pytest.mark.parametrize(
        "name", [name for name in STAGES if check is None or check not in EXAMPLES[name].exempt]
    )


def streams():
    return pytest.mark.parametrize(
        "name", [name for name in STAGES if issubclass(kind_of(name), tg.StreamingStage)]
    )


def outputs(stage, td):
    out = stage(td)
    return [out.get(key) for key in stage.out_keys]


def assert_equal(found, expected, rtol=1e-9, atol=1e-12):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert isinstance(a, torch.Tensor) and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, check_dtype=False)


def parts(key):
    return (key,) if isinstance(key, str) else key


def test_every_public_stage_has_an_example():
    assert [name for name in PUBLIC if name not in EXAMPLES and name not in NOT_STAGES] == []


def test_stages_of_users_are_held_to_it_too():
    bases = [
        next(base for base in kind_of(name).__mro__ if base.__module__.startswith("tdgeom")) for name in USERS
    ]
    assert bases == [tg.Stage, tg.StreamingStage, tg.PairStage]


def test_every_exemption_says_why():
    known = {"batched", "compile", "scale", "offset", "dispatch", "shapes", "requires_grad"}
    for name, example in EXAMPLES.items():
        assert set(example.exempt) <= known and all(len(why) > 10 for why in example.exempt.values()), name


# ------------------------------------------------------------------------------------------ keys


@stages()
def test_the_keys_list_every_leaf(name):
    example = EXAMPLES[name]
    stage = example.make()
    td = example.td(stage)
    before = set(td.keys(True, True))
    out = stage(td.copy())
    assert isinstance(stage.in_keys, list) and isinstance(stage.out_keys, list)
    assert set(out.keys(True, True)) - before == set(stage.out_keys) - before
    assert set(stage.out_keys) <= set(out.keys(True, True))
    assert len(set(stage.out_keys)) == len(stage.out_keys)
    for key in stage.out_keys:
        assert isinstance(out.get(key), torch.Tensor), key
    # what it did not declare it does not read
    extra = td.copy().set("unrelated", torch.full((3,), torch.nan))
    assert_equal(outputs(example.make(), extra), [out.get(key) for key in stage.out_keys], rtol=0, atol=0)


class Watched(TensorDict):
    """Notes which entries are asked for."""

    asked: set

    def get(self, key, *args, **kwargs):
        self.asked.add(key if isinstance(key, str) else key[0] if len(key) == 1 else tuple(key))
        return super().get(key, *args, **kwargs)

    def __getitem__(self, index):
        if isinstance(index, str | tuple):
            self.asked.add(index)
        return super().__getitem__(index)

    def items(self, *args, **kwargs):
        self.asked.add("every entry")
        return super().items(*args, **kwargs)

    values = items


def whole(name, stage=None):
    """The inputs of an example, the optional ones too, under the stage's keys."""
    example = EXAMPLES[name]
    stage = example.make() if stage is None else stage
    td, further = example.td(stage), optional_inputs()
    for role, key in zip(stage.in_roles, stage.in_keys):
        if key in stage.optional_in_keys and key not in td.keys(True):
            td.set(key, further[role])
    return td


# what batches commonly hold, each of a shape that would be refused or change a number if it were read
DECOYS = (
    "attention_mask", "position_ids", "sequence_id", "document_id", "special_tokens_mask", "input_ids", "row_id", "label",
    "labels", "sample_row_id", "token_type_ids", "sample_eigenvalues", "tokens", "sample", "eigenvalues",
)  # fmt: skip


@stages()
def test_no_key_is_read_that_is_not_declared(name):
    stage = EXAMPLES[name].make()
    td = whole(name, stage)
    expected = outputs(EXAMPLES[name].make(), td.copy())
    watched = Watched({})
    watched.asked = set()
    for key in td.keys(True, True):
        watched.set(key, td.get(key))
    decoys = [
        key for key in DECOYS if not any(key in (own, own[0]) for own in (*stage.in_keys, *stage.out_keys))
    ]
    for key in decoys:
        watched.set(key, torch.full((17, 2), torch.nan))
    watched.asked.clear()
    out = stage(watched)
    assert watched.asked <= {*stage.in_keys, *stage.out_keys}
    assert_equal([out.get(key) for key in stage.out_keys], expected, rtol=0, atol=0)
    if is_streaming(stage):
        stage.reset()
        watched.asked.clear()
        stage.update(watched)
        assert watched.asked == set(stage.in_keys)
        assert_equal(published(stage), expected, rtol=0, atol=0)


@stages()
def test_optional_inputs_may_be_absent_and_required_ones_may_not(name):
    make = EXAMPLES[name].make
    stage = make()
    td = whole(name, stage)
    assert set(stage.optional_in_keys) <= set(stage.in_keys) <= set(td.keys(True))
    for absent in ([], *([key] for key in stage.optional_in_keys), stage.optional_in_keys):
        assert all(isinstance(value, torch.Tensor) for value in outputs(make(), td.exclude(*absent)))
    for key in stage.in_keys:
        if key not in stage.optional_in_keys:
            with pytest.raises(
                KeyError, match=r"reads .* but the TensorDict has .*Put the stage that writes it before"
            ):
                make()(td.exclude(key))


@stages()
def test_lists_of_nested_keys_name_every_leaf_in_order(name):
    example = EXAMPLES[name]
    plain = example.make()
    inputs = [("deep", "down", f"in{i}") for i in range(len(plain.in_keys))]
    outs = [("far", "away", f"out{i}") for i in range(len(plain.out_keys))]
    stage = example.make(in_keys=inputs, out_keys=outs)
    assert stage.in_keys == inputs and stage.out_keys == outs
    assert_equal(outputs(stage, example.td(stage)), outputs(plain, example.td(plain)), rtol=0, atol=0)


@stages()
@pytest.mark.parametrize("root", ["root", ("root", "branch")])
def test_a_single_out_key_is_the_root(name, root):
    example = EXAMPLES[name]
    plain, stage = example.make(), example.make(out_keys=root)
    if len(plain.out_keys) == 1 and isinstance(plain.out_keys[0], str):
        assert stage.out_keys == [root]
    else:
        assert all(parts(key)[: len(parts(root))] == parts(root) for key in stage.out_keys)
        names = [parts(key)[-1] for key in plain.out_keys]
        assert [parts(key)[-1] for key in stage.out_keys] == names
    assert len(set(stage.out_keys)) == len(plain.out_keys)
    assert_equal(outputs(stage, example.td(stage)), outputs(plain, example.td(plain)), rtol=0, atol=0)


@stages()
def test_a_single_in_key_is_a_list_of_one(name):
    example = EXAMPLES[name]
    plain = example.make()
    if len(plain.in_keys) - len(plain.optional_in_keys) == 1:
        for key in ("rows", ("deep", "rows")):
            assert example.make(in_keys=key).in_keys == [key]
    else:
        with pytest.raises(ValueError, match="reads .* leaves, in this order"):
            example.make(in_keys="rows")


@stages()
def test_wrong_and_repeated_keys_are_refused(name):
    example = EXAMPLES[name]
    plain = example.make()
    if len(plain.in_keys) > 1:
        with pytest.raises(ValueError, match="in_keys names a key twice"):
            example.make(in_keys=["same"] * len(plain.in_keys))
    if len(plain.out_keys) > 1:
        with pytest.raises(ValueError, match="names a key twice"):
            example.make(out_keys=["same"] * len(plain.out_keys))
    with pytest.raises(ValueError, match="leaves, .*in this order"):
        example.make(out_keys=[f"o{i}" for i in range(len(plain.out_keys) + 1)])
    with pytest.raises(TypeError, match="takes a list of keys"):
        example.make(out_keys=3)


@stages()
def test_a_missing_input_is_named_with_the_remedy(name):
    example = EXAMPLES[name]
    stage = example.make()
    td = example.td(stage)
    first = stage.in_keys[0]
    td = td.exclude(first)
    with pytest.raises(KeyError, match=r"reads .* but the TensorDict has .*in_keys="):
        stage(td)


@stages()
def test_select_out_keys(name):
    example = EXAMPLES[name]
    plain = example.make()
    expected = dict(zip(plain.out_keys, outputs(plain, example.td(plain))))
    chosen = plain.out_keys[-1]
    stage = example.make().select_out_keys(chosen)
    td = stage(example.td(stage))
    assert stage.out_keys == [chosen]
    assert_equal([td.get(chosen)], [expected[chosen]], rtol=0, atol=0)
    dropped = [key for key in plain.out_keys if key != chosen and key not in plain.in_keys]
    assert not set(td.keys(True, True)) & set(dropped)


@stages()
def test_select_subsequence_keeps_the_stage_where_it_is_needed(name):
    example = EXAMPLES[name]
    stage = example.make()
    other = TensorDictModule(lambda x: x, in_keys=["unrelated"], out_keys=["other"])
    sequence = TensorDictSequential(other, stage)
    part = sequence.select_subsequence(out_keys=[stage.out_keys[0]])
    assert list(part.module) == [stage] and part.in_keys == stage.in_keys
    assert_equal(
        [part(example.td(stage)).get(stage.out_keys[0])],
        [example.make()(example.td()).get(stage.out_keys[0])],
        rtol=0, atol=0,
    )  # fmt: skip
    assert list(sequence.select_subsequence(out_keys=["other"]).module) == [other]


@stages("dispatch")
def test_dispatch_with_tensors(name):
    example = EXAMPLES[name]
    stage = example.make()
    expected = outputs(example.make(), example.td())
    named = {"_".join(parts(key)): value for key, value in zip(stage.in_keys, example.inputs())}
    for call in (lambda s: s(**named), lambda s: s(*example.inputs())):
        found = call(example.make())
        found = [found] if isinstance(found, torch.Tensor) else list(found)
        assert_equal(found, expected, rtol=0, atol=0)


@stages("shapes")
def test_a_batch_size_that_covers_rows_is_refused_with_the_remedy(name):
    example = EXAMPLES[name]
    stage = example.make()
    values = example.inputs()
    td = TensorDict({key: value for key, value in zip(stage.in_keys, values)}, batch_size=[len(values[0])])
    with pytest.raises(
        ValueError, match=r"batch size \[\d+\].*batch_size=\[\] \(td\.auto_batch_size_\(0\)\)"
    ):
        stage(td)


@streams()
@pytest.mark.parametrize("batch", [(60,), (3, 20)])
def test_rows_have_no_batch_size(name, batch):
    stage = EXAMPLES[name].make()
    td = whole(name, stage).apply(lambda x: x.reshape(*batch, *x.shape[1:]), batch_size=list(batch))
    with pytest.raises(ValueError, match=r"batch size \[.*\(td\.auto_batch_size_\(0\)\)"):
        stage.update(td)
    assert stage.is_empty


# ------------------------------------------------------------------------------------------ copies and state


@stages()
@pytest.mark.parametrize(
    "copy", [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(name, copy):
    example = EXAMPLES[name]
    stage = example.make()
    twin = copy(stage)
    assert twin.in_keys == stage.in_keys and twin.out_keys == stage.out_keys
    expected = outputs(stage, example.td(stage))
    assert_equal(outputs(twin, example.td(twin)), expected, rtol=0, atol=0)
    if is_streaming(stage):
        twin = copy(stage)
        assert_equal(published(twin), published(stage), rtol=0, atol=0)
        twin.reset()
        assert twin.is_empty and not stage.is_empty


def published(stage):
    out = stage.publish(TensorDict({}))
    return [out.get(key) for key in stage.out_keys]


@stages()
def test_state_dict_round_trip(name):
    example = EXAMPLES[name]
    stage, fresh = example.make(), example.make()
    empty = {key: value.clone() for key, value in stage.state_dict().items()}
    fresh.load_state_dict(empty)
    stage(example.td(stage))
    fresh.load_state_dict(stage.state_dict())
    assert fresh.state_dict().keys() == stage.state_dict().keys()
    for key, value in stage.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value) and fresh.state_dict()[key].dtype == value.dtype
    if is_streaming(stage):
        assert stage.state_dict(), "state must be persistent"
        assert_equal(published(fresh), published(stage), rtol=0, atol=0)
        fresh.load_state_dict(empty)
        assert fresh.is_empty
        assert_equal(outputs(fresh, example.td(fresh)), published(stage), rtol=0, atol=0)


def kept(state):
    """A state that was written to files in both formats and read back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    yield torch.load(file, weights_only=True)
    yield load_safetensors(save_safetensors({key: value.contiguous() for key, value in state.items()}))


@streams()
def test_state_knows_what_it_is(name):
    make = EXAMPLES[name].make
    stage = make()
    stage(whole(name, stage))
    state = stage.state_dict()
    about = json.loads(tensor_text(state["_extra_state"]))
    assert about["version"] == 1 and about["stage"] == type(stage).__name__
    for back in kept(state):
        twin = make()
        twin.load_state_dict(back)
        assert_equal(published(twin), published(stage), rtol=0, atol=0)

    def refused(match, changed=None, **others):
        twin = make()
        text = text_tensor(json.dumps({**about, **others}))
        with pytest.raises(RuntimeError, match=match):
            twin.load_state_dict({**(changed or state), "_extra_state": text})
        assert twin.is_empty

    refused(r"a state of .* \(version 2\) does not go into", version=2)
    refused("a state of Another .* does not go into", stage="Another")
    for setting in about["settings"]:
        refused(
            rf"the state of another {about['stage']}: {setting}\b.* is changed there and .* here\. Make the stage as it was",
            settings={**about["settings"], setting: "changed"},
        )
    declared = {key for key, value in make().state().items() if value.dtype == torch.float64}
    if declared:
        narrow = {key: value.half() if key in declared else value for key, value in state.items()}
        refused(r"is torch.float16, .* declares it as torch.float64 \(add_state\)", narrow)


@streams()
def test_declared_dtypes_of_state_hold(name):
    stage = EXAMPLES[name].make()
    declared = {key: value.dtype for key, value in stage.state().items()}
    td = whole(name, stage).apply(lambda x: x.float() if x.is_floating_point() else x, batch_size=[])
    first, second = (td.apply(lambda x, s=s: x[s], batch_size=[]) for s in (slice(0, 25), slice(25, None)))
    stage.update(first)
    started = {key: value.dtype for key, value in stage.state().items()}
    stage.update(second)
    other = EXAMPLES[name].make()
    other.update(first)
    other.merge_(stage)
    for key, dtype in started.items():
        assert stage.state()[key].dtype == other.state()[key].dtype == dtype, key
        assert declared[key] in (dtype, torch.float32), key  # declared, or that of the rows


# what plain data cannot hold
LIVE = {
    "SklearnProbe": {"estimator": LogisticRegression()},
    "TorchProbe": {"module": linear_head},
}


@stages()
def test_settings_are_plain_data_that_make_the_stage_again(name):
    stage = EXAMPLES[name].make()
    text = json.dumps(stage.settings())
    if name in LIVE:
        with pytest.raises(
            TypeError, match=r"which plain data cannot hold\. Give it again: from_settings\(settings, \w+="
        ):
            type(stage).from_settings(json.loads(text))
    twin = type(stage).from_settings(json.loads(text), **LIVE.get(name, {}))
    assert json.dumps(twin.settings()) == text and repr(twin) == repr(stage)
    assert_equal(outputs(twin, whole(name, twin)), outputs(stage, whole(name, stage)), rtol=0, atol=0)
    moved = type(stage).from_settings(json.loads(text), **LIVE.get(name, {}), out_keys=("else", "where"))
    assert [parts(key)[-1] for key in moved.out_keys] != [] and moved.out_keys != stage.out_keys


@stages()
def test_a_repr_shows_what_differs_from_the_defaults(name):
    kind, stage = kind_of(name), EXAMPLES[name].make(out_keys="here")
    usual = inspect.signature(kind).parameters
    given = {n for n, value in stage.settings().items() if value != plain_setting(usual[n].default)}
    shown = re.findall(r"(?:^\w+\(|, )(\w+)=", repr(stage))
    assert set(shown) == given and "out_keys" in given


@stages()
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_casts_leave_state_alone(name, cast):
    example = EXAMPLES[name]
    stage = example.make()
    expected = outputs(stage, example.td(stage))
    state = {key: value.clone() for key, value in stage.state_dict().items()}
    stage.to(torch.bfloat16) if cast == "to" else getattr(stage, cast)()
    for key, value in stage.state_dict().items():
        assert value.dtype == state[key].dtype and torch.equal(value, state[key]), key
    if is_streaming(stage):
        assert_equal(published(stage), expected, rtol=0, atol=0)
    else:
        fresh = example.make()
        fresh.to(torch.bfloat16) if cast == "to" else getattr(fresh, cast)()
        assert_equal(outputs(fresh, example.td(fresh)), expected, rtol=0, atol=0)


@streams()
def test_split_order_merge_and_reset(name):
    example = EXAMPLES[name]
    whole = example.make()
    expected = outputs(whole, example.td(whole))
    order = torch.randperm(60)
    shards = [example.make() for _ in range(3)]
    for i, part in enumerate(order.tensor_split([7, 8, 30, 31, 55])):
        stage = shards[i % 3]
        stage.update(example.td(stage).apply(lambda x, part=part: x[part], batch_size=[]))
    merged = example.make()
    for i in (2, 0, 1):
        before = {key: value.clone() for key, value in shards[i].state_dict().items()}
        merged.merge_(shards[i])
        assert all(torch.equal(value, before[key]) for key, value in shards[i].state_dict().items())
    assert_equal(published(merged), expected, rtol=1e-8, atol=1e-9)
    merged.reset()
    assert merged.is_empty
    with pytest.raises(ValueError, match=f"{type(merged).__name__} has seen no rows"):
        merged.publish(TensorDict({}))
    assert_equal(outputs(merged, example.td(merged)), expected, rtol=0, atol=0)
    merged.sync_()
    assert_equal(published(merged), expected, rtol=0, atol=0)


@streams()
def test_what_is_published_is_no_view_of_the_state(name):
    example = EXAMPLES[name]
    stage = example.make()
    first = outputs(stage, example.td(stage))
    kept = [value.clone() for value in first]
    for value in first:
        value.zero_()
    assert_equal(published(stage), kept, rtol=0, atol=0)


@streams()
def test_rows_that_are_not_finite_are_refused_in_a_direct_call(name):
    example = EXAMPLES[name]
    stage = example.make()
    td = example.td(stage)
    td.get(stage.in_keys[0])[3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"holds NaN or Inf.*nonfinite='drop'"):
        stage(td)
    assert stage.is_empty


# ------------------------------------------------------------------------------------------ loaders that refill their tensors


def refilled(td, size, kind):
    """Batches that lie in the same memory, which is filled anew, and with anything after the last."""
    room = {key: torch.empty_like(value[:size]) for key, value in td.items(True, True)}
    for start in range(0, 60, size):
        count = min(size, 60 - start)
        for key, value in room.items():
            value[:count].copy_(td.get(key)[start : start + count])
        batch = TensorDict({key: value[:count] for key, value in room.items()})
        yield batch.to_dict() if kind is dict else batch
    for value in room.values():
        value.fill_(77)


@streams()
@pytest.mark.parametrize("size", [7, 40], ids=["batches smaller than a block", "larger"])
def test_nothing_of_a_batch_is_kept_by_reference(name, size):
    make = EXAMPLES[name].make
    td = whole(name)
    batches = [td.apply(lambda x, s=s: x[s : s + size].clone(), batch_size=[]) for s in range(0, 60, size)]
    expected = tg.run(make(), batches, block_rows=16, progress=False)
    for kind in (dict, TensorDict):
        found = tg.run(make(), refilled(td, size, kind), block_rows=16, progress=False)
        keys = make().out_keys
        assert_equal([found[key] for key in keys], [expected[key] for key in keys], rtol=0, atol=0)
    # and called batch by batch, without a run
    stage, plain = make(), make()
    for batch, fresh in zip(refilled(td, size, TensorDict), batches):
        stage.update(batch), plain.update(fresh)
    assert_equal(published(stage), published(plain), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------ where it runs


@stages()
def test_inference_mode_and_then_outside(name):
    example = EXAMPLES[name]
    expected = outputs(example.make(), example.td())
    stage = example.make()
    with torch.inference_mode():
        td = example.td(stage)
        found = outputs(stage, td)
    assert_equal(found, expected, rtol=0, atol=0)
    if is_streaming(stage):
        assert not any(buffer.is_inference() for buffer in stage.buffers())
        half = example.make()
        cut = lambda x, s: x[s]
        with torch.inference_mode():
            half.update(example.td(half).apply(lambda x: cut(x, slice(0, 20)), batch_size=[]))
        half.update(example.td(half).apply(lambda x: cut(x, slice(20, None)), batch_size=[]))
        assert_equal(published(half), expected, rtol=1e-8, atol=1e-9)


@contextmanager
def changed(get, put, value) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


AROUND = {
    "default float64": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default bfloat16": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "matmul precision": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "one thread": lambda: changed(torch.get_num_threads, torch.set_num_threads, 1),
    "two threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, 2),
}
MIXED = {"FisherBasis", "LEACE"}  # read moments, which are float64 whatever the rows were


@stages()
def test_what_is_set_around_a_stage_changes_no_number(name):
    """The stage is made there, called, its state saved and loaded; float32 is what autocast and precision act on."""
    example = EXAMPLES[name]
    td = whole(name)
    if name not in MIXED:
        td = td.apply(lambda x: x.float() if x.is_floating_point() else x, batch_size=[])
    expected = outputs(example.make(), td.copy())
    for around, context in AROUND.items():
        with context():
            stage = example.make()
            found = outputs(stage, td.copy())
            if is_streaming(stage):
                twin = example.make()
                twin.load_state_dict(stage.state_dict())
                again = published(twin)
                twin.merge_(stage)
        assert [value.dtype for value in found] == [value.dtype for value in expected], around
        assert not any(value.is_meta or value.requires_grad for value in found), around
        rtol = 1e-5 if around == "two threads" else 1e-12  # float32 sums in another order
        assert_equal(found, expected, rtol=rtol, atol=1e-8 if around == "two threads" else 0)
        if is_streaming(stage):
            assert_equal(again, found, rtol=0, atol=0)
            assert not any(value.is_meta or value.is_inference() for value in twin.state().values()), around


@stages("requires_grad")
def test_inputs_that_require_grad(name):
    example = EXAMPLES[name]
    expected = outputs(example.make(), example.td())
    stage = example.make()
    td = example.td(stage)
    td = td.apply(lambda x: x.requires_grad_() if x.is_floating_point() else x, batch_size=[])
    found = outputs(stage, td)
    assert_equal([value.detach() for value in found], expected)
    if is_streaming(stage):
        assert not any(buffer.requires_grad for buffer in stage.buffers())
        assert not any(value.requires_grad for value in found)


# ------------------------------------------------------------------------------------------ mathematics


@stages("scale")
@pytest.mark.parametrize("factor", [3.7, 1e-12, 1e12])
def test_scale_changes_nothing(name, factor):
    example = EXAMPLES[name]
    assert example.free_of_scale, f"{name}: say which inputs it is free of the scale of, or why of none"
    expected = outputs(example.make(), example.td())
    stage = example.make()
    td = example.td(stage)
    for i in example.free_of_scale:
        td.set(stage.in_keys[i], td.get(stage.in_keys[i]) * factor)
    assert_equal(outputs(stage, td), expected, rtol=1e-7, atol=1e-9)


@stages("offset")
def test_an_offset_changes_nothing(name):
    example = EXAMPLES[name]
    assert example.free_of_offset, f"{name}: say which inputs it is free of the offset of, or why of none"
    expected = outputs(example.make(), example.td())
    stage = example.make()
    td = example.td(stage)
    for i in example.free_of_offset:
        td.set(stage.in_keys[i], td.get(stage.in_keys[i]) + torch.linspace(-3, 100, 5, dtype=torch.float64))
    assert_equal(outputs(stage, td), expected, rtol=1e-7, atol=1e-9)


@stages("batched")
def test_leading_dimensions_are_one_by_one(name):
    example = EXAMPLES[name]
    assert example.batched, f"{name}: say which inputs take leading dimensions, or why none"
    stage = example.make()
    values = example.inputs()
    versions = []
    for step in range(3):
        version = list(values)
        for i in example.batched:  # another data set in each: rows or eigenvalues scaled one by one
            version[i] = version[i].roll(step, 0) * (
                1 + step * torch.linspace(0, 1, version[i].shape[-1]).double()
            )
        if name in ("EigenSpectrum", "RankMe"):
            version = [(v + v.mT) / 2 if v.ndim == 2 else v for v in version]
        if name == "SpectrumMetrics":
            version = [v.sort(descending=True).values for v in version]
        versions.append(version)
    td = TensorDict({}, batch_size=[])
    for i, key in enumerate(stage.in_keys[: len(values)]):
        stacked = torch.stack([version[i] for version in versions])
        td.set(key, stacked if i in example.batched else values[i])
    if set(example.batched) == set(range(len(values))):
        td.batch_size = [3]
    together = outputs(stage, td)
    for step, version in enumerate(versions):
        one = TensorDict(dict(zip(stage.in_keys, version)))
        alone = outputs(example.make(), one)
        assert_equal([value[step] for value in together], alone, rtol=1e-8, atol=1e-10)


# quick to compile, and the spine: the others' graphs are proved in the slow run
QUICK = {
    "StreamingCovariance", "StreamingMean", "RowSample", "RouterLoad", "EigenSpectrum", "SpectrumMetrics", "RankMe",
    "SampleMetrics", "SampleSpectrum", "SubspaceNovelty", "LinearCKA", "LayerCosine",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in STAGES
        if "compile" not in EXAMPLES[name].exempt
    ],
)
def test_one_graph_by_value_and_by_state(name):
    """The graph of a stage (of ``update`` for a stream) is one graph and gives the same values and the same state."""
    torch._dynamo.reset()
    example = EXAMPLES[name]
    stage, plain = example.make(), example.make()
    if not is_streaming(stage):
        compiled = torch.compile(lambda td: stage(td), fullgraph=True, backend="eager")
        assert_equal(
            outputs_of(compiled, stage, example.td(stage)), outputs(plain, example.td(plain)), rtol=1e-10
        )
        return
    first, second = slice(0, 30), slice(30, None)
    half = lambda s: example.td(stage).apply(lambda x: x[s], batch_size=[])
    stage.update(half(first)), plain.update(half(first))
    compiled = torch.compile(stage.update, fullgraph=True, backend="eager")
    compiled(half(second)), plain.update(half(second))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(stage.state_dict()[key], value, rtol=1e-10, atol=1e-12, msg=key)
    assert_equal(published(stage), published(plain), rtol=1e-10)


def outputs_of(function, stage, td):
    out = function(td)
    return [out.get(key) for key in stage.out_keys]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "inputs"),
    [
        (tg.StreamingCovariance, [rows()]),
        (lambda: tg.RowSample(size=9), [rows(), ids()]),
        (tg.StreamingMean, [rows()[:, 0]]),  # its state has no dimension
        (lambda: tg.RouterLoad(top_k=2), [rows()]),
    ],
    ids=["StreamingCovariance", "RowSample", "StreamingMean", "RouterLoad"],
)
def test_inductor_by_value_and_by_state(stage, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        torch._dynamo.reset()
        under, plain = stage(), stage()
        compiled = torch.compile(under.update, fullgraph=True)
        for part in (slice(0, 20), slice(20, 40), slice(40, 60)):
            td = TensorDict({key: value[part] for key, value in zip(plain.in_keys, inputs)})
            compiled(td), plain.update(td)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(under.state_dict()[key], value, rtol=1e-10, atol=1e-12, msg=key)
        assert_equal(published(under), published(plain), rtol=1e-10)
