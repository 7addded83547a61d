"""Each edit does what its formula says; plain torch hooks are the reference."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import models
import tdgeom as tg
from editing import ALL, batch_for, hook_count, logits, other_for, plain_hook
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "bert", "vit", "falcon", "bloom"])
def test_edits_before_and_after_the_softmax(name):
    model = ALL[name]()
    batch = batch_for(name)
    with torch.no_grad():
        acts = Capture(model, ["attn_pattern", "v"], layers=1)(TensorDict(batch))["acts"]
        values = Capture(model, "v.1", heads=range(4))(TensorDict(batch))["acts", "v.1"]
        pattern = acts["attn_pattern.1"].clone()
        cut = pattern.clone()
        cut[:, 2, -1, 1] = 0
        renormalised = cut / cut.sum(-1, keepdim=True)
        for site, settings, expected in (
            ("attn_pattern.1", {}, cut),
            ("attn_pattern.1", {"renormalise": True}, renormalised),
            ("attn_scores.1", {}, renormalised),
        ):
            edit = tg.BlockAttention(queries=[pattern.shape[-1] - 1], keys=1, heads=2, **settings)
            with Intervene(model, {site: edit}), Capture(model, ["attn_pattern.1", "z.1"]) as calls:
                model(**batch)
            read = calls[0]["acts"]
            torch.testing.assert_close(read["attn_pattern.1"], expected, rtol=1e-4, atol=1e-5)
            z = torch.einsum("bhqk,bkhd->bqhd", expected, values)
            torch.testing.assert_close(read["z.1"], z, rtol=1e-3, atol=1e-4)
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("cached", [False, True])
def test_edits_of_scores_and_patterns_say_the_same(name, cached):
    """Factor, rows that sum to 1, a query's own position: one pattern by hand for both sites, padded, and step by step."""
    model, batch = models.TEXT_MODELS[name](), models.text_batch(2, 6)
    batch["attention_mask"][0, :2] = 0
    own = torch.eye(6, dtype=torch.bool)

    def read(edits):
        with torch.no_grad(), Intervene(model, edits), Capture(model, "attn_pattern.1") as calls:
            if not cached:
                return model(**batch) and calls[0]["acts", "attn_pattern.1"][:, :, -1]
            half = {key: value[:, :5] for key, value in batch.items()}
            past = model(**half, use_cache=True).past_key_values
            place = batch["attention_mask"].cumsum(1)[:, -1:] - 1
            step = {"input_ids": batch["input_ids"][:, 5:], "position_ids": place, "past_key_values": past}
            model(**step, attention_mask=batch["attention_mask"])
            return calls[1]["acts", "attn_pattern.1"][:, :, -1]

    plain = read({})
    columns = batch["attention_mask"].bool() & (batch["attention_mask"].cumsum(1) - 1 >= 1)
    for factor in (0.0, 0.25, 3.0):
        for keep in (False, True):
            where = columns & ~own[5] if keep else columns
            scaled = torch.where(where[:, None], plain * factor, plain)
            right = scaled / scaled.sum(-1, keepdim=True)
            cut = lambda keep=keep, factor=factor, **how: tg.BlockAttention(
                queries="last", keys=slice(1, None), factor=factor, keep_self=keep, **how
            )
            close = lambda found, expected: torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            close(read({"attn_pattern.1": cut()}), scaled)
            close(read({"attn_pattern.1": cut(renormalise=False)}), scaled)
            close(read({"attn_pattern.1": cut(renormalise=True)}), right)
            close(read({"attn_scores.1": cut()}), right)
            close(read({"attn_scores.1": cut(renormalise=True)}), right)


def test_what_scores_and_patterns_refuse_alike(llama):
    def run(site, **how):
        with torch.no_grad(), Intervene(llama, {site: tg.BlockAttention(**how)}):
            llama(**models.text_batch())

    with pytest.raises(ValueError, match="softmax behind makes every row sum to 1"):
        run("attn_scores.1", keys=0, renormalise=False)
    for site, how in (("attn_scores.1", {}), ("attn_pattern.1", {"renormalise": True})):
        with pytest.raises(ValueError, match="a factor of 0 or more"):
            run(site, keys=0, factor=-1.0, **how)
        with pytest.raises(ValueError, match="no key to attend to"):
            run(site, queries=0, keys=0, **how)
        run(site, queries=0, keys=0, keep_self=True, **how)
    run("attn_pattern.1", keys=0, factor=-1.0)
    pattern = torch.full((1, 1, 1, 2), 0.5)
    with pytest.raises(ValueError, match="of 2 keys for 1 queries, which are the queries' own"):
        tg.BlockAttention(keep_self=True)(activation=pattern)


