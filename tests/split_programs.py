"""What each rank does in test_split_loaders.py, under torchrun or alone: every check by name, its result or its error."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tensordict.nn import TensorDictSequential
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import models
import tdgeom as tg
from tdgeom.core import rank_failures

N, D = 47, 6


def data():
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    return [{"input": row, "label": int(row[0] > 0)} for row in x]


def model(seed=7):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(D, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5))


def pipeline(net=None):
    return pipeline_of(tg.Capture(net or model(), "module_output:2"))


def pipeline_of(capture):
    sites = capture.sites
    return TensorDictSequential(
        capture,
        tg.SelectTokens(sites, also=["label"]),
        tg.ForEach(tg.StreamingCovariance(), sites),
        tg.RowSample(sites, size=20, also=["label"]),
    )


def said(result):
    """Numbers of a run: its rows, what it counted, its sample and its moments."""
    if result is None:
        return None
    [site] = result["sample"].keys()
    return {
        "rows": int(result["run", "rows"]),
        "tokens": int(result["run", "tokens"]),
        "repeated": int(result["run", "repeated_rows"]),
        "sample": result["sample_row_id"].tolist(),
        "label": result["sample_carried", "label"].tolist(),
        "mean": result["moments", site, "mean"].tolist(),
        "covariance": result["moments", site, "covariance"].flatten().tolist(),
        "loader": result["run", "loader"],
    }


def rows_of(loader, **options):
    return said(tg.run(pipeline(), loader, progress=False, **options))


def sampler_loader(rank, world, batch_size=3, **options):
    dataset = data()
    sampler = DistributedSampler(
        dataset, num_replicas=world, rank=rank, **{"shuffle": True, "seed": 3, **options}
    )
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler)


def batches(size=5, ids=False, start=0):
    dataset = data()
    found = []
    for first in range(0, N, size):
        part = dataset[first : first + size]
        batch = {
            "input": torch.stack([one["input"] for one in part]),
            "label": torch.tensor([one["label"] for one in part]),
        }
        if ids:
            batch["sequence_id"] = torch.arange(first, first + len(part)) + start
        found.append(batch)
    return found


class EveryNth(IterableDataset):
    """A data set behind split_dataset_by_node, as datasets marks it."""

    def __init__(self, rank, world):
        from datasets.iterable_dataset import IterableDataset as Examples

        examples = Examples.from_generator(lambda: iter(data()))
        from datasets.distributed import split_dataset_by_node

        self.data = split_dataset_by_node(examples, rank=rank, world_size=world) if world > 1 else examples

    def __iter__(self):
        for one in self.data:
            yield {"input": torch.tensor(one["input"]), "label": one["label"]}


def accelerated(rank, world):
    from accelerate.data_loader import prepare_data_loader

    plain = DataLoader(data(), batch_size=4)
    return prepare_data_loader(
        plain, num_processes=world, process_index=rank, put_on_device=False, even_batches=True
    )


def seeded(seed):
    return DataLoader(data(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(seed))


def analysis(rank, world):
    loader = sampler_loader(rank, world)
    found = tg.analyze_model(
        model(), loader, sites="module_output:2", progress=False, select={"also": ["label"]}
    )
    if found is None:
        return None
    numbers = found.metrics.select_dtypes("number").iloc[0]
    loader = found.metadata["loader"]
    return {
        "numbers": {k: float(v) for k, v in numbers.items()},
        "rows": found.metadata["rows_observed"],
        "loader": loader,
    }


def comparison(rank, world):
    torch.manual_seed(8)
    other = torch.nn.Sequential(torch.nn.Linear(D, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    found = tg.compare(
        model(), other, batches(ids=True)[rank::world], ["linear_cka", "neighborhood_overlap"],
        sites="module_output:2", progress=False, sharded=True,
    )  # fmt: skip
    return (
        None
        if found is None
        else {k: float(v) for k, v in found.novelty.select_dtypes("number").iloc[0].items()}
    )


def probing(rank, world, bilinear=False):
    sites = ["module_output:0", "module_output:2"] if bilinear else "module_output:0"
    probe = tg.BilinearProbe() if bilinear else tg.LinearProbe(control=None)
    probing = tg.Probing(model(), sites, probe, capture={"in_keys": ["input"]})
    found = {}
    for name, loaders in {
        "held out": (sampler_loader(rank, world, seed=1),),
        "train and test": (batches()[:6], batches()[6:]),
    }.items():
        table = probing.run(*loaders)
        if (table is None) != (rank > 0):
            raise AssertionError("the table belongs to rank 0")
        found[name] = None if table is None else table["accuracy"].tolist()
    [fitted] = [probe.fitted["weight"].double().sum().item() for probe in probing.probes.values()]
    return {**found, "weight": round(fitted, 6)} if rank == 0 else None


def stored(rank, world):
    folder = Path(os.environ["TDGEOM_TEST_FOLDER"]) / f"store-{world}"
    capture = tg.Capture(model(), "module_output:2")
    keep = tg.StoreActivations(folder, capture.sites, also=["label"])
    steps = TensorDictSequential(capture, tg.SelectTokens(capture.sites, also=["label"]), keep)
    written = tg.run(steps, sampler_loader(rank, world), progress=False, max_rows=40)
    [record] = keep.store.catalogue.records()
    rows = keep.store.rows(record.id, batch_rows=7)
    again = TensorDictSequential(
        tg.ForEach(tg.StreamingCovariance(), capture.sites),
        tg.RowSample(capture.sites, size=20, also=["label"]),
    )
    found = {
        "written": None if written is None else int(written["stored", "rows"]),
        "read": said(tg.run(again, rows, progress=False)),
        "shuffled": said(tg.run(again, rows.shuffled(chunk_rows=4), progress=False)),
        "dealt": said(
            tg.run(
                again,
                DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows, world, rank, shuffle=False)),
                progress=False,
            )
        ),
    }
    return found if rank == 0 else None


def word_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    known = {word: number for number, word in enumerate(["<pad>", "<unk>", *(f"w{i}" for i in range(40))])}
    words = Tokenizer(kinds.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


def texts(rank, world):
    """Documents of several lengths, dealt out by a sampler, which run tokenizes."""
    words = [" ".join(f"w{(3 * i + j) % 40}" for j in range(2 + i % 5)) for i in range(13)]
    sampler = DistributedSampler(words, world, rank, shuffle=False)
    capture = tg.Capture(models.gpt2(), "residual_output.-1")
    steps = TensorDictSequential(
        capture,
        tg.SelectTokens(capture.sites, also=["document_id"]),
        tg.ForEach(tg.StreamingMean(), capture.sites),
        tg.Collect(capture.sites, also=["document_id"]),
    )
    loader = DataLoader(words, batch_size=2, sampler=sampler)
    found = tg.run(steps, loader, tokenizer=word_tokenizer(), progress=False)
    if found is None:
        return None
    [site] = found["mean"].keys()
    return {
        "rows": int(found["run", "rows"]),
        "documents": sorted(found["collected_carried", "document_id"].tolist()),
        "mean": found["mean", site, "mean"].tolist(),
    }


def second_pass(rank, world):
    first = tg.run(
        TensorDictSequential(tg.StreamingCovariance(in_keys=["input"]), tg.ConceptBasis(n=2)),
        batches(),
        progress=False,
    )
    steps = TensorDictSequential(
        tg.Project(in_keys=["input", *tg.Project().in_keys[1:]]),
        tg.StreamingMean(in_keys=tg.Project().out_keys),
    )
    found = tg.run(steps, batches(), inputs=first, progress=False)
    return None if found is None else found["mean", "variance"].tolist()


def uneven(rank, world):
    """Eight batches and one of them again on rank 0, the others' on the ranks behind it."""
    found = batches(ids=True)
    if world == 1:
        return found
    return found[:8] if rank == 0 else found[7:] if rank == 1 else found[9:]


