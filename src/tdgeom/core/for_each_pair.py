"""``ForEachPair``: one stage at many pairs of sites, each site prepared once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch, set_skip_existing, skip_existing
from torch import nn

from tdgeom.core.devices import with_float64
from tdgeom.core.for_each import (
    SHARED,
    check_module,
    check_shared_outputs,
    copied,
    is_shared,
    named_sites,
    shared_by,
)
from tdgeom.core.keys import Key, as_key, key_tuple
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.renamed import Renamed, is_streaming
from tdgeom.core.stage import device_of
from tdgeom.core.stage_settings import Configured
from tdgeom.core.surroundings import steady
from tdgeom.core.warnings import tell
from tdgeom.core.wrong_objects import site_list

__all__ = ["ForEachPair", "pair_list"]


def pair_list(
    sites: Sequence[str], pairs: str | Sequence[tuple[str, str]] | Sequence[Sequence[str]] = "consecutive"
) -> list[tuple[str, str]]:
    """The pairs that ``pairs=`` means, as (a, b) tuples of site names.

    ``"consecutive"`` joins neighbours in the order given, within one kind and one stack. A hidden state that is alone of its
    kind there (``embed``, ``final_norm``, a last ``residual_output``) is joined to the hidden state before it, the first of
    all to the one behind; any other site that is left without a pair is named in a warning. ``"all"`` joins every two sites
    once; a list is taken as it is and must name given sites.

        >>> pair_list(["mlp_output.0", "residual_output.0", "mlp_output.1", "residual_output.1"])
        [('mlp_output.0', 'mlp_output.1'), ('residual_output.0', 'residual_output.1')]
        >>> pair_list(["attn_input.0", "attn_input.1", "final_norm"])
        [('attn_input.0', 'attn_input.1'), ('attn_input.1', 'final_norm')]
    """
    names = [str(site) for site in sites]
    if pairs == "all":
        return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    if pairs == "consecutive":
        return _consecutive(sites, names)
    if isinstance(pairs, str):
        raise ValueError(f"pairs= takes 'consecutive', 'all' or a list of (a, b), got {pairs!r}.")
    listed = list(pairs) if isinstance(pairs, Iterable) else [pairs]
    wrong = [
        pair for pair in listed if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2
    ]
    if wrong:
        meant = (
            tuple(wrong[0].split("->"))
            if isinstance(wrong[0], str) and wrong[0].count("->") == 1
            else ("a", "b")
        )
        raise TypeError(
            f"pairs= takes 'consecutive', 'all' or a list of (a, b), got {wrong[0]!r:.80}. Write pairs=[{meant!r}]."
        )
    found = [(str(a), str(b)) for a, b in listed]
    unknown = sorted({name for pair in found for name in pair} - set(names))
    if unknown:
        raise ValueError(f"pairs= names {unknown}, which are not among the sites {names}.")
    return found


def _consecutive(sites: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    members = Counter(_family(site) for site in sites)
    last: dict[object, str] = {}
    last_state: dict[
        str, tuple[str, bool]
    ] = {}  # of a stack: its latest hidden state, and whether it awaits the next
    found: dict[tuple[str, str], None] = {}
    for site, name in zip(sites, names):
        family, state = _family(site), _STATE.fullmatch(name)
        if family in last:
            found[last[family], name] = None
        last[family] = name
        if state:
            alone, before = members[family] == 1, last_state.get(state["stack"])
            if before is not None and (alone or before[1]):
                found[before[0], name] = None
            last_state[state["stack"]] = (name, alone and before is None)
    joined = {name for pair in found for name in pair}
    left_out = [name for name in names if name not in joined]
    if left_out and found:
        tell(
            f"pairs='consecutive' joins neighbours of one kind and one stack, which leaves out {left_out}: in no pair. "
            f"Name the pairs that are meant, pairs=[(a, b), ...], or pairs='all'.",
            UserWarning,
        )
    return list(found)


# what a block hands on, as such or normalised: sites of these kinds are steps of one chain
_STATE = re.compile(
    r"(?P<stack>(?:.*/)?(?:[^/:]+\.)?)"
    r"(?:embed|residual_input|residual_mid|residual_output|attn_input|final_norm)(?:\.-?\d+)?"
)


def _family(site: str) -> object:
    """What consecutive sites share: a Site's prefix, stack and kind; of a plain name all but its last number."""
    if hasattr(site, "kind"):
        return (getattr(site, "prefix", None), getattr(site, "stack", None), site.kind)
    match = re.fullmatch(r"(.*)\.\d+", str(site))
    if match is None:  # a hidden state outside of the blocks is of its own kind
        return str(site) if _STATE.fullmatch(str(site)) else None
    return match.group(1)


