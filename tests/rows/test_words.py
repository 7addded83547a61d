"""Columns of text, None and lists on their way to rows, samples, stores, labels and tables."""

from __future__ import annotations

import pickle

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom.core.words import Vocabulary, Words

SITES = ["x"]
COLUMNS = {
    "category": [["food", "science", None][i * i % 3] for i in range(24)],
    "tags": [list(range(i % 3)) for i in range(24)],
    "score": [None if i == 9 else i / 2 for i in range(24)],
    "right": [[True, False, None][i % 3] for i in range(24)],
}
ACTS = torch.arange(24.0)[:, None] * torch.ones(3)


def batches(size=8, columns=COLUMNS):
    return [
        {
            "acts": {"x": ACTS[i : i + size]},
            **{name: values[i : i + size] for name, values in columns.items()},
        }
        for i in range(0, 24, size)
    ]


@pytest.mark.parametrize("size", [1, 5, 24])
def test_every_kind_of_value_comes_back_a_row_each_in_order(size, tmp_path):
    # a list of one length in every batch cannot be told from a vector
    columns = {name: values for name, values in COLUMNS.items() if size != 1 or name != "tags"}
    also, store = list(columns), tg.ActivationStore(tmp_path)
    keep = tg.StoreActivations(store, SITES, also=also, shard_bytes=300)
    stages = [tg.SelectTokens(SITES, also=also), tg.Collect(SITES, also=also), keep]
    if size != 1:  # a store's column is of one kind throughout
        stages.append(tg.RowSample(SITES, size=10, also=also))
    given = batches(size, columns)
    result = tg.run(TensorDictSequential(*stages), given, progress=False, block_rows=24)
    for name, values in columns.items():
        assert list(result["collected_carried", name]) == list(result["collected", name]) == values
        assert [one for batch in store.rows(keep.run_id) for one in batch["carried", name]] == values
        chosen = [7, 0, 23]
        assert store.rows(keep.run_id)[chosen]["carried", name] == [values[i] for i in chosen]
        assert store.load(keep.run_id)[0]["carried", name] == values
        if size != 1:
            rows = (result["sample_row_id"] >> 20).tolist()
            assert list(result["sample_carried", name]) == [values[i] for i in rows]
    assert store.verify() == []


def test_numbers_among_which_one_is_none_are_numbers_in_every_block():
    stages = [
        tg.SelectTokens(SITES, also=["score"]),
        tg.Collect(SITES, also=["score"]),
        tg.RowSample(SITES, also=["score"]),
    ]
    result = tg.run(TensorDictSequential(*stages), batches(4), progress=False, block_rows=4)
    assert list(result["collected", "score"]) == COLUMNS["score"]
    assert sorted(map(str, result["sample_carried", "score"])) == sorted(map(str, COLUMNS["score"]))


def test_shards_with_other_words_merge_and_travel():
    def fed(rows):
        stage = tg.RowSample(SITES, size=12, also=["category"])
        td = TensorDict({"tokens": {"x": ACTS[rows]}, "row_id": torch.tensor(rows) << 20})
        td.set_non_tensor(("carried", "category"), [COLUMNS["category"][i] for i in rows])
        stage.update(td)
        return stage

    food = [i for i in range(24) if COLUMNS["category"][i] == "food"]
    rest = [i for i in range(24) if i not in food]
    whole, merged = fed(food + rest), fed(food).merge_(fed(rest))
    again = tg.RowSample(SITES, size=12, also=["category"])
    again.load_state_dict(merged.state_dict())
    for stage in (merged, again, pickle.loads(pickle.dumps(merged))):
        found = stage.publish(TensorDict({}))
        assert (
            found["sample_carried", "category"] == whole.publish(TensorDict({}))["sample_carried", "category"]
        )
        assert found["sample_carried", "category"] == [
            COLUMNS["category"][i] for i in (found["sample_row_id"] >> 20).tolist()
        ]


def test_a_vocabulary_keeps_values_apart_that_print_alike():
    values = [1, 1.0, True, "1", None, "None", [1], ["1"], "", "a\nb", "é"]
    vocabulary = Vocabulary()
    codes = vocabulary.encode(Words(values))
    back = Vocabulary.of(vocabulary.tensor()).decode(codes).tolist()
    assert [(type(one), one) for one in back] == [(type(one), one) for one in values]
    assert len(codes.unique()) == len(values)