def test_a_row_without_keys_is_an_error(llama):
    edit = tg.BlockAttention(queries=0, keys=0)
    with pytest.raises(ValueError, match="no key to attend to"), Intervene(llama, {"attn_scores.0": edit}):
        llama(**models.text_batch())
    assert hook_count(llama) == 0
    with (
        pytest.raises(ValueError, match="expects 'attn_scores' or 'attn_pattern'"),
        Intervene(llama, {"q.0": edit}),
    ):
        Intervene(llama, {"residual_input.0": edit}).__enter__()
        llama(**models.text_batch())


def test_a_user_s_function_on_a_pattern_sees_batch_head_query_key(llama):
    seen = []
    with Intervene(llama, {"attn_pattern": lambda x: seen.append(x.shape) or x}):
        llama(**models.text_batch(2, 5))
    assert seen == [(2, 4, 5, 5)] * models.DEPTH


def test_steering_is_the_plain_hook(llama):
    vector, batch = torch.randn(models.WIDTH), models.text_batch()
    layer = llama.model.layers[1]
    with plain_hook(layer, lambda x: x + 2.0 * vector):
        expected = logits(llama, batch)
    edit = tg.Steer(vector, coefficient=2.0)
    with Intervene(llama, {"residual_output.1": edit}):
        torch.testing.assert_close(logits(llama, batch), expected, rtol=0, atol=0)
    td = Intervene(llama, {"residual_output.1": edit})(TensorDict(batch))
    torch.testing.assert_close(td["logits"], expected, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 4, 3)
    vectors = torch.randn(2, 3)
    out = tg.Steer(vectors, per_position=True, positions=[1, -1])(activation=x)
    assert torch.equal(out[:, 1], x[:, 1] + vectors[0])
    assert torch.equal(out[:, 3], x[:, 3] + vectors[1])
    assert torch.equal(out[:, [0, 2]], x[:, [0, 2]])
    with pytest.raises(ValueError, match="2 vectors for 3"):
        tg.Steer(vectors, per_position=True, positions=slice(1, None))(activation=x)
    with pytest.raises(ValueError, match=r"vector of the 3 features at None, got \(7,\)"):
        tg.Steer(torch.ones(7))(activation=x)


def test_the_strength_of_steering():
    """A share of each row's length, a target projection, a clamp: against the projections themselves, in float64."""
    x, vector = torch.randn(2, 5, 7).double(), torch.randn(7).double()
    unit = vector / vector.norm()
    along = lambda value: value @ unit
    rest = lambda value: value - along(value).unsqueeze(-1) * unit
    shared = tg.Steer(vector, share=0.25)(activation=x)
    torch.testing.assert_close((shared - x), 0.25 * x.norm(dim=-1, keepdim=True) * unit)
    aimed = tg.Steer(3 * vector, target=1.5, positions="last")(activation=x)
    torch.testing.assert_close(along(aimed[:, -1]), torch.full((2,), 1.5, dtype=torch.float64))
    torch.testing.assert_close(rest(aimed), rest(x))
    assert torch.equal(aimed[:, :-1], x[:, :-1])
    torch.testing.assert_close(
        tg.Steer(vector, target=0.0)(activation=x), tg.ProjectOut(vector)(activation=x)
    )
    for low, high in ((-0.3, 0.4), (None, 0.1), (0.0, None)):
        clamped = tg.Steer(vector, clamp=(low, high))(activation=x)
        torch.testing.assert_close(along(clamped), along(x).clamp(low, high))
        torch.testing.assert_close(rest(clamped), rest(x))
    z, heads = torch.randn(2, 5, 3, 4), torch.randn(3, 4)  # every head along its own
    each = tg.Steer(heads, target=2.0, heads=[0, 2])(activation=z)
    found = (each * heads / heads.norm(dim=-1, keepdim=True)).sum(-1)
    torch.testing.assert_close(found[..., [0, 2]], torch.full((2, 5, 2), 2.0))
    assert torch.equal(each[:, :, 1], z[:, :, 1])
    for wrong, said in (
        ({"share": 0.1, "target": 1.0}, "one strength"),
        ({"coefficient": 2.0, "target": 1.0}, "one strength"),
        ({"clamp": (None, None)}, r"\(low, high\)"),
        ({"target": 1.0, "features": [0]}, "features= would cut"),
    ):
        with pytest.raises(ValueError, match=said):
            tg.Steer(vector, **wrong)
    with pytest.raises(ValueError, match="needs a vector with a direction"):
        tg.Steer(torch.zeros(3), share=1.0)
    again = tg.Steer.from_settings(tg.Steer(vector, clamp=(0.0, None)).settings())
    assert repr(again) == "Steer(vector=tensor of shape (7,), clamp=(0.0, None))"


