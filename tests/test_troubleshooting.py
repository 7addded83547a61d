"""Every message that docs/howto/troubleshooting.md explains is provoked here, and is the one that users get."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

import models
import tdgeom as tg

PAGE = Path(__file__).parents[1] / "docs/howto/troubleshooting.md"
HEADINGS = re.findall(r"^### `(.*)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
BATCH = models.text_batch()


def batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    return [{**BATCH, "input_ids": (BATCH["input_ids"] + step) % 44 + 4} for step in range(count)]


def rows(count: int = 200, width: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def captured(sites: str, model: nn.Module | None = None, **settings) -> TensorDict:
    return tg.Capture(models.gpt2() if model is None else model, sites, **settings)(TensorDict(BATCH))


def run(*stages: Callable, model: nn.Module | None = None, data=None, **settings):
    """A run over the stages, each made for the sites of a tiny model's stream."""
    capture = tg.Capture(models.gpt2() if model is None else model, "residual_output")
    made = [stage(capture.sites) for stage in stages]
    pipeline = TensorDictSequential(capture, tg.SelectTokens(capture.sites), *made)
    return tg.run(pipeline, batches() if data is None else data, progress=False, **settings)


def covariance(sites):
    return tg.ForEach(tg.StreamingCovariance(), sites)


def sample(sites):
    return tg.RowSample(sites)


def inside(context, call: Callable = lambda: None):
    with context:
        return call()


def steered(edit, site: str = "residual_output.0"):
    model = models.gpt2()
    return inside(tg.Intervene(model, {site: edit}), lambda: model(**BATCH))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


class Shared(InPlace):
    def forward(self, x):
        self.act.inplace = False
        return self.act(self.last(self.act(self.first(x))))


class Skipping(InPlace):
    def forward(self, x):
        return self.first(x)


def of_network(module: nn.Module, sites) -> TensorDict:
    return tg.Capture(module, sites)(TensorDict(x=rows(3)))


def twice_entered():
    capture = tg.Capture(models.gpt2(), "residual_output")
    inside(capture, lambda: inside(capture))


