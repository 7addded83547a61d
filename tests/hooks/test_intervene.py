"""Edits take effect, see each other, and leave nothing behind; plain torch hooks are the reference."""

from __future__ import annotations

import contextlib
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

import models
import tdgeom as tg
from tdgeom.hooks import Capture, Intervene, find_stacks

ALL = {**models.TEXT_MODELS, **models.IMAGE_MODELS}
LISTED = [
    "gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt_neox", "phi", "opt", "mixtral", "bert", "vit",
]  # fmt: skip
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def hook_count(model):
    own = sum("forward" in m.__dict__ for m in model.modules())
    return own + sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


def batch_for(name):
    return {"pixel_values": IMAGES} if name == "vit" else models.text_batch()


def other_for(name):
    given = batch_for(name)
    return {k: v if k == "attention_mask" else v.flip(0).contiguous() for k, v in given.items()}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@contextlib.contextmanager
def plain_hook(module, fn):
    """The reference: a torch hook that changes a module's output (its first item where it is a tuple)."""
    handle = module.register_forward_hook(
        lambda m, a, o: (fn(o[0]), *o[1:]) if isinstance(o, tuple) else fn(o)
    )
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture
def llama():
    return models.llama()


@pytest.fixture(params=LISTED)
def listed(request):
    return request.param, ALL[request.param](), batch_for(request.param)


# ------------------------------------------------------------------------------------ every architecture


EVERY = [
    "residual_input", "q", "k", "v", "attn_scores", "attn_pattern", "z", "head_output", "attn_output", "residual_mid",
    "mlp_act", "mlp_output", "residual_output",
]  # fmt: skip


def sites_of(model, kinds=EVERY):
    has = {entry.site.kind for entry in tg.available_sites(model)}
    return [kind for kind in kinds if kind in has]


def test_patching_a_run_with_itself_changes_nothing(listed):
    _, model, batch = listed
    for kind in sites_of(model):
        own = Capture(model, kind)(TensorDict(batch))
        base = logits(model, batch)
        with Intervene(model, {kind: tg.Patch(own)}):
            torch.testing.assert_close(logits(model, batch), base, rtol=1e-4, atol=1e-4)
        assert hook_count(model) == 0


def test_patching_the_last_layer_gives_the_other_run_s_logits(listed):
    name, model, batch = listed
    other = other_for(name)
    expected = logits(model, other)
    assert (expected - logits(model, batch)).abs().max() > 0.1
    site = f"residual_output.{models.DEPTH - 1}"
    acts = Capture(model, site)(TensorDict(other))
    for patch in (tg.Patch(acts), tg.Patch(inputs=other)):
        with Intervene(model, {site: patch}):
            torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    # all that is added in the last layer, on top of the other run's stream
    parts = ["residual_input", "attn_output", "mlp_output"]
    edits = {f"{kind}.{models.DEPTH - 1}": tg.Patch(inputs=other) for kind in parts}
    with Intervene(model, edits):
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_an_edit_of_every_site_reaches_the_output(listed):
    _, model, batch = listed
    base = logits(model, batch)
    for kind in sites_of(model):
        tilt = lambda x: (
            x * torch.linspace(0.5, 1.5, x.shape[-1])
        )  # some models normalise a common factor away
        with Intervene(model, {f"{kind}.1": tilt}):
            assert (logits(model, batch) - base).abs().max() > 1e-4, kind
    torch.testing.assert_close(logits(model, batch), base, rtol=0, atol=0)


