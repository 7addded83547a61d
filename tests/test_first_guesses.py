"""What someone who comes from another library types first works, or is answered with the right name."""

from __future__ import annotations

import inspect

import pytest
import torch
from tensordict.nn import TensorDictSequential

import models
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
    (lambda: tg.analyze_model(MODEL, [], pool="mean"), "select="),
    (lambda: tg.compare(MODEL, MODEL, [], score="cka"), "It takes .*metrics"),
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


def given(what):
    """A stage that measures rows, and everything that one may give in its place."""
    return tg.analyze_model(
        MODEL, [{"input": torch.zeros(4, 4)}], sites="module_output:0", progress=False, **what
    )


def half(rows):
    return rows / 2


SAMPLED = [tg.SelectTokens(["a"]), tg.RowSample(["a"])]
# sites as other libraries and Python spell them, and what is given in place of names and objects: works (a list of sites, or
# None), or is answered with these words
FURTHER = [
    (lambda net: tg.Capture(net, "blocks.0.hook_resid_pre").sites, ["residual_input.0"]),
    (lambda net: tg.Capture(net, "blocks.0.hook_resid_mid").sites, ["residual_mid.0"]),
    (lambda net: tg.Capture(net, ["blocks.0.hook_resid_post"]).sites, ["residual_output.0"]),
    (lambda net: tg.Capture(net, "blocks.1.attn.hook_z").sites, ["z.1"]),
    (lambda net: tg.Capture(net, "blocks.1.attn.hook_pattern").sites, ["attn_pattern.1"]),
    (lambda net: tg.Capture(net, "blocks.1.attn.hook_result").sites, ["head_output.1"]),
    (lambda net: tg.Capture(net, "blocks.1.hook_mlp_out").sites, ["mlp_output.1"]),
    (lambda net: tg.Capture(net, "blocks.1.mlp.hook_post").sites, ["mlp_act.1"]),
    (lambda net: tg.Capture(net, ("z", 1)).sites, ["z.1"]),
    (lambda net: tg.Capture(net, "resid_out_1").sites, ["residual_output.1"]),
    (lambda net: tg.Capture(net, "hidden_states.1").sites, ["residual_input.1"]),
    (lambda net: tg.Capture(net, "attentions.1").sites, ["attn_pattern.1"]),
    (lambda net: tg.Capture(net, "transformer.h.1").sites, ["module_output:transformer.h.1"]),
    (lambda net: tg.Capture(net, "transformer.h[1].mlp").sites, ["module_output:transformer.h.1.mlp"]),
    (lambda net: tg.Capture(net, "transformer.h.1.mlp.output").sites, ["module_output:transformer.h.1.mlp"]),
    (lambda net: tg.Capture(net, "transformer.h.1.mlp.input").sites, ["module_input:transformer.h.1.mlp"]),
    (lambda net: tg.Capture(net, net.transformer.h[1].mlp).sites, ["module_output:transformer.h.1.mlp"]),
    (lambda net: tg.Capture(net, r"transformer\.h\.1\.ml.").sites, ["module_output:transformer.h.1.mlp"]),
    (lambda net: tg.Capture(net, "Residual-Input.1").sites, ["residual_input.1"]),
    (lambda net: tg.Capture(net, "RESIDUAL_INPUT[1]").sites, ["residual_input.1"]),
    (lambda net: tg.Capture(net, tg.available_sites(net)[0]).sites, ["embed"]),
    (lambda net: tg.Intervene(net, {"blocks.1.hook_resid_pre": torch.relu}).sites, ["residual_input.1"]),
    (lambda net: tg.Intervene(net, {}).sites, []),
    (lambda net: tg.Capture(net, "hidden_states"), "'residual_input', 'final_norm'"),
    (lambda net: tg.Capture(net, "hidden_states.-1"), "'final_norm' for that"),
    (lambda net: tg.Capture(net, "last_hidden_state"), "'final_norm'"),
    (lambda net: tg.Capture(net, "logits"), "model_outputs='logits'"),
    (lambda net: tg.Capture(net, "hook_embed"), "'module_output:transformer.wte'"),
    (lambda net: tg.Capture(net, "hook_pos_embed"), "'module_output:transformer.wpe'"),
    (lambda net: tg.Capture(net, "ln_final.hook_normalized"), "'final_norm'"),
    (lambda net: tg.Capture(net, "blocks.0.mlp.hook_pre"), "'module_output:<path>'"),
    (lambda net: tg.Capture(net, "residual_inputs"), "'residual_input'"),
    (lambda net: tg.Capture(net, "residual_input.99"), "layers run from 0 to"),
    (lambda net: tg.Capture(net, "h.0.attn"), "'module_output:transformer.h.0.attn'"),
    (lambda net: tg.Capture(net, "attn"), "'attn_output'"),
    (lambda net: tg.Capture(net, 1), "layers=1"),
    (lambda net: tg.Capture(net, [-1]), r"layers=\[-1\]"),
    (lambda net: tg.Intervene(net, {"embed": tg.Steer}), r"Write tg.Steer\("),
    (lambda net: tg.Intervene(net, [("embed", torch.relu)]), "mapping from sites to edits"),
    (lambda net: tg.NormalizationAblation(variants=["raw", half]), None),
    (lambda net: tg.NormalizationAblation(variants=["raw", lambda x: x]), "variants={'raw': 'raw', 'mine': function}"),
    (lambda net: tg.NormalizationAblation(variants=["raw", 3]), "variants are names"),
    (lambda net: tg.NormalizationAblation(variants=half), "variants is a list"),
    (lambda net: tg.NormalizationAblation(metrics=tg.SpectrumMetrics), r"Write tg.SpectrumMetrics\("),
    (lambda net: given({"metrics": [tg.TwoNN]}), r"Write tg.TwoNN\("),
    (lambda net: given({"metrics": tg.TwoNN}), r"Write tg.TwoNN\("),
    (lambda net: given({"metrics": [tg.functional.twonn]}), "Write 'twonn'"),
    (lambda net: given({"metrics": {"spectrum": tg.TwoNN()}}), "named by its out_keys"),
    (lambda net: given({"metrics": 3}), "takes a name, a stage"),
    (lambda net: given({"diagnostics": True}), "'normalization_ablation'"),
    (lambda net: given({"select": "last"}), "select={'positions'"),
    (lambda net: tg.compare(net, net, [], [tg.LinearCKA]), r"Write tg.LinearCKA\("),
    (lambda net: tg.compare(net, net, [], tg.functional.rsa), "Write 'rsa'"),
    (lambda net: tg.ForEach(tg.TwoNN, ["a"]), r"Write tg.TwoNN\("),
    (lambda net: tg.ForEach(tg.TwoNN(), tg.Capture(net)), "Write capture.sites"),
    (lambda net: tg.SelectTokens(tg.Capture(net)), "Write capture.sites"),
    (lambda net: tg.RowSample(tg.Capture(net)), "Write capture.sites"),
    (lambda net: tg.SelectTokens(["a"], positions=["last", 0]), "use one of all, last"),
    (lambda net: tg.SelectTokens(["a"], positions=lambda mask: mask), "use one of all, last"),
    (lambda net: tg.ForEachPair(tg.RSA(), ["a", "b"], pairs=["a->b"]), r"pairs=\[\('a', 'b'\)\]"),
    (lambda net: tg.LinearProbe(metrics=[lambda x, y: 0]), "Write {'mine': function}"),
    (lambda net: tg.run(tg.TwoNN, []), r"Write tg.TwoNN\("),
    (lambda net: tg.run(TensorDictSequential(*SAMPLED, tg.TwoNN()), []), r"tg.ForEach\(tg.TwoNN"),
    (lambda net: tg.run(TensorDictSequential(*SAMPLED, tg.LinearCKA()), []), r"tg.ForEachPair\(tg.LinearCKA"),
    (lambda net: tg.run(TensorDictSequential(tg.SelectTokens(["a"]), tg.StreamingMean()), []), r"tg.ForEach\(tg.StreamingMean"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in STAGES
        if "sites" in named(STAGES[name]) and name not in ("Capture", "CaptureSpec", "ForEachPair")
    ],
)
def test_a_capture_is_no_list_of_sites(name):
    """Every stage that takes sites says where the names are."""
    needed = {"stage": tg.TwoNN(), "model": MODEL, "rows": {"last": "last"}, "store": None}
    taken = {argument: value for argument, value in needed.items() if argument in named(STAGES[name])}
    with pytest.raises(TypeError, match=f"{name}: sites are names, got Capture. Write capture.sites."):
        STAGES[name](sites=tg.Capture(MODEL, "module_output:0"), **taken)


@pytest.mark.parametrize("number", range(len(FURTHER)))
def test_a_site_or_an_object_as_guessed_works_or_is_answered(number):
    guess, answer = FURTHER[number]
    net = models.gpt2()
    if answer is None or isinstance(answer, list):
        found = guess(net)
        assert answer is None or list(found) == answer
    else:
        with pytest.raises((TypeError, ValueError, IndexError), match=answer):
            guess(net)


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
