"""Hooking contexts beside tdhook 0.3.0: the same numbers on the same models, and what a capture costs.

Parity is checked on tiny random GPT-2 and Llama models: caching, steering, activation addition, patching. Costs are CPU time
of one thread, taken in turn in one process, round after round; the table gives medians. `added` is over the bare call.

    python -m pip install -e ".[bench]" -c tests/constraints.txt
    python tests/benchmarks/hooks.py             # parity, toy stack, GPT-2 small
    python tests/benchmarks/hooks.py --short     # fewer rounds and a shorter GPT-2 batch
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tensordict import TensorDict
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import models
import tdgeom as tg

MODELS = {"gpt2": ("transformer.h.{}.mlp", models.gpt2), "llama": ("model.layers.{}.mlp", models.llama)}
DEPTH, SITES = 3, 48


def td_of(**entries: torch.Tensor) -> TensorDict:
    """A TensorDict with the batch size that tdhook's wrapper wants."""
    return TensorDict(entries, batch_size=[3])


def parity() -> None:
    """The largest difference between the two tools, for each method."""
    from tdhook.latent import ActivationAddition, ActivationCaching, ActivationPatching, SteeringVectors

    for name, (path, build) in MODELS.items():
        model, ids = build(), models.text_batch()["input_ids"]
        other, where = ids.flip(0).contiguous(), path.format(1)
        keys = {"in_keys": ["input_ids"], "out_keys": ["logits"]}
        worst = {}
        with torch.no_grad():
            pattern = path.replace(".", r"\.").format(r"\d+") + "$"  # it matches prefixes
            with ActivationCaching(pattern).prepare(model, **keys) as hooked:
                cache = hooked(td_of(input_ids=ids))["cache"]
            ours = tg.Capture(model, f"module_output:{path.format('*')}")(td_of(input_ids=ids))["acts"]
            assert len(cache.keys()) == len(ours.keys()) == DEPTH
            worst["caching"] = max(gap(cache[p], ours[f"module_output:{p}"]) for p in cache.keys())

            vector = torch.linspace(-1, 1, models.WIDTH)
            add = lambda module_key, output, v=vector: output + v
            with SteeringVectors([where], add).prepare(model, **keys) as hooked:
                theirs = hooked(td_of(input_ids=ids))["logits"]
            with tg.Intervene(model, {f"module_output:{where}": tg.Steer(vector)}):
                worst["steering"] = gap(theirs, model(ids).logits)
            worst["steering moved"] = gap(theirs, model(ids).logits)

            prompts = {"positive": {"input_ids": ids}, "negative": {"input_ids": other}}
            with ActivationAddition([where]).prepare(model, **keys) as hooked:
                theirs = hooked(TensorDict(prompts, batch_size=[3]))["steer", where]
            edit = tg.ActivationAddition({"input_ids": ids}, {"input_ids": other}, reduce="positions")
            third = ids.roll(1, 1)
            with tg.Intervene(model, {f"module_output:{where}": edit}):
                own = model(third).logits
            with tg.Intervene(model, {f"module_output:{where}": lambda x, v=theirs: x + v}):
                worst["activation addition"] = gap(model(third).logits, own)

            with ActivationPatching([where]).prepare(model, **keys) as hooked:
                theirs = hooked(td_of(input_ids=ids, patched=td_of(input_ids=other)))["patched", "logits"]
            with tg.Intervene(model, {f"module_output:{where}": tg.Patch(inputs={"input_ids": ids})}):
                worst["patching"] = gap(theirs, model(other).logits)
            worst["patching moved"] = gap(theirs, model(other).logits)
        moved = {what: value for what, value in worst.items() if what.endswith("moved")}
        assert all(value > 1e-2 for value in moved.values()), moved
        assert all(value < 1e-5 for what, value in worst.items() if what not in moved), worst
        print(f"{name:6s}", "  ".join(f"{what} {value:.1e}" for what, value in worst.items()))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference."""
    return float((a - b).abs().max())


def interleaved(
    contestants: dict[str, Callable[[], object]], rounds: int, repeat: int
) -> dict[str, list[float]]:
    """CPU seconds of this thread a call of each contestant in each round, in turn: other processes count less."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.thread_time()
            for _ in range(repeat):
                call()
            times[name].append((time.thread_time() - start) / repeat)
    return times


def report(times: dict[str, list[float]], bare: str, unit: float, name: str) -> None:
    """Median, median of what each round adds to the bare call, and median ratio."""
    for who, taken in times.items():
        added = statistics.median(a - b for a, b in zip(taken, times[bare]))
        ratio = statistics.median(a / b for a, b in zip(taken, times[bare]))
        print(
            f"{who:34s} {statistics.median(taken) * unit:9.1f} {name}   added {added * unit:+8.1f}   x {ratio:.3f}"
        )


