"""The command line on a folder of images and on a FASTA file."""

from __future__ import annotations

import torch
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizer, ViTConfig, ViTImageProcessor, ViTModel

import tdgeom as tg
from tdgeom import cli


def test_a_folder_of_images_is_measured(tmp_path, capsys):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        Image.effect_noise((9, 9), 60).save(tmp_path / "pictures" / f"{number}.png")
    model, out = str(tmp_path / "vit"), tmp_path / "run"
    given = ["--images", str(tmp_path / "pictures"), "--layers", "all"]
    assert cli.main(["analyze", model, *given, "--metrics", "spectrum", "--out", str(out)]) == 0, (
        capsys.readouterr().err
    )
    results = tg.AnalysisResults.load(out)
    assert results.metadata["rows_observed"] == 12 * 5 and len(results.metrics) == 2
    assert cli.main(["compare", model, model, *given, "--metrics", "linear_cka"]) == 0, (
        capsys.readouterr().err
    )
    assert cli.main(["analyze", model, "--images", str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_fasta_file_is_measured(tmp_path, capsys):
    torch.manual_seed(0)
    letters = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"ACDEFGHIKLMNPQRSTVWY",
        *(f"##{x}" for x in "ACDEFGHIKLMNPQRSTVWY"),
    ]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(letters))
    BertTokenizer(str(tmp_path / "model" / "vocab.txt"), do_lower_case=False).save_pretrained(
        tmp_path / "model"
    )
    config = BertConfig(
        vocab_size=len(letters),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    (tmp_path / "two.fasta").write_text(">one\nMKVLAW\nGG*\n>two\nACDEFGH\n")
    given = [
        "analyze",
        str(tmp_path / "model"),
        "--fasta",
        str(tmp_path / "two.fasta"),
        "--metrics",
        "spectrum",
    ]
    assert cli.main([*given, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert tg.AnalysisResults.load(tmp_path / "run").metadata["rows_observed"] == 8 + 7 + 4
    assert cli.main([*given, "--text", str(tmp_path / "two.fasta")]) == 2
    assert "exactly one of --text FILE" in capsys.readouterr().err