def test_ablating_a_head_removes_exactly_its_share(listed):
    name, model, batch = listed
    acts = Capture(model, ["head_output", "attn_output"])(TensorDict(batch))["acts"]
    with (
        torch.no_grad(),
        Intervene(model, {"head_output.1": tg.Ablate(heads=2)}),
        Capture(model, "attn_output.1") as one,
    ):
        model(**batch)
    expected = acts["attn_output.1"] - acts["head_output.1"][:, :, 2]
    torch.testing.assert_close(one[0]["acts", "attn_output.1"], expected, rtol=1e-4, atol=1e-5)
    with (
        torch.no_grad(),
        Intervene(model, {"z.1": tg.Ablate(heads=[2])}),
        Capture(model, "attn_output.1") as two,
    ):
        model(**batch)
    if name in ("gemma2", "gemma3"):  # the norm behind the heads takes its statistics anew
        assert not torch.allclose(two[0]["acts", "attn_output.1"], expected, atol=1e-3)
    else:
        torch.testing.assert_close(two[0]["acts", "attn_output.1"], expected, rtol=1e-4, atol=1e-5)
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "gemma2", "olmo2", "vit", "bert", "gpt_neox_sequential", "t5"]
)
def test_an_edit_in_the_middle_reaches_the_stream_and_the_mlp(name):
    """The stream goes around the module where it is read: what comes out is middle + MLP(middle)."""
    model = models.t5() if name == "t5" else ALL[name]()
    stack = "encoder." if name == "t5" else ""
    reads = Capture(model, [f"{stack}{kind}.1" for kind in ("residual_mid", "mlp_output", "residual_output")])
    shift = torch.linspace(-1, 1, models.WIDTH)
    edits = {f"{stack}residual_mid.1": [lambda x: x + shift, lambda x: 2 * x]}
    batch = {
        **batch_for(name),
        **({"decoder_input_ids": models.text_batch()["input_ids"]} if name == "t5" else {}),
    }
    before = reads(TensorDict(batch))["acts"]
    with (
        torch.no_grad(),
        reads as outside,
        Intervene(model, edits),
        reads.__class__(model, reads.sites) as calls,
    ):
        model(**batch)
    acts, outer = calls[0]["acts"], outside[0]["acts"]
    middle, mlp, after = (acts[site] for site in reads.sites)
    torch.testing.assert_close(middle, 2 * (before[reads.sites[0]] + shift))
    torch.testing.assert_close(outer[reads.sites[0]], before[reads.sites[0]])
    torch.testing.assert_close(outer[reads.sites[2]], after)
    if name == "bert":  # normalises last
        block = find_stacks(model)[0].blocks[1].module
        after_attention = block.attention.output.LayerNorm(middle).detach()
        torch.testing.assert_close(after, block.output.LayerNorm(after_attention + mlp).detach())
    else:
        torch.testing.assert_close(after, middle + mlp, rtol=1e-4, atol=1e-5)
    assert hook_count(model) == 0


# ------------------------------------------------------------------------------------- attention patterns


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


# --------------------------------------------------------------------------------------------- the edits


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


def test_a_steering_vector_can_be_trained(llama):
    batch, vector = models.text_batch(), nn.Parameter(torch.zeros(models.WIDTH))
    steer = Intervene(llama, {"residual_output.0": tg.Steer(vector)}, keep_graph=True)
    assert list(steer.parameters()) == [vector]
    steer(TensorDict(batch))["logits"][:, -1, 5].sum().backward()
    assert vector.grad.norm() > 0


def test_activation_addition(llama):
    batch = models.text_batch()
    positive, negative = {"input_ids": batch["input_ids"][:1]}, {"input_ids": batch["input_ids"][1:2]}
    seen = {}
    layer = llama.model.layers[1]
    for name, given in (("positive", positive), ("negative", negative)):
        with plain_hook(layer, lambda x, name=name: seen.setdefault(name, x.detach()) * 1.0):
            logits(llama, given)
    difference = seen["positive"][0] - seen["negative"][0]
    cases = {
        "last": lambda x: x + 3 * difference[-1],
        "mean": lambda x: x + 3 * difference.mean(0),
        "positions": lambda x: torch.cat([x[:, :7] + 3 * difference, x[:, 7:]], 1),
    }
    longer = {"input_ids": torch.cat([batch["input_ids"], batch["input_ids"][:, :2]], 1)}
    for reduce, reference in cases.items():
        with plain_hook(layer, reference):
            expected = logits(llama, longer)
        edit = tg.ActivationAddition(positive, negative, coefficient=3.0, reduce=reduce)
        with Intervene(llama, {"residual_output.1": edit}):
            torch.testing.assert_close(logits(llama, longer), expected, rtol=1e-4, atol=1e-5)
        assert edit._runs == {}
        keyed = Intervene(
            llama,
            {"residual_output.1": tg.ActivationAddition("plus", "minus", coefficient=3.0, reduce=reduce)},
        )
        assert keyed.in_keys == ["input_ids", "plus", "minus"]
        td = TensorDict({**longer, "plus": TensorDict(positive), "minus": TensorDict(negative)})
        torch.testing.assert_close(keyed(td)["logits"], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="only the module form has"):
        keyed.__enter__()


