"""What the store raises, and nothing else: a damaged or hostile file never surfaces as another error."""

from __future__ import annotations

from tdgeom.core.visible_text import visible

__all__ = ["StoreBusyError", "StoreError", "StoreLookupError"]


class StoreError(RuntimeError):
    """The store refuses: a damaged file, a full disk, a folder that is gone. The message says what to do.

    What it quotes of a file is shown as text.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(visible(message))


class StoreBusyError(StoreError):
    """Another process (or another stage of this one) is writing the run."""


class StoreLookupError(StoreError, LookupError):
    """No run, or more than one, answers to the name given."""
