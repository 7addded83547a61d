"""The activation store beside plain files: how fast it writes, how fast random rows come back, how much memory it takes.

    python tests/benchmarks/store.py                          # 2 GB, every table
    python tests/benchmarks/store.py --gigabytes 20 --only memory
    python tests/benchmarks/store.py --folder /mnt/fast       # another disk

Rows are float32 of ``--sites`` sites and ``--width`` features; contestants take turns, several rounds; tables give the
median and the median of each round's ratio. Everything written is brought to the disk (fsync) before the clock stops; reads come
from the page cache where the rows fit into memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict

import tdgeom as tg

BLOCK_ROWS = 2048
STEP = 1 << 18  # bytes a write(); of several sizes the one that plain files are written fastest with


class Rows:
    """Blocks of rows at several sites, made once and given again and again under new ids."""

    def __init__(self, gigabytes: float, sites: int, width: int) -> None:
        self.sites = [f"residual_input.{i}" for i in range(sites)]
        self.width = width
        self.row_bytes = 4 * sites * width
        self.blocks = max(1, int(gigabytes * 1e9 / self.row_bytes / BLOCK_ROWS))
        generator = torch.Generator().manual_seed(0)
        self.block = {site: torch.randn(BLOCK_ROWS, width, generator=generator) for site in self.sites}

    @property
    def count(self) -> int:
        return self.blocks * BLOCK_ROWS

    @property
    def bytes(self) -> int:
        return self.count * self.row_bytes

    def __iter__(self) -> Iterator[TensorDict]:
        for number in range(self.blocks):
            ids = torch.arange(number * BLOCK_ROWS, (number + 1) * BLOCK_ROWS)
            yield TensorDict({"tokens": self.block, "row_id": ids}, batch_size=[])


# --- writers: each leaves the same bytes on the disk


def write_plain(rows: Rows, folder: Path, shard_bytes: int) -> None:
    """What the disk does: the blocks one after the other into files of the shards' size, each brought to the disk."""
    a_file = max(1, round(shard_bytes / rows.row_bytes / BLOCK_ROWS))
    for first in range(0, rows.blocks, a_file):
        with open(folder / f"{first}.bin", "wb", buffering=0) as handle:
            for _ in range(first, min(rows.blocks, first + a_file)):
                for block in rows.block.values():
                    rest = memoryview(block.numpy()).cast("B")
                    while rest:
                        rest = rest[handle.write(rest[:STEP]) :]
            os.fsync(handle.fileno())


def write_store(rows: Rows, folder: Path, shard_bytes: int, dtype: str | None = None) -> None:
    """The stage as ``run`` drives it."""
    keep = tg.StoreActivations(folder, rows.sites, shard_bytes=shard_bytes, dtype=dtype)
    keep.reset()
    for batch in rows:
        keep.update(batch)
    keep.sync_()


def write_tensordict(rows: Rows, folder: Path, shard_bytes: int) -> None:
    """Shards of the same size as memory-mapped TensorDicts, one file a site, each brought to the disk."""
    a_shard = max(1, round(shard_bytes / rows.row_bytes / BLOCK_ROWS))
    for first in range(0, rows.blocks, a_shard):
        count = min(a_shard, rows.blocks - first) * BLOCK_ROWS
        place = folder / f"shard-{first}"
        shard = TensorDict({}, batch_size=[count]).memmap_(place)
        for site in rows.sites:
            shard.make_memmap(site, (count, rows.width), dtype=torch.float32)
        for begin in range(0, count, BLOCK_ROWS):
            for site in rows.sites:
                shard.get(site)[begin : begin + BLOCK_ROWS] = rows.block[site]
        for path in place.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())


def write_memmap(rows: Rows, folder: Path) -> None:
    """All rows of all sites in one NumPy memory map."""
    shape = (rows.count, len(rows.sites), rows.width)
    whole = np.lib.format.open_memmap(folder / "rows.npy", mode="w+", dtype=np.float32, shape=shape)
    for number in range(rows.blocks):
        for i, site in enumerate(rows.sites):
            whole[number * BLOCK_ROWS : (number + 1) * BLOCK_ROWS, i] = rows.block[site].numpy()
    whole.flush()


# --- readers: random rows of every site


def reader_of_store(rows: Rows, folder: Path) -> Callable[[np.ndarray], object]:
    store = tg.ActivationStore(folder)
    source = store.rows(store.catalogue.records()[-1].id)
    return lambda numbers: source[numbers]


def reader_of_memmap(rows: Rows, folder: Path) -> Callable[[np.ndarray], object]:
    whole = np.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False)
    return lambda numbers: torch.from_numpy(whole[numbers])


def reader_of_tensordict(rows: Rows, folder: Path) -> Callable[[np.ndarray], object]:
    places = sorted(folder.iterdir(), key=lambda path: int(path.name.split("-")[1]))
    shards = [TensorDict.load_memmap(place) for place in places]
    starts = np.cumsum([0, *(len(shard) for shard in shards)])

    def read(numbers: np.ndarray) -> object:
        shard_of = np.searchsorted(starts, numbers, side="right") - 1
        found = {site: torch.empty(len(numbers), rows.width) for site in rows.sites}
        for number in np.unique(shard_of):
            here = np.flatnonzero(shard_of == number)
            local = torch.from_numpy(numbers[here] - starts[number])
            for site in rows.sites:
                found[site][torch.from_numpy(here)] = shards[number].get(site)[local]
        return found

    return read