def test_patching_chosen_positions_heads_and_features(llama):
    batch, other = models.text_batch(), other_for("llama")
    source = Capture(llama, ["residual_output.0", "z.1"])(TensorDict(other))["acts"]
    layer, projection = llama.model.layers[0], llama.model.layers[1].self_attn.o_proj

    def reference(x):
        x = x.clone()
        x[:, [2, 6], 3:5] = source["residual_output.0"][:, [2, 6], 3:5]
        return x

    with plain_hook(layer, reference):
        expected = logits(llama, batch)
    edit = tg.Patch(inputs=other, positions=[2, -1], features=slice(3, 5))
    with Intervene(llama, {"residual_output.0": edit}):
        torch.testing.assert_close(logits(llama, batch), expected, rtol=1e-4, atol=1e-5)

    def heads(module, args):
        z = args[0].clone()
        z[..., 4:8] = source["z.1"][:, :, 1]
        return (z,)

    handle = projection.register_forward_pre_hook(heads)
    expected = logits(llama, batch)
    handle.remove()
    with Intervene(llama, {"z.1": tg.Patch(inputs=other, heads=1)}):
        torch.testing.assert_close(logits(llama, batch), expected, rtol=1e-4, atol=1e-5)
    half = lambda own, theirs: (own + theirs) / 2
    with plain_hook(layer, lambda x: (x + source["residual_output.0"]) / 2):
        expected = logits(llama, batch)
    with Intervene(llama, {"residual_output.0": tg.Patch(inputs=other, patch_fn=half)}):
        torch.testing.assert_close(logits(llama, batch), expected, rtol=1e-4, atol=1e-5)
    keyed = Intervene(llama, {"residual_output.0": tg.Patch(key="other", patch_fn=half)})
    td = keyed(TensorDict({**batch, "other": TensorDict(other)}))
    torch.testing.assert_close(td["logits"], expected, rtol=1e-4, atol=1e-5)


def test_patching_matches_positions_over_padding():
    own, other = torch.zeros(2, 5, 1), torch.arange(8.0).reshape(2, 4, 1) + 1
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    theirs = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    source = TensorDict({("acts", "x"): other, "attention_mask": theirs})
    td = TensorDict({"activation": own, "attention_mask": mask}).set_non_tensor("site", "x")
    out = tg.Patch(source, positions=slice(0, 3))(td.copy())["activation"][..., 0]
    assert out.tolist() == [[0, 1, 2, 3, 0], [6, 7, 8, 0, 0]]
    assert own.abs().sum() == 0
    out = tg.Patch(source, positions="first", source_positions="last")(td.copy())["activation"][..., 0]
    assert out.tolist() == [[0, 4, 0, 0, 0], [8, 0, 0, 0, 0]]
    longer = TensorDict(
        {"activation": torch.zeros(2, 6, 1), "attention_mask": torch.ones(2, 6)}
    ).set_non_tensor("site", "x")
    with pytest.raises(ValueError, match=r"has \[4, 3\] positions.*up to 6"):
        tg.Patch(source)(longer)
    with pytest.raises(KeyError, match="capture that site"):
        tg.Patch(TensorDict({("acts", "y"): other}))(td.copy())
    with pytest.raises(ValueError, match="one of source=, inputs= and key="):
        tg.Patch()


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


