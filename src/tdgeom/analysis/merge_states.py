"""State files of jobs that shared nothing, added up and ended: the results of a run, or of an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase

from tdgeom.analysis.analysis_settings import AnalysisSettings
from tdgeom.analysis.analysis_state import ANALYSIS, Described, file_of_stack, settings_of
from tdgeom.analysis.default_pipeline import analysis_pipeline
from tdgeom.analysis.metadata import with_run
from tdgeom.analysis.one_model import Passes, kept_roots
from tdgeom.analysis.results import AnalysisResults
from tdgeom.analysis.stored_rows import named_site
from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.warnings import gathered
from tdgeom.run.plan import make_plan
from tdgeom.run.run import ended, kept_of
from tdgeom.run.state_file import Part, added_up, read_parts

__all__ = ["merge_states"]


@answer_guesses
def merge_states(
    files: Sequence[str | Path],
    pipeline: TensorDictModuleBase | None = None,
    *,
    settings: AnalysisSettings | None = None,
    keep: Sequence[str] | None = None,
    partial: bool = False,
) -> TensorDict | AnalysisResults:
    """Add up what jobs of one analysis left as state files, and end it: exactly what one run over all their data gives.

    The files are those of ``run(..., state=FILE)`` or ``analyze_model(..., state=FILE)``: array jobs, workers of a serving
    engine, machines that never met. No model is needed. That they belong together is checked: stages, settings and weights
    are the same, no part comes twice or is missing, no sequences are in two of them (found out by the 2,048 smallest hashes
    of each file's sequence numbers), and jobs with ``shard=`` met the same batches in the same order. Of jobs with
    ``sharded=True``, which hold their own parts, it is not checked that these differ in content and make up a whole.

    Args:
        files: all parts.
        pipeline: of files that ``run`` wrote the pipeline of then, or its stages from the streaming ones on, without the model;
            its streaming state becomes the sum. Files of ``analyze_model`` bring theirs.
        settings: of files of ``analyze_model`` with stages that plain data cannot hold (a function of one's own): the
            ``AnalysisSettings`` of then.
        keep: roots to keep of ``run``'s results.
        partial: also without all parts; ``("run", "loader")`` then says which are missing.

    Returns:
        What ``run`` returns, a TensorDict; or what ``analyze_model`` returns, ``AnalysisResults``.

    Raises:
        ValueError: files that do not belong together, with what differs; damaged ones. FileNotFoundError: no such file.

        >>> import tempfile, torch, tdgeom as tg
        >>> from tensordict.nn import TensorDictSequential
        >>> pipeline = TensorDictSequential(tg.StreamingCovariance(), tg.EigenSpectrum(), tg.SpectrumMetrics())
        >>> batches = [{"tokens": torch.eye(4)}, {"tokens": 2 * torch.eye(4)}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = [f"{folder}/part-{k}" for k in (1, 2)]
        ...     for k, file in enumerate(files, 1):
        ...         _ = tg.run(pipeline, batches, shard=f"{k}/2", state=file)
        ...     merged = tg.merge_states(files, pipeline)
        >>> float(merged["spectrum", "d_pr"]) == float(tg.run(pipeline, batches)["spectrum", "d_pr"])
        True
    """
    parts = read_parts(files)
    about = parts[0].record["about"].get(ANALYSIS)
    if pipeline is None and about is None:
        raise ValueError(
            f"merge_states: {parts[0].path} was written by run, which does not know the end of its pipeline: give pipeline=, the "
            f"one of then or its stages from the streaming ones on."
        )
    if pipeline is not None:
        return _merged(parts, pipeline, keep, partial)
    if keep is not None:
        raise ValueError("merge_states: keep= is for results of run; an analysis keeps what its tables read.")
    return _analysis(parts, settings, partial)


def _merged(
    parts: Sequence[Part], pipeline: TensorDictModuleBase, keep: Sequence[str] | None, partial: bool
) -> TensorDict:
    plan = make_plan(pipeline)
    told = added_up(parts, plan, partial=partial)
    with gathered():
        found = ended(plan, told["counts"], None, None)
    missing = f", without {told['missing']}" if told["missing"] else ""
    account = {**told, "loader": f"{len(parts)} jobs{missing}", "data_sha256": ""}
    return kept_of(found, plan, account, pipeline, keep)


# ------------------------------------------------------------------------------------------------ of an analysis


def _analysis(parts: Sequence[Part], given: AnalysisSettings | None, partial: bool) -> AnalysisResults:
    """The tables of all passes, from the files of each."""
    first = parts[0].record
    about = first["about"][ANALYSIS]
    settings, stacks = settings_of(about, given), about["stacks"]
    described = Described(about["name"], {name: int(depth) for name, depth in about["depths"]}, about["unit"])
    found = Passes([], [], {})
    for stack in stacks:
        own = (
            parts if stack == stacks[0] else read_parts([file_of_stack(p.path, stack, stacks) for p in parts])
        )
        asked = own[0].record["about"][ANALYSIS]
        sites = [named_site(name) for name in asked["sites"]]
        pipeline = analysis_pipeline(
            None,
            sites,
            settings,
            routers=asked["routers"],
            router_top_k=asked["router_top_k"],
            documents="document_id" in str(own[0].record["stream_stages"]),
        )
        with gathered() as told:
            result = _merged(own, pipeline, kept_roots(pipeline, settings), partial)
        found.said += told.texts()
        found.add(stack, sites, pipeline, result, settings, described)
    metadata = with_run(first["beside"]["metadata"], [one.result for one in found.passes], settings)
    return found.results(settings, {**metadata, "merged_from": [part.path.name for part in parts]})