def at_pair(key: Key, a: tuple[str, ...], b: tuple[str, ...], pair: str) -> Key:
    """``("sample", "a")`` -> ``("sample", a)``; any other key gets ``"a->b"`` after its first element."""
    first, *rest = key_tuple(key)
    if rest and rest[0] in ("a", "b"):
        return as_key((first, *(a if rest[0] == "a" else b), *rest[1:]))
    return (first, pair, *rest)


class ForEachPair(Configured, TensorDictModuleBase):
    """The same pair stage at many pairs of sites, each site prepared once.

    ``("sample", "a")`` and ``("sample", "b")`` become the keys of the two sites; every other key that is not shared
    gets ``"a->b"`` after its first element, so ``("between", "linear_cka")`` is written at
    ``("between", "a->b", "linear_cka")``.

    Args:
        stage: a ``PairStage`` (``prepare`` runs once a site, ``compare`` once a pair; called whole, once a pair, where it
            overrides ``compute`` or ``forward``, has hooks or holds state), or any TensorDict module whose in_keys carry "a" or
            "b" second (called once a pair). It is copied.
        sites: names, such as ``capture.sites``.
        pairs: "consecutive" (within one kind and one stack, see ``pair_list``), "all", or a list of (a, b).
        shared: keys, or roots of keys, that all pairs read as they are.

    Raises:
        ValueError: no pairs (with the remedy), or a shared output. TypeError: a streaming stage, or no pair keys.

        >>> import torch, tdgeom as tg
        >>> cosine = tg.ForEachPair(tg.LayerCosine(), ["x", "y"])
        >>> cosine.out_keys
        [('between', 'x->y', 'layer_cosine_sim')]
    """

    units: Any  # a Renamed a pair

    def __init__(
        self,
        stage: TensorDictModuleBase,
        sites: Iterable[Any],
        *,
        pairs: str | Sequence[tuple[str, str]] = "consecutive",
        shared: Iterable[Key] = SHARED,
    ) -> None:
        super().__init__()
        _check_sides(stage)
        sites = [sites] if isinstance(sites, str) else site_list("ForEachPair", sites)
        parts = named_sites(dict.fromkeys(sites))
        names = [name if isinstance(site, tuple) else site for name, site in zip(parts, dict.fromkeys(sites))]
        self.pairs = pair_list(names, pairs)
        if not self.pairs:
            raise ValueError(
                f"ForEachPair: no two of the sites {[str(site) for site in sites]} make a pair under pairs={pairs!r}. "
                f"Give more sites of one kind, pairs='all', or a list of (a, b)."
            )
        if len(set(self.pairs)) != len(self.pairs):
            raise ValueError(f"ForEachPair: pairs= names a pair twice: {self.pairs}.")
        keep = shared_by(stage, tuple(shared))
        check_shared_outputs(stage, keep, "ForEachPair")
        self.one = copied(stage, "ForEachPair") if _splits(stage) else None
        self.units = nn.ModuleList(
            Renamed(self.one or copied(stage, "ForEachPair"), _renamer(a, b, parts, keep), f"{a}->{b}")
            for a, b in self.pairs
        )
        self.in_keys = list(dict.fromkeys(key for unit in self.units for key in unit.in_keys))
        needed = {key for unit in self.units for key in unit.in_keys if key not in unit.optional_in_keys}
        self.optional_in_keys = [key for key in self.in_keys if key not in needed]
        self.out_keys = [key for unit in self.units for key in unit.out_keys]

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(
        self, tensordict: TensorDictBase, tensordict_out: TensorDictBase | None = None
    ) -> TensorDictBase:
        """Prepare each site once, compare each pair, write ``out_keys``."""
        out = tensordict if tensordict_out is None else tensordict_out
        # asked at every call: a hook may have come since
        alike = all(unit.module is self.one and not _hooked(unit) for unit in self.units)
        if self.one is not None and alike and _splits(self.one) and not skip_existing():
            self._prepare_and_compare(self.one, tensordict, out)
        else:
            for unit in self.units:
                unit(tensordict, tensordict_out=out)
        return out

    def _prepare_and_compare(self, stage: Any, tensordict: TensorDictBase, out: TensorDictBase) -> None:
        side_a, side_b, rest = stage.sides()
        last_use = {site: index for index, pair in enumerate(self.pairs) for site in pair}
        # Both sides usually read the same keys, and then one preparation serves a site on either side.
        a_keys, b_keys = (
            [key_tuple(stage.in_keys[i])[0::2] for i in side if i < len(stage.in_keys)]
            for side in (side_a, side_b)
        )
        number_b = 0 if a_keys == b_keys else 1
        prepared: dict[tuple[str, int], object] = {}
        for index, (unit, (a, b)) in enumerate(zip(self.units, self.pairs)):
            inputs = [with_float64(x) for x in unit.located(stage.read, unit.inward(tensordict))]
            with steady(device_of(inputs)):
                for site, side, number in ((a, side_a, 0), (b, side_b, number_b)):
                    if (site, number) not in prepared:
                        prepared[site, number] = unit.located(stage.prepare, *(inputs[i] for i in side))
                sides = prepared[a, 0], prepared[b, number_b]
                outputs = unit.located(stage.compare, *sides, *(inputs[i] for i in rest))
            unit.outward(stage.write(tensordict.empty(), outputs), out)
            for site in {a, b}:
                if last_use[site] == index:
                    prepared = {key: value for key, value in prepared.items() if key[0] != site}


