"""Texts, datasets, rows, frames and images as data: the same rows as from batches made by hand."""

from __future__ import annotations

import datasets
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tdgeom.demo import demo_model, demo_texts
from tensordict.nn import TensorDictSequential
from torch.utils.data import DataLoader, TensorDataset
from transformers import DataCollatorWithPadding, ViTImageProcessor

import tdgeom as tg
from tdgeom.cli.demo import demo_model_path
from tdgeom.rows.images import ImageBatches
from tdgeom.rows.text import TextBatches, read_fasta

TEXTS = [text[:120] for text in demo_texts()[:6]]
KINDS = ["a", None, "b", "b", "a", "c"]
MODEL, TOKENIZER = demo_model()
DATA = datasets.Dataset.from_dict({"text": TEXTS, "kind": KINDS, "label": [0, 1, 0, 1, 1, 0]})


def rows_of(data, also=(), model=MODEL, **options):
    capture = tg.Capture(model, "residual_output", layers=[0])
    also = list(also)
    stages = [tg.SelectTokens(capture.sites, also=also, pool="mean"), tg.Collect(capture.sites, also=also)]
    result = tg.run(TensorDictSequential(capture, *stages), data, progress=False, **options)
    return result["collected", capture.sites[0]], *(result["collected_carried", name] for name in also)


RIGHT = rows_of(TextBatches(TEXTS, TOKENIZER))[0]

