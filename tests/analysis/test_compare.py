"""Two models side by side: against the rows gathered and compared by hand."""

from __future__ import annotations

import copy
import functools
import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from tdgeom.demo import demo_model, demo_texts
from transformers import GPT2Config, GPT2Model

import models
import tdgeom as tg
from tdgeom.analysis.compare import MAX_ROWS
from tdgeom.cli.compare_command import compare as compare_command
from tdgeom.measures.registry import ALIASES, DEFAULT_MEASURES, MEASURES, known_measures
from tdgeom.model.calls.repeated_calls import FiredTooOften
from terminal import refused


def loader(side: str = "right") -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for lengths in ((9, 5, 7), (8, 9, 3), (9, 9, 6)):
        ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
        for row, length in enumerate(lengths):
            at = slice(0, length) if side == "right" else slice(9 - length, 9)
            ids[row, at] = torch.randint(3, models.VOCAB, (length,), generator=generator)
            mask[row, at] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def hidden(model: torch.nn.Module, batches) -> list[np.ndarray]:
    """The outputs of all blocks but the last, one row a token, in float64."""
    rows = []
    for batch in batches:
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states[1:-1]
        rows.append([state[batch["attention_mask"].bool()] for state in states])
    return [torch.cat(layer).double().numpy() for layer in zip(*rows)]


def debiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    """From the full Gram matrices, as Song et al. write it."""

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n = len(k)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        total = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
        return total / (n * (n - 3))

    x, y = x - x.mean(0), y - y.mean(0)
    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


@pytest.fixture(scope="module")
def wide() -> torch.nn.Module:
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=models.VOCAB,
        n_embd=24,
        n_layer=4,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2Model(config).eval()


def test_two_widths_and_depths_against_the_gram_matrices(wide) -> None:
    one = models.gpt2()
    result = tg.compare(one, wide, loader(), progress=False)
    grid = result.matrix("linear_cka_debiased")
    assert list(grid.index) == [f"a/residual_output.{i}" for i in range(3)]
    assert list(grid.columns) == [f"b/residual_output.{i}" for i in range(4)]
    a, b = hidden(one, loader()), hidden(wide, loader())
    for i in range(2):
        for j in range(3):
            assert grid.iloc[i, j] == pytest.approx(debiased_cka(a[i], b[j]), abs=1e-6)
    overlap = result.matrix("neighborhood_overlap")
    expected = tg.functional.neighborhood_overlap(torch.from_numpy(a[0]), torch.from_numpy(b[1]), k=10)
    assert overlap.iloc[0, 1] == pytest.approx(float(expected), abs=1e-9)


def test_a_model_with_itself_and_a_checkpoint_with_its_source() -> None:
    model = models.gpt2()
    result = tg.compare(model, model, loader(), progress=False, names=("before", "after"))
    for measure in result.measures:
        assert np.diag(result.matrix(measure)) == pytest.approx(np.ones(3), abs=1e-9)
    moved = tg.untrained_copy(model, seed=9)
    changed = tg.compare(model, moved, loader(), progress=False).matrix("linear_cka_debiased")
    assert (np.diag(changed) < 0.999).all()


def test_padding_side_changes_nothing(wide) -> None:
    right, left = (
        tg.compare(models.gpt2(), wide, loader(side), progress=False) for side in ("right", "left")
    )
    for measure in right.measures:
        np.testing.assert_allclose(right.matrix(measure), left.matrix(measure), atol=1e-6)


def test_other_measures_and_the_same_numbers_by_single_calls(wide) -> None:
    stages = [tg.RBFCKA(), tg.Procrustes(source="moments"), tg.NeighborhoodOverlap(k=5, source="neighbors")]
    result = tg.compare(models.gpt2(), wide, loader(), stages, layers=[0, 1], progress=False)
    a, b = (torch.from_numpy(rows[1]) for rows in (hidden(models.gpt2(), loader()), hidden(wide, loader())))
    assert result.matrix("rbf_cka").iloc[1, 1] == pytest.approx(float(tg.functional.rbf_cka(a, b)), abs=1e-5)
    assert result.matrix("procrustes").iloc[1, 1] == pytest.approx(
        float(tg.functional.procrustes(a, b)), abs=1e-5
    )
    expected = float(tg.functional.neighborhood_overlap(a, b, k=5))
    assert result.matrix("neighborhood_overlap").iloc[1, 1] == pytest.approx(expected)


