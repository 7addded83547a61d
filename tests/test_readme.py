"""The README: its Python on a tiny model, the output that it shows, the figures that it quotes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import models
import tdgeom as tg

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_ten_lines_give_the_output_shown(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert len([line for line in BLOCKS[0].splitlines() if line]) <= 10
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    given = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [line.split() for line in re.search(r"```text\n(.*?)```", README, re.DOTALL)[1].splitlines()]
    assert given[0] == shown[0] and len(given) == len(shown) == 7
    numbers = [[[float(cell) for cell in row] for row in table[1:]] for table in (given, shown)]
    torch.testing.assert_close(
        *map(torch.tensor, numbers), rtol=0.05, atol=0.01
    )  # the text is that of this Python
    assert (tmp_path / "report.html").stat().st_size > 100_000


@pytest.mark.filterwarnings("ignore::tdgeom.UndefinedMeasureWarning")
def test_every_other_block_runs() -> None:
    batch = models.text_batch()
    names = {
        "model": models.gpt2(),
        "dataloader": [batch] * 3,
        "inputs": {**batch, "pad_token_id": 0},
        "torch": torch,
        "tg": tg,
    }
    assert len(BLOCKS) == 4
    for block in BLOCKS[1:]:
        exec(compile(block, "README.md", "exec"), names)
    assert len(names["calls"]) == 8
    steps = 7 * len(batch["input_ids"])  # the last generated token is never read
    assert names["moments"]["run", "rows"] == int(batch["attention_mask"].sum()) + steps
    frame = tg.to_frame(names["result"], "dimension")
    assert list(frame["estimator"].unique()) == ["id"]
    assert (frame["estimate"] > 0).all()


def test_every_figure_stands_on_the_page_it_links_to() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", page, re.MULTILINE)}
    rows = re.findall(r"^\| .*?\(docs/benchmarks\.md#([\w-]+)\).*?\| (.+) \| (.+) \|$", README, re.MULTILINE)
    assert len(rows) == 6
    for anchor, *cells in rows:
        assert anchor in headings
        figures = re.findall(r"(?<![\w-])\d[\d,.]*(?:e-\d+)?", " ".join(cells))
        assert len(figures) >= 2 and all(figure.rstrip(",") in page for figure in figures)


def test_what_it_links_to_is_there_and_the_picture_is_small() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)
    pictures = [ROOT / f"docs/_static/report-{scheme}.png" for scheme in ("light", "dark")]
    assert all(picture.stat().st_size < 200_000 for picture in pictures)
