"""What was found out about a model by running it, kept with the model and not with who asked."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_FOUND: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()


def verified(model: nn.Module) -> dict[Hashable, Any]:
    """The facts found about a model so far, to read and to add to; gone with the model, and none for a copy of it.

    >>> layer = nn.Linear(2, 2)
    >>> verified(layer)["positions count from zero"] = True
    >>> verified(layer)
    {'positions count from zero': True}
    """
    return _FOUND.setdefault(model, {})
