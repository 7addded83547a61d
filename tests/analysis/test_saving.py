"""An analysis that cannot be saved is not lost: the error holds it, and its checkpoints stay until it is safe."""

from __future__ import annotations

import errno

import numpy as np
import pandas as pd
import pytest
import torch

import models
import tdgeom as tg


def loader():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, models.VOCAB, (8, 6, 7), generator=generator)
    return [{"input_ids": one, "decoder_input_ids": one} for one in ids]


def full(*args, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "model, untrained, files",
    [
        (models.gpt2, False, {"state"}),
        (models.gpt2, True, {"state", "state.untrained"}),
        (models.t5, False, {"state", "state.decoder"}),
    ],
)
def test_what_a_full_disk_refused_is_in_the_error_and_ends_quickly_when_called_again(
    model, untrained, files, tmp_path, monkeypatch
) -> None:
    net, seen = model(), []
    net.register_forward_pre_hook(lambda *_: seen.append(1))
    options = {"metrics": "spectrum", "untrained": untrained, "progress": False}
    call = {"checkpoint": tmp_path / "state", "every": 3, "save_dir": tmp_path / "run", **options}
    with monkeypatch.context() as disk, pytest.raises(tg.NotSavedError) as raised:
        disk.setattr(np, "savez_compressed", full)
        tg.analyze_model(net, loader(), **call)
    said = str(raised.value)
    assert "eigenvalues.npz" in said and "No space left on device" in said and str(tmp_path / "run") in said
    assert "The checkpoint" in said and "error.results.save" in said
    assert {path.name for path in tmp_path.iterdir()} == files
    expected = tg.analyze_model(model(), loader(), **options)
    pd.testing.assert_frame_equal(raised.value.results.metrics, expected.metrics)
    seen.clear()
    again = tg.analyze_model(net, loader(), **call)
    assert not seen  # the stream had ended: only what comes after it is done again
    pd.testing.assert_frame_equal(again.metrics, expected.metrics)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_file_in_the_way_is_named(tmp_path) -> None:
    class Loader:
        def __iter__(self):
            (tmp_path / "out").write_text("in the way")
            yield from loader()

    with pytest.raises(tg.NotSavedError, match=f"FileExistsError.*{tmp_path / 'out'}") as raised:
        tg.analyze_model(
            models.gpt2(), Loader(), metrics="spectrum", save_dir=tmp_path / "out" / "run", progress=False
        )
    assert "checkpoint" not in str(raised.value)
    assert tg.load_results(raised.value.results.save(tmp_path / "other")).metrics["layer"].tolist() == [
        0,
        1,
        2,
    ]
