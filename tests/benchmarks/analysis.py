"""The default analysis with ablation, beside the bare forward pass and representation-geometry 0.1.0.

GPT-2-small shape (random weights, GPT2LMHeadModel), 16,384 tokens in batches of 4 x 256. The contestants run in turn in one
process, several rounds; the table gives the median seconds and the median of each round's ratio.

    python -m pip install -e ".[bench]" -c tests/constraints.txt
    python tests/benchmarks/analysis.py            # times
    python tests/benchmarks/analysis.py --errors   # processor time with and without standard errors, one thread
    python tests/benchmarks/analysis.py --memory   # peak memory against the number of batches
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tdgeom as tg

BATCH, LENGTH = 4, 256


def model_and_batches(
    batches: int, layers: int = 12
) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """GPT-2 small with random weights, or fewer layers of it, and random tokens without padding."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers)).eval()
    ids = torch.randint(0, 50_257, (batches, BATCH, LENGTH))
    return model, [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


def bare(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """The whole forward pass and nothing else."""
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)


def ours(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """The default analysis and the ablation, from a sample of 4,096 rows."""
    tg.analyze_model(
        model,
        batches,
        max_rows=len(batches) * BATCH * LENGTH,
        diagnostics=["normalization_ablation"],
        progress=False,
    )


def plain(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """The default analysis."""
    tg.analyze_model(model, batches, max_rows=len(batches) * BATCH * LENGTH, progress=False)


def with_errors(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """The default analysis with standard errors of all measures."""
    tg.analyze_model(model, batches, max_rows=len(batches) * BATCH * LENGTH, errors=True, progress=False)


def theirs(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """The same analysis by representation-geometry: its sample has its default 512 rows."""
    from representation_geometry import analyze_model

    analyze_model(
        model,
        batches,
        max_tokens=len(batches) * BATCH * LENGTH,
        diagnostics=["normalization_ablation"],
    )


def seconds(clock: Callable[[], float], function: Callable[..., None], *args: object) -> float:
    """Time of one call by a clock."""
    begin = clock()
    function(*args)
    return clock() - begin


def times(
    rounds: int,
    batches: int,
    contestants: dict[str, Callable[..., None]],
    clock: Callable[[], float] = time.perf_counter,
    layers: int = 12,
) -> None:
    """Print the table of times: wall time, or by another clock."""
    model, data = model_and_batches(batches, layers)
    for function in contestants.values():
        function(model, data[:2])
    rows: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            rows[name].append(seconds(clock, function, model, data))
    first = next(iter(rows.values()))
    print(
        f"{batches * BATCH * LENGTH:,} tokens, {rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"| | seconds (median) | min - max | x {next(iter(contestants))} | x representation-geometry |")
    print("|---|---|---|---|---|")
    for name, values in rows.items():
        ratio = statistics.median(a / b for a, b in zip(values, first))
        peer = rows.get("representation-geometry 0.1.0")
        other = f"{statistics.median(a / b for a, b in zip(values, peer)):.2f}" if peer else ""
        span = f"{min(values):.1f} - {max(values):.1f}"
        print(f"| {name} | {statistics.median(values):.1f} | {span} | {ratio:.2f} | {other} |")


ONE = {"bare": bare, "ours": ours, "plain": plain, "errors": with_errors}


def memory(pair: tuple[str, str] = ("bare", "ours")) -> None:
    """Print peak memory for more and more batches, each in a process of its own."""
    print(f"| batches | {pair[0]}: peak MiB | {pair[1]}: peak MiB | beyond |")
    print("|---|---|---|---|")
    for batches in (4, 16, 64):
        peaks = []
        for which in pair:
            done = subprocess.run(
                [sys.executable, __file__, "--one", which, "--batches", str(batches)],
                capture_output=True,
                text=True,
                check=True,
            )
            peaks.append(int(done.stdout.split()[-1]))
        print(f"| {batches} | {peaks[0]} | {peaks[1]} | {peaks[1] - peaks[0]} |")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--one", choices=tuple(ONE))
    options = parser.parse_args()
    if options.one:
        ONE[options.one](*model_and_batches(options.batches, options.layers))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    elif options.memory:
        memory(("plain", "errors") if options.errors else ("bare", "ours"))
    elif options.errors:
        torch.set_num_threads(1)  # processor time, that a busy machine does not stretch
        pair = {"default analysis": plain, "with errors": with_errors}
        times(options.rounds, options.batches, pair, time.process_time, options.layers)
    else:
        contestants = {"bare forward pass": bare, "tdgeom": ours}
        if not options.without_peer:
            contestants["representation-geometry 0.1.0"] = theirs
        times(options.rounds, options.batches, contestants, layers=options.layers)


if __name__ == "__main__":
    main()
