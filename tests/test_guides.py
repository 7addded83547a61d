"""The Python of the guides in docs, block after block, on tiny models."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import models
import tdgeom as tg
from models import labelled_batches as batches

matplotlib.use("Agg")
DOCS = Path(__file__).parents[1] / "docs"


def ran(page: str, **given) -> dict:
    names = {"torch": torch, "tg": tg, "TensorDict": TensorDict, "TensorDictSequential": TensorDictSequential}
    names |= {"model": models.gpt2(), "loader": batches(12), **given}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert blocks
    return names


# run below, each with what it speaks of; the pages of FOLDERS run in test_how_to.py
GUIDES = {
    "models.md", "probes.md", "errors.md", "significance.md", "comparing.md", "contributing.md", "composition.md", "data.md",
    "index.md", "assistants.md", "store.md", "precision.md",
    "scaling.md",
}  # fmt: skip
FOLDERS = ("howto", "coming_from", "measures")


@pytest.mark.parametrize(
    "page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.relative_to(DOCS).as_posix()
)
def test_every_block_of_python_runs_and_asserts(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for number, block in enumerate(blocks):
        asserted = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(block)))
        assert asserted, f"block {number} asserts nothing: it would pass whatever it computes"
    name = page.relative_to(DOCS).as_posix()
    assert not blocks or name in GUIDES or name.split("/")[0] in FOLDERS


@pytest.mark.filterwarnings("ignore::tdgeom.UndefinedMeasureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("page", ["index.md", "assistants.md", "store.md", "precision.md", "scaling.md"])
def test_pages_that_need_nothing_further(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loader = batches(12)
    for number, batch in enumerate(loader):
        batch["document_id"] = torch.arange(8) // 2 + 4 * number
    ran(page, loader=loader)


def test_reading_and_changing_a_model() -> None:
    batch = {name: value for name, value in batches(1)[0].items() if name != "label"}
    other = {**batch, "input_ids": batch["input_ids"].flip(0)}
    names = ran("models.md", batch=batch, other_batch=other)
    assert names["td"]["acts", "attn_pattern.0"].shape == (8, 2, 7, 7)
    # the prompt's attended tokens and three cached steps of eight sequences
    assert int(names["generated"]["run", "rows"]) == int(batch["attention_mask"].sum()) + 3 * 8
    with tg.Capture(names["model"], "residual_output.0") as plain:
        names["model"](**batch)
    edited, own = (calls[0]["acts", "residual_output.0"] for calls in (names["edited"], plain))
    last = (edited - own)[:, -1]
    torch.testing.assert_close(last, 4 * names["direction"].expand_as(last))
    recovered = names["grid"]["recovered", "residual_input"]
    assert recovered.shape == (models.DEPTH, 7)
    assert names["found"]["exemplars", "mlp_act.0", "values"].shape[1] == 5
    assert not any(module._forward_hooks for module in names["model"].modules())


@pytest.mark.filterwarnings("ignore::tdgeom.UndefinedMeasureWarning")
def test_probes_concepts_erasure() -> None:
    whole = batches(12)
    names = ran("probes.md", train_batches=whole[:8], test_batches=whole[8:])
    assert set(names["table"]["site"]) == {f"residual_output.{i}" for i in range(models.DEPTH)}
    # the last token is the label: a probe of the last position reads it off
    assert (names["probing"].table()["accuracy"] == 1).all()
    assert names["found"]["collected", names["s"][0]].shape == (
        sum(int(b["attention_mask"].sum()) for b in whole),
        4,
    )
    site = names["s"][0]
    erased = tg.Erase(names["erasers"][site])(tokens=torch.randn(5, models.WIDTH))
    assert erased.shape == (5, models.WIDTH)


@pytest.mark.filterwarnings("ignore::tdgeom.UndefinedMeasureWarning")
def test_standard_errors() -> None:
    ran("errors.md")


@pytest.mark.filterwarnings("ignore::tdgeom.UndefinedMeasureWarning")
def test_more_than_chance() -> None:
    names = ran("significance.md")
    assert names["table"]["neighborhood_overlap_p"].min() >= 0.01
    assert set(names["curve"]["metric"]) >= {"d_pr", "twonn"}


def test_comparing_representations() -> None:
    names = ran("comparing.md", other_model=models.bert())
    pairs = models.DEPTH * (models.DEPTH - 1) // 2
    assert len(tg.to_frame(names["result"], "between")) == pairs
    assert names["compared"].matrix("linear_cka_debiased").shape == (models.DEPTH, models.DEPTH)
    assert {"twonn", "gride"} == set(tg.intrinsic_dimension_profile(names["results"])["estimator"])


def test_contributing() -> None:
    batch = {name: value for name, value in batches(1)[0].items() if name != "label"}
    names = ran("contributing.md", batch=batch)
    assert isinstance(names["one"], tg.StreamingStage)


def test_the_map_names_what_is_there_and_every_room() -> None:
    root = DOCS.parent
    page = (DOCS / "contributing.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    named = set(re.findall(r"`([\w./]+(?:/|\.(?:py|md|txt|toml)))`", prose))
    assert len(named) > 50
    missing = [name for name in named if not any((root / at / name).exists() for at in ("", "src/tdgeom"))]
    assert not missing
    rooms = {path.parent for path in (root / "src/tdgeom").rglob("*/__init__.py")}
    mapped = re.findall(r"^\| `([\w/]+)/`", page, re.MULTILINE)
    assert {f"{room.relative_to(root / 'src/tdgeom').as_posix()}" for room in rooms} == set(mapped)
    assert len(mapped) == len(set(mapped))


def test_the_map_is_in_the_order_in_which_rooms_may_use_each_other() -> None:
    settings = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.findall(r'^    "tdgeom\.(\w+)",$', settings, re.MULTILINE)
    page = (DOCS / "contributing.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| `(\w+)/`", page, re.MULTILINE)
    assert rooms == [layer for layer in reversed(layers) if layer in rooms]


@pytest.mark.torchrl
@pytest.mark.filterwarnings("ignore::tdgeom.UndefinedMeasureWarning")
def test_how_composition_works() -> None:
    names = ran("composition.md", loader=batches(3))
    rows = sum(int((batch["input_ids"] != 0).sum()) for batch in batches(3))
    assert int(names["result"]["run", "rows"]) == rows
    assert len(names["spectrum"]) < len(names["pipeline"])


def test_the_page_on_data():
    """Its blocks assert what they show."""
    ran("data.md")