def toy(rounds: int, repeat: int) -> None:
    """48 sites of a stack of 48 small linear layers."""
    from tdhook.latent import ActivationCaching

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(SITES)]).eval()
    x = torch.randn(4, 8)
    capture = tg.Capture(model, "residual_output", in_keys=["x"])
    entered = tg.Capture(model, "residual_output")
    caching = ActivationCaching(r"\d+$").prepare(model, in_keys=["x"], out_keys=["y"])

    with torch.no_grad(), caching as hooked:
        assert len(hooked(TensorDict({"x": x}, batch_size=[4]))["cache"].keys()) == SITES
    td = TensorDict({"x": x}, batch_size=[4])

    def ours_in_context() -> None:
        calls = entered.__enter__()
        try:
            for _ in range(repeat):
                model(x)
                calls.clear()
        finally:
            entered.__exit__(None, None, None)

    def theirs_in_context() -> None:
        with caching as hooked:
            for _ in range(repeat):
                hooked(td.copy())

    def theirs() -> None:
        with caching as hooked:
            hooked(td.copy())

    with torch.no_grad():
        once = interleaved(
            {
                "bare": lambda: model(x),
                "tdgeom, module form": lambda: capture(td.copy()),
                "tdhook, entered each call": theirs,
            },
            rounds,
            repeat,
        )
        report(once, "bare", 1e6, "us")

        def bare() -> None:
            for _ in range(repeat):
                model(x)

        inside = interleaved(
            {"bare": bare, "tdgeom, inside": ours_in_context, "tdhook, inside": theirs_in_context}, rounds, 1
        )
        report({name: [t / repeat for t in taken] for name, taken in inside.items()}, "bare", 1e6, "us")


def against_tdhook(rounds: int, repeat: int) -> None:
    """Capture, steer and patch of a tiny GPT-2, entered once, and with the object made for every call."""
    from tdhook.latent import ActivationCaching, ActivationPatching, SteeringVectors

    model, path = models.gpt2().eval(), "transformer.h.1.mlp"
    ids = models.text_batch()["input_ids"]
    other = ids.flip(0).contiguous()
    keys = {"in_keys": ["input_ids"], "out_keys": ["logits"]}
    vector = torch.linspace(-1, 1, models.WIDTH)
    site = f"module_output:{path}"
    add = lambda module_key, output, v=vector: output + v
    theirs = {
        "capture": lambda: ActivationCaching(path.replace(".", r"\.") + "$"),
        "steer": lambda: SteeringVectors([path], add),
        "patch": lambda: ActivationPatching([path]),
    }
    ours = {
        "capture": lambda: tg.Capture(model, site, model_outputs="logits"),
        "steer": lambda: tg.Intervene(model, {site: tg.Steer(vector)}, model_outputs="logits"),
        "patch": lambda: tg.Intervene(
            model, {site: tg.Patch(inputs={"input_ids": ids})}, model_outputs="logits"
        ),
    }

    def given(what: str) -> TensorDict:
        both = {"input_ids": ids, "patched": td_of(input_ids=other)}
        return td_of(**(both if what == "patch" else {"input_ids": ids}))

    def use(what: str, own: Any) -> None:
        """The same work as theirs: tensors in a TensorDict, logits out of it; a patch runs the donor and reads it."""
        own(td_of(input_ids=other if what == "patch" else ids))

    def bare(what: str) -> None:
        model(ids)
        if what == "patch":  # a donor's pass and the patched one
            model(other)

    with torch.no_grad():
        for what in ours:
            own, prepared = ours[what](), theirs[what]().prepare(model, **keys)

            def own_once(what: str = what, own: Any = own) -> None:
                use(what, own)

            def their_once(what: str = what, prepared: Any = prepared) -> None:
                with prepared as hooked:
                    hooked(given(what))

            def own_anew(what: str = what) -> None:
                use(what, ours[what]())

            def their_anew(what: str = what) -> None:
                with theirs[what]().prepare(model, **keys) as hooked:
                    hooked(given(what))

            for name, pair in (
                ("", (own_once, their_once)),
                (", object made each time", (own_anew, their_anew)),
            ):
                times = interleaved(
                    {"bare": lambda what=what: bare(what), "tdgeom": pair[0], "tdhook": pair[1]},
                    rounds,
                    repeat,
                )
                ratio = statistics.median(a / b for a, b in zip(times["tdgeom"], times["tdhook"]))
                medians = {who: statistics.median(taken) * 1e6 for who, taken in times.items()}
                said = ", ".join(f"{who} {value:.0f} us" for who, value in medians.items())
                print(f"{what + name:34s} {said}: {ratio:.2f} of tdhook")


def gpt2_small(rounds: int, length: int) -> None:
    """48 sites of a GPT-2 of the small size with random weights."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    ids = torch.randint(0, 50_257, (1, length))
    kinds = ["residual_input", "attn_output", "mlp_output", "residual_output"]
    capture = tg.Capture(model, kinds)
    assert len(capture.sites) == SITES

    def captured() -> None:
        with capture as calls:
            model(ids, use_cache=False)
        calls.clear()

    with torch.no_grad():
        times = interleaved(
            {"bare GPT-2 small": lambda: model(ids, use_cache=False), "tdgeom, 48 sites": captured}, rounds, 1
        )
    report(times, "bare GPT-2 small", 1e3, "ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer rounds, a shorter batch")
    short = parser.parse_args().short
    torch.set_num_threads(1)
    parity()
    toy(rounds=11 if short else 31, repeat=20)
    against_tdhook(rounds=11 if short else 31, repeat=10)
    gpt2_small(rounds=7 if short else 31, length=128 if short else 256)
