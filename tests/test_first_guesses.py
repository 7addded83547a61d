"""What someone who comes from another library types first works, or is answered with the right name."""

from __future__ import annotations

import inspect

import pytest
import torch

import tdgeom as tg
from tdgeom.core.guessed_names import SYNONYMS, WAYS

MODEL = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
PUBLIC = {name: getattr(tg, name) for name in tg.__all__ if inspect.isroutine(getattr(tg, name))}
PUBLIC |= {f"functional.{name}": getattr(tg.functional, name) for name in tg.functional.__all__}
STAGES = {name: getattr(tg, name) for name in tg.__all__ if hasattr(getattr(tg, name), "from_settings")}


def named(made) -> list[str]:
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in inspect.signature(made).parameters.items() if p.kind in kinds]


@pytest.mark.parametrize("name", [*PUBLIC, *STAGES])
def test_a_misspelt_argument_is_answered_with_the_nearest(name):
    """Every public function and stage, every argument of more than three letters."""
    made = {**PUBLIC, **STAGES}[name]
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(made).parameters.values()):
        assert name == "logit_lens"  # hands everything on to LogitLens, which answers
        made = tg.LogitLens
    for argument in named(made):
        if len(argument) > 3:
            wrong = argument[:-2] + argument[-1] + argument[-2] + "s"
            with pytest.raises(TypeError, match=rf"takes no argument '{wrong}'\. (Write|Did you mean) \w+="):
                made(**{wrong: 1})


@pytest.mark.parametrize("name", STAGES)
def test_an_argument_like_no_other_is_answered_with_all(name):
    with pytest.raises(TypeError, match=f"^{STAGES[name].__name__} takes no argument 'xyzzy'. It takes .*"):
        STAGES[name](xyzzy=1)


