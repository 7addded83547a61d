"""``Runs``: what a query found, acted on; in and out of stores; on the command line."""

from __future__ import annotations

import json
import os
import resource

import pytest
import torch

import models
import tdgeom as tg
from tdgeom.files.errors import StoreBusyError, StoreError, StoreLookupError
from terminal import refused


@pytest.fixture
def store(tmp_path) -> tg.ActivationStore:
    return tg.ActivationStore(tmp_path / "store")


@pytest.fixture
def three(store) -> list[str]:
    return [
        store.save({"acts": torch.full((2, 3), float(i))}, model=name, tag=["all", name], experiment="first")
        for i, name in enumerate(("gpt2", "bert", "gpt2"))
    ]


def test_length_order_and_iteration(store, three) -> None:
    found = store.query()
    assert len(found) == 3 and found.ids == three
    assert [one["model"] for one in found] == ["gpt2", "bert", "gpt2"]
    assert found[1]["id"] == three[1] and found[-1]["id"] == three[2]
    assert found[1:].ids == three[1:] and len(store.query(model="none")) == 0
    frame = found.to_frame()
    assert frame["id"].tolist() == three and frame["tags"][1] == ["all", "bert"]
    assert list(store.query(model="none").to_frame().columns) == list(frame.columns)


def test_ids_printed_are_the_ids_taken(store, three) -> None:
    printed = [line.split()[0] for line in repr(store.query()).splitlines()[1:]]
    assert printed == three
    for i, run in enumerate(printed):
        activations, metadata = store.query().load(run)
        assert activations["acts"][0, 0] == i and metadata["id"] == run


def test_one_run_by_position_id_or_beginning(store, three) -> None:
    found = store.query()
    assert found.load(1)[1]["id"] == found.load(three[1])[1]["id"] == three[1]
    short = next(
        three[1][:n] for n in range(2, 14) if sum(run.startswith(three[1][:n]) for run in three) == 1
    )
    assert found[short]["id"] == three[1]
    assert store.query(model="bert").load()[1]["id"] == three[1]


def test_ambiguity_and_absence_are_refused(store, three) -> None:
    found = store.query()
    with pytest.raises(
        StoreLookupError, match=r"3 runs match the query: \['r.*Name one by its id or position"
    ):
        found.load()
    with pytest.raises(StoreLookupError, match="3 runs match 'r'"):
        found.load("r")
    with pytest.raises(StoreLookupError, match="none of the 3 runs found is 'zz'"):
        found["zz"]
    with pytest.raises(StoreLookupError, match="there is no run 7: the query found 3"):
        found[7]
    with pytest.raises(StoreLookupError, match="none of the 3 runs found is ''"):
        found[""]
    with pytest.raises(TypeError, match="by position, id or the beginning"):
        found[1.5]
    with pytest.raises(StoreLookupError, match=r"the query found no run: store.query\(\) shows all"):
        store.query(model="nothing").rows()


def test_html_is_escaped(store) -> None:
    run = store.save({"x": torch.ones(1)}, model="<script>alert(1)</script>", tag="<b>", experiment="&")
    html = store.query()._repr_html_()
    assert run in html and "<script>" not in html and "&lt;script&gt;" in html and "&lt;b&gt;" in html
    assert "\x1b" not in repr(tg.ActivationStore(store.path).query())


def test_control_characters_do_not_reach_the_terminal(store) -> None:
    store.save({"x": torch.ones(1)}, model="a\x1b[2Jb\nc")
    assert "\x1b" not in repr(store.query()) and len(repr(store.query()).splitlines()) == 2


def test_tags_and_experiments(store, three) -> None:
    found = store.query(model="gpt2")
    found.retag(add=["new", "it's"], remove="all")
    assert store.query(tag="new").ids == [three[0], three[2]] and store.query(tag="all").ids == [three[1]]
    assert found[0]["tags"] == ["gpt2", "new", "it's"]
    found.rename_experiment("second")
    assert store.query(experiment="second").ids == found.ids
    found.move(three[0], "third")
    assert store.query(experiment="third").ids == [three[0]] and found[0]["experiment"] == "third"
    with pytest.raises(ValueError, match="experiment= takes a text"):
        found.rename_experiment("")
    for odd in (5, [None], "\ud800"):
        with pytest.raises(ValueError, match="tag="):
            found.retag(add=odd)
        with pytest.raises(ValueError, match="tag="):
            found.retag(remove=odd)
    assert found[0]["tags"] == ["gpt2", "new", "it's"]


def test_delete_leaves_nothing_behind(store, three) -> None:
    found = store.query(model="gpt2")
    files = [path for paths in found.paths().values() for path in paths]
    assert files and all(path.exists() for path in files)
    assert found.delete() == 2 and len(found) == 0
    assert store.query().ids == [three[1]] and not any(path.exists() for path in files)
    assert {path.name for path in store.path.iterdir() if path.is_dir()} == {three[1]}


def test_what_is_gone_already_does_not_stop_a_delete(store, three) -> None:
    found = store.query()
    store.remove(three[1])
    assert found.delete() == 2 and len(store.query()) == 0


