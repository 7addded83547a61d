"""What the pages of docs/coming_from state in figures: other tools and ours on the same tensors and models, in one process.

    python -m venv .venv-peers && .venv-peers/bin/pip install -e . representation-geometry==0.1.0 scikit-dimension==0.5.0 \
        torchmetrics==1.9.0 tdhook==0.3.0 nnsight==0.8.1 transformer-lens==4.3.0
    .venv-peers/bin/python -m tests.benchmarks.coming_from tdhook transformer_lens

Each line is the largest relative difference, or the two numbers. DADApy's numbers stand in tests/data/golden.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import models
import tdgeom as tg
from tdgeom import functional as F

GOLDEN = Path(__file__).parents[1] / "data/golden/inputs.npz"


def layers() -> Tensor:
    """Four layers of 600 rows, (4, 600, 48)."""
    return torch.from_numpy(np.load(GOLDEN)["layers"])


def gap(theirs: Tensor, ours: Tensor) -> str:
    """The largest difference, relative to the largest value."""
    theirs, ours = theirs.double(), ours.double()
    return f"{float((theirs - ours).abs().max() / ours.abs().max()):.1e}"


def say(what: str, *values: object) -> None:
    """One line."""
    print(f"{what:58s}", *(f"{value:.6g}" if isinstance(value, float) else value for value in values))


def tdhook() -> None:
    """Estimators of tdhook."""
    from tdhook.latent import dimension_estimation as theirs
    from tdhook.latent.probing.estimators import MeanDifferenceClassifier
    from tdhook.latent.representation_similarity import CkaEstimator, InformationImbalanceEstimator

    def dimension(name: str, rows: Tensor, **settings: object) -> Tensor:
        return getattr(theirs, name)(**settings)(TensorDict(data=rows))["dimension"].double()

    x, exact = layers(), layers().double()
    two = "TwoNnDimensionEstimator"
    say("TwoNN(discard=0), float32", gap(dimension(two, x), F.twonn(x, discard=0).estimate))
    say("TwoNN(discard=0), float64", gap(dimension(two, exact), F.twonn(exact, discard=0).estimate))
    say("TwoNN(), our default", float(dimension(two, exact)[0]), float(F.twonn(exact).estimate[0]))
    moved = {
        "30 repeated rows": torch.cat((x[0], x[0, :30])),
        "offset 1e4": x[0] + 1e4,
        "size 1e-5": x[0] * 1e-5,
    }
    for name, rows in moved.items():
        say(f"TwoNN, {name}", float(dimension(two, rows)), float(F.twonn(rows, discard=0).estimate))
    local = dimension("LocalKnnDimensionEstimator", exact, k=10).nanmean(-1)
    say("LocalKNN(k=10)", gap(local, F.local_knn(exact, k=10).estimate))
    curved = dimension("CaPcaDimensionEstimator", exact[0], k=20).mean()
    say("CAPCA(k=20)", gap(curved, F.ca_pca(exact[0], k=20).estimate))
    for criterion, rule in (("ratio", "fukunaga_olsen"), ("maxgap", "maxgap")):
        value = dimension("LocalPcaDimensionEstimator", exact[0], k=20, criterion=criterion).mean()
        say(
            f"LocalPCA(k=20, rule={rule!r})",
            float(value),
            float(F.local_pca(exact[0], k=20, rule=rule).estimate),
        )
    sides = TensorDict(data_a=exact[0], data_b=exact[1])
    say("LinearCKA()", gap(CkaEstimator()(sides)["cka"], F.linear_cka(exact[0], exact[1])))
    small = TensorDict(data_a=x[0] * 1e-5, data_b=x[1] * 1e-5)
    say(
        "LinearCKA(), size 1e-5",
        float(CkaEstimator()(small)["cka"]),
        float(F.linear_cka(small["data_a"], small["data_b"])),
    )
    found = InformationImbalanceEstimator()(sides)["information_imbalance_a_to_b"]
    say("InformationImbalance", gap(found, F.information_imbalance(exact[0], exact[1])[0]))
    binary = torch.randint(0, 2, (400, 12), generator=torch.Generator().manual_seed(0)).float()
    tied = InformationImbalanceEstimator()(TensorDict(data_a=binary, data_b=binary))
    own = F.information_imbalance(binary, binary)[0]
    say("InformationImbalance, binary rows", float(tied["information_imbalance_a_to_b"]), float(own))
    labels = (np.load(GOLDEN)["labels"] < 2).astype(int)
    classifier = MeanDifferenceClassifier()
    classifier.fit(exact[0].numpy(), labels)
    probe = tg.MeanDifferenceProbe().fit(exact[0], torch.from_numpy(labels))
    say("MeanDifferenceProbe", gap(torch.from_numpy(classifier.coef_[0]), probe.direction(1)))


def small_gpt2() -> torch.nn.Module:
    """Four layers of width 64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=500, n_embd=64, n_layer=4, n_head=4, n_positions=64, **ends)
    ).eval()


