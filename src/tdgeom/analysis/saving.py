"""The end of an analysis: saved, or handed to the caller inside the error that says why not."""

from __future__ import annotations

from pathlib import Path

from tdgeom.analysis.results import AnalysisResults

__all__ = ["NotSavedError", "save_or_hand_over"]


class NotSavedError(OSError):
    """An analysis was measured and could not be saved.

    Attributes:
        results: what was measured, whole; ``error.results.save(FOLDER)`` saves it elsewhere.
        folder: where it should have gone.
    """

    def __init__(self, results: AnalysisResults, folder: Path, cause: BaseException, kept: str) -> None:
        at = getattr(cause, "filename", None)
        where = "" if at is None or str(at) in str(cause) else f" (at {at})"
        super().__init__(
            f"the analysis is measured; saving it in {folder} failed: {type(cause).__name__}: {cause}{where}. The results are "
            f"in this error: except tg.NotSavedError as error: error.results.save(ANOTHER_FOLDER).{kept}"
        )
        self.results, self.folder = results, folder


def save_or_hand_over(
    results: AnalysisResults, folder: Path, mode: str, overwrite: bool, checkpoint: str | Path | None = None
) -> None:
    """Save results; where that fails, raise an error that carries them.

    Raises:
        NotSavedError: the folder could not be written.
    """
    try:
        results.save(folder, mode, overwrite=overwrite)
    except Exception as error:
        kept = f" The checkpoint {checkpoint} is kept: the same call ends quickly." if checkpoint else ""
        raise NotSavedError(results, folder, error, kept) from error