def test_a_run_being_written_stops_the_whole_delete(store, three) -> None:
    from tdgeom.store.run_writer import RunLock

    lock = RunLock(store.catalogue, three[1])
    with pytest.raises(StoreBusyError, match="nothing was removed"):
        store.query().delete()
    lock.release()
    assert len(store.query()) == 3


def test_export_and_import(store, three, tmp_path) -> None:
    before = [store.metadata(run) for run in three]
    (tmp_path / "moved").mkdir()
    folder = store.query().export(tmp_path / "moved")
    other = tg.ActivationStore(tmp_path / "other")
    assert other.import_runs(folder).ids == sorted(three)
    for run, told in zip(three, before):
        assert other.metadata(run) == told
        torch.testing.assert_close(other.load(run)[0]["acts"], store.load(run)[0]["acts"])
    assert other.verify() == [] and len(other.import_runs(folder)) == 3 and len(other.query()) == 3
    with pytest.raises(StoreError, match="exists already"):
        store.query().export(tmp_path / "moved")


def test_a_hostile_export_is_refused_and_nothing_is_taken(store, three, tmp_path) -> None:
    folder = store.query().export(tmp_path / "moved")
    record = folder / three[1] / "run.json"
    shard = next((folder / three[1]).glob("*.safetensors"))
    good, bits = record.read_text(), shard.read_bytes()
    told = json.loads(good)

    def changed(**new):
        return json.dumps({**told, **new})

    shards = told["shards"]
    texts = [
        "", "{}", "[" * 10_000, changed(id="../../x"), changed(kind="analysis"), changed(created="now"),
        changed(layout="{}"), changed(about={"model": 3}), changed(about={"nothing": 1}), changed(shards=[[0, 0]]),
        changed(shards=[[-1, *shards[0][1:]]]), changed(shards=[["../../etc/passwd", *shards[0][1:]]]),
        changed(shards=[[*shards[0][:4], "0" * 64, {}]]), changed(format=99), changed(shards=[[0, 1, 0, 5, "x", {}]]),
    ]  # fmt: skip
    for text in texts:
        record.write_text(text)
        other = tg.ActivationStore(tmp_path / "other")
        with pytest.raises(StoreError):
            other.import_runs(folder)
        assert len(other.query()) == 0
    record.write_text(good)
    shard.write_bytes(bits[:-1] + bytes([bits[-1] ^ 1]))
    with pytest.raises(StoreError, match="SHA-256 differs"):
        tg.ActivationStore(tmp_path / "other").import_runs(folder)
    shard.unlink()
    os.symlink("/etc/hostname", shard)
    with pytest.raises(StoreError):
        tg.ActivationStore(tmp_path / "other").import_runs(folder)
    with pytest.raises(StoreError, match="holds no exported runs"):
        store.import_runs(tmp_path)


def test_an_analysis_is_kept_found_and_loaded(store) -> None:
    ids = torch.arange(3, 27).reshape(3, 8)
    results = tg.analyze_model(models.gpt2(), [{"input_ids": ids}] * 2, metrics="spectrum", progress=False)
    run = store.save_analysis(results, model="tiny", tag="check")
    found = store.query(kind="analysis", capture={"sites": "residual_input.1"}, tag="check")
    assert found.ids == [run] and found[0]["state"] == "complete"
    bundle = store.load_analysis(run)
    assert bundle.tables["metrics"]["d_pr"].tolist() == results.metrics["d_pr"].tolist()
    loaded = tg.AnalysisResults.load(bundle)
    assert (
        loaded.to_dict()["novelty"] == results.to_dict()["novelty"] and loaded.artifact_dir == bundle.folder
    )
    assert results.artifact_dir is None and store.verify() == []
    with pytest.raises(StoreError, match="is an analysis"):
        store.load(run)
    path = next(path for path in found.paths()[run] if path.name == "metrics.csv")
    path.write_text(path.read_text() + " ")
    assert [damage.run for damage in store.verify()] == [run]
    with pytest.raises(StoreError, match=r"the analysis in .* cannot be copied: .*metrics.csv has changed"):
        found.export(store.path.parent / "out")
    assert not (store.path.parent / "out").exists()


def test_an_analysis_is_exported_and_imported(store, tmp_path) -> None:
    ids = torch.arange(3, 27).reshape(3, 8)
    results = tg.analyze_model(models.gpt2(), [{"input_ids": ids}] * 2, metrics="spectrum", progress=False)
    run = store.save_analysis(results, tag="moved")
    folder = store.query().export(tmp_path / "moved")
    other = tg.ActivationStore(tmp_path / "other")
    assert other.import_runs(folder).ids == [run] and other.metadata(run) == store.metadata(run)
    assert (
        other.load_analysis(run).tables["metrics"]["d_pr"].tolist() == results.metrics["d_pr"].tolist()
        and other.verify() == []
    )
    table = folder / run / "bundle" / "metrics.csv"
    table.write_text(table.read_text().replace("1", "2", 1))
    third = tg.ActivationStore(tmp_path / "third")
    with pytest.raises(StoreError, match="the analysis in .*metrics.csv has changed"):
        third.import_runs(folder)
    assert len(third.query()) == 0 and list(third.path.glob("r*")) == []


