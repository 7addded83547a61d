"""Every stage, hook and run with tensors of a device: the numbers of the CPU, and nothing that comes back to the host.

``test_cuda.py`` takes these where there is a CUDA device; ``TDGEOM_DEVICE`` names another (``cpu`` shows that they run).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from models import VOCAB, WIDTH, gpt2
from stage_examples import EXAMPLES
from tdgeom.numerics.products import product_dtype

DEVICE = torch.device(os.environ.get("TDGEOM_DEVICE", "cuda"))


def tolerance() -> dict[str, Any]:
    """Of float64 products where the device has them at speed, of float32 ones else."""
    fine = product_dtype("auto", DEVICE) == torch.float64
    return {"rtol": 1e-6 if fine else 1e-4, "atol": 1e-8 if fine else 1e-6, "equal_nan": True}


def outputs(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def there(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, VOCAB, (count, 4, 12), generator=torch.Generator().manual_seed(count))
    mask = torch.ones_like(ids)
    mask[:, 0, 8:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask)]


def pipeline(model: torch.nn.Module) -> TensorDictSequential:
    capture = tg.Capture(model, sites="residual_input")
    s = capture.sites
    return TensorDictSequential(
        capture,
        tg.SelectTokens(s),
        tg.ForEach(tg.StreamingCovariance(), s),
        tg.RowSample(s, size=64),
        tg.StreamingCrossMoments(s),
        tg.ForEach(tg.EigenSpectrum(k=4), s),
        tg.ForEach(tg.SpectrumMetrics(), s),
        tg.ForEachPair(tg.LinearCKA(source="moments"), s),
        tg.ForEachPair(tg.SubspaceNovelty(k=4), s),
        tg.ForEach(tg.TwoNN(), s),
    )


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_stage_gives_on_the_device_what_it_gives_on_the_cpu(name: str) -> None:
    example = EXAMPLES[name]
    torch.manual_seed(0)
    expected = outputs(example.make()(*example.inputs()))
    torch.manual_seed(0)
    stage = example.make()
    found = outputs(stage(*map(there, example.inputs())))
    for key, want, got in zip(stage.out_keys, expected, found):
        if isinstance(got, torch.Tensor):
            if name != "StoreActivations":  # which tells of a file
                assert got.device.type == DEVICE.type, f"{key} is on {got.device}"
            torch.testing.assert_close(got.cpu(), want, **tolerance())


def test_a_run_gives_on_the_device_what_it_gives_on_the_cpu() -> None:
    expected = tg.run(pipeline(gpt2()), batches(6), progress=False)
    found = tg.run(pipeline(gpt2().to(DEVICE)), batches(6), progress=False)
    for key, want in expected.items(True, True):
        got = found[key]
        if isinstance(got, torch.Tensor) and key[0] in ("spectrum", "between", "moments", "eigenvalues"):
            assert got.device.type == DEVICE.type, f"{key} is on {got.device}"
            torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_edits_and_lenses_act_on_the_device() -> None:
    model, batch = gpt2().to(DEVICE), {key: there(value) for key, value in batches(1)[0].items()}
    plain = model(**batch).logits
    with tg.Intervene(model, {"residual_output.1": tg.Steer(torch.arange(float(WIDTH), device=DEVICE))}):
        steered = model(**batch).logits
    assert steered.device.type == DEVICE.type and (steered - plain).abs().max() > 1e-3
    assert torch.equal(model(**batch).logits, plain)


def test_a_model_in_two_places_gives_what_one_in_one_place_does() -> None:
    """Half of the blocks on the device and half on the host: activations come from both."""
    from accelerate import dispatch_model

    expected = tg.run(pipeline(gpt2()), batches(3), progress=False)
    where = {"transformer.wte": DEVICE, "transformer.wpe": DEVICE, "transformer.drop": DEVICE}
    where |= {f"transformer.h.{i}": DEVICE if i < 2 else torch.device("cpu") for i in range(3)}
    where |= {"transformer.ln_f": torch.device("cpu"), "lm_head": DEVICE}
    split = dispatch_model(gpt2(), where, main_device=DEVICE) if DEVICE.type != "cpu" else gpt2()
    found = tg.run(pipeline(split), batches(3), progress=False)
    key = ("spectrum", "residual_input.2", "d_pr")
    torch.testing.assert_close(found[key].cpu(), expected[key], rtol=1e-4, atol=1e-6)