def test_projections():
    x, basis = torch.randn(2, 3, 5), torch.randn(5, 2)
    q = torch.linalg.qr(basis).Q
    mean = torch.randn(5)
    torch.testing.assert_close(tg.ProjectOut(basis)(activation=x), x - x @ q @ q.T)
    torch.testing.assert_close(tg.ProjectOnto(basis, mean=mean)(activation=x), mean + (x - mean) @ q @ q.T)
    out = tg.ProjectOut(torch.stack([basis[:, 0], 2 * basis[:, 0]], 1))(activation=x)  # dependent columns
    torch.testing.assert_close(out @ basis[:, 0], torch.zeros(2, 3), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"basis \(D, k\)"):
        tg.ProjectOut(torch.ones(2, 3))


# ------------------------------------------------------------------------------------------------- order


def test_edits_see_earlier_edits(llama):
    batch = models.text_batch()
    plus, twice = (lambda x: x + 1), (lambda x: x * 2)
    with plain_hook(llama.model.layers[0], lambda x: (x + 1) * 2):
        expected = logits(llama, batch)
    site = "residual_output.0"
    for context in (
        [Intervene(llama, {site: [plus, twice]})],
        [Intervene(llama, {site: plus}), Intervene(llama, {site: twice})],
    ):
        with contextlib.ExitStack() as stack:
            for one in context:
                stack.enter_context(one)
            torch.testing.assert_close(logits(llama, batch), expected, rtol=0, atol=0)
        assert hook_count(llama) == 0


@pytest.mark.parametrize(
    "kind", ["residual_input", "z", "head_output", "attn_scores", "attn_pattern", "mlp_output"]
)
def test_captures_inside_see_the_edits_and_those_outside_do_not(llama, kind):
    batch, site = models.text_batch(), f"{kind}.1"
    before = Capture(llama, site)(TensorDict(batch))["acts", site]
    outer, inner = Capture(llama, site), Capture(llama, site)
    with torch.no_grad(), outer as one, Intervene(llama, {site: tg.Scale(0.5)}), inner as two:
        llama(**batch)
    torch.testing.assert_close(one[0]["acts", site], before)
    torch.testing.assert_close(two[0]["acts", site], before * 0.5)
    with Intervene(llama, {site: tg.Scale(0.5)}):  # the module form too
        torch.testing.assert_close(Capture(llama, site)(TensorDict(batch))["acts", site], before * 0.5)


def test_stages_of_one_s_own_and_their_keys(llama):
    batch = models.text_batch()
    seen = []

    def mask_out(x, mask):
        seen.append(mask.shape)
        return x * mask.unsqueeze(-1)

    stage = TensorDictModule(mask_out, ["activation", "attention_mask"], ["activation"])
    with Intervene(llama, {"mlp_output": [stage, nn.Identity()]}, layers=[0, 2]):
        logits(llama, batch)
    assert seen == [(3, 7), (3, 7)]


def test_routers_keep_their_shape():
    model, batch = models.mixtral(), models.text_batch()
    shapes = []
    with Intervene(model, {"router_logits.1": lambda x: shapes.append(x.shape) or x + 1}):
        logits(model, batch)
    assert shapes == [(3, 7, 4)]


def test_shared_blocks_are_edited_one_layer_at_a_time():
    model, batch = models.albert(num_hidden_layers=3), models.text_batch()
    seen = Capture(model, "residual_output")
    base = seen(TensorDict(batch))["acts"]
    with torch.no_grad(), Intervene(model, {"residual_output.1": tg.Scale(2.0)}), seen as calls:
        model(**batch)
        model(**batch)
    for call in calls:
        torch.testing.assert_close(call["acts", "residual_output.0"], base["residual_output.0"])
        torch.testing.assert_close(call["acts", "residual_output.1"], 2 * base["residual_output.1"])
        assert not torch.allclose(call["acts", "residual_output.2"], base["residual_output.2"])