WHOLE, SPLIT = torch.randn(2, 3, 4), torch.randn(2, 3, 4, 5)
MISFITS = [
    (WHOLE, lambda v: tg.Steer(v), [(), (1,), (3,), (3, 4), (2, 4), (7,), (3, 1, 4), (2, 3, 1)]),
    (SPLIT, lambda v: tg.Steer(v), [(), (4,), (3, 5), (2, 3, 4), (4, 1)]),
    (WHOLE, lambda v: tg.Steer(v, per_position=True, positions=[0, 1]), [(2,), (2, 3), (2, 1)]),
    (WHOLE, lambda v: tg.Scale(v), [(3,), (3, 4), (3, 1, 4)]),
    (WHOLE, lambda v: tg.ProjectOut(v), [(3,), (5, 2)]),
    (WHOLE, lambda v: tg.ProjectOnto(torch.ones(4), mean=v), [(1,), (3, 4)]),
    (WHOLE, lambda v: tg.Patch(v), [(4,), (2, 4), (3, 4), (2, 3, 1)]),
    (WHOLE, lambda v: tg.Ablate("mean", reference=v), [(4,), (2, 3, 1)]),
]


@pytest.mark.parametrize("case", range(len(MISFITS)))
def test_nothing_is_broadcast_to_a_site_unasked(case):
    value, make, shapes = MISFITS[case]
    for shape in shapes:
        with pytest.raises(ValueError, match=r"expected|shape|replaces"):
            make(torch.randn(shape))(activation=value)


def test_what_fits_a_site():
    steer = lambda shape, value: tg.Steer(torch.ones(shape))(activation=value)
    for shape in ((4,), (1, 3, 4), (2, 1, 4)):
        assert torch.equal(steer(shape, WHOLE), WHOLE + 1)
    for shape in ((5,), (4, 5), (1, 1, 4, 5)):
        assert torch.equal(steer(shape, SPLIT), SPLIT + 1)
    for shape in ((), (5,), (4, 5), (4, 1), (2, 3, 4, 1)):
        assert torch.equal(tg.Scale(torch.full(shape, 2.0))(activation=SPLIT), 2 * SPLIT)


def test_a_steering_vector_can_be_trained(llama):
    batch, vector = models.text_batch(), nn.Parameter(torch.zeros(models.WIDTH))
    steer = Intervene(llama, {"residual_output.0": tg.Steer(vector)}, keep_graph=True)
    assert list(steer.parameters()) == [vector]
    steer(TensorDict(batch))["logits"][:, -1, 5].sum().backward()
    assert vector.grad.norm() > 0


def test_a_trained_coefficient_and_the_edits_of_a_context_are_registered(llama):
    coefficient, vector = nn.Parameter(torch.tensor(2.0)), torch.arange(float(models.WIDTH))
    steer, scale = tg.Steer(vector, coefficient=coefficient), tg.Scale(0.5)
    context = Intervene(llama, {"residual_output.0": [steer, scale, steer], "residual_output.1": steer})
    assert list(context.edits) == [steer, scale]
    assert list(context.parameters()) == [coefficient]
    assert sorted(context.state_dict()) == ["edits.0.coefficient", "edits.0.vector"]
    assert context.double().edits[0].vector.dtype == torch.float64
    assert torch.equal(tg.Steer(vector, coefficient=3)(activation=vector[None, None]), 4 * vector[None, None])


class LooksWhileReplacing(tg.Steer):
    def replace(self, value, call):
        return super().replace(value, call) * call.attended(value)[:, -value.shape[1] :, None]


class LooksForPlaces(tg.Steer):
    def where(self, value, call):
        return call.attended(value)[:, -value.shape[1] :, None]


class LooksWhileComputing(tg.Scale):
    def compute(self, value, mask=None, *others):
        return torch.where(mask[:, -value.shape[1] :, None], super().compute(value, mask, *others), value)


