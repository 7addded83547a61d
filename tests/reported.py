"""Runs for reports, made up: the tables of an analysis with everything that a report shows."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tdgeom.report import ReportedRun

VARIANTS = ("raw", "token_l2", "token_rms", "feature_standardized")
HOSTILE = '</script><script>window.hurt=1</script><img src=x onerror="window.hurt=2">\'"&<b>'


def made_up(
    name: str = "run", layers: int = 6, width: int = 64, seed: int = 0, hostile: str = "", experts: int = 4
) -> ReportedRun:
    """The tables of one run; ``hostile`` goes into every name that comes from outside."""
    rng = np.random.default_rng(seed)
    kind = hostile or "residual_input"
    sites = [f"{kind}.{i}" for i in range(layers)]
    model = {"model_key": hostile or "m", "model_label": hostile or "a/model"}
    shape = rng.uniform(0.5, 2, layers)
    spectra = {
        f"layer_{i:02d}": np.append(np.arange(1.0, width) ** -shape[i], 0.0) for i in range(layers)
    }  # the last direction does not vary
    place = [{**model, "site": s, "kind": kind, "layer": i, "stack": None} for i, s in enumerate(sites)]
    depth = np.linspace(0, 1, layers)
    metrics = pd.DataFrame(place).assign(
        num_layers=layers, relative_depth=depth, layer_norm_depth=depth, rows_observed=500, tokens_observed=600,
        hidden_dim=width, d_pr=3 + 10 * rng.random(layers), d_pr_se=0.5, effective_rank=20 + rng.random(layers),
        d_entropy=10 + rng.random(layers), stable_rank=2 + rng.random(layers), top1_share=rng.random(layers),
        top10_share=1.0, top32_share=1.0, k90=5, k95=8, k99=20, alpha_req=shape, isoscore=rng.random(layers),
        near_rank1=[i == 1 for i in range(layers)], numerical_rank=width - 1, few_rows=[i == 2 for i in range(layers)],
        unresolved=["alpha_req" if i == 3 else None for i in range(layers)], cos_sim_mean=rng.random(layers),
        cos_sim_std=0.1, norm_mean=10.0, norm_q05=8.0, norm_q50=10 + rng.random(layers), norm_q95=13.0,
        norm_max=200 + rng.random(layers), top_feature_share=rng.random(layers), my_own_score=rng.normal(size=layers),
        twonn_estimate=5 + rng.random(layers), twonn_standard_error=0.2, twonn_scale=1.0, twonn_rows=500,
        gride_estimate=[np.array([9.0, 7, 5]) - i / layers for i in range(layers)],
        gride_standard_error=[np.array([0.3, 0.2, 0.1])] * layers, gride_scale=[np.array([1.0, 2, 4])] * layers,
        gride_rows=[np.array([500, 500, 500])] * layers,
    )  # fmt: skip
    pairs = pd.DataFrame(
        [
            {**model, "a": sites[i], "b": sites[i + 1], "kind": kind, "layer": i, "stack": None,
             "transition": f"{i}->{i + 1}", "novelty_k": 8, "feature_subspace_novelty": rng.random(),
             "linear_cka": rng.random(), "layer_cosine_sim": rng.random()}
            for i in range(layers - 1)
        ]
    )  # fmt: skip
    ablation = pd.DataFrame(
        [
            {**row, "variant": variant, "tokens": 500, "hidden_dim": width, "d_pr": value, "effective_rank": 2 * value,
             "top1_share": 1 / value}
            for row in place
            for variant, value in zip(VARIANTS, (2.0, 3.0, 3.0, 5 + rng.random()))
        ]
    )  # fmt: skip
    loads = [rng.dirichlet(np.ones(experts)) for _ in range(layers)]
    router = pd.DataFrame(place).assign(
        router_entropy_norm=rng.random(layers), load_imbalance=1 + rng.random(layers), load=loads
    )
    return ReportedRun(
        name,
        {"metrics": metrics, "novelty": pairs, "router": router, "diagnostics/normalization_ablation": ablation},
        spectra,
        {
            "model_id": hostile or "a/model", "model_class": "Model", "parameter_count": 12_345_678, "rows_observed": 500,
            "row_unit": "tokens", "dataset": hostile or "text.txt", "stopped": "max_rows", "warnings": [f"few rows {hostile}"],
            "settings": {"seed": 0, "note": hostile}, "software": {"torch": "2"}, "runtime_seconds": {"batch": 1.5},
            "files": {"metrics.csv": "ab" * 32}, "sites": sites,
        },
    )  # fmt: skip


def compared(layers: int = 5) -> ReportedRun:
    """A comparison of two models: every site of one with every site of the other."""
    sites = {side: [f"{side}/residual_output.{i}" for i in range(layers)] for side in "ab"}
    pairs = pd.DataFrame(
        [
            {"pair": f"{a}->{b}", "a": a, "b": b, "layer_a": i, "layer_b": j,
             "linear_cka_debiased": 1 / (1 + abs(i - j)), "procrustes": abs(i - j) / 2}
            for i, a in enumerate(sites["a"])
            for j, b in enumerate(sites["b"])
        ]
    )  # fmt: skip
    rows = [
        {"model": side, "model_key": side, "model_label": side, "site": site, "kind": "residual_output", "layer": i,
         "stack": None, "relative_depth": i / (layers - 1)}
        for side in "ab"
        for i, site in enumerate(sites[side])
    ]  # fmt: skip
    metadata = {"models": {"a": {"id": "one"}, "b": {"id": "two"}}, "align": "rows", "rows_observed": 500}
    return ReportedRun("comparison", {"metrics": pd.DataFrame(rows), "novelty": pairs}, {}, metadata)


def further(layers: int = 4) -> ReportedRun:
    """What else a report shows: a sweep over steps, dimension over scales, overlaps, a grid of patching, a table of its own."""
    run = made_up(layers=layers)
    metrics = run.tables["metrics"]
    sweep = pd.concat(
        [metrics.assign(step=s, d_pr=metrics["d_pr"] + s) for s in (0, 10, 1000)], ignore_index=True
    )
    place = metrics[["site", "kind", "layer", "stack", "relative_depth"]]
    scales = pd.concat(
        [place.assign(estimator="gride", step=s, estimate=9.0 - s + place["layer"] / 8, standard_error=0.2, scale=2.0**s)
         for s in range(3)], ignore_index=True,
    )  # fmt: skip
    overlap = place.assign(measure="neighborhood_overlap", other="x", value=0.5 + place["layer"] / 10)
    grid = [
        {"kind": "residual_input", "by": "position", "layer": i, "column": j, "label": f"token{j}", "grid": i * j,
         "recovered": i * j / 60}
        for i in range(layers) for j in range(20)
    ]  # fmt: skip
    tables = {
        **run.tables, "metrics": sweep, "diagnostics/intrinsic_dimension": scales, "diagnostics/overlap": overlap,
        "patching": pd.DataFrame(grid), "diagnostics/verified_sites": pd.DataFrame({"site": ["x"], "outcome": ["passed"]}),
    }  # fmt: skip
    return ReportedRun("further", tables, run.eigenvalues, run.metadata)