def padded_fnet():
    from transformers import FNetConfig, FNetModel

    model = FNetModel(
        FNetConfig(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    ).eval()
    ids = BATCH["input_ids"].clone()
    ids[0, 4:] = 0
    tg.Capture(model, "residual_output")(TensorDict(input_ids=ids, attention_mask=(ids != 0).long()))


def decoder_rows():
    capture = tg.Capture(models.t5(), ["encoder.residual_output", "decoder.residual_output"])
    td = TensorDict({**BATCH, "decoder_input_ids": BATCH["input_ids"][:, :4]})
    TensorDictSequential(capture, tg.SelectTokens(capture.sites))(td)


def selected(acts: torch.Tensor, **others) -> TensorDict:
    return tg.SelectTokens(["x"], pad_id=0)(TensorDict({"acts": {"x": acts}, **others}))


def dataset(**columns):
    from datasets import Dataset

    return Dataset.from_dict(columns)


def splits():
    from datasets import DatasetDict

    return DatasetDict(train=dataset(text=["one"]))


def analysed(data, **settings):
    return tg.analyze_model(models.gpt2(), data, progress=False, **settings)


def no_number() -> nn.Module:
    model = models.gpt2()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.bias[0] = torch.nan
    return model


def same_rows_again():
    stage, td = tg.RowSample(["x"]), TensorDict({"tokens": {"x": rows(5)}, "row_id": torch.arange(5)})
    stage(td)
    stage(td)


def projected(sites):
    return TensorDictSequential(tg.ForEach(tg.ConceptBasis(n=2), sites), tg.ForEach(tg.Project(), sites))


def resumed(change: Callable, tmp_path: Path, **options):
    """A run that ended early, and another call on its checkpoint."""
    data, state = batches(6), tmp_path / "state"

    def broken():
        yield from data[:4]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        run(covariance, data=broken(), checkpoint=state, every=2)
    stages, again = change(data)
    run(*stages, data=again, checkpoint=state, every=2, **options)


def float32_moments():
    low = rows(2000, 3) @ rows(3, 64) + 1e-3 * rows(2000, 64, seed=1)
    td = tg.StreamingCovariance(precision="float32")(TensorDict(tokens=low))
    tg.SpectrumMetrics()(tg.EigenSpectrum()(td))


def nearly_copies():
    one = rows(100, 16)
    near = torch.cat((one, 1.01 * one[:10], 1.045 * one[10:]))
    tg.NearestNeighbors(k=3)(sample=near.bfloat16())


def foreign_table():
    index = torch.tensor(NearestNeighbors(n_neighbors=6).fit(rows()).kneighbors(rows())[1])
    sides = {side: {"index": index} for side in ("a", "b")}
    tg.NeighborhoodOverlap(k=5, source="neighbors")(TensorDict(neighbors=sides))


def cross_moments():
    stage = tg.StreamingCrossMoments(["a", "b"], pairs="all", memory=10)
    stage(TensorDict({"tokens": {"a": rows(), "b": rows()}, "row_id": torch.arange(200)}))


def probed():
    data = [{**batch, "label": torch.zeros(3, dtype=torch.long)} for batch in batches(12)]
    tg.Probing(models.gpt2(), "residual_output", tg.LinearProbe(), labels="label").run(data)


def patched():
    settings = {"sites": "residual_input", "metric": "logit_diff", "answers": (5, 7), "progress": False}
    tg.activation_patching(models.gpt2(), clean=BATCH, corrupted=BATCH, **settings)


def without_a_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run(covariance)


def bundle(tmp_path: Path):
    results = analysed(batches(12), metrics="spectrum")
    return results, results.save(tmp_path / "run")


def saved_twice(tmp_path: Path):
    bundle(tmp_path)
    analysed(batches(3), metrics="spectrum").save(tmp_path / "run")


def edited_table(tmp_path: Path):
    _, folder = bundle(tmp_path)
    table = folder / "metrics.csv"
    table.write_text(table.read_text() + "\n")
    tg.load_results(folder)


def unfinished(tmp_path: Path):
    store, kept = tg.ActivationStore(tmp_path / "store"), []

    def broken():
        yield from batches(12)
        raise ConnectionError

    def keep(sites):
        kept.append(tg.StoreActivations(store, sites, shard_bytes=4096))
        return kept[0]

    with pytest.raises(ConnectionError):
        run(keep, data=broken(), block_rows=32)
    store.rows(kept[0].run_id)


def lost(sites):
    return TensorDictModule(lambda x: x.norm(dim=-1), [("acts", sites[0])], ["norms"])


def each(stage) -> Callable:
    return lambda sites: tg.ForEach(stage, sites)


PROVOKED: dict[str, Callable] = {
    "… takes no argument '…'": lambda: tg.TwoNN(n_neighbors=3),
    "metrics: '…' is none. Did you mean '…'?": lambda: analysed(batches(), metrics=["participation"]),
    "module 'tdgeom' has no attribute '…'": lambda: tg.TwoNearest,
    "… has no '…' that can be told from its structure; it has …": lambda: captured("router_logits"),
    "'…' of … is not where its structure says at the layers …": lambda: tg.Capture(
        models.network(lambda: nn.Linear(8, 8), scale=0.5), "mlp_output"
    ),
    "expected repeated blocks (a list of like modules) for the site '…', found none in …": lambda: captured(
        "residual_output", nn.Linear(3, 3)
    ),
    "no module of … matches '…' (the whole path has to match)": lambda: captured("module_output:h.*.mlp"),
    "'…' could be in any of the stacks …": lambda: captured("residual_output.0", models.t5()),
    "layer … is out of range: … has … blocks": lambda: captured("residual_output", layers=[12]),
    "heads=… needs a site with heads, (B, T, H, Dh)": lambda: steered(tg.Scale(0.0, heads=[0])),
    "expected a model whose hooks fire, got a … of which … is compiled": lambda: captured(
        "residual_output", torch.compile(models.gpt2(), backend="eager")
    ),
    "no call of … was seen in this Capture's block": lambda: inside(
        tg.Capture(models.gpt2(), "residual_output")
    ),
    "edits of … had no effect in this block: …": lambda: inside(
        tg.Intervene(models.gpt2(), {"residual_output.0": tg.Scale(2.0)})
    ),
    "expected every site to fire, … never did: …": lambda: of_network(
        Skipping(), ["module_output:first", "module_output:last"]
    ),
    "the site '…' fired … times in one forward pass, expected 1": lambda: of_network(
        Shared(), "module_output:act"
    ),
    "this Capture is already in use (entered, or running)": twice_entered,
    "the tensor read at '…' was modified in place later in the same forward pass": lambda: of_network(
        InPlace(), ["module_output:first", "module_output:last"]
    ),
    "Capture expected the model's input '…' under the key '…'": lambda: tg.Capture(
        models.gpt2(), "residual_output"
    )(TensorDict(ids=BATCH["input_ids"])),
    "the batch has sequences of … tokens, … takes …": lambda: tg.Capture(models.gpt2(), "residual_output")(
        TensorDict(input_ids=torch.full((1, 80), 7))
    ),
    "… failed without 'decoder_input_ids'": lambda: captured("decoder.residual_output", models.t5()),
    "this batch is padded, and … does not give for a padded sequence what it gives for that sequence alone": padded_fnet,
    "the edit … at '…' wrote to the activation in place": lambda: steered(lambda x: x.add_(1)),
    "Steer expected a vector of the … features at '…', got …": lambda: steered(tg.Steer(torch.ones(3))),
    "… was given texts: give tokenizer= as well": lambda: analysed(["one", "two"]),
    "the columns … all hold text. Name the one that the model reads": lambda byte_tokenizer: analysed(
        dataset(title=["a"], text=["b"]), tokenizer=byte_tokenizer
    ),
    "… takes one dataset, got a dictionary of them with the splits …": lambda: analysed(splits()),
    "run takes an iterable of batches, got one dict": lambda: run(covariance, data=BATCH),
    "… reads the data twice, but the dataloader is an iterator that can be read once": lambda: analysed(
        iter(batches()), untrained=True
    ),
    "run got no rows: …": lambda: run(covariance, data=iter([])),
    "the batch has no 'attention_mask' but its input_ids hold the padding id …": lambda: selected(
        rows(2, 3).expand(2, 2, 3), input_ids=torch.tensor([[5, 0], [5, 6]])
    ),
    "SelectTokens expects '…' of shape (B, T), got …": lambda: selected(
        torch.zeros(2, 5, 3), attention_mask=torch.rand(2, 4, 5, 5)
    ),
    "SelectTokens expects … to fit 'attention_mask', got …": decoder_rows,
    "SelectTokens got … and nothing says which axis counts channels": lambda: selected(
        torch.zeros(2, 5, 3, 3)
    ),
    "SelectTokens turns activations of positions into rows; … holds attention between positions": lambda: (
        tg.SelectTokens(["attn_pattern.0"])(captured("attn_pattern.0"))
    ),
    "… holds NaN or Inf in … of … rows, first in batch …": lambda: run(covariance, model=no_number()),
    "… saw row id … more than once": same_rows_again,
    "Collect holds … rows and gets … more, which is above limit=…": lambda: run(
        lambda sites: tg.Collect(sites, limit=10)
    ),
    "… reads …, but the TensorDict has …": lambda: tg.TwoNN()(TensorDict(tokens=rows())),
    "… reads one tensor at '…', which holds the sites …": lambda: tg.TwoNN()(
        TensorDict(sample={"x.0": rows()})
    ),
    "… reads 'sample' with event dimensions (N, D), got … in a TensorDict of batch size …": lambda: (
        tg.TwoNN()(TensorDict(sample=rows(), batch_size=[200]))
    ),
    "… reads … which nothing put into the sample": lambda: run(sample, each(tg.LabelOverlap(k=2))),
    "run found no streaming stage in the pipeline, so nothing would be kept": lambda: tg.run(
        TensorDictSequential(), []
    ),
    "… runs once a batch and writes …, but nothing it writes reaches a streaming stage": lambda: run(
        covariance, lost
    ),
    "… reads finished results … together with …": lambda: run(covariance, projected),
    "… both write …": lambda: run(sample, each(tg.TwoNN()), each(tg.TwoNN(method="ml"))),
    "… names no keys, so run cannot tell whether it belongs to each batch or to the end": lambda: run(
        covariance, lambda sites: lambda td: td
    ),
    "run cannot see into a compiled module": lambda: tg.run(
        torch.compile(TensorDictSequential(tg.StreamingMean()), backend="eager"), batches()
    ),
    "to_frame: the result has nothing under '…'": lambda: tg.to_frame(run(covariance), "spectrum"),
    "the checkpoint … belongs to another run": lambda tmp_path: resumed(
        lambda data: ([sample], data), tmp_path
    ),
    "run resumes from …, but the loader's first batch is not the one of then": lambda tmp_path: resumed(
        lambda data: ([covariance], data[::-1]), tmp_path
    ),
    "run resumes from …, but the loader now gives others among them": lambda tmp_path: resumed(
        lambda data: ([covariance], [data[0], *data[:0:-1]]), tmp_path
    ),
    "run resumes from …, which was reading …, and now there is …": lambda tmp_path: resumed(
        lambda data: ([covariance], data), tmp_path, sharded=True
    ),
    "… a launcher started … processes (WORLD_SIZE), … but there is no process group": without_a_group,
    "… few rows, …: … calls for …": lambda: tg.CCA()(sample_a=rows(6, 8), sample_b=rows(6, 8, seed=1)),
    "… is undefined, NaN: …": lambda: tg.LinearCKA()(sample_a=torch.ones(5, 3), sample_b=rows(5, 3)),
    "… could move … by more than 1e-4: unresolved": float32_moments,
    "… rows have more equally near neighbours than places for them": lambda: tg.NeighborhoodOverlap(k=5)(
        sample_a=torch.eye(4).repeat(10, 1), sample_b=torch.eye(4).repeat(10, 1)
    ),
    "… rows are left out as copies up to rounding …": nearly_copies,
    "… nearest neighbours need at least … rows, got …": lambda: tg.NearestNeighbors(k=30)(sample=rows(20)),
    "the table … holds the row itself among its neighbours": foreign_table,
    "… to have the same N, got … and …": lambda: tg.LinearCKA()(sample_a=rows(20), sample_b=rows(21)),
    "feature_subspace_novelty compares subspaces of one space": lambda: (
        tg.functional.feature_subspace_novelty(torch.eye(4)[:, :2], torch.eye(5)[:, :2])
    ),
    "StreamingCrossMoments needs … GiB for … sites": cross_moments,
    "… all … training labels are class 0": probed,
    "activation_patching: the two runs have the same metric": patched,
    "… exists already: give another folder, or overwrite=True": saved_twice,
    "… has changed since the bundle was written: its SHA-256 differs": edited_table,
    "run … is not complete: its state is failed": unfinished,
}


# what only several processes say: provoked where ranks are tested, and here found in the source
OF_RANKS = [
    "run: the ranks do not do the same…",
    "run: the loaders of the ranks differ: …",
    "run(sharded=True): all … ranks begin with the same batch",
    "… rank … has come to …, another rank to …",
    "… is gone: …",
    "run: checkpoint=…: the other ranks have written …, and rank 0 does not see them",
    "… is a part of the activation, another on every rank: …",
]


def test_every_message_on_the_page_is_provoked() -> None:
    assert sorted([*PROVOKED, *OF_RANKS]) == sorted(HEADINGS)


@functools.cache
def raised_texts() -> list[str]:
    """The texts of all errors in the source, with … for what is filled in."""
    found = []
    for file in (PAGE.parents[2] / "src/tdgeom").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else "…" for one in node.values]
                found.append("".join(map(str, parts)))
    return found


@pytest.mark.parametrize("heading", OF_RANKS)
def test_what_ranks_say_is_in_the_source(heading) -> None:
    pattern = ".*".join(map(re.escape, heading.split("…")))
    assert any(re.search(pattern, text, re.DOTALL) for text in raised_texts())


@pytest.mark.parametrize("heading", list(PROVOKED))
def test_the_message_is_the_one_that_users_get(heading, tmp_path, byte_tokenizer, monkeypatch) -> None:
    provoke = PROVOKED[heading]
    given = {"tmp_path": tmp_path, "byte_tokenizer": byte_tokenizer, "monkeypatch": monkeypatch}
    wanted = {name: given[name] for name in inspect.signature(provoke).parameters}
    said = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            provoke(**wanted)
        except Exception as error:
            said.append(" ".join(map(str, error.args)))
    said += [str(one.message) for one in told]
    pattern = ".*".join(map(re.escape, heading.split("…")))
    assert any(re.search(pattern, text, re.DOTALL) for text in said), said