GUESSES = [
    (lambda: tg.LinearCKA(debiased=True), "estimator='debiased'"),
    (lambda: tg.LinearCKA(kernel="rbf"), r"tg.RBFCKA\(\)"),
    (lambda: tg.Capture(MODEL, positions="last"), "SelectTokens"),
    (lambda: tg.Capture(MODEL, names_filter="x"), "sites="),
    (lambda: tg.Capture(MODEL, layer=0), "layers="),
    (lambda: tg.Capture(MODEL, module_names=["0"]), "sites="),
    (lambda: tg.Capture(MODEL, detach=False), "keep_graph=True"),
    (lambda: tg.Capture(MODEL, hook_fn=print), "callback="),
    (lambda: tg.NearestNeighbors(n_neighbors=5), "k="),
    (lambda: tg.NearestNeighbors(algorithm="brute"), "backend="),
    (lambda: tg.NearestNeighbors(n_jobs=4), "set_num_threads"),
    (lambda: tg.NeighborhoodOverlap(topk=5), "k="),
    (lambda: tg.LabelOverlap(y="label"), "labels="),
    (lambda: tg.TwoNN(fraction=0.9), "discard="),
    (lambda: tg.TwoNN(discard_fraction=0.1), "discard="),
    (lambda: tg.Gride(n_max=64), "range_max="),
    (lambda: tg.LevinaBickel(n_neighbors=10), "k="),
    (lambda: tg.EigenSpectrum(n_components=10), "k="),
    (lambda: tg.EigenSpectrum(center=True), "moments are centred"),
    (lambda: tg.ConceptBasis(n_components=10), "n="),
    (lambda: tg.StreamingCovariance(ddof=1), "N - 1"),
    (lambda: tg.RowSample(["a"], n_samples=10), "size="),
    (lambda: tg.RowSample(["a"], random_state=0), "seed="),
    (lambda: tg.RSA(metric="cosine"), "kind="),
    (lambda: tg.RSA(method="spearman"), "comparison="),
    (lambda: tg.RBFCKA(sigma=0.4), "fraction="),
    (lambda: tg.LinearR2(alpha=0.1), "ridge="),
    (lambda: tg.NormalizationAblation(norms=["raw"]), "variants="),
    (lambda: tg.LinearProbe(C=1.0), "alpha=1/C"),
    (lambda: tg.LinearProbe(test_size=0.2), "holdout="),
    (lambda: tg.LinearProbe(cv=5), "folds="),
    (lambda: tg.TorchProbe(MODEL, lr=1e-3), "learning_rate="),
    (lambda: tg.TorchProbe(MODEL, n_epochs=3), "epochs="),
    (lambda: tg.Steer(torch.ones(4), strength=2.0), "coefficient="),
    (lambda: tg.Steer(torch.ones(4), layer=2), "Intervene"),
    (lambda: tg.Scale(scale=2.0), "factor="),
    (lambda: tg.Ablate(method="mean"), "how="),
    (lambda: tg.ProjectOut(direction=torch.ones(4)), "basis="),
    (lambda: tg.SelectTokens(["a"], pooling="mean"), "pool="),
    (lambda: tg.SelectTokens(["a"], skip_bos=True), "skip_first="),
    (lambda: tg.SelectTokens(["a"], skip_special_tokens=True), "skip_special="),
    (lambda: tg.run(None, [], n_tokens=10), "max_rows="),
    (lambda: tg.run(None, [], verbose=True), "progress="),
    (lambda: tg.run(None, [], model=MODEL), "tg.Capture"),
    (lambda: tg.run(None, [], num_batches=3), "max_rows="),
    (lambda: tg.analyze_model(MODEL, [], n_samples=10), "sample_size="),
    (lambda: tg.analyze_model(MODEL, [], measures=["twonn"]), "metrics="),
    (lambda: tg.analyze_model(MODEL, [], output_dir="x"), "save_dir="),
    (lambda: tg.analyze_model(MODEL, [], tokenizer=None), "TextBatches"),
    (lambda: tg.analyze_model(MODEL, [], pool="mean"), "select="),
    (lambda: tg.compare(MODEL, MODEL, [], score="cka"), "It takes .*metrics"),
    (lambda: tg.compare(MODEL, MODEL, [], tokenizer=None), "tokenizer_a="),
    (lambda: tg.functional.twonn(torch.zeros(3, 2), fraction=0.9), "discard="),
    (lambda: tg.functional.nearest_neighbors(torch.zeros(3, 2), n_neighbors=2), "k="),
    (lambda: tg.functional.rsa(torch.zeros(3, 2), torch.zeros(3, 2), method="pearson"), "comparison="),
    (
        lambda: tg.functional.linear_cka(torch.zeros(3, 2), torch.zeros(3, 2), debiased=True),
        "linear_cka_debiased",
    ),
    (lambda: tg.untrained_copy(MODEL, random_state=1), "seed="),
]


@pytest.mark.parametrize("guess, answer", GUESSES, ids=[answer for _, answer in GUESSES])
def test_the_names_of_other_libraries_are_answered(guess, answer):
    with pytest.raises(TypeError, match=f"takes no argument .*{answer}"):
        guess()


def test_the_answers_name_what_there_is():
    """No answer leads to an argument or a name that does not exist."""
    takes = {argument for made in {**PUBLIC, **STAGES}.values() for argument in named(made)}
    assert set(SYNONYMS) <= takes | {"max_length"}, set(SYNONYMS) - takes
    for (owner, guess), way in WAYS.items():
        made = {**PUBLIC, **STAGES}.get(owner) or PUBLIC[f"functional.{owner}"]
        assert guess not in named(made), (owner, guess)
        head = way.partition("=")[0]
        assert "=" not in way or not head.isidentifier() or head in named(made), (owner, way)


def test_errors_of_ones_own_pass():
    """An unknown argument of something that is called on the way is no argument of ours."""

    class Mine(tg.Stage):
        """A stage whose constructor fails by itself."""

        reads = {"sample": "N D"}
        writes = ["x"]

        def __init__(self, *, bins=3, in_keys=None, out_keys=None):
            super().__init__(in_keys=in_keys, out_keys=out_keys)
            self.edges = torch.linspace(0, 1, bins, colour="red")

    with pytest.raises(TypeError, match="linspace"):
        Mine()
    with pytest.raises(TypeError, match="Mine takes no argument 'bin'. Write bins=."):
        Mine(bin=4)