def _renamer(
    a: str, b: str, parts: dict[str, tuple[str, ...]], shared: frozenset[tuple[str, ...]]
) -> Callable[[Key], Key]:
    return lambda key: (
        as_key(key_tuple(key)) if is_shared(key, shared) else at_pair(key, parts[a], parts[b], f"{a}->{b}")
    )


def _splits(stage: TensorDictModuleBase) -> bool:
    """Whether ``prepare`` and ``compare`` by themselves are all that calling the stage does."""
    if not isinstance(stage, PairStage):
        return False
    names = ("__call__", "forward", "with_named", "read", "computed", "compute", "listed", "write")
    own = any(
        name in stage.__dict__ or getattr(type(stage), name) is not getattr(PairStage, name) for name in names
    )
    holds = any(True for _ in (*stage.buffers(), *stage.parameters()))
    side_a, side_b, _ = stage.sides()
    keys = [
        (key_tuple(stage.in_roles[i]), key_tuple(stage.in_keys[i]))
        for i in (*side_a, *side_b)
        if i < len(stage.in_keys)
    ]
    swapped = any(role[1:2] != key[1:2] for role, key in keys)
    return not (own or holds or swapped or _hooked(stage))


def _hooked(module: nn.Module) -> bool:
    """Whether hooks act around a call; what ``select_out_keys`` hooks in is honoured without one."""
    own = [hook for hook in module._forward_hooks.values() if not hasattr(hook, "out_keys")]
    return bool(own or module._forward_pre_hooks)


def _check_sides(stage: TensorDictModuleBase) -> None:
    check_module(stage, "ForEachPair")
    name = type(stage).__name__
    if is_streaming(stage):
        raise TypeError(
            f"ForEachPair takes a stage that reads finished sites; {name} streams. A stream over pairs is one stage, "
            f"such as StreamingCrossMoments(sites, pairs=...)."
        )
    keys = [key_tuple(key) for key in stage.in_keys]
    if {key[1] for key in keys if len(key) > 1} & {"a", "b"} != {"a", "b"}:
        raise TypeError(
            f"ForEachPair takes a stage whose in_keys carry their side second, such as ('sample', 'a') and "
            f"('sample', 'b'); {name} reads {stage.in_keys}. For one site at a time use ForEach."
        )
