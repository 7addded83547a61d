"""Keeping activations and runs: shards in a folder, a catalogue beside them."""

from tdgeom.store.errors import StoreBusyError, StoreError, StoreLookupError
from tdgeom.store.store import ActivationStore

__all__ = ["ActivationStore", "StoreBusyError", "StoreError", "StoreLookupError"]
