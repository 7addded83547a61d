"""``sweep``: an analysis of every checkpoint of a training, and each beside the first, the last and the one before."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from tdgeom.analysis.analysis_settings import (
    MAX_ROWS,
    AnalysisSettings,
    Metrics,
    select_settings,
    stage_record,
)
from tdgeom.analysis.one_model import analyzed
from tdgeom.analysis.results import AnalysisResults
from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.keys import Key
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.process_groups import rank_and_world
from tdgeom.core.warnings import Gathered, gathered
from tdgeom.model.sites import LayerSpec
from tdgeom.rows.batches import as_batch
from tdgeom.run.identity import tensors_sha256, weights_identity
from tdgeom.store.write_lock import Lock
from tdgeom.training.checkpoints import Checkpoints, TrainedTo, as_checkpoints
from tdgeom.training.compared_steps import HELD_ROOTS, compared, held_of, pair_stages
from tdgeom.training.device_workers import on_devices
from tdgeom.training.sweep_folder import SweepFolder
from tdgeom.training.sweep_results import Sweep

__all__ = ["sweep"]

REFERENCES = ("first", "last", "previous")
_LOOKED_AT = 64  # batches of the data that a sweep which goes on must find again
SIMILARITY = ("linear_cka_debiased", "feature_subspace_novelty")


@answer_guesses
def sweep(
    checkpoints: Checkpoints,
    dataloader: Iterable[Any],
    *,
    steps: Iterable[int] | None = None,
    metrics: Metrics = "default",
    sites: str | Sequence[str] = "residual_output",
    layers: LayerSpec = "all",
    similarity: str | PairStage | Sequence[str | PairStage] = SIMILARITY,
    references: str | Sequence[str] = REFERENCES,
    max_rows: int | None = MAX_ROWS,
    sample_size: int = 4096,
    novelty_k: int = 32,
    errors: bool | int = False,
    seed: int = 0,
    select: Mapping[str, Any] | None = None,
    device: str | torch.device | Sequence[str | torch.device] | None = None,
    save_dir: str | Path | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    in_keys: Sequence[Key] | None = None,
    tokenizer: Any = None,
    text_column: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    nonfinite: str = "raise",
    progress: bool | None = True,
) -> Sweep:
    """Measure every checkpoint of a training on the same data: tables over steps, similarity of steps, drift of subspaces.

    One model at a time is open (one a device), and of the checkpoints that others are still compared with the sample's rows and
    the leading directions are kept on disk. With ``save_dir`` each checkpoint is safe as soon as it is measured: the same call
    goes on where a killed one was, and gives what an undisturbed one gives.

    Args:
        checkpoints: a trainer's output directory (with ``checkpoint-100``, ...); names, each a folder or ``id@revision`` of a
            hub, whose last number is the step; a mapping from steps to names, modules or functions that make one; or a function
            of the step, with ``steps``.
        dataloader: what all are measured on, as for ``analyze_model``; it is read once for each checkpoint.
        steps: only these.
        metrics, sites, layers, max_rows, sample_size, novelty_k, errors, seed, select, nonfinite: as for ``analyze_model``.
        similarity: what a checkpoint is compared by with another, at the same site: names of measures (of matched sample rows),
            or pair stages that read ``sample``, ``eigenvectors`` or ``eigenvalues``. Default debiased linear CKA, and the novelty
            of the subspace of the ``novelty_k`` leading directions.
        references: what each is compared with: "first", "last", "previous". Each measure becomes a column,
            ``linear_cka_debiased_to_first``.
        device: where models go; of several each has a thread of its own, which takes the next checkpoint as it is free.
        save_dir: the folder to work in. At the end its ``results`` hold the sweep's bundle.
        model_kwargs, trust_remote_code: of named checkpoints, as for ``analyze_model``.
        in_keys, tokenizer, text_column, batch_size, max_length: of the data, as for ``run``.
        progress: a bar on a terminal; False for none.

    Returns:
        ``Sweep``: ``frame()`` is the tidy table, ``plot(measure)`` draws one over steps, ``report(path)`` all of them.

    Raises:
        ValueError: no checkpoints, data that can be read once only, a folder that was begun with other settings, checkpoints with
            different sites or other data than before. FileExistsError: the folder holds something else.

        >>> from torch import nn
        >>> models = {step: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for step in (0, 100)}
        >>> found = sweep(models, [{"input": torch.randn(200, 4)}], sites="module_output:0", metrics="spectrum", progress=False)
        >>> found.frame()["step"].unique().tolist(), float(found.metrics["linear_cka_debiased_to_last"].iloc[-1])
        ([0, 100], 1.0)
    """
    if isinstance(dataloader, Iterator):
        raise ValueError(
            "sweep: every checkpoint reads the data, but the dataloader is an iterator that can be read once. Give a list or a "
            "DataLoader."
        )
    if rank_and_world()[1] > 1:
        raise ValueError(
            "sweep: this is a process group. Start one process, and name its devices: device=['cuda:0', 'cuda:1']."
        )
    asked = [references] if isinstance(references, str) else list(references)
    if unknown := [name for name in asked if name not in REFERENCES]:
        raise ValueError(f"sweep: references are of {list(REFERENCES)}, got {unknown[0]!r}.")
    found = as_checkpoints(
        checkpoints, steps, "sweep", model_kwargs=model_kwargs, trust_remote_code=trust_remote_code
    )
    stages = pair_stages(similarity, novelty_k, "sweep")
    settings = AnalysisSettings(
        metrics=metrics,
        sites=sites,
        layers=layers,
        max_rows=max_rows,
        sample_size=sample_size,
        novelty_k=novelty_k,
        errors=errors,
        seed=seed,
        select=select_settings("sweep", select),
        held=HELD_ROOTS if stages and asked else (),
    )
    texts = {
        "tokenizer": tokenizer,
        "text_column": text_column,
        "batch_size": batch_size,
        "max_length": max_length,
    }
    run_options = {"in_keys": in_keys, "nonfinite": nonfinite, "progress": False, **texts}
    signature = {
        **settings.record(),
        "sites": sites,
        "layers": layers,
        "max_rows": max_rows,
        "similarity": [stage_record(stage) for stage in stages],
        "references": asked,
        "checkpoints": [[one.step, one.name, _what_it_is(one)] for one in found],
        "model_kwargs": {str(name): str(value) for name, value in (model_kwargs or {}).items()},
        "nonfinite": nonfinite,
        "in_keys": in_keys,
        **{
            **texts,
            "tokenizer": tokenizer if isinstance(tokenizer, str | None) else type(tokenizer).__name__,
        },
        "data": _first_batches(dataloader),
    }
    devices = list(device) if isinstance(device, Sequence) and not isinstance(device, str) else [device]
    with _work_in(save_dir) as place:
        folder = SweepFolder(place, signature, [one.step for one in found], asked if stages else [])
        lock = Lock(place / ".lock", f"the sweep in {place}")
        try:
            told = Gathered()
            work = _Work(folder, stages, settings, dataloader, run_options, told)
            with tqdm(
                total=len(found), unit=" checkpoints", disable=None if progress else True, leave=False
            ) as bar:
                bar.update(sum(map(folder.is_measured, folder.steps)))
                on_devices(
                    devices,
                    [one for one in _order(found) if not folder.is_measured(one.step)],
                    work.measure,
                    bar.update,
                )
            work.compare()
            with gathered():
                results = _results(folder, found, signature)
            results.metadata["warnings"] = list(dict.fromkeys([*results.metadata["warnings"], *told.texts()]))
            if save_dir is not None:
                results.save(place / "results", overwrite=True)
        finally:
            lock.release()
    return results


def _order(found: Sequence[TrainedTo]) -> list[TrainedTo]:
    """The last and the first come first: the others are compared with them as they come."""
    return [found[-1], *found[:-1]]


@contextmanager
def _work_in(save_dir: str | Path | None) -> Iterator[Path]:
    if save_dir is not None:
        yield Path(save_dir)
        return
    with tempfile.TemporaryDirectory(prefix="tdgeom-sweep-") as place:
        yield Path(place)


def _what_it_is(one: TrainedTo) -> Any:
    """Of a module its weights' hash, of a folder its files' sizes and times; nothing of what only a call would tell."""
    if one.given:
        return weights_identity(one.open())
    folder = Path(one.name)
    if not folder.is_dir():
        return None
    states = sorted((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def _first_batches(dataloader: Any) -> list[str]:
    """Hashes of what the data begin with, ``_LOOKED_AT`` batches at most."""
    found = [_hash(batch) for batch in islice(iter(dataloader), _LOOKED_AT)]
    if not found:
        raise ValueError("sweep: the dataloader is empty.")
    return found


def _hash(first: Any) -> str:
    if isinstance(first, str):
        return tensors_sha256(as_batch({"text": [first]}, None, None))
    try:
        return tensors_sha256(as_batch(first, [f"entry {i}" for i in range(16)], None))
    except (TypeError, ValueError):
        return type(first).__name__


class _Work:
    """What is done with each checkpoint, and as soon as two are there between them."""

    def __init__(
        self,
        folder: SweepFolder,
        stages: Sequence[PairStage],
        settings: AnalysisSettings,
        dataloader: Iterable[Any],
        run_options: Mapping[str, Any],
        told: Gathered,
    ) -> None:
        self.folder, self.stages, self.settings, self.told = folder, stages, settings, told
        self.dataloader, self.run_options = dataloader, run_options
        self.data = folder.data()

    def measure(self, one: TrainedTo, model: torch.nn.Module, device: Any, serially: Any) -> None:
        """Measure a checkpoint's model; what is kept is kept by one thread at a time (``serially``)."""
        held: dict[str, Any] = {}
        if device is not None and not getattr(model, "hf_device_map", None):
            model.to(device)
        with gathered(self.told):
            results = analyzed(
                model,
                one.model or type(model).__name__,
                self.dataloader,
                self.settings,
                held=held,
                **self.run_options,
            )
        assert results is not None  # in one process
        data = str(results.metadata["data_sha256"])
        results.metadata |= {
            "step": one.step,
            "weights_identity": weights_identity(model),
            "run_name": f"step {one.step}",
        }
        with serially:
            self.data = self.data or data
            if data != self.data:
                raise ValueError(
                    f"sweep: at step {one.step} the loader gave other data than before, so that steps would differ by their "
                    f"rows. Give a loader that gives the same batches each time."
                )
            self.folder.keep(one.step, results, held_of(held))
            self.compare()

    def compare(self) -> None:
        """All comparisons whose two sides are there; then rows that nothing needs any more go."""
        for step, name, reference in self.folder.open_pairs():
            with gathered(self.told):
                values = compared(self.folder.rows(reference), self.folder.rows(step), self.stages, "sweep")
            self.folder.keep_between(step, name, values)
        self.folder.let_go()