def shuffled(found, seed):
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    return [found[place] for place in order]


def after(index, change, loader):
    for number, batch in enumerate(loader):
        yield change(batch) if number == index else batch


def halves(rank, world):
    """What split_dataset_by_node gives of a map-style data set: parts that lie one behind the other."""
    from datasets import Dataset
    from datasets.distributed import split_dataset_by_node

    whole = Dataset.from_list([{**one, "input": one["input"].tolist()} for one in data()]).with_format(
        "torch"
    )
    return DataLoader(split_dataset_by_node(whole, rank, world) if world > 1 else whole, batch_size=3)


def prepared(rank, world):
    """A loader that rank 0 reads for all, and a model, as Accelerate prepares them."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    own = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=world > 1))
    dataset = [{**one, "sequence_id": number} for number, one in enumerate(data())]
    net, loader = own.prepare(model(), DataLoader(dataset, batch_size=4))
    capture = tg.Capture(net, "module_output:**2")
    return said(tg.run(pipeline_of(capture), loader, progress=False, max_rows=31))


def by_one_rank(rank, world):
    """One rank works by itself while the others go on."""
    if rank:
        return None
    with tg.alone():
        return rows_of(batches(), max_rows=33)


def late(rank, world):
    """The last rank begins later than the others expect, who say so and wait."""
    rank_failures._SOON = 0.3
    if rank and rank == world - 1:
        time.sleep(3.5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = rows_of(batches())
    text = [str(one.message) for one in told if "have not called it" in str(one.message)]
    if world > 1 and rank == 0:
        assert len(text) == 1 and f"the ranks [{world - 1}]" in text[0] and "tg.alone()" in text[0], text
    return found


CHECKS = {
    "one loader": lambda r, w: rows_of(batches()),
    "one loader, cut": lambda r, w: rows_of(batches(), max_rows=33),
    "one loader, one seed": lambda r, w: rows_of(seeded(5), max_rows=29),
    "sampler": lambda r, w: rows_of(sampler_loader(r, w)),
    "sampler, cut": lambda r, w: rows_of(sampler_loader(r, w), max_rows=31),
    "sampler, cut in one batch": lambda r, w: rows_of(sampler_loader(r, w, batch_size=8), max_rows=5),
    "sampler that drops": lambda r, w: rows_of(sampler_loader(r, w, drop_last=True), max_rows=44),
    "accelerate": lambda r, w: rows_of(accelerated(r, w)),
    "accelerate, cut": lambda r, w: rows_of(accelerated(r, w), max_rows=31),
    "split_by_node": lambda r, w: rows_of(DataLoader(EveryNth(r, w), batch_size=3)),
    "ids": lambda r, w: rows_of(batches(ids=True)[r::w]),
    "ids, cut": lambda r, w: rows_of(batches(ids=True)[r::w], max_rows=27),
    "ids, uneven": lambda r, w: rows_of(uneven(r, w), sharded=True),
    "ids, empty": lambda r, w: rows_of(batches(ids=True) if r == w - 1 else [], sharded=True),
    "told": lambda r, w: rows_of(batches()[r::w], sharded=True),
    "halves": lambda r, w: rows_of(halves(r, w), sharded=True),
    "halves, cut": lambda r, w: rows_of(halves(r, w), sharded=True, max_rows=20),
    "halves with ids, cut": lambda r, w: rows_of(
        batches(size=6, ids=True) if w == 1 else batches(size=6, ids=True)[r * 8 // w : (r + 1) * 8 // w], max_rows=20
    ),
    "prepared": prepared,
    "by one rank": by_one_rank,
    "late": late,
    "analyze_model": analysis,
    "compare": comparison,
    "Probing": probing,
    "Probing pairs": lambda r, w: probing(r, w, bilinear=True),
    "store": stored,
    "second pass": second_pass,
    "texts": texts,
}  # fmt: skip

REFUSED = {
    "lengths": lambda r, w: rows_of(batches() if r == 0 else batches()[:-1]),
    "lengths, cut": lambda r, w: rows_of(batches() if r == 0 else batches()[:-1], max_rows=46),
    "seeds": lambda r, w: rows_of(seeded(r)),
    "own data": lambda r, w: rows_of([{**b, "input": b["input"] + r} for b in batches()]),
    "another batch later": lambda r, w: rows_of(after(3, lambda b: {**b, "input": b["input"] + r}, batches())),
    "seeds with ids": lambda r, w: rows_of(shuffled(batches(size=1, ids=True), r)),
    "part without a word": lambda r, w: rows_of(batches()[r::w]),
    "the same part": lambda r, w: rows_of(batches()[:4], sharded=True),
    "sampler of other ranks": lambda r, w: rows_of(sampler_loader(r, w + 1)),
    "sampler of one rank": lambda r, w: rows_of(sampler_loader(0, w)),
    "sampler seeds": lambda r, w: rows_of(sampler_loader(r, w, seed=r)),
    "sampler on one rank": lambda r, w: rows_of(sampler_loader(r, w) if r else batches(size=3)),
    "sharded=False": lambda r, w: rows_of(sampler_loader(r, w), sharded=False),
    "sharded on one": lambda r, w: rows_of(batches(ids=True)[r::w], sharded=r == 0),
    "weights": lambda r, w: said(tg.run(pipeline(model(seed=r)), batches(), progress=False)),
    "weights that change": lambda r, w: changing(r),
    "settings": lambda r, w: said(tg.run(tg.RowSample(size=8 + r, in_keys=["input", "row_id"]), batches())),
    "limits": lambda r, w: rows_of(batches(), max_rows=20 + r),
    "TunedLens": lambda r, w: tg.TunedLens(models.gpt2(), ["residual_output.0"]).fit(sampler_loader(r, w)),
    "halves without a word": lambda r, w: rows_of(halves(r, w)),
    "profile of nothing": lambda r, w: tg.intrinsic_dimension_profile(None) if r else refuse(),
}  # fmt: skip


def refuse():
    raise ValueError("rank 0 has the result")


def changing(rank):
    net = model()

    def train(batch):
        with torch.no_grad():
            net[2].bias.add_(rank)
        return batch

    return said(tg.run(pipeline(net), after(4, train, batches()), progress=False))


def outcome(check, rank, world):
    try:
        return {"result": check(rank, world)}
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def main(out, which):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    no_group = outcome(CHECKS["one loader"], rank, world) if world > 1 else None
    if world > 1:
        dist.init_process_group("gloo")
    checks = {**CHECKS, **(REFUSED if world > 1 else {})}
    wanted = which.split(",") if which else list(checks)
    found = {name: outcome(checks[name], rank, world) for name in wanted if name in checks}
    Path(out, f"{world}-{rank}.json").write_text(json.dumps({**found, "no group": no_group}))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
