"""Activations of other runs: patching and activation addition."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

import models
import tdgeom as tg
from editing import hook_count, logits, other_for, plain_hook, sites_of
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene


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


def test_patching_every_site_of_the_last_layer_at_once_gives_the_other_run_s_logits(listed):
    name, model, batch = listed
    other = other_for(name)
    sites = [str(e.site) for e in tg.available_sites(model) if e.site.layer == models.DEPTH - 1]
    acts = Capture(model, sites)(TensorDict(other))
    with Intervene(model, {site: tg.Patch(acts) for site in sites}):
        torch.testing.assert_close(logits(model, batch), logits(model, other), rtol=1e-4, atol=1e-4)
    assert hook_count(model) == 0


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
        assert keyed.in_keys[:3] == ["input_ids", "plus", "minus"]
        assert keyed.optional_in_keys == keyed.in_keys[3:] and "special_tokens_mask" in keyed.in_keys
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
    with pytest.raises(
        ValueError, match=r"has \[4, 3\] positions.*none for the positions \[3, 4, 5\] of this run"
    ):
        tg.Patch(source, align="start")(longer)
    with pytest.raises(
        ValueError, match=r"have \[6, 6\] tokens, those of the other \[4, 3\]: which .*align='start'"
    ):
        tg.Patch(source)(longer)
    with pytest.raises(KeyError, match="capture that site"):
        tg.Patch(TensorDict({("acts", "y"): other}))(td.copy())
    with pytest.raises(ValueError, match="one of source=, inputs= and key="):
        tg.Patch()


def test_texts_of_different_lengths_are_matched_as_asked():
    """Rank r from the start, r from the end, or by a map: each value is where it should be, and nothing else moves."""
    theirs = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])  # three tokens, padded on either side
    other = torch.tensor([[[1.0], [2], [3], [99]], [[99.0], [4], [5], [6]]])
    source = TensorDict({("acts", "x"): other, "attention_mask": theirs})
    own = {
        "activation": torch.zeros(2, 5, 1),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
    }
    td = TensorDict(own).set_non_tensor("site", "x")
    read = lambda **how: tg.Patch(source, **how)(td.copy())["activation"][..., 0].tolist()
    for positions in ("last", "all", [-1], slice(1, None), "last-1"):
        with pytest.raises(ValueError, match="which position is which"):
            read(positions=positions)
    assert read(positions="last", align="end") == [[0, 0, 0, 0, 3], [0, 0, 0, 6, 0]]
    assert read(positions=[1, 2, 3], align="end") == [[0, 0, 1, 2, 3], [0, 4, 5, 6, 0]]
    with pytest.raises(ValueError, match=r"has \[3, 3\] positions to take from"):
        read(align="end")
    assert (
        read(positions=[0, 2]) == read(positions=[0, 2], align="start") == [[0, 1, 0, 3, 0], [4, 0, 6, 0, 0]]
    )
    assert read(align={3: -1, 0: 1}) == [[0, 2, 0, 0, 3], [5, 0, 0, 6, 0]]
    with pytest.raises(ValueError, match="no position 7 of align="):
        read(align={7: 0})
    with pytest.raises(ValueError, match="says itself which positions"):
        read(align={0: 0}, positions="last")
    with pytest.raises(ValueError, match="values in order, or align="):
        read(align="end", source_positions="last")
    with pytest.raises(ValueError, match="align= expects 'start', 'end' or a mapping"):
        read(align="front")
    with pytest.raises(ValueError, match=r"expected activations \(2, T, 1\), got \(2,\)"):
        tg.Patch(torch.ones(2))(td.copy())


@pytest.mark.parametrize("kind", ["z", "head_output", "attn_pattern", "k"])
def test_what_a_capture_gives_is_a_donor(llama, kind):
    """A list of one call is that call; captured heads go to the same heads; both do what the whole run in a TensorDict does."""
    site, batch, other = f"{kind}.1", models.text_batch(), other_for("llama")
    capture = lambda **how: tg.Capture(llama, site, **how)
    with torch.no_grad():
        with capture() as donor:
            llama(**other)
        with capture(heads=[1]) as one:
            llama(**other)
        with capture() as two:
            llama(**other), llama(**batch)
    whole = capture()(TensorDict(other))

    def under(edit):
        with torch.no_grad(), tg.Intervene(llama, {site: edit}):
            return llama(**batch).logits

    right = under(tg.Patch(whole, heads=[1]))
    assert not torch.equal(right, llama(**batch).logits)
    for source in (donor, donor[0], one, one[0], one[0]["acts", site]):
        assert torch.equal(under(tg.Patch(source, heads=[1])), right)
    how = "resample" if kind == "attn_pattern" else "mean"
    right = under(tg.Ablate(how, reference=whole, heads=[1]))
    for reference in (donor, one):
        torch.testing.assert_close(under(tg.Ablate(how, reference=reference, heads=[1])), right)
    for edit in (tg.Patch(two), tg.Ablate("resample", reference=two)):
        with pytest.raises(ValueError, match=r"got 2 calls. Remedy: say which, such as calls\[0\]"):
            under(edit)
    with pytest.raises(ValueError, match=r"expected activations|holds \(1,"):
        under(tg.Patch(one, heads=[0, 1, 2]))
    swapped = list(range(2 if kind == "k" else 4))[::-1]
    heads = swapped if kind != "k" else [2, 0]  # key/value heads 1 and 0
    with pytest.raises(ValueError, match="which are all of them, or those of heads="):
        under(tg.Patch(capture(heads=heads)(TensorDict(other)), heads=heads))


def test_activation_addition_takes_what_was_captured(llama):
    site, batch = "residual_output.1", models.text_batch()
    sides = models.text_batch(2, 5), {k: v.flip(0) for k, v in models.text_batch(2, 6).items()}
    with torch.no_grad():
        with tg.Capture(llama, site) as positive:
            llama(**sides[0])
        with tg.Capture(llama, site) as negative:
            llama(**sides[1])

    def under(edit):
        with torch.no_grad(), tg.Intervene(llama, {site: edit}):
            return llama(**batch).logits

    right = under(tg.ActivationAddition(*sides, coefficient=2.0))
    for given in ((positive, negative), (positive[0], negative), (positive, sides[1])):
        torch.testing.assert_close(under(tg.ActivationAddition(*given, coefficient=2.0)), right)
    elsewhere = {"residual_output.0": tg.ActivationAddition(positive, negative)}
    with pytest.raises(KeyError, match="capture that site"), tg.Intervene(llama, elsewhere):
        llama(**batch)
    wide = TensorDict({("acts", site): torch.randn(1, 3, 4)})
    with pytest.raises(ValueError, match="ActivationAddition expected activations of"):
        under(tg.ActivationAddition(wide, wide))
