"""What a device would refuse, and how often the host waits for it: run by ``test_devices.py`` in a process of its own.

A type of device that PyTorch was told of stays for the life of a process, and libraries then look for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tdgeom as tg
from simulated_device import OnDevice, SimulatedDevice, moved
from stage_examples import EXAMPLES
from tdgeom import functional as F
from tdgeom.core import devices
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.numerics.on_host import remember

# Backward passes need streams, which a device that is not there has not.
GRADIENTS = {"TorchProbe", "LowRankBilinearProbe"}
# What an update of a stage has to wait for, beside what run has read with the batch: at most so often a block of rows.
WAITS = {
    "StoreActivations": 2,  # the rows go to the disk: one copy a tensor
    "StreamingLabelMoments": 4,  # rows are dealt to folds by their labels
    "LinearProbe": 11,
    "MeanDifferenceProbe": 7,
    "SklearnProbe": 5,
    "TorchProbe": 5,
    "ProbeScore": 5,
}


def put(device: SimulatedDevice, value: Any) -> Any:
    """As ``run`` hands it on: the host knows the ids that it made."""
    if not isinstance(value, torch.Tensor):
        return value
    there = device.put(value)
    if not value.is_floating_point():
        remember(there, value)
    return there


def outputs(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - GRADIENTS))
def test_a_stage_gives_on_a_device_what_it_gives_on_the_cpu_and_mixes_none(name: str) -> None:
    example = EXAMPLES[name]
    torch.manual_seed(0)
    expected = outputs(example.make()(*example.inputs()))
    with SimulatedDevice() as device:
        stage = example.make()
        torch.manual_seed(0)
        found = outputs(
            stage(*(device.put(x) if isinstance(x, torch.Tensor) else x for x in example.inputs()))
        )
        for key, want, got in zip(stage.out_keys, expected, found):
            if name != "StoreActivations":  # which tells of a file
                assert isinstance(got, OnDevice), f"{key} came back to the host"
            host = got.host if isinstance(got, OnDevice) else got
            torch.testing.assert_close(host, want, rtol=1e-6, atol=1e-8, equal_nan=True)


STREAMS = sorted(name for name, example in EXAMPLES.items() if isinstance(example.make(), StreamingStage))


@pytest.mark.parametrize("name", STREAMS)
def test_an_update_makes_the_host_wait_for_nothing_but_what_is_listed(name: str) -> None:
    example = EXAMPLES[name]
    with SimulatedDevice() as device:
        stage: Any = example.make()

        def block(number: int) -> TensorDict:
            td = TensorDict({}, batch_size=[])
            for key, value in zip(stage.in_keys, example.inputs()):
                fresh = value + (number << 40) if str(key).endswith("row_id") else value
                td.set(key, put(device, fresh))
            return td

        stage.update(block(0))
        device.waits.clear()
        stage.update(block(1))
        assert device.count <= WAITS.get(name, 0), device.waits
        if name in WAITS:
            assert device.count == WAITS[name], f"{name} waits less often now: lower its number"


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=50, bos_token_id=0, eos_token_id=0)
    ).eval()


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=24, vocab_size=50
    )
    return LlamaForCausalLM(config).eval()


def batches(count: int, *, padded: bool = True) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(count)
    found = []
    for _ in range(count):
        ids = torch.randint(1, 50, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 8:] = 0 if padded else 1
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def pipeline(model: torch.nn.Module) -> TensorDictSequential:
    capture = tg.Capture(model, sites=["residual_input", "mlp_output"])
    s = capture.sites
    stream, added = ([x for x in s if x.kind == kind] for kind in ("residual_input", "mlp_output"))
    return TensorDictSequential(
        capture,
        tg.SelectTokens(s),
        tg.ForEach(tg.StreamingCovariance(), stream),
        tg.ForEach(tg.GroupedCovariance(groups=4), added),
        tg.RowSample(s, size=64),
        tg.StreamingCrossMoments(s),
        tg.ForEach(tg.StreamingMean(), s),
        tg.ForEach(tg.EigenSpectrum(k=4), s),
        tg.ForEach(tg.SpectrumMetrics(), s),
        tg.ForEachPair(tg.LinearCKA(source="moments"), s),
    )


def ours(device: SimulatedDevice) -> dict[tuple[str, str], int]:
    """Waits by operation and line, but for the model's own."""
    return {where: count for where, count in device.waits.items() if where[1] != "the model"}


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("loaded", ["on the host", "on the device"])
def test_run_makes_the_host_wait_once_a_batch(make: Any, loaded: str) -> None:
    """However many blocks, sites and stages: what a batch has more than another is one wait."""
    expected = tg.run(pipeline(make()), batches(8))
    with SimulatedDevice() as device:
        model = moved(device, make())

        def waits(count: int) -> tuple[int, Any]:
            given = batches(count)
            if loaded == "on the device":
                given = [{key: device.put(value) for key, value in batch.items()} for batch in given]
            device.waits.clear()
            result = tg.run(pipeline(model), given, block_rows=16)
            return sum(ours(device).values()), result

        waits(1)  # what is found out about a model is found out once
        few, _ = waits(2)
        many, result = waits(8)
        assert many - few <= 6, ours(device)
        for key in (
            ("spectrum", "residual_input.1", "d_pr"),
            ("between", "residual_input.0->residual_input.1", "linear_cka"),
        ):
            torch.testing.assert_close(result[key].host, expected[key], rtol=1e-5, atol=1e-7)