# --------------------------------------------------------------------------------- batches and generation


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma", "phi"])
@pytest.mark.parametrize("positions", ["last", "first", "last-1", 2, slice(1, 3), "random-2"])
def test_a_padded_batch_equals_the_prompts_one_by_one(name, positions):
    model, ids, lengths = ALL[name](), models.text_batch()["input_ids"], [7, 4, 5]
    torch.manual_seed(1)
    steer = tg.Steer(torch.randn(models.WIDTH), positions=positions)
    context = Intervene(model, {"residual_output.0": steer, "z.1": tg.Ablate(heads=1, positions=positions)})
    alone = [
        context(TensorDict({"input_ids": ids[i : i + 1, :n]}))["logits"][0] for i, n in enumerate(lengths)
    ]
    for side in ("left", "right"):
        padded, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
        spans = [slice(9 - n, 9) if side == "left" else slice(0, n) for n in lengths]
        for row, (span, n) in enumerate(zip(spans, lengths)):
            padded[row, span], mask[row, span] = ids[row, :n], 1
        together = context(TensorDict({"input_ids": padded, "attention_mask": mask}))["logits"]
        for row, span in enumerate(spans):
            torch.testing.assert_close(together[row, span], alone[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("positions", ["last", 2, 8, slice(5, 9), "all"])
def test_positions_of_cached_steps_count_the_whole_sequence(llama, positions):
    """With a cache each token is computed once; without one the same edits are made again every step."""
    given = models.text_batch()
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    torch.manual_seed(1)
    edit = tg.Steer(3 * torch.randn(models.WIDTH), positions=positions)
    with Intervene(llama, {"residual_output.0": edit}), Capture(llama, "residual_output.0") as calls:
        tokens = llama.generate(**given, **settings, use_cache=True)
    base = llama.generate(**given, **settings)
    seen = torch.cat([call["acts", "residual_output.0"] for call in calls], 1)
    plain = Capture(llama, "residual_output.0")(TensorDict({"input_ids": tokens[:, :10]}))[
        "acts", "residual_output.0"
    ]
    changed = ((seen - plain).norm(dim=-1) > 1e-2)[0].nonzero().flatten().tolist()
    expected = {"last": [6, 7, 8, 9], "all": list(range(10))}
    wanted = expected.get(positions) if isinstance(positions, str) else None
    wanted = wanted or ([positions] if isinstance(positions, int) else list(range(10))[positions])
    assert changed == wanted
    if positions != "last":  # "last" of an uncached step is another token than that of the step before
        with Intervene(llama, {"residual_output.0": edit}):
            assert torch.equal(tokens, llama.generate(**given, **settings, use_cache=False))
    assert torch.equal(base, llama.generate(**given, **settings))
    assert hook_count(llama) == 0


def test_generation_with_two_stacks():
    model = models.t5()
    torch.manual_seed(1)
    edits = {
        "encoder.residual_output.0": tg.Steer(torch.randn(16), positions="last"),
        "decoder.z.1": tg.Ablate(heads=1),
    }
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    mask = models.text_batch()["attention_mask"].clone()
    mask[0, 4:] = 0
    given = {**models.text_batch(), "attention_mask": mask}
    encoder, decoder = Capture(model, "encoder.residual_output.0"), Capture(model, "decoder.z.1")
    with encoder as plain:
        model.generate(**given, **settings)
    with Intervene(model, edits), encoder as one, decoder as two:
        model.generate(**given, **settings)
    key = ("acts", "encoder.residual_output.0")
    moved = (one[0][key] - plain[0][key]).norm(dim=-1) > 1e-3
    assert moved.nonzero().tolist() == [[0, 3], [1, 6], [2, 6]]
    assert all(call["acts", "decoder.z.1"][:, :, 1].abs().sum() == 0 for call in two)
    assert hook_count(model) == 0


def test_patching_a_prompt_and_generating_on(llama):
    given, other = models.text_batch(), other_for("llama")
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    with Intervene(llama, {"residual_input": tg.Patch(inputs=other)}):
        tokens = llama.generate(**given, **settings)
    assert torch.equal(tokens[:, 7:], llama.generate(**other, **settings)[:, 7:])


# ------------------------------------------------------------------------------------ nothing stays behind


class Failing(nn.Module):
    """An edit that fails at its n-th call."""

    def __init__(self, error, at=1):
        super().__init__()
        self.error, self.left = error, at

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return x + 1


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["edit", "pattern edit", "model", "generate", "source run", "module form"])
def test_everything_is_restored_after_any_exception(llama, error, where):
    batch = models.text_batch()
    base = logits(llama, batch)
    before = [m.config._attn_implementation for m in llama.modules() if hasattr(m, "config")]
    site = "attn_pattern.1" if where == "pattern edit" else "residual_output.1"
    patch = tg.Patch(inputs=other_for("llama"))
    context = Intervene(
        llama,
        {
            "attn_scores": tg.Scale(0.9),
            "residual_input": patch,
            site: Failing(error, 3 if where == "generate" else 1),
        },
    )
    broken = llama.model.layers[2].mlp
    with pytest.raises(type(error)):
        if where in ("model", "source run"):
            context.plan[-1][1][0].left = 99
            handle = broken.register_forward_hook(lambda *_: (_ for _ in ()).throw(error))
        if where == "source run":
            context = Intervene(llama, {"residual_output.2": patch, "attn_scores": tg.Scale(0.9)})
        if where == "module form":
            context(TensorDict(batch))
        else:
            with context, Capture(llama, ["attn_pattern", "z"]):
                if where == "generate":
                    llama.generate(
                        **batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
                    )
                else:
                    llama(**batch)
    if where in ("model", "source run"):
        handle.remove()
    assert hook_count(llama) == 0
    assert [m.config._attn_implementation for m in llama.modules() if hasattr(m, "config")] == before
    assert patch._runs == {}
    assert torch.equal(logits(llama, batch), base)
    with Intervene(llama, {"z": tg.Scale(1.0)}):  # and the next context works
        torch.testing.assert_close(logits(llama, batch), base)


def test_an_exception_caught_inside_the_block_leaves_the_next_call_alone(llama):
    batch = models.text_batch()
    base = Capture(llama, "attn_pattern")(TensorDict(batch))["acts"]
    edit = Failing(ValueError("no"))
    with Intervene(llama, {"z.1": edit}), Capture(llama, "attn_pattern") as calls:
        with pytest.raises(ValueError, match="no"):
            llama(**batch)
        llama(**batch)
    assert len(calls) == 1
    torch.testing.assert_close(calls[0]["acts", "attn_pattern.0"], base["attn_pattern.0"])


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


# ------------------------------------------------------------------------------------------------- errors


def test_errors_say_what_was_expected(llama):
    batch = models.text_batch()
    for edits, match in (
        (
            {"residual_output.1": lambda x: x[:, :2]},
            r"expected to give a tensor \(3, 7, 16\), gave \(3, 2, 16\)",
        ),
        ({"residual_output.1": lambda x: None}, "gave NoneType"),
        ({"residual_output.1": tg.Ablate(heads=0)}, "needs a site with heads"),
    ):
        with pytest.raises(ValueError, match=match), Intervene(llama, edits):
            llama(**batch)
    with pytest.raises(IndexError, match="4 query heads"), Intervene(llama, {"k.0": tg.Ablate(heads=4)}):
        llama(**batch)
    with pytest.raises(ValueError, match="Kinds"):
        Intervene(llama, {"residul": tg.Ablate()})
    with pytest.raises(TypeError, match="no module or function"):
        Intervene(llama, {"residual_output": 3})
    with pytest.raises(ValueError, match="mapping from sites to edits"):
        Intervene(llama, {})
    context = Intervene(llama, {"z": tg.Scale(1.0)})
    with context, pytest.raises(RuntimeError, match="already in use"):
        context.__enter__()
    twin = pickle.loads(pickle.dumps(context))
    with pytest.raises(RuntimeError, match="without its model"):
        twin.__enter__()
    with pytest.raises(RuntimeError, match="compiled"):
        Intervene(torch.compile(llama, backend="eager"), {"z": tg.Scale(1.0)})


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


def test_plain_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    context = Intervene(model, {"module_output:0": tg.Scale(2.0)}, model_outputs="y", in_keys=["x"])
    torch.testing.assert_close(context(TensorDict({"x": x}))["y"], model[1](2 * model[0](x)).detach())
    assert find_stacks(model)
    with pytest.raises(ValueError, match="has no positions"):
        Intervene(model, {"module_output:0": tg.Scale(2.0, positions="last")}, in_keys=["x"])(
            TensorDict({"x": x})
        )