def token_batches(count: int, padded: bool = False) -> list[dict[str, Tensor]]:
    """Batches of 8 sequences of 32 tokens; half of them end after 20 where padded."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(1, 500, (8, 32), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[:4, 20:] = ids[:4, 20:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def representation_geometry() -> None:
    """The whole analysis of representation-geometry."""
    import representation_geometry as theirs

    def both(data: list, **settings: object) -> tuple:
        told = {"diagnostics": ["normalization_ablation"]}
        one = theirs.analyze_model(model=small_gpt2(), dataloader=data, max_tokens=10**6, **told)
        return one, tg.analyze_model(
            small_gpt2(), data, metrics="default", progress=False, **told, **settings
        )

    their, our = both(token_batches(2))
    for table in ("metrics", "novelty"):
        a, b = getattr(their, table), getattr(our, table)
        for name in a.columns.intersection(b.columns):
            if a[name].dtype.kind in "fi" and not name.startswith(("layer_norm", "num_", "novelty_k")):
                say(
                    f"{table}: {name}",
                    gap(torch.tensor(a[name].to_numpy(float)), torch.tensor(b[name].to_numpy(float))),
                )
    a, b = (one.diagnostics["normalization_ablation"] for one in (their, our))
    column = next(name for name in a.columns if set(a[name]) & {"token_l2"})
    for variant in a[column].unique():
        rows = a[a[column] == variant]["d_pr"], b[b["variant"] == variant]["d_pr"]
        say(f"ablation: d_pr, {variant}", gap(*(torch.tensor(one.to_numpy()) for one in rows)))
    for name, data in (("padded", token_batches(2, padded=True)), ("10,240 tokens", token_batches(40))):
        their, our = both(data)
        for column in ("d_pr", "sv_participation_ratio", "cos_sim_mean"):
            say(
                f"{name}: {column}, last layer",
                *(float(one.metrics[column].iloc[-1]) for one in (their, our)),
            )
    equal = np.full(10, 0.1)
    say("k90 of ten equal eigenvalues", theirs.metric_from_eigenvalues(equal)["k90"],
        int(F.spectrum_metrics(torch.from_numpy(equal))["k90"]))  # fmt: skip
    for offset in (10.0, 100.0, 1000.0):
        rows = torch.randn(8192, 64, generator=torch.Generator().manual_seed(0)) + offset
        exact = np.linalg.eigvalsh(np.cov(rows.double().numpy().T))
        running, streaming = theirs.RunningCovariance(64), tg.StreamingCovariance()
        for block in rows.split(512):
            running.update(block)
            moments = streaming(tokens=block)
        found = (np.linalg.eigvalsh(one.double().numpy()) for one in (running.covariance(), moments[2]))
        say(f"worst eigenvalue, offset {offset:g}", *(float(np.abs(one / exact - 1).max()) for one in found))


def scikit_dimension() -> None:
    """Estimators of scikit-dimension."""
    import skdim

    rows = layers()[0].double()
    given = rows.numpy()
    say("TwoNN()", gap(torch.tensor(skdim.id.TwoNN().fit(given).dimension_), F.twonn(rows).estimate))
    for name, own in (("MLE", F.levina_bickel), ("MOM", F.mom), ("TLE", F.tle)):
        estimator = getattr(skdim.id, name)()
        estimator.fit(given, n_neighbors=20)
        say(f"{name}, 20 neighbours", gap(torch.tensor(estimator.dimension_), own(rows, k=20).estimate))
    mle = skdim.id.MLE()
    mle.fit(given, n_neighbors=20, comb="mean")
    say("MLE, comb='mean'", float(mle.dimension_), float(F.levina_bickel(rows, k=20).estimate))
    rules = {
        "FO": "fukunaga_olsen", "participation_ratio": "participation_ratio", "Kaiser": "kaiser",
        "broken_stick": "broken_stick", "maxgap": "maxgap",
    }  # fmt: skip
    for version, rule in rules.items():
        own = F.global_pca(rows, rule=rule).estimate if rule != "maxgap" else torch.tensor(torch.nan)
        say(f"lPCA(ver={version!r})", float(skdim.id.lPCA(ver=version).fit(given).dimension_), float(own))
    ratio = skdim.id.lPCA(ver="ratio", alphaRatio=0.95).fit(given).dimension_
    say(
        "lPCA(ver='ratio', alphaRatio=0.95)",
        float(ratio),
        float(F.global_pca(rows, rule="ratio", share=0.95).estimate),
    )
    again = torch.cat((rows, rows[:30]))
    say(
        "TwoNN, 30 repeated rows",
        float(skdim.id.TwoNN().fit(again.numpy()).dimension_),
        float(F.twonn(again).estimate),
    )
    mle = skdim.id.MLE()
    mle.fit(again.numpy(), n_neighbors=20)
    say("MLE, 30 repeated rows", float(mle.dimension_), float(F.levina_bickel(again, k=20).estimate))


def torchmetrics() -> None:
    """What both measure."""
    import torchmetrics as theirs
    from torchmetrics.functional import pairwise_cosine_similarity
    from torchmetrics.shape import ProcrustesDisparity

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator).double()
    y = x @ torch.randn(6, 6, generator=generator).double() + 0.3 * torch.randn(200, 6, generator=generator)
    procrustes = ProcrustesDisparity(reduction="mean")
    procrustes.update(x[None], y[None])
    own = F.procrustes(x, y)
    say("procrustes", float(procrustes.compute()), float(own))
    say("procrustes, 1 - (1 - ours/2)²", gap(procrustes.compute(), 1 - (1 - own / 2) ** 2))
    cosine = theirs.CosineSimilarity(reduction="mean")
    cosine.update(x, y)
    say("layer_cosine_sim", gap(cosine.compute(), F.layer_cosine_sim(x, y)))
    off = pairwise_cosine_similarity(x)[~torch.eye(len(x), dtype=torch.bool)].mean()
    say("cos_sim_mean", gap(off, tg.SampleMetrics()(TensorDict(sample=x))["sample_metrics", "cos_sim_mean"]))
    mean, streaming = theirs.MeanMetric(), tg.StreamingMean()
    for rows in (x[:50], x[50:]):
        mean.update(rows)
        found = streaming(tokens=rows)
    say("mean of all entries", gap(mean.compute().double(), found[0].mean()))


def nnsight() -> None:
    """Reading and changing an activation."""
    from nnsight import NNsight

    model, batch = models.gpt2(), models.text_batch()
    wrapped = NNsight(model)
    with wrapped.trace(input_ids=batch["input_ids"]):
        added = wrapped.transformer.h[1].mlp.output.save()
        stream = wrapped.transformer.h[1].output.save()
    acts = tg.Capture(model, ["mlp_output.1", "residual_output.1"])(TensorDict(batch))["acts"]
    say("mlp_output", gap(added, acts["mlp_output.1"]))
    say("residual_output", gap(stream[0] if isinstance(stream, tuple) else stream, acts["residual_output.1"]))
    vector = torch.linspace(-1, 1, models.WIDTH)
    with wrapped.trace(input_ids=batch["input_ids"]):
        wrapped.transformer.h[1].mlp.output[:, -1] += vector
        logits = wrapped.output.logits.save()
    with tg.Intervene(model, {"mlp_output.1": tg.Steer(vector, positions="last")}):
        say("logits, steered at the last position", gap(logits, model(**batch).logits))


NAMES = {
    "residual_input.1": "blocks.1.hook_resid_pre", "residual_mid.1": "blocks.1.hook_resid_mid",
    "residual_output.1": "blocks.1.hook_resid_post", "attn_output.1": "blocks.1.hook_attn_out",
    "mlp_output.1": "blocks.1.hook_mlp_out", "mlp_act.1": "blocks.1.mlp.hook_post", "q.1": "blocks.1.attn.hook_q",
    "k.1": "blocks.1.attn.hook_k", "v.1": "blocks.1.attn.hook_v", "z.1": "blocks.1.attn.hook_z",
    "attn_pattern.1": "blocks.1.attn.hook_pattern", "head_output.1": "blocks.1.attn.hook_result",
    "attn_norm.1": "blocks.1.ln1.hook_out", "final_norm": "ln_final.hook_out",
}  # fmt: skip


def bridge_of(model: torch.nn.Module) -> object:
    """A TransformerBridge of the model, with a tokenizer of its vocabulary."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers import models as pieces
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = Tokenizer(pieces.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=models.VOCAB, special_tokens=["<eos>"], show_progress=False)
    made.train_from_iterator(["a sentence, and another one"] * 50, trainer)
    ends = dict.fromkeys(("eos_token", "bos_token", "pad_token"), "<eos>")
    folder = tempfile.mkdtemp()
    PreTrainedTokenizerFast(tokenizer_object=made, **ends).save_pretrained(folder)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TransformerBridge.boot_transformers(
        folder, hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu"
    )


