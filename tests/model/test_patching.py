"""The patching grid is what one hand-made patch after the other gives."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch
from tensordict import TensorDict

import models
import tdgeom as tg
from tdgeom import UndefinedMeasureWarning
from tdgeom.model.capture import Capture
from tdgeom.model.patching.activation_patching import activation_patching
from tdgeom.numerics.logit_metrics import answer_probability, kl_from, logit_difference


def pair(batch=3, length=5):
    clean = torch.randint(4, models.VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    corrupted = clean.clone()
    corrupted[:, 1] = (clean[:, 1] + 3 - 4) % (models.VOCAB - 4) + 4
    return {"input_ids": clean}, {"input_ids": corrupted}


def by_hand(model, base, other, layer, position):
    """One plain hook on one block: its input at one position is that of the other run."""
    block = model.model.layers[layer]
    seen = {}
    handle = block.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    with torch.no_grad():
        model(**other)
        handle.remove()

        def put(module, args):
            x = args[0].clone()
            x[:, position] = seen["x"][:, position]
            return (x, *args[1:])

        handle = block.register_forward_pre_hook(put)
        logits = model(**base).logits[:, -1]
    handle.remove()
    return logits


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_grid_is_patch_by_patch(direction):
    model = models.llama()
    clean, corrupted = pair()
    correct, wrong = torch.tensor([5, 6, 7]), 9
    out = activation_patching(
        model,
        clean,
        corrupted,
        "residual_input",
        answers=(correct, wrong),
        direction=direction,
        rows=7,
        progress=False,
    )
    base, other = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    metric = logit_difference(correct, wrong)
    for layer in range(models.DEPTH):
        for position in range(5):
            logits = by_hand(model, base, other, layer, position)
            expected = metric(logits, torch.arange(3)).double()
            torch.testing.assert_close(
                out["per_example", "residual_input"][layer, position], expected, rtol=1e-4, atol=1e-5
            )
    torch.testing.assert_close(out["grid", "residual_input"], out["per_example", "residual_input"].mean(-1))
    # the last position of the last layers decides, the corrupted position of the first layer brings the other run
    torch.testing.assert_close(
        out["per_example", "residual_input"][0, 1], out["clean" if direction == "denoise" else "corrupted"].double(),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    recovered = out["recovered", "residual_input"]
    assert recovered[0, 1] == pytest.approx(1.0, abs=1e-3)
    assert recovered[0, 0] == pytest.approx(0.0, abs=1e-3)
    assert out["layers", "residual_input"].tolist() == [0, 1, 2]
    assert out["columns", "residual_input"].tolist() == list(range(5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_heads_and_several_kinds():
    model = models.llama()
    clean, corrupted = pair()
    out = activation_patching(
        model, clean, corrupted, ["z", "v", "attn_pattern", "mlp_output"], "kl", layers=[0, 2], positions=[1, -1],
        progress=False,
    )  # fmt: skip
    assert out["grid", "z"].shape == out["grid", "v"].shape == (2, 4)
    assert out["grid", "mlp_output"].shape == (2, 2)
    assert out["columns", "mlp_output"].tolist() == [1, 4]
    assert out["layers", "z"].tolist() == [0, 2]
    torch.testing.assert_close(out["grid", "v"][:, 0], out["grid", "v"][:, 1])  # one key/value head for two
    assert out["clean"].abs().max() < 1e-6
    assert out["corrupted"].min() > 0
    source = Capture(model, "z.2")(TensorDict(clean))["acts", "z.2"]

    def put(module, args):
        x = args[0].clone()
        x[..., 4:8] = source[:, :, 1].reshape(3, 5, 4)
        return (x,)

    handle = model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(put)
    with torch.no_grad():
        logits = model(**corrupted).logits[:, -1]
        reference = model(**clean).logits[:, -1]
    handle.remove()
    expected = kl_from(reference)(logits, torch.arange(3)).mean().double()
    torch.testing.assert_close(out["grid", "z"][1, 1], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_examples_are_those_alone(side):
    model, lengths = models.llama(), [5, 3]
    clean, corrupted = pair(2)
    both = []
    for given in (clean, corrupted):
        ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
        for row, n in enumerate(lengths):
            span = slice(7 - n, 7) if side == "left" else slice(0, n)
            ids[row, span], mask[row, span] = given["input_ids"][row, :n], 1
        both.append({"input_ids": ids, "attention_mask": mask})
    settings = dict(metric="probability", answers=9, progress=False)
    together = activation_patching(model, *both, **settings)["per_example", "residual_input"]
    assert together.shape == (3, 5, 2)
    assert together[:, 3:, 1].isnan().all()
    for row, n in enumerate(lengths):
        one = ({"input_ids": given["input_ids"][row : row + 1, :n]} for given in (clean, corrupted))
        alone = activation_patching(model, *one, **settings)["per_example", "residual_input"]
        torch.testing.assert_close(together[:, :n, row], alone[..., 0], rtol=1e-3, atol=1e-5)
    # the two runs may be padded on different sides
    other = (
        {"input_ids": t["input_ids"].flip(1).roll(0), "attention_mask": t["attention_mask"].flip(1)}
        for t in both[1:]
    )
    flipped = next(iter(other))
    for row, n in enumerate(lengths):
        span = slice(0, n) if side == "left" else slice(7 - n, 7)
        flipped["input_ids"][row, span] = corrupted["input_ids"][row, :n]
    mixed = activation_patching(model, both[0], flipped, **settings)["per_example", "residual_input"]
    torch.testing.assert_close(mixed, together, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_metrics():
    logits = torch.randn(4, 6)
    example = torch.tensor([0, 1, 0, 1])
    ids = torch.tensor([2, 3])
    expected = logits.softmax(-1)[torch.arange(4), ids[example]]
    torch.testing.assert_close(answer_probability(ids)(logits, example), expected)
    own = activation_patching(
        models.gpt2(), *pair(), metric=lambda value, example: value[:, 7] * 2, layers=0, progress=False
    )
    assert own["grid", "residual_input"].shape == (1, 5)


def test_two_stacks_have_positions_of_their_own():
    """Encoder sites are counted over the prompt, decoder sites over what the decoder reads, padded or not."""
    model = models.t5()
    clean, corrupted = pair()
    start = torch.randint(4, models.VOCAB, (3, 4), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    clean = {**clean, "decoder_input_ids": start, "decoder_attention_mask": mask}
    corrupted = {**corrupted, "decoder_input_ids": start.flip(1) * mask, "decoder_attention_mask": mask}
    kinds = ["encoder.residual_output", "decoder.residual_output", "decoder.z"]
    out = activation_patching(model, clean, corrupted, kinds, answers=(5, 6), progress=False)
    shapes = {kind: tuple(out["grid", kind].shape) for kind in kinds}
    assert shapes == {kinds[0]: (models.DEPTH, 5), kinds[1]: (models.DEPTH, 4), kinds[2]: (models.DEPTH, 4)}
    assert torch.equal(out["per_example", kinds[1]][0].isnan(), ~mask.bool().T)
    last = mask.sum(1) - 1
    for stack, kind, position in ((model.encoder, kinds[0], 1), (model.decoder, kinds[1], 1)):
        block, seen = stack.block[1], {}
        with torch.no_grad():
            handle = block.register_forward_hook(lambda m, a, o, seen=seen: seen.update(x=o[0]))
            model(**clean)
            handle.remove()

            def put(module, args, output, seen=seen, position=position):
                x = output[0].clone()
                x[:, position] = seen["x"][:, position]
                return (x, *output[1:])

            handle = block.register_forward_hook(put)
            logits = model(**corrupted).logits[torch.arange(3), last]
            handle.remove()
        expected = (logits[:, 5] - logits[:, 6]).double()
        torch.testing.assert_close(out["per_example", kind][1, position], expected, rtol=1e-4, atol=1e-4)


def test_answers_may_be_lists_and_have_to_fit():
    model = models.gpt2()
    clean, corrupted = pair()
    given = {"sites": "z", "layers": 0, "progress": False}
    one = activation_patching(model, clean, corrupted, answers=([5, 6, 7], 9), **given)
    two = activation_patching(model, clean, corrupted, answers=(torch.tensor([5, 6, 7]), 9), **given)
    assert torch.equal(one["grid", "z"], two["grid", "z"])
    for answers, match in (
        (([5, 6], 9), "one for each of the 3 texts, got 2"),
        ((5, models.VOCAB), f"token ids from 0 to {models.VOCAB - 1}, got .{models.VOCAB}"),
        ((0.5, 9), "an answer is a token id, a word, .*got 0.5"),
    ):
        with pytest.raises(ValueError, match=match):
            activation_patching(model, clean, corrupted, answers=answers, **given)
    with pytest.raises(ValueError, match="by= expects 'position', 'head', 'neuron', 'layer' or None"):
        activation_patching(model, clean, corrupted, answers=(5, 9), by="heads", **given)


def test_runs_of_one_metric_have_nothing_to_recover():
    model, (clean, _) = models.gpt2(), pair()
    with pytest.warns(UndefinedMeasureWarning, match="same metric.*'recovered' of z"):
        out = activation_patching(model, clean, clean, "z", answers=(5, 6), layers=0, progress=False)
    assert out["recovered", "z"].isnan().all() and not out["grid", "z"].isnan().any()


def test_errors():
    model = models.gpt2()
    clean, corrupted = pair()
    for settings, match in (
        ({}, r"needs answers=, \(correct, wrong\)"),
        ({"metric": "probability"}, "needs answers="),
        ({"metric": "accuracy"}, "'logit_diff', 'logit', 'probability', 'kl'"),
        ({"metric": "kl", "direction": "both"}, "'denoise' or 'noise'"),
        ({"metric": "kl", "by": "head"}, "needs sites with heads"),
        ({"metric": "kl", "positions": "lst"}, "one of all, last"),
    ):
        with pytest.raises(ValueError, match=match):
            activation_patching(model, clean, corrupted, progress=False, **settings)
    with pytest.raises(ValueError, match="3 and 2 examples"):
        activation_patching(
            model, clean, {"input_ids": corrupted["input_ids"][:2]}, metric="kl", progress=False
        )


def test_metrics_of_logits_are_public():
    """Against SciPy, for any leading dimensions; ids one or one each."""
    logits, other = torch.randn(3, 2, 7), torch.randn(3, 2, 7)
    ids = torch.randint(0, 7, (3, 2))
    probabilities, reference = (scipy.special.softmax(x.double().numpy(), -1) for x in (logits, other))
    expected = np.take_along_axis(logits.numpy(), ids.numpy()[..., None], -1)[..., 0] - logits.numpy()[..., 3]
    np.testing.assert_array_equal(tg.functional.logit_diff(logits, ids, 3), expected)
    np.testing.assert_allclose(tg.functional.token_probability(logits, 2), probabilities[..., 2], rtol=1e-5)
    kl = scipy.special.rel_entr(reference, probabilities).sum(-1)
    np.testing.assert_allclose(tg.functional.kl_divergence(logits, other), kl, rtol=1e-4)
    np.testing.assert_allclose(tg.functional.kl_divergence(logits, logits), np.zeros((3, 2)), atol=1e-6)
    with pytest.raises(ValueError, match="ids from 0 to 6"):
        tg.functional.logit_diff(logits, 7, 0)
    with pytest.raises(ValueError, match=r"one for each of \(3, 2\)"):
        tg.functional.logit_diff(logits, [1, 2], 0)