def test_a_checkpoint_keeps_words(tmp_path):
    def pipeline():
        return TensorDictSequential(
            tg.SelectTokens(SITES, also=["category"]), tg.Collect(SITES, also=["category"])
        )

    class Broken(list):
        def __iter__(self):
            yield from list.__iter__(self)
            raise RuntimeError("power cut")

    file = tmp_path / "state"
    with pytest.raises(RuntimeError, match="power cut"):
        tg.run(pipeline(), Broken(batches(4)[:3]), checkpoint=file, every=1, block_rows=6, progress=False)
    assert file.exists()
    result = tg.run(pipeline(), batches(4), checkpoint=file, every=1, block_rows=6, progress=False)
    assert result["collected", "category"] == COLUMNS["category"]
    with pytest.raises(RuntimeError, match="power cut"):
        tg.run(pipeline(), Broken(batches(4)[:3]), checkpoint=file, every=1, block_rows=6, progress=False)
    other = batches(4)
    other[0]["category"] = ["else"] * 4
    with pytest.raises(ValueError, match="the loader's first batch is not the one of then"):
        tg.run(pipeline(), other, checkpoint=file, every=1, block_rows=6, progress=False)


def test_words_of_a_sequence_and_of_its_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    td = TensorDict({"acts": {"x": torch.zeros(2, 3, 1)}, "attention_mask": mask})
    td["language"] = NonTensorStack("de", "en")
    td.set_non_tensor("part", [["DET", "NOUN"], ["PRON", "VERB", "DET"]])
    td.set_non_tensor("padded", [["a", "b", "-"], ["c", "d", "e"]])
    out = tg.SelectTokens(["x"], also=["language", "part", "padded"])(td)
    assert out["carried", "language"] == ["de", "de", "en", "en", "en"]
    assert out["carried", "part"] == ["DET", "NOUN", "PRON", "VERB", "DET"]
    assert out["carried", "padded"] == list("abcde")
    last = tg.SelectTokens(["x"], positions="last", also=["part"])(td)
    assert last["carried", "part"] == ["NOUN", "DET"]
    with pytest.raises(ValueError, match=r"one row a sequence, but 'part' has lists of text"):
        tg.SelectTokens(["x"], pool="mean", also=["part"])(td)
    td.set_non_tensor("part", [["DET"], ["PRON", "VERB", "DET"]])
    with pytest.raises(
        ValueError, match=r"as many as the sequence has tokens, 2 \(or 3 with padding\); got 1"
    ):
        tg.SelectTokens(["x"], also=["part"])(td)
    td.set_non_tensor("language", "de")
    with pytest.raises(
        TypeError, match=r"a value a row or sequence at 'language', got one str.*\[value\] \* batch_size"
    ):
        tg.SelectTokens(["x"], also=["language"])(td)
    td.set_non_tensor("language", [object(), object()])
    with pytest.raises(TypeError, match="expected text, None, booleans"):
        tg.SelectTokens(["x"], also=["language"])(td)


def labelled(labels):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(240, 4, generator=generator)
    x[torch.arange(240), torch.arange(240) % 3] += 2
    return x, [{"acts": {"x": x[i : i + 40]}, "label": labels[i : i + 40]} for i in range(0, 240, 40)]


NAMES = ["science", "food", "animals"]
WORDS = [NAMES[i % 3] for i in range(240)]
NUMBERS = torch.tensor([sorted(NAMES).index(word) for word in WORDS])


@pytest.mark.parametrize(
    "probe", [tg.LinearProbe(), tg.MeanDifferenceProbe(), tg.TorchProbe(torch.nn.LazyLinear(3), epochs=2)]
)
def test_a_probe_of_names_is_the_probe_of_their_numbers(probe):
    def scores(labels):
        _, loader = labelled(labels)
        stages = [tg.SelectTokens(SITES, also=["label"]), tg.ForEach(probe, SITES)]
        return tg.run(TensorDictSequential(*stages), loader, progress=False)["probe", "x"]

    named, numbered = scores(WORDS), scores(NUMBERS)
    assert named["accuracy"] > 0.3
    for name in numbered.keys():
        assert torch.equal(named[name], numbered[name]) or (named[name].isnan() and numbered[name].isnan()), (
            name
        )


