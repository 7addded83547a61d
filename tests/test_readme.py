"""The README's Python, block after block, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import models
import tdgeom as tg

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore::tdgeom.UndefinedMeasureWarning")
def test_every_block_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    batch = models.text_batch()
    names = {
        "model": models.gpt2(),
        "other_model": models.bert(),
        "dataloader": [batch] * 3,
        "inputs": {**batch, "pad_token_id": 0},
        "torch": torch,
        "tg": tg,
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) == 5
    assert len(names["calls"]) == 8
    steps = 7 * len(batch["input_ids"])  # the last generated token is never read
    assert names["moments"]["run", "rows"] == int(batch["attention_mask"].sum()) + steps
    frame = tg.to_frame(names["result"], "dimension")
    assert list(frame["estimator"].unique()) == ["id"]
    assert (frame["estimate"] > 0).all()
    assert len(names["rows"]) > 0 and (tmp_path / "activations" / "catalogue.sqlite").exists()