def test_measures_by_name_are_those_of_the_pure_functions(wide):
    """Every name, in one pass, against the function of that name on the rows gathered by hand."""
    result = tg.compare(models.gpt2(), wide, loader(), list(MEASURES), layers=[0, 1], progress=False)
    assert set(result.measures) == set(MEASURES)
    a, b = (torch.from_numpy(rows[1]) for rows in (hidden(models.gpt2(), loader()), hidden(wide, loader())))
    for name in MEASURES:
        if name.startswith("information_imbalance"):
            expected = tg.functional.information_imbalance(a, b)[name.endswith("_ba")]
        else:
            settings = {"k": 10} if name in ("neighborhood_overlap", "jaccard_knn") else {}
            expected = getattr(tg.functional, name)(a, b, **settings)
        assert result.matrix(name).iloc[1, 1] == pytest.approx(float(expected), abs=1e-5), name


def test_names_aliases_and_stages_mix(wide):
    settings = {"layers": [0], "progress": False}
    one = tg.compare(models.gpt2(), wide, loader(), "cka", **settings)
    assert one.measures == ["linear_cka_debiased"]
    mixed = tg.compare(models.gpt2(), wide, loader(), [tg.NeighborhoodOverlap(k=5), "cka", "rsa"], **settings)
    assert set(mixed.measures) == {"linear_cka_debiased", "rsa", "neighborhood_overlap"}
    assert mixed.matrix("linear_cka_debiased").equals(one.matrix())
    assert set(ALIASES.values()) <= set(known_measures()) and set(DEFAULT_MEASURES) <= set(MEASURES)
    assert not set(ALIASES) & set(known_measures())


