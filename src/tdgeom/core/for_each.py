"""``ForEach``: one stage at many sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdgeom.core.keys import NOT_WRITTEN, Key, as_key, key_tuple, site_key
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.pipeline import Pipeline, opened, why_closed
from tdgeom.core.renamed import Renamed, RenamedStream, is_streaming
from tdgeom.core.stage_settings import Configured
from tdgeom.core.wrong_objects import refuse_class, site_list

__all__ = ["SHARED", "ForEach", "check_module", "check_shared_outputs", "copied", "named_sites", "shared_by"]

SHARED: tuple[Key, ...] = ("row_id", "sample_row_id", "attention_mask", "carried", "sample_carried")


class ForEach(Configured, Pipeline):
    """The same stage at every site: a ``TensorDictSequential`` of one renamed stage a site.

    The site is put after the first element of every key: ``"tokens"`` becomes ``("tokens", site)`` and
    ``("moments", "mean")`` becomes ``("moments", site, "mean")``; keys whose root is in ``shared`` stay. The stage is copied for
    each site (a model that it holds is shared by the copies); the stage given stays untouched. ``ForEach`` of a sequence is the
    sequence of ``ForEach`` of its parts; a sequence that is more than its parts (hooks, selected keys) is one stage.

    Args:
        stage: any TensorDict module, or a ``TensorDictSequential`` of them; also a ``ForEach`` (models x sites).
        sites: names, such as ``capture.sites``; numbers, or tuples of names, which are levels of the key.
        shared: keys, or roots of keys, that all sites read as they are (beside those that the stage itself declares).

    Slices, ``select_subsequence`` and iteration reach each site's stage.

    Raises:
        ValueError: no sites, a site named twice, or a shared output. TypeError: not a TensorDict module.

        >>> import torch, tdgeom as tg
        >>> both = tg.ForEach(tg.StreamingMean(), ["x", "y"])
        >>> both.in_keys
        [('tokens', 'x'), ('tokens', 'y')]
    """

    cut_into = Pipeline  # what a part of it is

    def __init__(
        self,
        stage: TensorDictModuleBase,
        sites: Iterable[str | int | tuple[str | int, ...]],
        *,
        shared: Iterable[Key] = SHARED,
    ) -> None:
        check_module(stage, "ForEach")
        given = tuple(shared)
        names = named_sites(sites)
        if not names:
            raise ValueError(f"ForEach takes a non-empty list of different sites, got {list(names)}.")
        units: list[Renamed] = []
        for part in opened(stage):
            _check_part(part)
            keep = shared_by(part, given)
            check_shared_outputs(part, keep, "ForEach")
            kind = RenamedStream if is_streaming(part) else Renamed
            units += [
                kind(copied(part, "ForEach"), _renamer(site, keep), name) for name, site in names.items()
            ]
        super().__init__(*units)

    def __getitem__(self, index: int | slice | str) -> Any:
        """A site's stage, or a plain pipeline of several."""
        held: Any = self.module
        return Pipeline(*list(held)[index]) if isinstance(index, slice) else held[index]


def at_site(key: Key, site: tuple[str, ...]) -> Key:
    """``"tokens"`` -> ``("tokens", site)``; ``("moments", "mean")`` -> ``("moments", site, "mean")``."""
    first, *rest = key_tuple(key)
    return (first, *site, *rest)


def _renamer(site: tuple[str, ...], shared: frozenset[tuple[str, ...]]) -> Callable[[Key], Key]:
    return lambda key: as_key(key_tuple(key)) if is_shared(key, shared) else at_site(key, site)


def named_sites(sites: Iterable[Any]) -> dict[str, tuple[str, ...]]:
    """Sites by the name they have in messages and pairs, each as its part of a key; one named twice is refused."""
    listed = [sites] if isinstance(sites, str) else site_list("ForEach", sites)
    names = {"/".join(site_key(site)): site_key(site) for site in listed}
    if len(names) != len(listed):
        raise ValueError(
            f"ForEach takes a non-empty list of different sites, got {[str(site) for site in listed]}."
        )
    return names


def is_shared(key: Key, shared: frozenset[tuple[str, ...]]) -> bool:
    """Whether a key, or one of its roots, is shared by all sites."""
    parts = key_tuple(key)
    return parts == (NOT_WRITTEN,) or any(parts[:n] in shared for n in range(1, len(parts) + 1))


def shared_by(stage: object, shared: Iterable[Key]) -> frozenset[tuple[str, ...]]:
    """The keys and roots that all sites read as they are: those given, and those that the stage declares."""
    return frozenset(key_tuple(key) for key in (*shared, *getattr(stage, "shared", ())))


def copied(stage: TensorDictModuleBase, owner: str) -> TensorDictModuleBase:
    """A copy for one site, whatever state it keeps: in buffers or in plain attributes."""
    if "forward" in stage.__dict__:
        raise TypeError(
            f"{owner} copies the stage for every site, and {type(stage).__name__} was given a forward of this one object, which "
            f"its copies would still call. Override forward() in a subclass."
        )
    try:
        return deepcopy(stage)
    except Exception as error:
        raise TypeError(
            f"{owner} copies the stage for every site, and {type(stage).__name__} cannot be copied: {error!r}. "
            f"Give it a __deepcopy__, or make one stage a site yourself with in_keys= and out_keys=."
        ) from error


def check_module(stage: object, owner: str) -> None:
    """A TensorDict module, or an error."""
    refuse_class(owner, stage)
    if not isinstance(stage, nn.Module) or not TensorDictModuleBase.is_tdmodule_compatible(stage):
        raise TypeError(
            f"{owner} takes a TensorDict module (with in_keys and out_keys), got {type(stage).__name__}. Wrap a function "
            f"in TensorDictModule(function, in_keys=[...], out_keys=[...]) or write a tg.Stage."
        )


def check_shared_outputs(stage: TensorDictModuleBase, shared: frozenset[tuple[str, ...]], owner: str) -> None:
    """An output that all sites would write to one key is refused."""
    clash = [key for key in stage.out_keys if key != NOT_WRITTEN and is_shared(key, shared)]
    if clash:
        raise ValueError(
            f"{owner}: {type(stage).__name__} writes {clash}, which is shared, so every site would write the same key. "
            f"Rename the output, or take it out of shared=."
        )


def _check_part(part: nn.Module) -> None:
    check_module(part, "ForEach")
    if hasattr(part, "pairs"):
        raise TypeError("ForEach takes a stage of one site; ForEachPair already runs over pairs of sites.")
    if isinstance(part, PairStage):
        raise TypeError(
            f"ForEach takes a stage of one site; {type(part).__name__} compares two: use ForEachPair(stage, sites)."
        )
    if isinstance(part, TensorDictSequential) and any(is_streaming(module) for module in part.modules()):
        raise TypeError(
            f"ForEach cannot open this {type(part).__name__} to reach its streaming stages: {why_closed(part)}. Put that on the "
            f"ForEach, or on a sequence without streaming stages."
        )
