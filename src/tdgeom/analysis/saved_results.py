"""Any results kept and read back: an analysis, a comparison, what a run, a patching grid or a probing gave, a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from tensordict import is_tensor_collection

from tdgeom.analysis.packed_tensors import pack, unpack
from tdgeom.analysis.results import AnalysisResults
from tdgeom.core.guessed_names import answer_guesses
from tdgeom.files.bundle import read_bundle, write_bundle
from tdgeom.model.loading import software_versions

__all__ = ["load_results", "save_results"]

TABLE = "table"


@answer_guesses
def save_results(
    results: Any,
    save_dir: str | Path,
    save_mode: str = "bundle",
    *,
    overwrite: bool = False,
) -> Path:
    """Write results into a folder, whole or not at all, from which ``load_results`` reads them anywhere.

    Args:
        results: ``AnalysisResults`` or ``Comparison`` (as their ``save``), a TensorDict (of ``run``, ``activation_patching``,
            ``Probing.result``), or a DataFrame (a profile, ``to_frame``, ``Probing.table``).
        save_dir: the folder to make, or an empty one.
        save_mode: "bundle" or "csv" (tables as CSV), or "json".
        overwrite: replace an earlier bundle there.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is there. TypeError: something else than results.

        >>> import tempfile, torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> rows = TensorDict({("sample", site): torch.rand(50, 4) for site in ("embed", "final_norm")})
        >>> result = tg.ForEach(tg.TwoNN(), ["embed", "final_norm"])(rows)
        >>> folder = save_results(tg.intrinsic_dimension_profile(result), tempfile.mkdtemp())
        >>> load_results(folder)["site"].tolist()
        ['embed', 'final_norm']
    """
    if isinstance(results, AnalysisResults):
        return results.save(save_dir, save_mode, overwrite=overwrite)
    metadata = {"results": type(results).__name__, "software": software_versions(), "save_mode": save_mode}
    if isinstance(results, pd.DataFrame):
        return write_bundle(Path(save_dir), {TABLE: results}, {}, metadata, save_mode, overwrite)
    if not is_tensor_collection(results):
        raise TypeError(
            f"save_results takes AnalysisResults, a TensorDict or a DataFrame, got {type(results).__name__}: give .result or "
            f".table() of a Probing, the table of a profile."
        )
    arrays, words = pack(results)
    told = {**metadata, "words": {"result": words}}
    return write_bundle(Path(save_dir), {}, {"result": arrays}, told, save_mode, overwrite)


@answer_guesses
def load_results(path: str | Path) -> Any:
    """What ``save_results`` or ``results.save`` wrote: ``AnalysisResults``, ``Comparison``, a TensorDict or a DataFrame.

    Raises:
        FileNotFoundError: no bundle there. ValueError: a file is missing or changed, or the schema is newer.
    """
    found = read_bundle(Path(path))
    if set(found.tables) == {TABLE}:
        return found.tables[TABLE]
    if found.tables:
        return AnalysisResults.load(found)
    words = found.metadata.get("words")
    result = unpack(found.arrays["result"], words.get("result") if isinstance(words, dict) else None)
    if result is None:
        raise ValueError(f"{found.folder} holds no results: the bundle is incomplete.")
    return result
