"""Under which keys a Capture writes what it reads."""

from __future__ import annotations

from collections.abc import Sequence

from tdgeom.core.keys import Key, key_tuple
from tdgeom.model.sites import Site, split_element


def name_leaves(
    out_keys: Key | list[Key],
    sites: Sequence[Site],
    outputs: Sequence[Key],
    *,
    nested: bool,
    asked: int,
) -> list[Key]:
    """A key for every site and each of the model's ``outputs``: below one root, or as they are listed.

    ``asked`` is how many of the sites were asked for: the others came along, and are spoken of nowhere.

    >>> name_leaves("acts", [Site("residual_input.0"), Site("module_output:h.0.mlp")], ["logits"], nested=True, asked=2)
    [('acts', 'residual_input.0'), ('acts', 'h', '0', 'mlp'), 'logits']
    """
    if isinstance(out_keys, str | tuple):
        root = key_tuple(out_keys)
        return [*((*root, *_parts(site, nested)) for site in sites), *outputs]
    if len(out_keys) != len(sites) + len(outputs):
        raise ValueError(
            f"out_keys= expected {asked + len(outputs)} keys, for "
            f"{[*map(str, sites[:asked]), *outputs]}, got {len(out_keys)}. Remedy: give one root key "
            "instead of a list."
        )
    return list(out_keys)


def prefixed(names: Sequence[Key], prefix: str) -> list[Key]:
    """Keys with a prefix before their first part.

    >>> prefixed(["logits", ("vision", "logits")], "b/")
    ['b/logits', ('b/vision', 'logits')]
    """
    return [(prefix + name[0], *name[1:]) if isinstance(name, tuple) else prefix + name for name in names]


def _parts(site: Site, nested: bool) -> tuple[str, ...]:
    if not nested or site.path is None:
        return (str(site),)
    head, side = site.prefix.rstrip("/"), "input" if site.kind == "module_input" else ""
    path, element = split_element(site.path)
    return tuple(part for part in (head, *path.split("."), *map(str, element or ()), side) if part)
