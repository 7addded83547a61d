"""``ForEach`` and ``ForEachPair``: one stage at many sites, by renaming its keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential, dispatch
from torch import nn

from tdgeom.core.keys import Key, as_key, key_tuple
from tdgeom.core.stage import PairStage
from tdgeom.core.streaming_stage import StreamingStage

__all__ = ["ForEach", "ForEachPair", "pair_list"]

SHARED: tuple[Key, ...] = ("row_id", "sample_row_id", "attention_mask")


def pair_list(
    sites: Sequence[str], pairs: str | Sequence[tuple[str, str]] | Sequence[Sequence[str]] = "consecutive"
) -> list[tuple[str, str]]:
    """The pairs that ``pairs=`` means, as (a, b) tuples of site names.

    ``"consecutive"`` joins neighbours in the order given, within one kind and one stack; ``"all"`` every two sites
    once; a list is taken as it is and must name given sites.

        >>> pair_list(["mlp_output.0", "residual_output.0", "mlp_output.1", "residual_output.1"])
        [('mlp_output.0', 'mlp_output.1'), ('residual_output.0', 'residual_output.1')]
    """
    names = [str(site) for site in sites]
    if pairs == "all":
        return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    if pairs == "consecutive":
        last: dict[object, str] = {}
        found = []
        for site, name in zip(sites, names):
            family = _family(site)
            if family in last:
                found.append((last[family], name))
            last[family] = name
        return found
    if isinstance(pairs, str):
        raise ValueError(f"pairs= takes 'consecutive', 'all' or a list of (a, b), got {pairs!r}.")
    found = [(str(a), str(b)) for a, b in pairs]
    unknown = sorted({name for pair in found for name in pair} - set(names))
    if unknown:
        raise ValueError(f"pairs= names {unknown}, which are not among the sites {names}.")
    return found


def _family(site: str) -> object:
    """What consecutive sites share: a Site's prefix, stack and kind; of a plain name all but its last number."""
    if hasattr(site, "kind"):
        return (getattr(site, "prefix", None), getattr(site, "stack", None), site.kind)
    match = re.fullmatch(r"(.*)\.\d+", site)
    return match.group(1) if match else None


def at_site(key: Key, site: str) -> Key:
    """``"tokens"`` -> ``("tokens", site)``; ``("moments", "mean")`` -> ``("moments", site, "mean")``."""
    first, *rest = key_tuple(key)
    return (first, str(site), *rest)


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.buffers()) or any(True for _ in module.parameters())


class Renamed(TensorDictModuleBase):
    """A module whose keys are seen under other names; the module itself keeps its own."""

    def __init__(self, module: TensorDictModuleBase, rename: Callable[[Key], Key], where: str) -> None:
        super().__init__()
        self.module = module
        self.where = where
        self.in_keys = [rename(key) for key in module.in_keys]
        self.out_keys = [rename(key) for key in module.out_keys]
        optional = getattr(module, "_optional", [False] * len(self.in_keys))
        self._optional = list(optional[: len(self.in_keys)])

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Call the module on its own names and write what it wrote under the outer ones."""
        return self.outward(self.inner(tensordict), tensordict)

    def inner(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the module returns, under its own names; ``tensordict`` is only read."""
        return self._call(self.module, self._inward(tensordict))  # type: ignore[return-value]

    def _call(self, function: Callable[..., object], *args: object) -> object:
        try:
            return function(*args)
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            if error.args and isinstance(error.args[0], str):
                error.args = (f"{error.args[0]} [at {self.where}]", *error.args[1:])
            raise

    def _inward(self, tensordict: TensorDictBase) -> TensorDict:
        # A stage whose own names are both a tensor and its parent ("tokens", ("tokens", "label")) brings a holder for them.
        holder = getattr(self.module, "holder", TensorDict)
        inner = holder({}, batch_size=tensordict.batch_size)
        for own, outer in zip(self.module.in_keys, self.in_keys):
            value = tensordict.get(outer, None)
            if value is not None:
                inner.set(own, value)
        return inner

    def outward(self, inner: TensorDictBase, tensordict: TensorDictBase) -> TensorDictBase:
        for own, outer in zip(self.module.out_keys, self.out_keys_source):
            tensordict.set(outer, inner.get(own))
        return tensordict


