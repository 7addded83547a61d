"""``run``: stream a dataloader through a pipeline in bounded memory, then finish."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tqdm import tqdm

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.keys import Key, as_key, key_tuple
from tdgeom.core.process_groups import (
    from_first_rank,
    gather_numbers,
    rank_and_world,
    refuse_no_group,
    sum_over_ranks,
)
from tdgeom.core.rank_failures import fail_together
from tdgeom.core.renamed import stage_of
from tdgeom.core.warnings import gathered, tell
from tdgeom.model.calls.shared_model import sharing_of
from tdgeom.rows.data_sources import as_loader
from tdgeom.run.batch_stages import BatchStages, models_of
from tdgeom.run.checkpoint import Checkpoint
from tdgeom.run.finish import run_end
from tdgeom.run.gathered_rows import BLOCK_ROWS
from tdgeom.run.identity import tensors_sha256
from tdgeom.run.one_pass import OnePass
from tdgeom.run.plan import Plan, make_plan
from tdgeom.run.state_file import SequencesMet, StateTo, parse_shard, write_part

__all__ = ["end_of", "ended", "kept_of", "run"]


@answer_guesses
@fail_together
def run(
    pipeline: TensorDictModuleBase,
    dataloader: Iterable[Any],
    *,
    max_rows: int | None = None,
    inputs: TensorDictBase | None = None,
    keep: Sequence[str] | None = None,
    block_rows: int = BLOCK_ROWS,
    nonfinite: str = "raise",
    in_keys: Sequence[Key] | None = None,
    device: torch.device | str | None = None,
    tokenizer: Any = None,
    text_column: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    sharded: bool | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    shard: str | tuple[int, int] | None = None,
    state: str | Path | StateTo | None = None,
    progress: bool | None = None,
) -> TensorDict | None:
    """Stream a dataloader through a pipeline and return every result in one TensorDict.

    Stages up to the streaming ones run once a batch, streaming stages gather rows, and every stage whose inputs they
    write runs once at the end; which is which follows from the keys. Rows reach the streaming stages in blocks of
    ``block_rows``, cut exactly at ``max_rows`` in stream order and checked once for NaN and Inf.

    Args:
        pipeline: a TensorDictSequential of stages. Its streaming state is reset first and stays afterwards.
        dataloader: an iterable of dicts, BatchEncodings, TensorDicts, tensors, arrays or tuples; ``(x, y)`` is the model's input
            and ``"labels"``. Or, with ``tokenizer``, texts, a ``datasets.Dataset`` (streaming too), a data frame, a
            ``DataLoader`` over one; a sentence encoder brings its own tokenizer. Their other columns stay beside the text, for
            ``SelectTokens(also=[...])``.
        max_rows: stop after this many rows (those that ``nonfinite="drop"`` leaves out count too).
        inputs: results of an earlier run that stages here may read (the second pass of a two-pass analysis).
        keep: roots to keep, such as ["spectrum"]; default all streaming and end results.
        block_rows: rows gathered before the streaming stages see them; small batches then cost what large ones do.
        nonfinite: "raise" names site and batch of a NaN or Inf; "drop" leaves such rows out at all sites and counts them.
        in_keys: names for the entries of tuple batches; default the first inputs that the pipeline needs.
        device: where batches go; default the model's device.
        tokenizer: makes sequences of texts: a tokenizer or its name; of images: an image processor.
        text_column: the column that holds the text, where several do.
        batch_size, max_length: of texts: sequences a batch (8) and the longest sequence (256, or what the model takes).
        sharded: in a process group, True says that the loader holds this rank's part of the data, False that all ranks have one
            loader, which run shares out. Default: found out, see Ranks below.
        checkpoint: a file that keeps the state of the run, also while the end stages run. Where it exists the run goes on from
            it: batches already seen are read from the loader, which must give the same ones in the same order, and skipped.
            Other stages, settings, weights or batches are refused with the difference. Removed when the run ends. Ranks keep
            theirs in files beside it, in a folder that all see; as many, more or fewer of them go on with one loader, as many
            with the same parts of one that is split.
        every: batches between two writes of the checkpoint, of a split loader in each part.
        shard: "3/16" (or (3, 16)): this job reads the third of sixteen parts, every sixteenth batch of a loader that all jobs
            have alike, or with ``sharded=True`` all of a loader that holds this part only. Sequences are numbered apart.
            ``max_rows`` counts the rows of this job.
        state: a file that gets the streaming state instead of results: no end stage runs, and only ``("run", ...)`` is
            returned. ``merge_states`` adds up such files of jobs that share nothing, and ends the pipeline.
        progress: a progress bar; default only on a terminal.

    Ranks: in a process group (``torchrun``, ``torch.distributed.init_process_group``) all ranks call ``run`` alike; what one
    rank does by itself goes into ``tg.alone()``. Either all have one loader, of which each takes every n-th batch, or each has a
    part: behind a ``DistributedSampler``, Accelerate's loaders, ``split_dataset_by_node`` of an iterable (these are recognised),
    with disjoint ``sequence_id`` or ``row_id`` in the batches (found by comparison), or with ``sharded=True``. Stages, settings,
    weights, first batches and, of one loader, all batches are compared; what differs is an error on all ranks. ``max_rows``
    counts the rows of all. The numbers do not depend on how many ranks there are, wherever sequences are known in the whole: of
    one loader, behind ``DistributedSampler``, by ``sequence_id`` or ``row_id`` (8 bytes each are held; what comes twice counts
    once), there with ``max_rows`` only where parts are dealt out in turn: of halves, one behind the other, it takes of each, and
    is said to. Else they are numbered by rank and index, and only the same number of ranks gives the same sample.
    ``("run", "loader")`` says which it was.

    Returns:
        A TensorDict of batch size [] with the results and ``("run", ...)``: rows, tokens, padding and dropped rows,
        batches, seconds by phase, how the ranks read the data, and why it stopped. In a process group the result is on rank 0,
        None elsewhere.

    Raises:
        ValueError: a pipeline that cannot be split (the message names the stage and the remedy), an empty loader, rows that
            are not finite, ranks that differ. RuntimeError: several processes that are no group. KeyboardInterrupt passes
            through; the model is left as it was.

        >>> import torch, tdgeom as tg
        >>> from tensordict.nn import TensorDictSequential
        >>> pipeline = TensorDictSequential(tg.StreamingCovariance(), tg.EigenSpectrum(), tg.SpectrumMetrics())
        >>> result = tg.run(pipeline, [{"tokens": torch.eye(4)}])
        >>> round(float(result["spectrum", "d_pr"]), 3), int(result["run", "rows"])
        (3.0, 4)
    """
    if nonfinite not in ("raise", "drop"):
        raise ValueError(f"run: nonfinite takes 'raise' or 'drop', got {nonfinite!r}.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"run: max_rows must be at least 1, got {max_rows}.")
    if block_rows < 1:
        raise ValueError(f"run: block_rows must be at least 1, got {block_rows}.")
    refuse_no_group("run")
    inputs = _of_all_ranks(inputs)
    plan = make_plan(pipeline, [] if inputs is None else inputs.keys(True, True))
    if keep is not None:
        _check_keep(keep, plan)
    if not plan.stream:
        raise ValueError(
            "run found no streaming stage in the pipeline, so nothing would be kept. Put one behind the per-batch stages "
            "(StreamingCovariance, RowSample, StreamingMean, Collect), or call the pipeline on a TensorDict directly."
        )
    part, leave = parse_shard(shard, "run"), _state_to(state)
    if part is not None and rank_and_world()[1] > 1:
        raise ValueError(
            f"run: shard={shard!r} is for jobs that share nothing, and this is a group of {rank_and_world()[1]} ranks, among "
            f"which the data are shared out without it."
        )
    loader = as_loader(
        dataloader,
        owner="run",
        tokenizer=tokenizer,
        text_column=text_column,
        batch_size=batch_size,
        max_length=max_length,
        models=models_of(plan),
    )
    one_pass = OnePass(
        plan,
        BatchStages(plan, inputs, in_keys, device),
        max_rows=max_rows,
        block_rows=block_rows,
        drop_nonfinite=nonfinite == "drop",
        sharded=sharded,
        shard=part,
        agree={
            "max_rows": max_rows,
            "block_rows": block_rows,
            "nonfinite": nonfinite,
            "in_keys": in_keys and ["/".join(key_tuple(key)) for key in in_keys],
            "checkpoint": None if checkpoint is None else [Path(checkpoint).name, every],
        },
        shared=sharing_of(models_of(plan)),
    )
    read = None if inputs is None else tensors_sha256(inputs)
    settings = {"max_rows": max_rows, "block_rows": block_rows, "nonfinite": nonfinite, "inputs": read}
    if leave is not None:
        one_pass.met = SequencesMet()
    if checkpoint is not None:
        alone = {"shard": part, "state": leave is not None}
        one_pass.keep_in(Checkpoint(checkpoint, every, plan, {**settings, **alone}))
    try:
        with tqdm(
            total=max_rows,
            unit=" rows",
            unit_scale=True,
            disable=True if one_pass.rank else None if progress is None else not progress,
            leave=False,
        ) as bar:
            one_pass.read(loader, bar)
        with one_pass.timed("finish"), gathered():
            found = end_of(one_pass, inputs, keep) if leave is None else _left(one_pass, leave, settings)
    except BaseException:
        for unit in plan.stream:
            with suppress(Exception):  # the first error is the one to report
                stage_of(unit).release()
        raise
    if one_pass.kept is not None:
        one_pass.kept.checkpoint.remove()
    return None if found is None else _result(found, one_pass, pipeline, keep)


def _state_to(state: str | Path | StateTo | None) -> StateTo | None:
    if state is None or isinstance(state, StateTo):
        return state
    path = Path(state)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(
            f"run: state={str(state)!r} is a file in a folder that exists, such as 'part-03.state'."
        )
    return StateTo(path)


def _left(one_pass: OnePass, leave: StateTo, settings: Mapping[str, Any]) -> TensorDict | None:
    """Write the state of all ranks; nothing is ended."""
    for unit in one_pass.plan.stream:
        unit.sync_()
    one_pass.counts = sum_over_ranks(one_pass.counts)
    met = SequencesMet()
    for hashes in gather_numbers([] if one_pass.met is None else one_pass.met.smallest.tolist()):
        met.join(hashes)
    if one_pass.rank != 0:
        return None
    record = {
        "settings": settings,
        "shard": one_pass.shard,
        "order": {} if one_pass.order is None else one_pass.order.known,
        "data_sha256": one_pass.data_sha256(),
        "sequences": met.smallest.tolist(),
        "counts": one_pass.counts,
        "seconds": one_pass.seconds,
        "stopped": one_pass.stopped,
    }
    if not one_pass.counts["rows"]:
        tell(
            f"run: this part has no rows, and {leave.path} says so: there are fewer batches than parts, or it is empty."
        )
    write_part(leave, one_pass.plan, record)
    return TensorDict({}, batch_size=[])


def end_of(one_pass: OnePass, inputs: TensorDictBase | None, keep: Sequence[str] | None) -> TensorDict | None:
    """Merge ranks, publish, run the end stages; None on every rank but the first."""
    plan = one_pass.plan
    for unit in plan.stream:
        unit.sync_()
    one_pass.counts = counts = sum_over_ranks(one_pass.counts)
    if one_pass.rank != 0:
        return None
    return ended(plan, counts, inputs, keep)


def ended(
    plan: Plan, counts: Mapping[str, int], inputs: TensorDictBase | None, keep: Sequence[str] | None
) -> TensorDict:
    """What the streaming stages publish of their states, and the end stages make of it."""
    if not counts["rows"]:
        raise ValueError(
            f"run got no rows: {counts['batches']} batches with {counts['tokens']} attended tokens, {counts['dropped_rows']} "
            f"rows dropped. Is the loader empty (a generator already used up?), or does the selection (positions=, "
            f"skip_first=, skip_special=) leave nothing?"
        )
    td = TensorDict({}, batch_size=[])
    for unit in plan.stream:
        unit.publish(td)
    for key in plan.hidden:
        if td.get(key, None) is not None:
            td.del_(key)
    run_end(plan.end, td, inputs, keep)
    return td


def _result(
    td: TensorDict, one_pass: OnePass, pipeline: TensorDictModuleBase, keep: Sequence[str] | None
) -> TensorDict:
    """What the caller keeps, and the account of the run."""
    account = {
        "counts": one_pass.counts,
        "seconds": one_pass.seconds,
        "stopped": one_pass.stopped,
        "loader": one_pass.division.words,
        "data_sha256": one_pass.data_sha256(),
    }
    return kept_of(td, one_pass.plan, account, pipeline, keep)


def kept_of(
    td: TensorDict,
    plan: Plan,
    account: Mapping[str, Any],
    pipeline: TensorDictModuleBase,
    keep: Sequence[str] | None,
) -> TensorDict:
    """Those results that the caller keeps, with the account of how they came about."""
    selected = _selected(pipeline)
    result = TensorDict({}, batch_size=[])
    for unit in (*plan.stream, *plan.end):
        for key in map(key_tuple, unit.out_keys):
            kept = (keep is None or key[0] in keep) and (selected is None or as_key(key) in selected)
            if kept and td.get(as_key(key), None) is not None:
                result.set(as_key(key), td.get(as_key(key)))
    for name, count in account["counts"].items():
        result.set(("run", name), torch.tensor(count, device="cpu"))
    for name, seconds in account["seconds"].items():
        result.set(("run", "seconds", name), torch.tensor(seconds, dtype=torch.float64, device="cpu"))
    for name in ("stopped", "loader", "data_sha256"):
        result.set_non_tensor(("run", name), account[name])
    return result


def _of_all_ranks(inputs: TensorDictBase | None) -> TensorDictBase | None:
    """An earlier run's results, which rank 0 alone got, on every rank; of ranks that all have some each keeps its own."""
    world = rank_and_world()[1]
    given = [one for (one,) in gather_numbers([int(inputs is not None)])] if world > 1 else [1]
    if given != [1] + [0] * (world - 1) or world == 1:
        return inputs
    sent = from_first_rank(None if inputs is None else inputs.cpu())
    return inputs if inputs is not None else sent


def _selected(pipeline: TensorDictModuleBase) -> set[Key] | None:
    """What ``select_out_keys`` on the whole pipeline left, if it was called."""
    if isinstance(pipeline, TensorDictSequential) and getattr(pipeline, "_select_before_return", False):
        return {as_key(key_tuple(key)) for key in pipeline.out_keys}
    return None


def _check_keep(keep: Sequence[str], plan: Plan) -> None:
    if isinstance(keep, str):
        raise TypeError(f"run: keep is a list of roots, such as ['spectrum'], got {keep!r}.")
    roots = {key_tuple(key)[0] for unit in (*plan.stream, *plan.end) for key in unit.out_keys}
    unknown = [root for root in keep if root not in roots]
    if unknown:
        raise ValueError(f"run: keep names {unknown}, the pipeline's results are {sorted(roots)}.")
