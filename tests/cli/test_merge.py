"""``tdgeom analyze --shard K/N --state FILE`` and ``tdgeom merge``."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tdgeom.cli.app import main
from tdgeom.cli.demo import demo_model_path


def test_parts_from_the_shell_give_the_tables_of_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Sentence {i} tells of thing {i * i % 37}." for i in range(120)))
    words = [
        "analyze",
        str(demo_model_path()),
        "--text",
        str(text),
        "--max-length",
        "32",
        "--batch-size",
        "4",
    ]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    files = [str(tmp_path / f"{number}.state") for number in (1, 2)]
    for number, file in enumerate(files, 1):
        assert main([*words, "--shard", f"{number}/2", "--state", file]) == 0
        assert "State of this part" in capsys.readouterr().out
    assert main(["merge", *files, "--out", str(tmp_path / "merged")]) == 0
    one, other = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("merged", "whole"))
    pd.testing.assert_frame_equal(one, other, rtol=1e-6)
    assert (tmp_path / "merged" / "report.html").is_file()
    capsys.readouterr()
    assert main(["merge", files[0]]) == 2
    assert "1 of 2 parts; missing: [2]" in capsys.readouterr().err
    assert main([*words, "--state", files[0], "--out", str(tmp_path / "x")]) == 2
    assert "--out belongs to tdgeom merge" in capsys.readouterr().err