def compare_writing(rows: Rows, base: Path, shard_bytes: int, rounds: int) -> None:
    """Seconds and MB/s of every writer."""
    contestants: dict[str, Callable[[Path], None]] = {
        "plain sequential files": lambda folder: write_plain(rows, folder, shard_bytes),
        "store (safetensors shards)": lambda folder: write_store(rows, folder, shard_bytes),
        "store, cast to bfloat16": lambda folder: write_store(rows, folder, shard_bytes, "bfloat16"),
        "store, cast to float8": lambda folder: write_store(rows, folder, shard_bytes, "float8"),
        "memory-mapped TensorDicts": lambda folder: write_tensordict(rows, folder, shard_bytes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        names = list(contestants)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody always goes first
            folder = Path(tempfile.mkdtemp(dir=base))
            os.sync()
            begin = time.perf_counter()
            contestants[name](folder)
            seconds[name].append(time.perf_counter() - begin)
            shutil.rmtree(folder)
    print(
        f"\nWriting {rows.bytes / 1e9:.2f} GB of rows in shards of {shard_bytes / 2**20:.0f} MiB, {rounds} rounds\n"
    )
    print("| | s | MB of rows a second | x plain files |\n|---|---|---|---|")
    plain = seconds["plain sequential files"]
    for name, times in seconds.items():
        middle = statistics.median(times)
        ratio = statistics.median(a / b for a, b in zip(plain, times))
        print(f"| {name} | {middle:.2f} | {rows.bytes / middle / 1e6:,.0f} | {ratio:.2f} |")


def compare_reading(rows: Rows, base: Path, shard_bytes: int, rounds: int) -> None:
    """Rows a second of every reader, in batches of random rows."""
    folders = {name: base / name for name in ("store", "memmap", "tensordict")}
    for folder in folders.values():
        folder.mkdir()
    write_store(rows, folders["store"], shard_bytes)
    write_memmap(rows, folders["memmap"])
    write_tensordict(rows, folders["tensordict"], shard_bytes)
    readers = {
        "one NumPy memory map": reader_of_memmap(rows, folders["memmap"]),
        "store (safetensors shards)": reader_of_store(rows, folders["store"]),
        "memory-mapped TensorDicts": reader_of_tensordict(rows, folders["tensordict"]),
    }
    generator = np.random.default_rng(0)
    per_second: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        batches = [generator.integers(0, rows.count, BLOCK_ROWS) for _ in range(10)]
        for name, read in readers.items():
            begin = time.perf_counter()
            for numbers in batches:
                read(numbers)
            per_second[name].append(10 * BLOCK_ROWS / (time.perf_counter() - begin))
    print(f"\nRandom batches of {BLOCK_ROWS} rows at {len(rows.sites)} sites, {rounds} rounds\n")
    print("| | rows a second | x NumPy |\n|---|---|---|")
    for name, rates in per_second.items():
        ratio = statistics.median(a / b for a, b in zip(rates, per_second["one NumPy memory map"]))
        print(f"| {name} | {statistics.median(rates):,.0f} | {ratio:.2f} |")
    for folder in folders.values():
        shutil.rmtree(folder)


def measure_memory(rows: Rows, base: Path, shard_bytes: int) -> None:
    """Peak resident memory of a process that writes everything and then streams it through a pipeline."""
    list(rows)  # what the rows themselves take
    before = _peak()
    write_store(rows, base / "memory", shard_bytes)
    written = _peak()
    store = tg.ActivationStore(base / "memory")
    source = store.rows(store.catalogue.records()[-1].id)
    tg.run(tg.ForEach(tg.StreamingMean(), rows.sites), source, progress=False)
    print(
        f"\nMemory for {rows.bytes / 1e9:.2f} GB: {before:,.0f} MB before, at most {written:,.0f} MB writing, "
        f"{_peak():,.0f} MB writing and reading."
    )


def _peak() -> float:
    """MB at most so far; a process on Linux inherits its parent's ``ru_maxrss``, so the kernel's own figure is read there."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--sites", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--shard-mebibytes", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; default the temporary folder"
    )
    parser.add_argument("--only", choices=["write", "read", "memory"], default=None)
    given = parser.parse_args()
    rows = Rows(given.gigabytes, given.sites, given.width)
    shard_bytes = given.shard_mebibytes * 2**20
    base = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        if given.only in (None, "write"):
            compare_writing(rows, base, shard_bytes, given.rounds)
        if given.only in (None, "read"):
            compare_reading(rows, base, shard_bytes, given.rounds)
        if given.only == "memory":
            measure_memory(rows, base, shard_bytes)
        elif given.only is None:  # in a process of its own: the readers' maps count as memory
            subprocess.run([sys.executable, *sys.argv, "--only", "memory"], check=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
