"""Checkpoints side by side: each as ``analyze_model`` measures it, pairs as functions of tensors do, killed or not."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch

import models
import tdgeom as tg
from tdgeom.training.checkpoints import as_checkpoints

ASKED = {
    "sites": "residual_output",
    "metrics": ["spectrum", "sample"],
    "sample_size": 64,
    "novelty_k": 4,
    "progress": False,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*(few|too few) ")


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, models.VOCAB, (4, 12), generator=generator)} for _ in range(count)]


def drifted(steps=(0, 1, 2, 5)):
    """A model whose weights walk away from where they began."""
    model, found = models.gpt2(), {}
    torch.manual_seed(5)
    for step in range(max(steps) + 1):
        if step in steps:
            found[step] = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return found


@pytest.fixture(scope="module")
def swept():
    made = drifted()
    return made, tg.sweep(made, batches(), **ASKED)


def rows_of(model, site):
    """All rows of a site by a hook of our own."""
    seen = []
    layer = model.transformer.h[int(site[-1])]
    handle = layer.register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    model.eval()
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in seen]).double().numpy()


def test_each_step_is_what_analyze_model_measures(swept):
    made, found = swept
    assert found.steps == [0, 1, 2, 5]
    for step, model in made.items():
        alone = tg.analyze_model(model, batches(), **{k: v for k, v in ASKED.items()}).metrics
        own = found.metrics[found.metrics["step"] == step].reset_index(drop=True)
        for column in ("d_pr", "effective_rank", "norm_mean", "cos_sim_mean"):
            assert own[column].tolist() == pytest.approx(alone[column].tolist(), rel=1e-12)


def test_similarity_and_drift_are_those_of_the_rows(swept):
    """NumPy on rows of our own hook: the 192 rows are sampled to 64, so the subspace is compared exactly, CKA on its rows."""
    made, found = swept
    table = found.metrics.set_index(["step", "site"])
    site = "residual_output.2"

    def directions(model):
        values, vectors = np.linalg.eigh(np.cov(rows_of(model, site), rowvar=False))
        return vectors[:, np.argsort(values)[::-1][:4]]

    def novelty(a, b):
        angles = np.linalg.svd(directions(a).T @ directions(b), compute_uv=False).clip(0, 1)
        return np.sqrt(1 - angles**2).mean()

    for step, reference, name in ((5, 0, "first"), (1, 5, "last"), (2, 1, "previous"), (5, 2, "previous")):
        value = table.loc[(step, site), f"feature_subspace_novelty_to_{name}"]
        assert value == pytest.approx(novelty(made[reference], made[step]), abs=1e-7)
    cka = table["linear_cka_debiased_to_first"].xs(site, level="site")
    assert cka[0] == pytest.approx(1) and cka[0] > cka[1] > cka[5]
    assert np.isnan(table.loc[(0, site), "linear_cka_debiased_to_previous"])
    assert (
        table.loc[(1, site), "linear_cka_debiased_to_previous"]
        == table.loc[(1, site), "linear_cka_debiased_to_first"]
    )
    pipeline = tg.analysis_pipeline(
        tg.Capture(made[5], "residual_output"),
        tg.Capture(made[5], "residual_output").sites,
        tg.AnalysisSettings(sample_size=64, held=["sample"]),
    )
    last = tg.run(pipeline, batches(), progress=False)["sample", site]
    first = tg.run(
        tg.analysis_pipeline(
            tg.Capture(made[0], "residual_output"),
            tg.Capture(made[0], "residual_output").sites,
            tg.AnalysisSettings(sample_size=64, held=["sample"]),
        ),
        batches(),
        progress=False,
    )["sample", site]
    assert cka[5] == pytest.approx(float(tg.functional.linear_cka_debiased(first, last)), rel=1e-9)


@pytest.mark.slow
def test_the_tidy_frame_pictures_report_and_bundle(swept, tmp_path):
    _, found = swept
    frame = found.frame()
    assert list(frame) == ["step", "site", "layer", "metric", "value"]
    assert len(frame) == len(frame.drop_duplicates(["step", "site", "metric"]))
    assert set(frame["step"]) == {0, 1, 2, 5} and "linear_cka_debiased_to_last" in set(frame["metric"])
    axes = found.plot("d_pr")
    assert len(axes.lines) >= 3 and axes.get_xlabel() == "step"
    again = tg.load_results(found.save(tmp_path / "bundle"))
    assert isinstance(again, tg.Sweep) and again.steps == found.steps
    pd.testing.assert_frame_equal(again.metrics, found.metrics, check_dtype=False)
    page = found.report(tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert "Over training" in page and "linear CKA, debiased, to the first over steps" in page


@pytest.mark.slow
def test_several_devices_give_the_same_table(swept):
    made, found = swept
    both = tg.sweep(made, batches(), device=["cpu", "cpu"], **ASKED)
    pd.testing.assert_frame_equal(both.metrics, found.metrics)
    one = next(iter(made.values()))
    with pytest.raises(ValueError, match="is the same module as"):
        tg.sweep(dict.fromkeys(range(8), one), batches(), device=["cpu", "cpu"], **ASKED)


def test_a_function_of_the_step_holds_one_model_at_a_time():
    model, opened = models.gpt2(), []

    def at(step):
        opened.append(step)
        with torch.no_grad():
            model.transformer.h[1].mlp.c_proj.bias.fill_(float(step))
        return model

    found = tg.sweep(at, batches(1), steps=[3, 0, 1], references="previous", **ASKED)
    assert opened == [3, 0, 1] and found.steps == [0, 1, 3]
    assert not [name for name in found.metrics if name.endswith("_to_last")]


def test_checkpoints_by_every_name(tmp_path):
    for name in ("checkpoint-20", "checkpoint-100", "runs", "checkpoint-3"):
        (tmp_path / name).mkdir()
    found = as_checkpoints(tmp_path, None, "sweep")
    assert [(one.step, one.name) for one in found] == [
        (n, str(tmp_path / f"checkpoint-{n}")) for n in (3, 20, 100)
    ]
    assert [one.step for one in as_checkpoints(tmp_path, [20], "sweep")] == [20]
    named = as_checkpoints(["org/pythia-70m@step512", "org/pythia-70m@step8"], None, "sweep")
    assert [(one.step, one.model) for one in named] == [(8, "org/pythia-70m"), (512, "org/pythia-70m")]
    for given, steps, said in (
        (["org/model"], None, "not in its name"),
        (["a/step1", "b/step1"], None, "both of step 1"),
        (["a/step1"], [2], "no checkpoint of step 2"),
        (lambda step: None, None, "needs steps="),
        ({-1: "x"}, None, "whole numbers from 0"),
        (str(tmp_path / "none"), None, "no folder that holds"),
        ([], None, "no checkpoints"),
    ):
        with pytest.raises(ValueError, match=said):
            as_checkpoints(given, steps, "sweep")
    for wrong in ([models.gpt2()], models.gpt2()):
        with pytest.raises(TypeError, match="mapping from steps"):
            as_checkpoints(wrong, None, "sweep")
    with pytest.raises(TypeError, match="a function that makes one, got int"):
        as_checkpoints({1: lambda: 3}, None, "sweep")[0].open()


def test_a_revision_is_what_is_loaded(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "tdgeom.training.checkpoints.load_model",
        lambda name, **how: asked.append((name, how)) or models.gpt2(),
    )
    as_checkpoints(["org/model@step7"], None, "sweep", model_kwargs={"dtype": "float32"})[0].open()
    assert asked == [("org/model", {"model_kwargs": {"dtype": "float32", "revision": "step7"}})]


def test_a_folder_goes_on_only_with_what_it_was_begun_with(tmp_path):
    made, place = drifted((0, 1)), tmp_path / "sweep"
    first = tg.sweep(made, batches(), save_dir=place, **ASKED)
    assert not list((place / "held").iterdir())  # rows that nothing needs any more are gone
    again = tg.sweep(made, batches(), save_dir=place, **ASKED)
    pd.testing.assert_frame_equal(again.metrics, first.metrics)
    assert isinstance(tg.load_results(place / "results"), tg.Sweep)
    for change, said in (
        ({"novelty_k": 5}, "novelty_k is 4 there and 5 here"),
        ({"sample_size": 32}, "sample_size is 64 there"),
        ({"similarity": "linear_cka"}, "similarity"),
        ({"layers": [0]}, "layers is all there"),
    ):
        with pytest.raises(ValueError, match=f"begun with other settings: .*{said}"):
            tg.sweep(made, batches(), save_dir=place, **{**ASKED, **change})
    with pytest.raises(ValueError, match=r"checkpoints.*there and .*here"):
        tg.sweep(drifted((0, 2)), batches(), save_dir=place, **ASKED)
    with pytest.raises(ValueError, match=r"checkpoints\[0\]\[2\]"):  # other weights under the same steps
        tg.sweep(dict(enumerate(drifted((1, 2)).values())), batches(), save_dir=place, **ASKED)
    for other in (batches()[1:], [*batches()[:-1], batches()[0]], batches()[:-1]):
        with pytest.raises(ValueError, match="data"):
            tg.sweep(made, other, save_dir=place, **ASKED)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="something else than a sweep"):
        tg.sweep(made, batches(), save_dir=tmp_path / "other", **ASKED)


def test_what_cannot_be_is_refused():
    made = drifted((0, 1))
    with pytest.raises(ValueError, match="can be read once"):
        tg.sweep(made, iter(batches()), **ASKED)
    with pytest.raises(ValueError, match="references are of"):
        tg.sweep(made, batches(), references="next", **ASKED)
    with pytest.raises(ValueError, match="similarity 'ckb' is none"):
        tg.sweep(made, batches(), similarity="ckb", **ASKED)
    with pytest.raises(ValueError, match="reads .*moments"):
        tg.sweep(made, batches(), similarity=tg.LinearCKA(source="moments"), **ASKED)
    with pytest.raises(ValueError, match="different sites"):
        _other_sites(made)

    class Shuffled:
        count = 0

        def __iter__(self):
            Shuffled.count += 1
            order = torch.randperm(4, generator=torch.Generator().manual_seed(Shuffled.count))
            return iter([batches()[i] for i in order])

    with pytest.raises(ValueError, match="other data than before"):
        tg.sweep(made, Shuffled(), **ASKED)


def _other_sites(made):
    other = copy.deepcopy(made[1])
    other.transformer.h = other.transformer.h[:2]
    tg.sweep({0: made[0], 1: other}, batches(), **ASKED)


@pytest.mark.slow
def test_ten_checkpoints_killed_twice_give_the_table_of_an_undisturbed_sweep(tmp_path):
    """kill -9, first in the middle of the fourth checkpoint's data, then between its rows and its results."""
    program = textwrap.dedent(
        """
        import os, signal, sys, warnings
        warnings.simplefilter("ignore")
        import torch, tdgeom as tg
        from tdgeom.files import atomic
        from models import VOCAB

        trained, place, how = sys.argv[1:]
        class Data:
            read = 0
            def __iter__(self):
                generator = torch.Generator().manual_seed(0)
                for _ in range(4):
                    Data.read += 1
                    if how == "batch" and Data.read == 4 + 4 * 3 + 2:  # all are looked at first
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield {"input_ids": torch.randint(3, VOCAB, (4, 12), generator=generator)}

        rename, renamed = os.rename, [0]
        def killing(*args):
            renamed[0] += 1
            if how == "rename" and renamed[0] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*args)
        os.rename = killing
        tg.sweep(trained, Data(), sites="residual_output", metrics=["spectrum", "sample"], sample_size=64, novelty_k=4,
                 save_dir=place, progress=False)
        """
    )
    model, trained = models.gpt2(), tmp_path / "trained"
    torch.manual_seed(5)
    for step in range(10, 101, 10):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(trained / f"checkpoint-{step}")

    def run(place, how):
        done = subprocess.run(
            [sys.executable, "-c", program, str(trained), str(tmp_path / place), how],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        return done.returncode, len(list((tmp_path / place / "steps").glob("step-*"))), done.stderr

    assert run("killed", "batch")[:2] == (-signal.SIGKILL, 3)
    code, measured, _ = run("killed", "rename")
    assert code == -signal.SIGKILL and 3 < measured < 10
    assert run("killed", "")[0] == 0 and run("whole", "")[0] == 0
    killed, whole = (tg.load_results(tmp_path / place / "results") for place in ("killed", "whole"))
    assert whole.steps == list(range(10, 101, 10)) and len(whole.frame()) > 1000
    for table in ("metrics", "novelty"):
        pd.testing.assert_frame_equal(getattr(killed, table), getattr(whole, table), check_exact=True)
    assert all(np.array_equal(value, whole.eigenvalues[name]) for name, value in killed.eigenvalues.items())
    assert not list((tmp_path / "killed" / "held").iterdir())


def test_subspaces_of_few_rows_are_compared_along_what_they_vary_in():
    """19 rows of 20 tokens in 64 features: directions beyond the rank are any, and do not count."""
    from tdgeom import functional as F

    def turned(seed, size):
        model = models.gpt2()
        with torch.no_grad():
            for number, weight in enumerate(model.parameters()):
                weight += size * torch.randn(
                    weight.shape, generator=torch.Generator().manual_seed(seed + number)
                )
        return model

    made = {0: turned(0, 0.0), 1: turned(1, 1e-3)}
    few = [{"input_ids": torch.randint(1, models.VOCAB, (12, 8), generator=torch.Generator().manual_seed(3))}]
    found = tg.sweep(
        made,
        few,
        select={"positions": "last"},
        sites="residual_output",
        metrics="spectrum",
        novelty_k=16,
        progress=False,
    )

    def basis(model):
        with tg.Capture(model, "residual_output.0") as calls:
            model(**few[0])
        rows = calls[0]["acts", "residual_output.0"][:, -1].double()
        return torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:11].T

    want = float(F.feature_subspace_novelty(basis(made[0]), basis(made[1])))
    metrics = found.metrics
    at = (metrics["step"] == 1) & (metrics["site"] == "residual_output.0")
    assert float(metrics.loc[at, "feature_subspace_novelty_to_first"].iloc[0]) == pytest.approx(
        want, abs=1e-6
    )


def test_a_rank_alone_is_alone_on_every_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with tg.alone():
        found = tg.sweep(drifted((0, 1)), batches(), device=["cpu", "cpu"], **ASKED)
    assert set(found.metrics["step"]) == {0, 1}