def test_rows_that_are_not_finite_are_named_at_the_latest_with_the_next_batch() -> None:
    def broken(number: int) -> list[dict[str, torch.Tensor]]:
        rows = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
        rows[number][3, 2] = torch.nan
        return [{"tokens": x} for x in rows]

    stream = TensorDictSequential(tg.StreamingCovariance())
    for number in (0, 4):
        with SimulatedDevice() as device:
            given = [{"tokens": device.put(batch["tokens"])} for batch in broken(number)]
            with pytest.raises(
                ValueError, match=f"holds NaN or Inf in 1 of 6 rows, first in batch {number} "
            ):
                tg.run(stream, given, block_rows=6)
            kept = tg.run(stream, given, block_rows=6, nonfinite="drop")
            assert kept["run", "dropped_rows"] == 1


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device that refuses float64, as Apple's does."""
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", {"privateuseone"})
    with SimulatedDevice(float64=False) as device:
        yield device


def narrow(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value


# Moments are float64 by their key: there are none on such a device.
MOMENTS = {
    name for name, example in EXAMPLES.items() if any("moments" in str(key) for key in example.make().in_keys)
}


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - GRADIENTS - MOMENTS))
def test_a_stage_works_on_rows_of_a_device_without_float64(
    name: str, without_float64: SimulatedDevice
) -> None:
    example = EXAMPLES[name]
    given = [narrow(value) for value in example.inputs()]
    torch.manual_seed(0)
    expected = outputs(example.make()(*given))
    torch.manual_seed(0)
    found = outputs(example.make()(*(put(without_float64, value) for value in given)))
    for want, got in zip(expected, found):
        host = got.host if isinstance(got, OnDevice) else got
        torch.testing.assert_close(host, want, rtol=1e-6, atol=1e-8, equal_nan=True)


def test_a_function_works_on_rows_of_a_device_without_float64(without_float64: SimulatedDevice) -> None:
    x, y = torch.randn(30, 4), torch.randn(30, 3)
    found = F.linear_cka(without_float64.put(x), without_float64.put(y))
    torch.testing.assert_close(found, F.linear_cka(x, y))


def test_a_run_on_a_device_without_float64(without_float64: SimulatedDevice) -> None:
    model = moved(without_float64, gpt2())
    result = tg.run(pipeline(model), batches(4))
    expected = tg.run(pipeline(gpt2()), batches(4))
    key = ("spectrum", "residual_input.1", "d_pr")
    torch.testing.assert_close(result[key], expected[key], rtol=1e-5, atol=0)


def test_batches_of_other_parts_stay_where_they_are(tmp_path: Path) -> None:
    """A job of sixteen moves its own batches to the device, and looks at the first for the others' sake."""
    with SimulatedDevice() as device:
        model = moved(device, gpt2())
        moves: list[tuple[int, ...]] = []
        place = device.run

        def watched(func: Any, args: Any, kwargs: Any) -> Any:
            if func._schema.name == "aten::_to_copy" and kwargs.get("device") == device.device:
                moves.append(tuple(args[0].shape))
            return place(func, args, kwargs)

        device.run = watched  # type: ignore[method-assign]
        counts = []
        for parts in (1, 3, 9):  # one batch is this job's, however many are passed over
            moves.clear()
            tg.run(pipeline(model), batches(parts), shard=(parts, parts), state=tmp_path / "state")
            counts.append(len(moves))
        assert counts[0] > 0 and counts[1] == counts[2]