@pytest.mark.parametrize("kind", [LooksWhileReplacing, LooksForPlaces, LooksWhileComputing])
def test_edits_at_all_positions_are_told_the_mask_where_a_subclass_looks_at_it(llama, kind):
    batch = models.text_batch()
    batch["attention_mask"][0, -2:] = 0
    given = 3.0 if kind is LooksWhileComputing else torch.ones(models.WIDTH)
    with (
        torch.no_grad(),
        Capture(llama, "mlp_output.1") as before,
        Intervene(llama, {"mlp_output.1": kind(given)}),
        Capture(llama, "mlp_output.1") as after,
    ):
        llama(**batch)
    x, y = before[0]["acts", "mlp_output.1"], after[0]["acts", "mlp_output.1"]
    new = 3 * x if kind is LooksWhileComputing else x + 1
    other = torch.zeros_like(x) if kind is LooksWhileReplacing else x
    torch.testing.assert_close(y, torch.where(batch["attention_mask"].bool()[..., None], new, other))


def test_ablations(llama):
    batch, x = models.text_batch(), torch.randn(4, 3, 2)
    reference = Capture(llama, "mlp_output.1")(TensorDict(other_for("llama")))
    mean = reference["acts", "mlp_output.1"].double().mean((0, 1)).float()
    for edit, expected in (
        (tg.Ablate(), lambda y: 0 * y),
        (tg.Ablate("mean", reference=reference), lambda y: 0 * y + mean),
    ):
        with plain_hook(llama.model.layers[1].mlp, expected):
            wanted = logits(llama, batch)
        with Intervene(llama, {"mlp_output.1": edit}):
            torch.testing.assert_close(logits(llama, batch), wanted, rtol=1e-4, atol=1e-5)
    masked = TensorDict({("acts", "s"): x, "attention_mask": torch.tensor([[1, 0, 0]] * 4)})
    td = TensorDict({"activation": torch.zeros(1, 1, 2)}).set_non_tensor("site", "s")
    out = tg.Ablate("mean", reference=masked)(td)["activation"][0, 0]
    torch.testing.assert_close(out, x[:, 0].mean(0))  # padding is no part of the mean
    drawn = tg.Ablate("resample")(activation=x)
    assert sorted(drawn[:, 0, 0].tolist()) == sorted(x[:, 0, 0].tolist())
    assert (drawn[:, 0, 0] != x[:, 0, 0]).all()
    drawn = tg.Ablate("resample", reference=x, seed=3)(activation=torch.zeros(9, 3, 2))
    assert {tuple(row.flatten().tolist()) for row in drawn} <= {tuple(row.flatten().tolist()) for row in x}
    with pytest.raises(ValueError, match="needs reference="):
        tg.Ablate("mean")


def test_a_mean_of_some_heads_is_a_reference_for_these():
    model, batch = models.gpt2(), models.text_batch()
    some, whole = (tg.Capture(model, "z", heads=heads)(TensorDict(batch)) for heads in ([0], None))
    read = []
    for reference in (some, whole):
        with tg.Intervene(model, {"z.1": tg.Ablate("mean", reference=reference, heads=[0])}):
            read.append(logits(model, batch))
    torch.testing.assert_close(*read)
    with (
        tg.Intervene(model, {"z.1": tg.Ablate("mean", reference=some, heads=[0, 1])}),
        pytest.raises(
            ValueError, match=r"Ablate\('mean'\) at z.1 .*\(4, 4\) a position, its reference holds \(1, 4\)"
        ),
    ):
        model(**batch)


@pytest.mark.parametrize("kind", ["attn_pattern", "attn_scores"])
def test_mean_patterns_stay_causal(llama, kind):
    batch = models.text_batch()
    reference = Capture(llama, kind)(TensorDict(other_for("llama")))
    edit = {f"{kind}.1": tg.Ablate("mean", reference=reference, heads=2)}
    with torch.no_grad(), Intervene(llama, edit), Capture(llama, "attn_pattern.1") as calls:
        llama(**batch)
    found = calls[0]["acts", "attn_pattern.1"][:, 2]
    expected = reference["acts", f"{kind}.1"][:, 2].mean(0)
    expected = expected.softmax(-1) if kind == "attn_scores" else expected
    torch.testing.assert_close(found, expected.expand_as(found))
    assert found.triu(1).abs().max() == 0
    padded = {**batch, "attention_mask": batch["attention_mask"].clone()}
    padded["attention_mask"][0, 0] = 0
    shorter = {name: value[:, 1:] for name, value in batch.items()}
    for given, text in ((padded, "with padding"), (shorter, r"here \(6,\) and in the reference \(7,\)")):
        with pytest.raises(ValueError, match=text), Intervene(llama, edit):
            llama(**given)