def transformer_lens() -> None:
    """Names, lens and patching on the same weights."""
    from transformer_lens import patching

    batch = models.text_batch()
    ids = batch["input_ids"]
    for name in ("gpt2", "llama"):
        model = getattr(models, name)()
        bridge = bridge_of(model)
        bridge.set_use_attn_result(True)
        _, cache = bridge.run_with_cache(ids)
        bridge.set_use_attn_result(False)
        kinds = [*NAMES, "attn_scores.1", "embed", *(["q_rotary.1", "k_rotary.1"] if name == "llama" else [])]
        acts = tg.Capture(model, kinds)(TensorDict(batch))["acts"]
        for ours, theirs in NAMES.items():
            say(f"{name}: {theirs}", gap(cache[theirs], acts[ours]))
        on = acts["attn_pattern.1"] > 0
        scores = cache["blocks.1.attn.hook_attn_scores"]
        say(f"{name}: attn_scores where attended", gap(scores[on], acts["attn_scores.1"][on]))
        if name == "llama":
            say(f"{name}: hook_rot_q", gap(cache["blocks.1.attn.hook_rot_q"], acts["q_rotary.1"]))
            repeated = cache["blocks.1.attn.hook_rot_k"].repeat_interleave(2, 2)
            say(f"{name}: hook_rot_k, repeated", gap(repeated, acts["k_rotary.1"]))
        else:
            say(
                f"{name}: hook_embed + hook_pos_embed",
                gap(cache["hook_embed"] + cache["hook_pos_embed"], acts["embed"]),
            )

        sites = [*(f"residual_input.{i}" for i in range(models.DEPTH)), f"residual_output.{models.DEPTH - 1}"]
        lens = tg.logit_lens(model, batch, sites=sites, outputs=["logits"])
        ours = torch.stack([lens["lens", site, "logits"] for site in sites])
        stack = cache.accumulated_resid()
        for recompute in (True, False):
            scaled = cache.apply_ln_to_stack(stack, layer=-1, recompute_ln=recompute) @ bridge.W_U
            say(f"{name}: lens, recompute_ln={recompute}", *(gap(a, b) for a, b in zip(scaled, ours)))
        metric = lambda logits: (logits[:, -1, 5] - logits[:, -1, 7]).mean()
        other = {**batch, "input_ids": ids.flip(1)}
        settings = {"metric": "logit_diff", "answers": (5, 7), "progress": False}
        for kind, method in (("residual_input", "resid_pre"), ("z", "attn_head_out_all_pos")):
            grid = tg.activation_patching(model, clean=batch, corrupted=other, sites=kind, **settings)[
                "grid", kind
            ]
            patch = getattr(patching, f"get_act_patch_{method}")
            say(f"{name}: patching of {kind}", gap(patch(bridge, other["input_ids"], cache, metric), grid))
        bridge.enable_compatibility_mode()
        logits, processed = bridge.run_with_cache(ids)
        say(f"{name}, processed: probabilities", gap(logits.softmax(-1), model(ids).logits.softmax(-1)))
        for kind in ("hook_resid_post", "attn.hook_z", "attn.hook_pattern"):
            say(f"{name}, processed: {kind}", gap(processed[f"blocks.1.{kind}"], cache[f"blocks.1.{kind}"]))
        stack, labels = processed.decompose_resid(return_labels=True)
        theirs = processed.logit_attrs(stack, torch.full((3,), 5), torch.full((3,), 7))[:, :, -1]
        table = tg.logit_attribution(model, batch, answers=(5, 7), by="component")
        own = torch.tensor(
            table[table["kind"] != "bias"]
            .pivot(index="component", columns="text", values="contribution")
            .to_numpy()
        )
        order = sorted(set(table[table["kind"] != "bias"]["component"]))
        theirs = torch.cat(
            (theirs[: len(labels) - 2 * models.DEPTH].sum(0, keepdim=True), theirs[-2 * models.DEPTH :])
        )
        named = ["embed", *(f"{kind}_output.{i}" for i in range(models.DEPTH) for kind in ("attn", "mlp"))]
        say(
            f"{name}, processed: logit_attrs of a difference",
            gap(theirs, own[[order.index(one) for one in named]]),
        )
        streams = (one["blocks.1.hook_resid_post"].flatten(0, 1).double() for one in (cache, processed))
        ratios = [F.spectrum_metrics(torch.linalg.eigvalsh(rows.T.cov()).flip(0))["d_pr"] for rows in streams]
        say(f"{name}, processed: participation ratio before, after", *map(float, ratios))


TOOLS: dict[str, Callable[[], None]] = {
    tool.__name__: tool
    for tool in (transformer_lens, tdhook, representation_geometry, scikit_dimension, torchmetrics, nnsight)
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for tool in sys.argv[1:] or TOOLS:
        print(f"\n{tool}")
        TOOLS[tool]()