def test_an_import_that_was_killed_is_done_again(store, three, tmp_path) -> None:
    folder = store.query().export(tmp_path / "moved")
    other = tg.ActivationStore(tmp_path / "other")
    left = other.path / three[0]
    left.mkdir()
    (left / "rank-00000-00000000.safetensors").write_bytes(b"half")
    (left / ".rank-00000-00000001.safetensors.7.draft").write_bytes(b"half")
    assert sorted(other.import_runs(folder).ids) == sorted(three) and other.verify() == []
    assert {path.name for path in left.iterdir()} == {"rank-00000.lock", "rank-00000-00000000.safetensors"}


def test_an_unfinished_run_of_the_same_id_is_not_passed_off_as_imported(store, three, tmp_path) -> None:
    folder = store.query().export(tmp_path / "moved")
    other = tg.ActivationStore(tmp_path / "other")
    other.catalogue.add_run(
        three[1], "capture", store.catalogue.record(three[1]).about, store.catalogue.layout(three[1])
    )
    with pytest.raises(
        StoreError, match=rf"has the run {three[1]} already, in the state failed: remove it there"
    ):
        other.import_runs(folder)
    assert other.query().ids == [three[1]]
    other.remove(three[1])
    assert len(other.import_runs(folder)) == 3


def test_an_import_without_space_leaves_nothing(store, tmp_path) -> None:
    store.save(torch.ones(100_000))
    folder = store.query().export(tmp_path / "moved")
    other = tg.ActivationStore(tmp_path / "other")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(StoreError, match="no space is left"):
            other.import_runs(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(other.query()) == 0 and list(other.path.rglob("*.safetensors")) == [] == other.verify()
    assert len(other.import_runs(folder)) == 1


def test_nothing_is_not_exported(store, tmp_path) -> None:
    with pytest.raises(StoreError, match="there are no runs to export"):
        store.query().export(tmp_path / "moved")
    assert not (tmp_path / "moved").exists()


def test_an_export_whose_record_and_shards_disagree_is_refused(store, tmp_path) -> None:
    keep = tg.StoreActivations(store, ["x"], shard_bytes=160)
    tg.run(keep, [{"tokens": {"x": torch.ones(20, 2)}}])
    folder = store.query().export(tmp_path / "moved")
    record = folder / keep.run_id / "run.json"
    told = json.loads(record.read_text())
    shards = told["shards"]
    changes = [
        {"shards": [[*one[:5], {"x": "y"}] for one in shards]}, {"shards": shards[1:]}, {"shards": shards + shards[:1]},
        {"shards": []}, {"shards": [[*one[:2], one[2] + 1, *one[3:]] for one in shards]}, {"kind": "capture"},
        {"layout": told["layout"].replace("float32", "float64")}, {"kind": "analysis", "shards": []},
    ]  # fmt: skip
    for change in changes:
        record.write_text(json.dumps({**told, **change}))
        other = tg.ActivationStore(tmp_path / "other")
        with pytest.raises(
            StoreError, match="tampered with|damaged|changed|a shard that is none|cannot be copied"
        ):
            other.import_runs(folder)
        assert len(other.query()) == 0 and other.verify() == [], change


def test_the_commands(store, three, command, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TDGEOM_STORE", str(store.path))
    code, out, err = command("runs", "list")
    assert code == 0 and err == "" and all(run in out for run in three)
    assert command("runs", "query", "--model", "bert", "--ids")[1].split() == [three[1]]
    assert command("runs", "query", "--capture", '{"a": 1}')[1].strip() == "no runs"
    assert json.loads(command("runs", "show", three[0])[1])["model"] == "gpt2"
    assert command("runs", "verify") == (0, "all is well\n", "")
    assert command("runs", "export", tmp_path / "moved", three[0], three[1])[0] == 0
    code, out, _ = command("runs", "import", tmp_path / "moved", "--store", tmp_path / "other")
    assert code == 0 and three[0] in out
    assert command("runs", "rm", three[0], "--yes")[1].endswith("1 removed\n") and len(store.query()) == 2
    shard = next((store.path / three[1]).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    code, out, _ = command("runs", "verify", three[1])
    assert code == 1 and shard.name in out


def test_mistakes_on_the_command_line_are_one_line(store, three, command, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TDGEOM_STORE", raising=False)
    refused(command("runs", "list"), "--store DIR", "TDGEOM_STORE")
    refused(command("runs", "list", "--store", tmp_path / "none"), "holds no store")
    refused(command("runs", "show", "r", "--store", store.path), "3 runs match 'r'")
    refused(command("runs", "query", "--capture", "{", "--store", store.path), "--capture takes JSON")
    refused(command("runs", "query", "--where", "1=1", "--store", store.path), "where= takes a path")