def test_projections():
    x, basis = torch.randn(2, 3, 5), torch.randn(5, 2)
    q = torch.linalg.qr(basis).Q
    mean = torch.randn(5)
    torch.testing.assert_close(tg.ProjectOut(basis)(activation=x), x - x @ q @ q.T)
    torch.testing.assert_close(tg.ProjectOnto(basis, mean=mean)(activation=x), mean + (x - mean) @ q @ q.T)
    out = tg.ProjectOut(torch.stack([basis[:, 0], 2 * basis[:, 0]], 1))(activation=x)  # dependent columns
    torch.testing.assert_close(out @ basis[:, 0], torch.zeros(2, 3), rtol=0, atol=1e-5)
    for empty in (torch.zeros(5, 2), torch.full((5,), torch.nan)):
        with pytest.raises(ValueError, match="basis with directions.*zeros, NaN or Inf"):
            tg.ProjectOut(empty)
    with pytest.raises(ValueError, match=r"basis \(D, k\)"):
        tg.ProjectOut(torch.ones(2, 3))


def test_key_value_heads_are_shared_by_their_group(llama):
    batch = models.text_batch()
    read = Capture(llama, ["v", "z"], layers=1)
    with torch.no_grad(), Intervene(llama, {"v.1": tg.Ablate(heads=3)}), read as calls:
        llama(**batch)
    v, z = calls[0]["acts", "v.1"], calls[0]["acts", "z.1"]
    assert v[:, :, 1].abs().sum() == 0
    assert v[:, :, 0].abs().sum() > 0
    assert z[:, :, 2:].abs().sum() == 0
    assert z[:, :, :2].abs().sum() > 0


def test_an_edit_in_place_is_an_error_and_ours_are_not(llama):
    double = Intervene(llama, {"residual_output.1": lambda x: x.mul_(2)})
    with (
        pytest.raises(RuntimeError, match="wrote to the activation in place.*Remedy"),
        torch.no_grad(),
        double,
    ):
        llama(**models.text_batch())
    given = torch.randn(2, 3, 4, 5)
    copy = given.clone()
    for edit in (
        tg.Steer(torch.ones(5), heads=0),
        tg.Scale(2.0, features=[1]),
        tg.Ablate(positions="last"),
        tg.ProjectOut(torch.ones(5)),
        tg.Patch(torch.zeros(2, 3, 4, 5), positions="first"),
    ):
        out = edit(activation=given)
        assert torch.equal(given, copy)
        assert not torch.equal(out, copy)


class Negate(tg.Edit):
    """As the guide has it: ``edit`` alone."""

    def edit(self, value):
        return -value


class Recount(tg.Edit):
    """One that asks what call it is in."""

    def replace(self, value, call):
        assert call.site == "z.1" and call.groups == 1 and call.mask.shape == (3, 7)
        return value * (1 + call.rank(value))[..., None, None]


class Halved(Negate):
    """One that overrides what its base does with keys."""

    def forward(self, tensordict):
        return super().forward(tensordict).update({"activation": tensordict["activation"] / 2})


def test_edits_of_one_s_own(llama):
    batch = models.text_batch()
    layer = llama.model.layers[1]
    hooked = Negate(positions="all")
    hooked.register_forward_hook(lambda module, args, td: td.set("activation", td["activation"] * 3))
    seen = []
    watched = tg.Scale(2.0)
    watched.register_forward_pre_hook(lambda module, args: seen.append(sorted(args[0].keys())))
    cases = {-1.0: Negate(), -0.5: Halved(), -3.0: hooked, 2.0: watched}
    for factor, edit in cases.items():
        with plain_hook(layer, lambda x, factor=factor: factor * x):
            expected = logits(llama, batch)
        with Intervene(llama, {"residual_output.1": edit}):
            torch.testing.assert_close(logits(llama, batch), expected, rtol=0, atol=0)
    assert seen == [["activation", "attention_mask", "groups", "input_ids", "site"]]
    with Intervene(llama, {"z.1": Recount()}), Capture(llama, "z.1") as calls:
        llama(**batch)
    before = Capture(llama, "z.1")(TensorDict(batch))["acts", "z.1"]
    expected = before * torch.arange(1, 8)[:, None, None]
    torch.testing.assert_close(calls[0]["acts", "z.1"], expected)
    td = TensorDict({"activation": before, "site": "z.1", "attention_mask": batch["attention_mask"]})
    torch.testing.assert_close(Recount()(td)["activation"], expected)
