"""What the numbers cost beside the model on an accelerator: one command, under six minutes on a card of today.

    python -m pip install -e ".[dev]" -c tests/constraints.txt    # with a torch that knows the card
    python tests/benchmarks/accelerator.py                        # the tests of on_an_accelerator.py, then the tables
    python tests/benchmarks/accelerator.py --device cpu --small   # whether it runs, anywhere

Contestants take turns in one process; times are medians, ratios medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from transformers import LlamaConfig, LlamaForCausalLM

import tdgeom as tg
from tdgeom import functional as F

TESTS = Path(__file__).parents[1]


def waited(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    contestants: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, work in contestants.items():
            waited(device)
            begin = time.perf_counter()
            work()
            waited(device)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def row(name: str, seconds: list[float], first: list[float], further: str) -> str:
    """A line of a table."""
    ratio = statistics.median(a / b for a, b in zip(seconds, first))
    return f"| {name} | {1e3 * statistics.median(seconds):,.2f} ms | {ratio:.2f} | {further} |"


def llama(small: bool, device: torch.device) -> torch.nn.Module:
    """Four layers of the shape of Llama-3-8B, random weights, bfloat16; or small ones."""
    wide = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128_256,
    }  # fmt: skip
    narrow = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    }  # fmt: skip
    config = LlamaConfig(
        num_hidden_layers=4, pad_token_id=None, bos_token_id=1, eos_token_id=2, **(narrow if small else wide)
    )
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def model_table(small: bool, device: torch.device, rounds: int) -> None:
    """A bare forward pass, and one with ours around it."""
    model = llama(small, device)
    batch, length, count = (2, 16, 2) if small else (8, 1024, 4)
    ids = torch.randint(3, model.config.vocab_size, (count, batch, length), device=device)
    loader = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]

    def bare() -> None:
        with torch.no_grad():
            for given in loader:
                model(**given, use_cache=False)

    def up_to_the_last_block() -> None:
        with torch.no_grad():
            for given in loader:
                capture(TensorDict(given))

    capture = tg.Capture(model, sites="residual_input")
    s = capture.sites

    def pipeline(*stages: Any) -> Callable[[], Any]:
        whole = TensorDictSequential(tg.Capture(model, sites="residual_input"), tg.SelectTokens(s), *stages)
        return lambda: tg.run(whole, loader, progress=False)

    seconds = in_turn(
        {
            "bare forward pass": bare,
            "captured, stopped before the last block": up_to_the_last_block,
            "run: a mean of every site": pipeline(tg.ForEach(tg.StreamingMean(), s)),
            "run: covariance of every site": pipeline(tg.ForEach(tg.StreamingCovariance(), s)),
            "run: covariance, float32": pipeline(tg.ForEach(tg.StreamingCovariance(precision="float32"), s)),
            "the default analysis": lambda: tg.analyze_model(
                model, loader, max_rows=count * batch * length, sites="residual_input", progress=False
            ),
        },
        rounds,
        device,
    )
    tokens = count * batch * length
    print(f"\n### Four layers of width {model.config.hidden_size:,}, bfloat16, {tokens:,} tokens\n")
    print("| | median | x bare | tokens a second |\n|---|---|---|---|")
    first = seconds["bare forward pass"]
    for name, taken in seconds.items():
        print(row(name, taken, first, f"{tokens / statistics.median(taken):,.0f}"))


def covariance_table(small: bool, device: torch.device, rounds: int) -> None:
    """An update of the covariance beside the bare product."""
    print("\n### Covariance: one update of 8,192 rows\n")
    print("| | median | x float32 product | TFLOP/s of a whole square |\n|---|---|---|---|")
    for width in (32, 64) if small else (768, 4096):
        n = 256 if small else 8192
        x = torch.randn(n, width, device=device) + 0.3
        wide = x.double() if device.type != "mps" else x
        contestants: dict[str, Callable[[], Any]] = {
            f"D = {width:,}: float32 x.T @ x": lambda x=x: x.T @ x,
            f"D = {width:,}: float64 x.T @ x": lambda wide=wide: wide.T @ wide,
        }
        for precision in ("auto", "float64", "float32"):
            stage = tg.StreamingCovariance(precision=precision)
            contestants[f"D = {width:,}: update, {precision}"] = lambda stage=stage, x=x: stage.update(
                TensorDict(tokens=x)
            )
        seconds = in_turn(contestants, rounds, device)
        first = next(iter(seconds.values()))
        for name, taken in seconds.items():
            print(row(name, taken, first, f"{2e-12 * n * width**2 / statistics.median(taken):.2f}"))


def neighbours_table(small: bool, device: torch.device, rounds: int) -> None:
    """TwoNN and information imbalance, rows already there."""
    print("\n### Neighbours\n\n| | median | x the product of all rows | |\n|---|---|---|---|")
    for n in (200, 400) if small else (20_000, 100_000):
        for width in (16,) if small else (768, 4096):
            x = torch.randn(n, width, device=device)
            y = x + 0.5 * torch.randn_like(x)

            def products(x: torch.Tensor = x) -> None:
                for part in x.split(4096):
                    part @ x.T

            contestants: dict[str, Callable[[], Any]] = {
                "products": products,
                "twonn": lambda x=x: F.twonn(x).estimate,
            }
            if n <= 20_000:
                contestants["imbalance"] = lambda x=x, y=y: F.information_imbalance(x, y)
            seconds = in_turn(contestants, 1 if n > 20_000 else rounds, device)
            for name, taken in seconds.items():
                print(row(f"N = {n:,}, D = {width:,}: {name}", taken, seconds["products"], ""))


def eigen_table(small: bool, device: torch.device, rounds: int) -> None:
    """Decompositions: of one site, and how long 32 take in turn."""
    width = 32 if small else 4096
    x = torch.randn(2 * width, width, device=device, dtype=torch.float64)
    covariance = x.T @ x / (2 * width)
    stage = tg.EigenSpectrum(k=4 if small else 32)
    contestants = {
        "torch.linalg.eigvalsh": lambda: torch.linalg.eigvalsh(covariance),
        "torch.linalg.eigh": lambda: torch.linalg.eigh(covariance),
        "EigenSpectrum": lambda: stage(moments_covariance=covariance),
    }
    seconds = in_turn(contestants, rounds, device)
    print(f"\n### Eigenvalues and leading vectors of one site, D = {width:,}\n")
    print("| | median | x eigvalsh | 32 sites |\n|---|---|---|---|")
    for name, taken in seconds.items():
        whole = f"{32 * statistics.median(taken):.1f} s"
        print(row(name, taken, seconds["torch.linalg.eigvalsh"], whole))


def store_table(small: bool, device: torch.device, rounds: int) -> None:
    """Rows of the device written to the disk."""
    n, width = (256, 16) if small else (65_536, 4096)
    rows = torch.randn(n, width, device=device).bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        store = tg.ActivationStore(folder)

        def write() -> None:
            stage = tg.StoreActivations(store, ["x"])
            tg.run(stage, [{"tokens": {"x": part}} for part in rows.split(8192)], progress=False)

        def copy() -> None:
            for part in rows.split(8192):
                part.cpu()

        seconds = in_turn({"copied to the host": copy, "store": write}, min(rounds, 2), device)
    print("\n### The activation store\n\n| | median | x copying | MB a second |\n|---|---|---|---|")
    for name, taken in seconds.items():
        megabytes = rows.numel() * 2 / 1e6 / statistics.median(taken)
        print(row(name, taken, seconds["copied to the host"], f"{megabytes:,.0f}"))


TABLES = (model_table, covariance_table, neighbours_table, eigen_table, store_table)


def main() -> None:
    """The tests on that device, then every table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that any machine takes in seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-tests", action="store_true", help="the tables alone")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --small shows that the command runs")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, tdgeom {tg.__version__}"
    )
    if not given.without_tests:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "on_an_accelerator.py",
        ]
        where = {**os.environ, "TDGEOM_DEVICE": given.device}
        done = subprocess.run(command, cwd=TESTS, env=where, stdout=subprocess.PIPE, text=True, check=False)
        print(f"\nTests on it: {done.stdout.strip().splitlines()[-1]}")
        if done.returncode:
            print(done.stdout[-6000:], file=sys.stderr)
    for table in TABLES:
        table(given.small, device, given.rounds)


if __name__ == "__main__":
    main()
