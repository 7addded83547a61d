"""Keeping activations and runs: shards in a folder, a catalogue beside them."""

from tdgeom.store.errors import StoreBusyError, StoreError, StoreLookupError
from tdgeom.store.runs import Runs
from tdgeom.store.stage import StoreActivations
from tdgeom.store.store import ActivationStore

__all__ = ["ActivationStore", "Runs", "StoreActivations", "StoreBusyError", "StoreError", "StoreLookupError"]