def _results(folder: SweepFolder, found: Sequence[TrainedTo], signature: Mapping[str, Any]) -> Sweep:
    """The tables of all steps, each with its step in the first column."""
    every = [AnalysisResults.load(folder.bundle(step)) for step in folder.steps]
    between = {(step, name): folder.between(step, name) for step, name, _ in folder.pairs()}

    def joined(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
        filled = [(step, table) for step, table in zip(folder.steps, tables) if len(table)]
        parts = [table.drop(columns="step", errors="ignore") for _, table in filled]
        for (step, _), part in zip(filled, parts):
            part.insert(0, "step", step)
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def beside(step: int, table: pd.DataFrame) -> pd.DataFrame:
        own = {name: values for (at, name), values in between.items() if at == step}
        measures = dict.fromkeys(m for values in own.values() for cells in values.values() for m in cells)
        columns: dict[str, Any] = {
            f"{measure}_to_{name}": [own[name].get(site, {}).get(measure) for site in table["site"]]
            for measure in measures
            for name in own
        }
        return table.assign(**columns)

    last = every[-1]
    names = dict.fromkeys(name for one in every for name in one.diagnostics)
    own = {
        name: value for name, value in last.metadata.items() if name not in ("artifact_dir", "step", "files")
    }
    metadata = {
        **own,
        "run_name": f"sweep of {len(every)} steps",
        "steps": folder.steps,
        "checkpoints": {str(one.step): one.name for one in found},
        "sweep": dict(signature),
        "weights_by_step": {
            str(step): one.metadata["weights_identity"] for step, one in zip(folder.steps, every)
        },
        "warnings": list(dict.fromkeys(text for one in every for text in one.metadata.get("warnings", ()))),
        "runtime_seconds_by_step": {
            str(step): one.metadata.get("runtime_seconds") for step, one in zip(folder.steps, every)
        },
    }
    return Sweep(
        metrics=joined(beside(step, one.metrics) for step, one in zip(folder.steps, every)),
        novelty=joined(one.novelty for one in every),
        router=joined(one.router for one in every),
        diagnostics={
            name: joined(one.diagnostics.get(name, pd.DataFrame()) for one in every) for name in names
        },
        eigenvalues=last.eigenvalues,
        metadata=metadata,
    )