def test_a_probe_says_names_and_merges_shards_that_met_others():
    x, _ = labelled(WORDS)
    named, numbered = tg.LinearProbe().fit(x, WORDS), tg.LinearProbe().fit(x, NUMBERS)
    assert named.classes == sorted(NAMES) and numbered.classes == []
    assert named.predict(x).tolist() == [sorted(NAMES)[i] for i in numbered.predict(x)]
    assert named.score(x, WORDS)["accuracy"] == numbered.score(x, NUMBERS)["accuracy"]
    assert torch.equal(named.direction("food"), numbered.direction(1))
    with pytest.raises(ValueError, match="is given numbers"):
        named.score(x, NUMBERS)
    with pytest.raises(ValueError, match="are not among the classes seen before"):
        named.score(x, ["sport"] * 240)

    def fed(rows, stage):
        td = TensorDict({"tokens": x[rows], "row_id": torch.tensor(rows) << 20})
        td.set_non_tensor(("carried", "label"), [WORDS[i] for i in rows])
        stage.update(td)
        return stage

    science = [i for i in range(240) if WORDS[i] == "science"]
    others = [i for i in range(240) if WORDS[i] != "science"]
    for make in (lambda: tg.LinearProbe(holdout=0.0), lambda: tg.MeanDifferenceProbe(holdout=0.0)):
        merged = fed(science, make()).merge_(fed(others, make()))
        whole = fed(list(range(240)), make())
        assert merged.classes == whole.classes == sorted(NAMES)
        torch.testing.assert_close(merged.fitted["weight"], whole.fitted["weight"], rtol=1e-6, atol=1e-8)
    one = fed(science, tg.StreamingLabelMoments()).merge_(fed(others, tg.StreamingLabelMoments()))
    both = fed(list(range(240)), tg.StreamingLabelMoments())
    torch.testing.assert_close(
        one.result()["cross_scatter"], both.result()["cross_scatter"], rtol=1e-9, atol=1e-9
    )


def test_labels_of_every_sort_reach_label_overlap():
    gaps = [None if i % 7 == 0 else int(NUMBERS[i]) for i in range(240)]
    minus = torch.tensor([-100 if one is None else one for one in gaps])
    named = [None if i % 7 == 0 else WORDS[i] for i in range(240)]

    def overlap(labels):
        _, loader = labelled(labels)
        stages = [tg.SelectTokens(SITES, also=["label"]), tg.RowSample(SITES, also=["label"])]
        return tg.run(
            TensorDictSequential(*stages, tg.ForEach(tg.LabelOverlap(k=5), SITES)), loader, progress=False
        )

    right = overlap(minus)["neighborhood", "x", "label_overlap"]
    for labels in (gaps, named, minus.numpy(), minus.to(torch.int32), minus.double()):
        assert overlap(labels)["neighborhood", "x", "label_overlap"] == right
    direct = tg.LabelOverlap(k=5)(sample=labelled(WORDS)[0], label=WORDS)
    assert direct == tg.LabelOverlap(k=5)(sample=labelled(WORDS)[0], label=NUMBERS)
    with pytest.raises(ValueError, match="numbers with a fraction"):
        overlap([None if i == 3 else 0.5 for i in range(240)])


def test_tables_have_text_and_bundles_keep_it(tmp_path):
    stages = [tg.SelectTokens(SITES, also=["category"]), tg.Collect(SITES, also=["category"])]
    frame = tg.to_frame(tg.run(TensorDictSequential(*stages), batches(), progress=False), "collected_carried")
    assert frame["category"].tolist() == COLUMNS["category"] and frame["sequence"].tolist() == list(range(24))
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    loader = [{"input": ACTS + torch.randn(24, 3), "category": COLUMNS["category"]}]
    results = tg.analyze_model(
        model,
        loader,
        select={"also": ["category"]},
        neighbors=5,
        metrics="spectrum",
        progress=False,
        save_dir=tmp_path / "run",
    )
    kept = tg.AnalysisResults.load(tmp_path / "run").neighbors["sample_carried", "category"]
    assert kept == results.neighbors["sample_carried", "category"]
    assert sorted(map(str, kept)) == sorted(map(str, COLUMNS["category"]))


def test_exemplars_keep_words():
    stages = [
        tg.SelectTokens(SITES, also=["category"]),
        tg.MaxActivating("x", k=3, units=[0], context="category"),
    ]
    found = tg.run(TensorDictSequential(*stages), batches(5), progress=False)["exemplars", "x"]
    assert found["values"].tolist() == [[23.0, 22.0, 21.0]]
    assert found["context"] == [[COLUMNS["category"][i] for i in (23, 22, 21)]]
    assert tg.describe_exemplars(found, None, 0)[0].endswith("science")
