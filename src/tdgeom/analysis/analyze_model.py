"""``analyze_model``: the default pipeline over a model, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from tdgeom.analysis.analysis_settings import MAX_ROWS, AnalysisSettings, Metrics, select_settings
from tdgeom.analysis.baseline import with_baseline
from tdgeom.analysis.one_model import analyzed
from tdgeom.analysis.results import AnalysisResults, default_folder
from tdgeom.analysis.saving import save_or_hand_over
from tdgeom.analysis.seed_names import also_called
from tdgeom.analysis.stored_rows import analyzed_rows, are_stored_rows
from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.keys import Key
from tdgeom.core.rank_failures import fail_together
from tdgeom.files.bundle import check_target
from tdgeom.measures.normalization import NormalizationAblation
from tdgeom.model.calls.repeated_calls import CallsSpec
from tdgeom.model.capture import Capture
from tdgeom.model.loading import load_model
from tdgeom.model.sites import LayerSpec
from tdgeom.model.untrained import untrained_copy
from tdgeom.model.verification.verify_sites import verify_sites
from tdgeom.rows.batches import as_batch
from tdgeom.rows.data_sources import as_loader, holds_texts
from tdgeom.run.checkpoint import checkpoints_kept

__all__ = ["analyze_model"]


@also_called(max_tokens="max_rows", sample_limit="sample_size")
@answer_guesses
@fail_together
def analyze_model(
    model_name: str | nn.Module | None = None,
    dataloader: Iterable[Any] | None = None,
    *,
    model: nn.Module | None = None,
    max_rows: int | None = MAX_ROWS,
    metrics: Metrics = "default",
    diagnostics: str | NormalizationAblation | Sequence[str | NormalizationAblation] | None = None,
    layers: LayerSpec = "all",
    hook_point: str = "residual_input",
    sites: str | Sequence[str] | None = None,
    save_mode: str | None = None,
    save_dir: str | Path | None = None,
    sample_size: int = 4096,
    novelty_k: int = 32,
    device: str | torch.device | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    output_router_logits: bool | str = "auto",
    run_name: str | None = None,
    tokenizer_name: str | None = None,
    dataset_name: str | None = None,
    run_metadata: Mapping[str, Any] | None = None,
    progress: bool | None = True,
    seed: int = 0,
    select: Mapping[str, Any] | None = None,
    neighbors: bool | int = False,
    errors: bool | int = False,
    untrained: bool | nn.Module = False,
    checkpoint: str | Path | None = None,
    every: int = 100,
    shard: str | tuple[int, int] | None = None,
    state: str | Path | None = None,
    in_keys: Sequence[Key] | None = None,
    tokenizer: Any = None,
    text_column: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
    verify: bool = False,
    calls: CallsSpec = None,
    convergence: bool = False,
    significance: bool = False,
    sharded: bool | None = None,
    nonfinite: str = "raise",
) -> AnalysisResults | None:
    """Measure the representation geometry of a model over a dataloader.

    Builds ``analysis_pipeline``, runs it with ``run``, and returns tables.

    Args:
        model_name: a Hugging Face id, a local directory, or a module.
        dataloader: an iterable of batches, or texts or a dataset of texts with ``tokenizer``, see ``run``. ``store.rows(run)``
            (also in the first place) needs no model: the tables are of the rows that are kept, at all their sites or ``sites``.
        model: a loaded module; takes precedence, ``model_name`` then only labels it.
        max_rows: rows to measure; reaching it is recorded in the metadata. ``max_tokens`` is the seed's name of it.
        metrics: "default" or None for all families ("spectrum", "sample", "novelty", "router"), or a list of families, of
            measures by name (those of the pure functions: "twonn", "gride", "rankme", "linear_cka_debiased", ...; an unknown
            one lists them) and of stages of one's own: any TensorDict module whose inputs the pipeline has becomes columns.
        diagnostics: ["normalization_ablation"], or a ``NormalizationAblation(variants=...)`` of your own; or both, where their
            variants have names of their own. The table is ``results.diagnostics["normalization_ablation"]``.
        layers: "all", a list (negative counts from the end), a slice or "0,3,7".
        hook_point: the kind of site, when ``sites`` is not given.
        sites: kinds or concrete site names, see ``Capture``.
        save_mode: "bundle" or "csv" (tables as CSV), or "json"; None: a bundle where ``save_dir`` is given, else nothing.
        save_dir: the folder to make; default the run's name, or ``tdgeom_run``.
        sample_size: rows of the uniform sample. ``sample_limit`` is the seed's name of it.
        novelty_k: leading eigenvectors compared between consecutive sites.
        device: moves the model there first.
        model_kwargs: passed to ``from_pretrained``.
        trust_remote_code: run code that comes with a checkpoint; off unless asked.
        output_router_logits: measure router load; "auto" where the model has routers.
        run_name, tokenizer_name, dataset_name, run_metadata: recorded in the metadata.
        progress: a progress bar on a terminal; False for none.
        seed: seed of the row sample.
        select: further settings of ``SelectTokens``, such as {"skip_first": 1}.
        neighbors: keep a neighbour table of the sample at every site (100 neighbours, or this many), with what
            ``select={"also": [...]}`` carries: in ``results.neighbors`` and in the bundle.
        errors: standard errors of every measure that has one, in columns ``<metric>_se`` of all tables: those of the
            delete-a-group jackknife over 20 groups of documents, or this many. A document is a ``document_id`` of the
            batches, else a sequence. See docs/errors.md for what it costs.
        untrained: measure the same model with re-initialised weights too (or the module given here), in the same tables:
            column ``weights`` says which. The loader must be one that can be read twice.
        checkpoint, every: as for ``run``: a file that keeps the state, and batches between two writes. Further stacks and the
            untrained model have files of their own beside it. All go when the results are made and, with ``save_dir``, saved.
        shard, state: as for ``run``: "3/16" measures one part of the data, and ``state=FILE`` leaves its state there instead of
            tables (None is returned). ``merge_states`` makes the tables of all parts, without the model.
        in_keys: names for the entries of tuple batches, such as ["x", "label"].
        tokenizer, text_column, batch_size, max_length: of texts and datasets, as for ``run``. The tokenizer of a model that is
            named is its own.
        overwrite: replace an earlier bundle in ``save_dir``.
        verify: compare the sites with the model itself on the loader's first batch (``verify_sites``), before the analysis:
            ``results.diagnostics["verified_sites"]``, kept in the bundle. The loader must be one that can be read twice.
        nonfinite: "raise" names site and batch of a NaN or Inf; "drop" leaves such rows out at all sites, and the metadata count
            them (``dropped_rows``).
        calls: which call is measured of a module that runs several times in one pass: "first", "last" or a number from 0.
            Default: such a module is an error.
        convergence: measure the sample's metrics on N, N/2, N/4, ... of its rows too: the column ``converged`` says whether all
            have settled, ``tg.convergence(results)`` gives the curves and ``tg.rows_needed(results, metric)`` an extrapolation.
        significance: every measure of two sites beside what it is by chance, documents of one side moved: ``<measure>_z``,
            ``_p``, ``_calibrated`` (0 by chance, 1 for the same) and ``_p_adjusted``, for the best of all pairs. Linear CKA's
            stand there always. All are of the sample's first 512 rows; see docs/significance.md for what each costs.
        sharded: in a process group, whether each rank's loader is a part of the data, as for ``run``. Default: found out.

    Returns:
        AnalysisResults. Every site has a ``layer``: the final norm stands behind the last block, see ``to_frame``. Column
        ``layer_norm_depth`` = layer / last analysed layer; ``relative_depth`` = layer / last layer of the model's stack. In a
        process group the results are on rank 0, None elsewhere.

    Raises:
        ValueError: an unknown family, measure or diagnostic, no model or loader, an empty loader. TypeError: an argument given
            under both of its names. FileExistsError: ``save_dir`` is there already (said before the model runs).
            NotSavedError: the bundle could not be written; ``error.results`` holds what was measured.
    """
    if dataloader is None and are_stored_rows(model_name):
        model_name, dataloader = None, model_name
    if dataloader is None:
        raise ValueError(
            "analyze_model needs a dataloader: an iterable of batches, such as a list of dicts, or texts and tokenizer=."
        )
    mode = save_mode or "bundle"
    target = None if save_dir is None and save_mode is None else Path(save_dir or default_folder(run_name))
    if target is not None:
        check_target(target, mode, overwrite)
    settings = AnalysisSettings(
        sites=hook_point if sites is None else sites,
        layers=layers,
        calls=calls,
        max_rows=max_rows,
        sample_size=sample_size,
        seed=seed,
        select=select_settings("analyze_model", select),
        metrics=metrics,
        diagnostics=diagnostics,
        output_router_logits=output_router_logits,
        novelty_k=novelty_k,
        neighbors=neighbors,
        errors=errors,
        convergence=convergence,
        significance=significance,
    )
    if tokenizer is None and isinstance(model_name, str) and model is None and holds_texts(dataloader):
        tokenizer = model_name
    if (model is None and model_name is None) or are_stored_rows(dataloader):
        net, label = None, model_name if isinstance(model_name, str) else None
        if untrained is not False or verify:
            raise ValueError(
                "analyze_model: untrained= and verify= run the model, and stored rows have none. Leave them out."
            )
    else:
        net, label = _model(model_name, model, trust_remote_code, model_kwargs)
    if net is not None and device is not None and not getattr(net, "hf_device_map", None):
        net.to(device)
    twice = "untrained=" if untrained is not False else "verify=" if verify else None
    if twice is not None and isinstance(dataloader, Iterator):
        raise ValueError(
            f"analyze_model: {twice} reads the data twice, but the dataloader is an iterator that can be read once. "
            "Give a list or a DataLoader."
        )
    texts = {
        "tokenizer": tokenizer,
        "text_column": text_column,
        "batch_size": batch_size,
        "max_length": max_length,
    }
    verified = None
    if verify and net is not None:
        loader = as_loader(dataloader, owner="analyze_model", models=[net], **texts)
        verified = _verified(net, loader, settings, in_keys)
    progress = None if progress else False
    options = {
        "every": every,
        "in_keys": in_keys,
        "progress": progress,
        "shard": shard,
        "nonfinite": nonfinite,
        "sharded": sharded,
        **texts,
    }
    if state is not None and (untrained is not False or target is not None):
        asked = "untrained=" if untrained is not False else "save_dir="
        raise ValueError(
            f"analyze_model: state= leaves the state of a part and no results, so {asked} has nothing to work on. "
            f"merge_states(files) gives the results of all parts, which can be saved."
        )
    if state is not None and net is None:
        raise ValueError(
            "analyze_model: state= is for an analysis of a model; stored rows are in one place already."
        )
    noted = {
        "hook_point": hook_point if sites is None else None,
        "output_router_logits": output_router_logits,
        "run_name": run_name,
        "tokenizer": tokenizer_name,
        "dataset": dataset_name,
        **({"run_metadata": dict(run_metadata)} if run_metadata else {}),
    }
    with checkpoints_kept():  # until the results are safe
        if net is None:
            results = analyzed_rows(dataloader, label, settings, sites, checkpoint=checkpoint, **options)
        else:
            leave = None if state is None else (Path(state), noted)
            results = analyzed(
                net, label, dataloader, settings, checkpoint=checkpoint, leave=leave, **options
            )
        if untrained is not False and net is not None:
            other = untrained if isinstance(untrained, nn.Module) else untrained_copy(net, seed=seed)
            beside = None if checkpoint is None else f"{checkpoint}.untrained"
            baseline = analyzed(other, label, dataloader, settings, checkpoint=beside, **options)
            results = None if results is None or baseline is None else with_baseline(results, baseline)
        if results is None:
            return None  # the result is on rank 0
        if verified is not None:
            results.diagnostics["verified_sites"] = verified
        results.metadata |= noted
        if target is not None:
            save_or_hand_over(results, target, mode, overwrite, checkpoint)
        return results


def _verified(
    model: nn.Module, dataloader: Iterable[Any], settings: AnalysisSettings, in_keys: Sequence[Key] | None
) -> pd.DataFrame:
    """The checks of the analysis' sites on the loader's first batch."""
    asked = Capture(model, settings.sites, layers=settings.layers, calls=settings.calls)
    batch = next(iter(dataloader), None)
    if batch is None:
        raise ValueError("analyze_model: verify= found no batch: the dataloader is empty.")
    own = [key for key in asked.in_keys if key not in asked.optional_in_keys]
    td = as_batch(batch, own if in_keys is None else in_keys, asked.device, named=in_keys is not None)
    return verify_sites(model, td, sites=[str(site) for site in asked.sites])


def _model(
    model_name: str | nn.Module | None,
    model: nn.Module | None,
    trust_remote_code: bool,
    model_kwargs: Mapping[str, Any] | None,
) -> tuple[nn.Module, str | None]:
    given = model_name if model is None else model
    label = model_name if isinstance(model_name, str) else None
    if isinstance(given, nn.Module):
        return given, label
    if isinstance(given, str):
        return load_model(given, trust_remote_code=trust_remote_code, model_kwargs=model_kwargs), label
    raise ValueError(
        "analyze_model needs a model: model_name= (an id, a directory or a module) or model= (a module)."
    )