class RenamedStream(Renamed):
    """``Renamed`` around a streaming stage, with a streaming stage's methods."""

    module: StreamingStage

    def update(self, tensordict: TensorDictBase) -> None:
        """Add the rows found under the outer names."""
        self._call(self.module.update, self._inward(tensordict))

    def publish(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the values so far under the outer names."""
        inner = TensorDict({}, batch_size=tensordict.batch_size)
        return self.outward(self._call(self.module.publish, inner), tensordict)

    def merge_(self, other: RenamedStream) -> RenamedStream:
        """Add the state of the same stage at the same site elsewhere."""
        self._call(self.module.merge_, other.module)
        return self

    def reset(self) -> None:
        """Forget every row."""
        self.module.reset()

    def sync_(self) -> None:
        """Merge the states of all ranks into rank 0."""
        self.module.sync_()

    @property
    def is_empty(self) -> bool:
        """True before the first rows."""
        return self.module.is_empty


def _flat(module: nn.Module) -> list[TensorDictModuleBase]:
    return (
        [part for child in module for part in _flat(child)]
        if isinstance(module, TensorDictSequential)
        else [module]
    )


def _check(stage: object, owner: str) -> None:
    if not isinstance(stage, nn.Module) or not TensorDictModuleBase.is_tdmodule_compatible(stage):
        raise TypeError(
            f"{owner} takes a TensorDict module (with in_keys and out_keys), got {type(stage).__name__}. Wrap a function "
            f"in TensorDictModule(function, in_keys=[...], out_keys=[...]) or write a tg.Stage."
        )


def _check_shared_outputs(stage: TensorDictModuleBase, shared: Mapping[Key, Key], owner: str) -> None:
    clash = [key for key in stage.out_keys if as_key(key_tuple(key)) in shared]
    if clash:
        raise ValueError(
            f"{owner}: {type(stage).__name__} writes {clash}, which is shared, so every site would write the same key. "
            f"Rename the output, or take it out of shared=."
        )


class ForEach(TensorDictSequential):
    """The same stage at every site: a ``TensorDictSequential`` of one renamed stage a site.

    The site is put after the first element of every key: ``"tokens"`` becomes ``("tokens", site)`` and
    ``("moments", "mean")`` becomes ``("moments", site, "mean")``; keys in ``shared`` stay. A stage with buffers or
    parameters is copied for each site, any other is shared; the stage given stays untouched. ``ForEach`` of a sequence
    is the sequence of ``ForEach`` of its parts.

    Args:
        stage: any TensorDict module, or a ``TensorDictSequential`` of them.
        sites: names, such as ``capture.sites``.
        shared: keys that all sites read as they are (beside those that the stage itself declares).

    Returns:
        A plain ``TensorDictSequential``, so that ``select_subsequence`` and indexing reach each site's stage.

    Raises:
        ValueError: no sites, a site named twice, or a shared output. TypeError: not a TensorDict module.

        >>> import torch, tdgeom as tg
        >>> both = tg.ForEach(tg.StreamingMean(), ["x", "y"])
        >>> both.in_keys
        [('tokens', 'x'), ('tokens', 'y')]
    """

    def __new__(  # type: ignore[misc]
        cls, stage: TensorDictModuleBase, sites: Sequence[str], *, shared: Iterable[Key] = SHARED
    ) -> TensorDictSequential:
        """Build the sequence; see the class."""
        _check(stage, "ForEach")
        names = [str(site) for site in sites] if not isinstance(sites, str) else [sites]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"ForEach takes a non-empty list of different sites, got {names}.")
        units: list[Renamed] = []
        for part in _flat(stage):
            _check(part, "ForEach")
            if isinstance(part, ForEachPair):
                raise TypeError(
                    "ForEach takes a stage of one site; ForEachPair already runs over pairs of sites."
                )
            if isinstance(part, PairStage):
                raise TypeError(
                    f"ForEach takes a stage of one site; {type(part).__name__} compares two: use ForEachPair(stage, sites)."
                )
            keep = _shared_keys(shared, part)
            _check_shared_outputs(part, keep, "ForEach")
            kind = RenamedStream if isinstance(part, StreamingStage) else Renamed
            for name in names:
                module = deepcopy(part) if _has_state(part) else part
                units.append(
                    kind(module, lambda key, name=name, keep=keep: _unless(keep, at_site, key, name), name)
                )
        return TensorDictSequential(*units)


def _shared_keys(shared: Iterable[Key], stage: object) -> dict[Key, Key]:
    """A stage's own name of every shared key -> the key that all sites read (the same, unless the stage maps it)."""
    declared = getattr(stage, "shared", ())
    own = (
        {key: declared[key] for key in declared}
        if isinstance(declared, Mapping)
        else {key: key for key in declared}
    )
    return {
        as_key(key_tuple(a)): as_key(key_tuple(b)) for a, b in ({key: key for key in shared} | own).items()
    }


def _unless(keep: Mapping[Key, Key], rename: Callable[..., Key], key: Key, *names: str) -> Key:
    key = as_key(key_tuple(key))
    return keep[key] if key in keep else rename(key, *names)


def at_pair(key: Key, a: str, b: str) -> Key:
    """``("sample", "a")`` -> ``("sample", a)``; any other key gets ``"a->b"`` after its first element."""
    first, *rest = key_tuple(key)
    if rest and rest[0] in ("a", "b"):
        return as_key((first, a if rest[0] == "a" else b, *rest[1:]))
    return (first, f"{a}->{b}", *rest)


class ForEachPair(TensorDictModuleBase):
    """The same pair stage at many pairs of sites, each site prepared once.

    ``("sample", "a")`` and ``("sample", "b")`` become the keys of the two sites; every other key that is not shared
    gets ``"a->b"`` after its first element, so ``("between", "linear_cka")`` is written at
    ``("between", "a->b", "linear_cka")``.

    Args:
        stage: a ``PairStage`` (``prepare`` runs once a site, ``compare`` once a pair), or any TensorDict module whose
            in_keys carry "a" or "b" second (called once a pair).
        sites: names, such as ``capture.sites``.
        pairs: "consecutive" (within one kind and one stack), "all", or a list of (a, b).
        shared: keys that all pairs read as they are.

    Raises:
        ValueError: no pairs (with the remedy), or a shared output. TypeError: a streaming stage, or no pair keys.

        >>> import torch, tdgeom as tg
        >>> cosine = tg.ForEachPair(tg.LayerCosine(), ["x", "y"])
        >>> cosine.out_keys
        [('between', 'x->y', 'layer_cosine_sim')]
    """

    def __init__(
        self,
        stage: TensorDictModuleBase,
        sites: Sequence[str],
        *,
        pairs: str | Sequence[tuple[str, str]] = "consecutive",
        shared: Iterable[Key] = SHARED,
    ) -> None:
        super().__init__()
        _check(stage, "ForEachPair")
        name = type(stage).__name__
        if isinstance(stage, StreamingStage):
            raise TypeError(
                f"ForEachPair takes a stage that reads finished sites; {name} streams. A stream over pairs is one stage, "
                f"such as StreamingCrossMoments(sites, pairs=...)."
            )
        keys = [key_tuple(key) for key in stage.in_keys]
        sides = {key[1] for key in keys if len(key) > 1} & {"a", "b"}
        if sides != {"a", "b"}:
            raise TypeError(
                f"ForEachPair takes a stage whose in_keys carry their side second, such as ('sample', 'a') and "
                f"('sample', 'b'); {name} reads {stage.in_keys}. For one site at a time use ForEach."
            )
        self.pairs = pair_list(sites, pairs)
        if not self.pairs:
            raise ValueError(
                f"ForEachPair: no two of the sites {[str(site) for site in sites]} make a pair under pairs={pairs!r}. "
                f"Give more sites of one kind, pairs='all', or a list of (a, b)."
            )
        if len(set(self.pairs)) != len(self.pairs):
            raise ValueError(f"ForEachPair: pairs= names a pair twice: {self.pairs}.")
        self._keep = _shared_keys(shared, stage)
        _check_shared_outputs(stage, self._keep, "ForEachPair")
        self._shares_prepare = isinstance(stage, PairStage) and not _has_state(stage)
        self.module = stage if self._shares_prepare else None
        self.units = nn.ModuleList(
            []
            if self._shares_prepare
            else [
                Renamed(deepcopy(stage) if _has_state(stage) else stage, self._renamer(a, b), f"{a}->{b}")
                for a, b in self.pairs
            ]
        )
        self.in_keys = list(
            dict.fromkeys(self._renamer(a, b)(key) for a, b in self.pairs for key in stage.in_keys)
        )
        self.out_keys = [self._renamer(a, b)(key) for a, b in self.pairs for key in stage.out_keys]

    def _renamer(self, a: str, b: str) -> Callable[[Key], Key]:
        return lambda key: _unless(self._keep, at_pair, key, a, b)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Prepare each site once, compare each pair, write ``out_keys``."""
        for unit in self.units:
            unit(tensordict)
        if self._shares_prepare:
            self._prepare_and_compare(tensordict)
        return tensordict

    def _prepare_and_compare(self, tensordict: TensorDictBase) -> None:
        stage = self.module
        side_a, side_b, rest = stage.sides()
        last_use = {site: index for index, pair in enumerate(self.pairs) for site in pair}
        prepared: dict[tuple[str, int], object] = {}
        for index, (a, b) in enumerate(self.pairs):
            unit = Renamed(stage, self._renamer(a, b), f"{a}->{b}")
            inputs = unit._call(stage.read, unit._inward(tensordict))
            # Both sides usually read the same keys, and then one preparation serves a site on either side.
            same = [key_tuple(stage.in_keys[i])[0::2] for i in side_a] == [
                key_tuple(stage.in_keys[i])[0::2] for i in side_b
            ]
            for site, side, number in ((a, side_a, 0), (b, side_b, 0 if same else 1)):
                if (site, number) not in prepared:
                    prepared[site, number] = unit._call(stage.prepare, *(inputs[i] for i in side))
            sides = prepared[a, 0], prepared[b, 0 if same else 1]
            outputs = stage.listed(unit._call(stage.compare, *sides, *(inputs[i] for i in rest)))
            found: Mapping[Key, object] = dict(zip(stage.out_keys_source, outputs))
            for key in stage.out_keys:
                tensordict.set(self._renamer(a, b)(key), found[key])
            for site in {a, b}:
                if last_use[site] == index:
                    prepared = {key: value for key, value in prepared.items() if key[0] != site}