def trained(model: torch.nn.Module, batches) -> torch.nn.Module:
    """A later checkpoint of the same model: a few steps of language modelling."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in 2 * batches:
        model(**batch, labels=batch["input_ids"].where(batch["attention_mask"].bool(), -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_two_checkpoints_of_one_model_against_numpy(tmp_path):
    """One model before and after training, the later one opened from its directory, every number by NumPy alone."""
    before = models.gpt2()
    after = trained(before, loader())
    after.save_pretrained(tmp_path / "after")
    result = tg.compare(
        before, str(tmp_path / "after"), loader(), ["linear_cka_debiased", "linear_cka", "procrustes", "neighborhood_overlap"],
        names=("before", "after"), progress=False,
    )  # fmt: skip
    a, b = hidden(before, loader()), hidden(after, loader())
    assert all(np.abs(x - y).max() > 0.01 for x, y in zip(a, b))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            x0, y0 = x - x.mean(0), y - y.mean(0)
            x1, y1 = x0 / np.linalg.norm(x0), y0 / np.linalg.norm(y0)
            k, m = x0 @ x0.T, y0 @ y0.T
            near = [
                np.argsort(np.linalg.norm(s[:, None] - s, axis=-1) + 1e9 * np.eye(len(s)), 1)[:, :10]
                for s in (x, y)
            ]
            expected = {
                "linear_cka_debiased": debiased_cka(x, y),
                "linear_cka": (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()),
                "procrustes": 2 - 2 * np.linalg.svd(x1.T @ y1, compute_uv=False).sum(),
                "neighborhood_overlap": np.mean([len(set(p) & set(q)) / 10 for p, q in zip(*near)]),
            }
            for name, value in expected.items():
                assert result.matrix(name).iloc[i, j] == pytest.approx(value, abs=1e-5), (name, i, j)
    assert list(result.matrix().index) == [f"before/residual_output.{i}" for i in range(3)]
    assert list(result.matrix().columns) == [f"after/residual_output.{i}" for i in range(3)]
    assert (result.metrics.groupby("model")["model_label"].nunique() == 1).all()


def test_moments_that_would_not_fit_are_refused_with_the_remedy(monkeypatch, wide):
    from tdgeom.analysis import compare as comparison

    small = functools.partial(comparison.StreamingCrossMoments, memory=20_000)
    monkeypatch.setattr(comparison, "StreamingCrossMoments", small)
    with pytest.raises(ValueError, match=r"7 sites of width up to 24 and 12 pairs.*Pass sketch=1024"):
        tg.compare(models.gpt2(), wide, loader(), progress=False)
    assert tg.compare(models.gpt2(), wide, loader(), sketch=16, layers=[0], progress=False).measures


def test_a_sketch_reports_its_error(wide) -> None:
    result = tg.compare(models.gpt2(), wide, loader(), sketch=64, progress=False)
    exact = tg.compare(models.gpt2(), wide, loader(), progress=False).matrix("linear_cka_debiased")
    error = result.matrix("linear_cka_debiased_standard_error")
    assert (error > 0).all(axis=None)
    assert result.measures == ["linear_cka_debiased", "neighborhood_overlap"]
    recorded = {one["stage"]: one for one in result.metadata["settings"]["metrics"]}
    assert recorded["LinearCKA"]["source"] == "sketch" and recorded["NeighborhoodOverlap"]["k"] == 10
    assert ((result.matrix("linear_cka_debiased") - exact).abs() < 6 * error + 0.05).all(axis=None)


@pytest.fixture(scope="module")
def byte_model() -> torch.nn.Module:
    torch.manual_seed(2)
    return GPT2Model(
        GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()


@pytest.mark.parametrize("align", ["auto", "document"])
def test_two_tokenizers_against_rows_gathered_by_hand(align, byte_tokenizer, byte_model) -> None:
    model, words = demo_model()
    texts = demo_texts()[:40]
    with pytest.warns(UserWarning, match="what is beyond max_length=48 is left out"):
        result = tg.compare(
            model, byte_model, texts, tokenizer_a=words, tokenizer_b=byte_tokenizer, align=align,
            layers=[0], max_length=48, progress=False,
        )  # fmt: skip
    assert result.metadata["align"] == ("characters" if align == "auto" else "document")
    rows: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for text in texts:  # one by one: no padding at all
        ends, states, used = [], [], []
        for net, tokenizer in ((model, words), (byte_model, byte_tokenizer)):
            made = tokenizer(
                text,
                truncation=True,
                max_length=48,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
            with torch.no_grad():
                out = net(torch.tensor([made["input_ids"]]), output_hidden_states=True)
            states.append(out.hidden_states[1][0])
            spans = made["offset_mapping"]
            ends.append({e: at for at, (s, e) in enumerate(spans) if e > s})
            used.append(~torch.tensor(made["special_tokens_mask"]).bool())
        if align == "document":
            rows[0].append(states[0][used[0]].mean(0))
            rows[1].append(states[1][used[1]].mean(0))
        else:
            for end in sorted(set(ends[0]) & set(ends[1])):
                rows[0].append(states[0][ends[0][end]])
                rows[1].append(states[1][ends[1][end]])
    a, b = (torch.stack(side).double().numpy() for side in rows)
    assert result.metadata["rows_observed"] == len(a)
    assert result.matrix("linear_cka_debiased").iloc[0, 0] == pytest.approx(debiased_cka(a, b), abs=1e-5)


def test_one_vocabulary_is_compared_token_by_token() -> None:
    model, words = demo_model()
    result = tg.compare(
        model, model, demo_texts()[:3], tokenizer_a=words, tokenizer_b=words, layers=[0], progress=False
    )
    assert result.metadata["align"] == "rows" and result.matrix().iloc[0, 0] == pytest.approx(1)


def test_slow_tokenizers_of_one_vocabulary_that_cut_differently_are_not_matched_by_row(slow_tokenizers):
    _, bert, _ = slow_tokenizers
    model, _ = demo_model()
    with pytest.raises(ValueError, match="cut text differently"):
        tg.compare(model, model, ["The cat"], tokenizer_a=bert[True], tokenizer_b=bert[False], align="rows")


def test_shown_in_a_line_and_as_a_matrix_in_notebooks(wide) -> None:
    result = tg.compare(models.gpt2(), wide, loader(), metrics="cka", progress=False)
    assert repr(result) == (
        f"Comparison(a GPT2LMHeadModel, b {type(wide).__name__}: {len(result.novelty)} pairs of sites, linear_cka_debiased)"
    )
    assert result._repr_html_() == result.matrix("linear_cka_debiased").to_html()


def test_saved_and_loaded_and_drawn(wide, tmp_path) -> None:
    result = tg.compare(models.gpt2(), wide, loader(), progress=False)
    loaded = tg.Comparison.load(result.save(tmp_path / "run"))
    pd.testing.assert_frame_equal(loaded.matrix(), result.matrix())
    image = tg.plot.matrix(result.novelty, "linear_cka_debiased").images[0].get_array()
    np.testing.assert_allclose(image, result.matrix("linear_cka_debiased"))
    assert loaded.metadata["models"]["b"]["class"] == type(wide).__name__


def test_mistakes_say_what_to_do(byte_tokenizer) -> None:
    model, words = demo_model()
    with pytest.raises(ValueError, match="two different words"):
        tg.compare(model, model, [], names=("x", "x"))
    with pytest.raises(ValueError, match="align takes 'auto' or one of"):
        tg.compare(model, model, [], align="tokens")
    with pytest.raises(ValueError, match="compare was given texts: give tokenizer="):
        tg.compare(model, model, demo_texts()[:2], progress=False)
    with pytest.raises(ValueError, match="give documents"):
        tg.compare(model, model, demo_texts()[:2], align="document")
    with pytest.raises(ValueError, match="cut text differently.*Take align='characters'"):
        tg.compare(
            model, model, demo_texts()[:2], tokenizer_a=words, tokenizer_b=byte_tokenizer, align="rows"
        )
    with pytest.raises(TypeError, match="metrics are names.*or pair stages.*TwoNN"):
        tg.compare(model, model, [], [tg.TwoNN()])
    with pytest.raises(ValueError, match="metrics: 'cosine' is none.*There are linear_cka_debiased, "):
        tg.compare(model, model, [], ["rsa", "cosine"])
    with pytest.raises(
        ValueError, match="metrics procrustes, cca_r2 need exact moments: leave them out, or sketch"
    ):
        tg.compare(model, model, [], ["cka", "procrustes", "cca_r2"], sketch=32)
    with pytest.raises(ValueError, match="SVCCA with source='moments' needs exact moments, sketch=32"):
        tg.compare(model, model, [], [tg.SVCCA(source="moments")], sketch=32)
    with pytest.raises(KeyError, match="no measure 'rsa'"):
        tg.compare(models.gpt2(), models.gpt2(), loader(), progress=False).matrix("rsa")


def test_the_command(command, folder, text, tmp_path) -> None:
    out = tmp_path / "run"
    code, printed, err = command(
        "compare",
        folder,
        folder,
        "--text",
        text,
        "--max-length",
        32,
        "--max-rows",
        400,
        "--plots",
        "--out",
        out,
    )
    assert code == 0 and err == "" and "token by token" in printed
    loaded = tg.Comparison.load(out)
    assert np.diag(loaded.matrix("linear_cka_debiased")) == pytest.approx(np.ones(3), abs=1e-9)
    assert {path.name for path in (out / "plots").iterdir()} == {f"{name}.png" for name in loaded.measures}
    code, shown, _ = command("show", out)
    assert code == 0 and "nearest" in shown
    refused(
        command("compare", folder, folder, "--text", text, "--metrics", "cosine"),
        "--metrics: 'cosine' is none",
    )
    refused(
        command("compare", folder, folder, "--text", text, "--metrics", "procrustes", "--sketch", 32),
        "--metrics procrustes",
        "exact moments",
    )


def test_the_command_and_the_function_have_one_default():
    function, command = (inspect.signature(f).parameters for f in (tg.compare, compare_command))
    assert function["max_rows"].default == command["max_rows"].default == MAX_ROWS
    assert ",".join(function["metrics"].default) == command["metrics"].default
    for name in ("sites", "layers", "align", "sketch", "batch_size", "seed"):
        assert function[name].default == command[name].default, name


def test_the_earlier_name_of_metrics_is_taken(wide):
    settings = {"layers": [0], "progress": False}
    by_alias = tg.compare(models.gpt2(), wide, loader(), measures=["cka"], **settings)
    assert by_alias.matrix().equals(tg.compare(models.gpt2(), wide, loader(), ["cka"], **settings).matrix())
    with pytest.raises(TypeError, match="measures= is another name of metrics=; got both"):
        tg.compare(models.gpt2(), wide, loader(), metrics="cka", measures="cka", **settings)


def test_a_module_that_runs_several_times_is_compared_at_the_call_that_is_named() -> None:
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    model = AlbertModel(
        AlbertConfig(
            vocab_size=models.VOCAB, embedding_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    ).eval()  # fmt: skip
    site = "module_output:encoder.albert_layer_groups.0.albert_layers.0"
    with pytest.raises(FiredTooOften, match="calls="):
        tg.compare(model, model, loader(), "linear_cka", sites=site, progress=False)
    with pytest.raises(ValueError, match="calls='all' has several values"):
        tg.compare(model, model, loader(), "linear_cka", sites=site, calls="all", progress=False)
    other = tg.compare(
        model, copy.deepcopy(model), loader(), "linear_cka", sites=site, calls="last", progress=False
    )
    assert other.metadata["settings"]["calls"] == "last" and other.matrix("linear_cka").iloc[
        0, 0
    ] == pytest.approx(1.0)
