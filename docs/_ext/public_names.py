"""The names of the API reference: those of ``tdgeom.__all__``, and modules that users are sent to beside them."""

from __future__ import annotations

import types
from collections.abc import Iterator
from importlib import import_module

import tdgeom

# module -> names, None for its __all__: what messages, docstrings and guides tell users to write
FURTHER: dict[str, tuple[str, ...] | None] = {
    "text": None,
    "demo": None,
    "measures.registry": ("known_measures", "NamedMeasure", "MEASURES", "SITE_MEASURES", "ALIASES"),
    "model.positions": ("VOCABULARY", "position_mask", "partition"),
    "model.guessed_sites": ("SAME", "OTHERS"),
    "store.query": ("condition",),
}


def modules() -> dict[str, tuple[types.ModuleType, tuple[str, ...]]]:
    """Modules with a chapter of their own, by the name that users write, and their names in order."""
    public = {name: getattr(tdgeom, name) for name in tdgeom.__all__ if not name.startswith("__")}
    found = {
        name: (module, tuple(module.__all__))
        for name, module in public.items()
        if isinstance(module, types.ModuleType)
    }
    for name, listed in FURTHER.items():
        module = import_module(f"tdgeom.{name}")
        found[name] = (module, tuple(module.__all__) if listed is None else listed)
    return found


def documented() -> Iterator[str]:
    """Every name that the reference has an entry for, as users write it behind ``tdgeom.``."""
    yield from (name for name in tdgeom.__all__ if not name.startswith("__"))
    for name, (_, listed) in modules().items():
        yield name
        yield from (f"{name}.{one}" for one in listed)