SOURCES = {
    "a dataset": lambda: DATA,
    "a streaming dataset": lambda: DATA.to_iterable_dataset(),
    "a data frame": lambda: DATA.to_pandas(),
    "rows": lambda: list(DATA),
    "rows of a loader": lambda: DataLoader(DATA, batch_size=4, collate_fn=list),
    "columns": lambda: [DATA[:4], DATA[4:]],
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_holds_texts_gives_their_rows_and_columns(source):
    found, kind, label = rows_of(
        SOURCES[source](), ["kind", "label"], tokenizer=TOKENIZER, text_column="text", batch_size=4
    )
    torch.testing.assert_close(found, RIGHT, rtol=1e-4, atol=1e-5)
    assert kind == KINDS and label.tolist() == DATA["label"][:]


def test_texts_alone_in_pairs_and_in_loaders():
    torch.testing.assert_close(rows_of(TEXTS, tokenizer=TOKENIZER)[0], RIGHT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows_of(iter(TEXTS), tokenizer=TOKENIZER)[0], RIGHT, rtol=1e-4, atol=1e-5)
    pairs = [(text, label) for text, label in zip(TEXTS, DATA["label"])]
    for data in (
        pairs,
        DataLoader(pairs, batch_size=4),
        DataLoader(DATA.select_columns(["text", "label"]), batch_size=4),
    ):
        name = "label" if data is not pairs and isinstance(data.dataset, datasets.Dataset) else "labels"
        found, label = rows_of(data, [name], tokenizer=TOKENIZER)
        torch.testing.assert_close(found, RIGHT, rtol=1e-4, atol=1e-5)
        assert label.tolist() == DATA["label"][:]


def test_labels_of_the_collator_and_tokenized_rows():
    made = [{**TOKENIZER(text), "label": label} for text, label in zip(TEXTS, DATA["label"])]
    loader = DataLoader(made, batch_size=4, collate_fn=DataCollatorWithPadding(TOKENIZER))
    found, label = rows_of(loader, ["labels"])
    torch.testing.assert_close(found, RIGHT, rtol=1e-4, atol=1e-5)
    assert label.tolist() == DATA["label"][:]
    rows = datasets.Dataset.from_list([dict(row) for row in made])
    found, label = rows_of(rows, ["label"])
    torch.testing.assert_close(found, RIGHT, rtol=1e-4, atol=1e-5)
    assert label.tolist() == DATA["label"][:]


def test_a_sentence_encoder_reads_texts_as_it_does():
    encoder = SentenceTransformer(str(demo_model_path()), device="cpu")
    torch.testing.assert_close(rows_of(TEXTS, model=encoder)[0], RIGHT, rtol=1e-4, atol=1e-5)
    capture = tg.Capture(encoder, "module_output:<root>['sentence_embedding']")
    pipeline = TensorDictSequential(capture, tg.SelectTokens(capture.sites), tg.Collect(capture.sites))
    found = tg.run(pipeline, DATA.select_columns(["text"]), progress=False)["collected", capture.sites[0]]
    torch.testing.assert_close(found, torch.tensor(encoder.encode(TEXTS)), rtol=1e-4, atol=1e-5)


def test_every_entry_point_takes_texts():
    options = {"layers": [0], "progress": False}
    one = tg.analyze_model(MODEL, TEXTS, tokenizer=TOKENIZER, metrics="spectrum", **options)
    same = tg.analyze_model(MODEL, TextBatches(TEXTS, TOKENIZER), metrics="spectrum", **options)
    assert one.metrics["d_pr"].tolist() == same.metrics["d_pr"].tolist()
    data = DATA.select_columns(["text", "label"])
    both = tg.compare(MODEL, MODEL, data, "linear_cka", tokenizer=TOKENIZER, **options)
    assert float(both.matrix().iloc[0, 0]) == pytest.approx(1.0)
    given = [next(iter(TextBatches(TEXTS, TOKENIZER)))]
    assert float(
        tg.compare(MODEL, MODEL, given, "linear_cka", **options).matrix().iloc[0, 0]
    ) == pytest.approx(1.0)
    probing = tg.Probing(
        MODEL, "residual_output", tg.LinearProbe(permutations=0), labels="label", capture={"layers": [0]}
    )
    found = probing.run(data, data, tokenizer=TOKENIZER)
    made = TextBatches(TEXTS, TOKENIZER, labels=DATA["label"][:])
    assert found["accuracy"].tolist() == probing.run(made, made)["accuracy"].tolist()


def test_what_does_not_fit_is_said_with_its_remedy():
    with pytest.raises(
        ValueError, match=r"\['text', 'kind'\] all hold text\. Name the one .*text_column='text'"
    ):
        rows_of(DATA, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="none of the columns"):
        rows_of(DATA, tokenizer=TOKENIZER, text_column="body")
    with pytest.raises(ValueError, match="'label' holds int, not text"):
        rows_of(DATA, tokenizer=TOKENIZER, text_column="label")
    with pytest.raises(ValueError, match="run was given texts: give tokenizer="):
        rows_of(TEXTS)
    with pytest.raises(ValueError, match="none of which is text or input_ids"):
        rows_of(DATA.select_columns(["label"]), tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="the data are batches already.*own batch size"):
        rows_of(TextBatches(TEXTS, TOKENIZER), tokenizer=TOKENIZER)
    with pytest.raises(
        TypeError, match=r"single examples: torch.utils.data.DataLoader\(dataset, batch_size=8\)"
    ):
        rows_of(TensorDataset(torch.zeros(3, 4)))
    with pytest.raises(TypeError, match=r"with the splits \['train'\].*dataset\['train'\]"):
        rows_of(datasets.DatasetDict({"train": DATA}), tokenizer=TOKENIZER)


def test_images_and_fasta(tmp_path):
    for folder, shade in (("dark", 20), ("light", 220)):
        (tmp_path / folder).mkdir()
        for number in range(2):
            Image.new("RGB", (10 + number, 8), (shade, number, 0)).save(tmp_path / folder / f"{number}.png")
    processor = ViTImageProcessor(size={"height": 4, "width": 4})
    first, second = ImageBatches(tmp_path, processor, batch_size=3)
    assert first["pixel_values"].shape == (3, 3, 4, 4) and first["folder"] == ["dark", "dark", "light"]
    opened = [Image.open(path).convert("RGB") for path in sorted(tmp_path.rglob("*.png"))]
    whole = processor(opened, return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat([first["pixel_values"], second["pixel_values"]]), whole)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
    capture = tg.Capture(model, "module_output:1", in_keys=["pixel_values"])
    pipeline = TensorDictSequential(capture, tg.SelectTokens(capture.sites), tg.Collect(capture.sites))
    found = tg.run(pipeline, opened, tokenizer=processor, progress=False)["collected", capture.sites[0]]
    torch.testing.assert_close(found, model(whole).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="given images: give the model's image processor"):
        tg.run(pipeline, opened, progress=False)
    file = tmp_path / "two.fasta"
    file.write_text(">sp|P1 first\nthe quick\nbrown*\n\n>second\nfox\n")
    assert list(read_fasta(file)) == ["thequickbrown", "fox"]
    batch = next(iter(TextBatches(read_fasta(file), TOKENIZER)))
    assert batch["header"] == ["sp|P1 first", "second"]
    file.write_text(">empty\n>second\nfox\n")
    with pytest.raises(ValueError, match="'empty' has no sequence"):
        list(read_fasta(file))
