"""Sequences of stages: opened where that changes nothing, selected from with optional inputs in mind, merged and reset.

A pipeline is a plain ``TensorDictSequential``. What TensorDict's own class does not know about it, optional inputs, is told to
it here; ``Pipeline`` is the same sequence with a streaming stage's ``merge_``, ``reset`` and ``sync_``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from tensordict import LazyStackedTensorDict, TensorDictBase, unravel_key_list
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.keys import Key, key_tuple, optional_in_keys, touches
from tdgeom.core.renamed import describe, is_streaming
from tdgeom.core.stage import Stage

__all__ = ["Pipeline", "merge_", "opened", "parts_of", "reset", "streams_of", "sync_", "why_closed"]


def parts_of(sequence: TensorDictSequential) -> list[TensorDictModuleBase]:
    """The modules of a sequence in order, named or not."""
    held: Any = sequence.module
    return list(held.values() if isinstance(held, nn.ModuleDict) else held)


def why_closed(sequence: TensorDictSequential, *, but_selection: bool = False) -> str | None:
    """Why a sequence is more than its parts one after the other; None where it is just that.

    ``but_selection`` leaves aside what ``select_out_keys`` has chosen, for a caller that honours it.
    """
    kind = type(sequence)
    for name in ("forward", "__call__", "_run_module"):
        if name in sequence.__dict__ or getattr(kind, name) is not getattr(TensorDictSequential, name):
            return f"it overrides {name}()"
    if sequence._forward_hooks or sequence._forward_pre_hooks:
        return "it has forward hooks"
    if not but_selection and set(sequence.out_keys) != set(sequence.out_keys_source):
        return f"select_out_keys left {sequence.out_keys[:4]}"
    if sequence.inplace is not None and sequence.inplace is not True:
        return f"it writes elsewhere (inplace={sequence.inplace!r})"
    return "partial_tolerant=True skips parts" if sequence.partial_tolerant else None


def opened(module: Any) -> Iterator[TensorDictModuleBase]:
    """The parts of a module in order, sequences opened unless they are more than their parts."""
    if isinstance(module, TensorDictSequential) and why_closed(module) is None:
        for part in parts_of(module):
            yield from opened(part)
    else:
        yield module


def streams_of(module: nn.Module) -> list[Any]:
    """The streaming stages of a pipeline in order, wherever they stand in it."""
    if is_streaming(module):
        return [module]
    return [stream for child in module.children() for stream in streams_of(child)]


@answer_guesses
def merge_(pipeline: nn.Module, other: nn.Module) -> nn.Module:
    """Add the streaming state of another pipeline of the same stages, which saw other rows.

    >>> import torch, tdgeom as tg
    >>> a, b = tg.Pipeline(tg.StreamingMean()), tg.Pipeline(tg.StreamingMean())
    >>> _ = a(tokens=torch.ones(2, 1)), b(tokens=torch.zeros(2, 1))
    >>> float(tg.merge_(a, b)[0].centre)
    0.5
    """
    own, theirs = streams_of(pipeline), streams_of(other)
    if len(own) != len(theirs):
        raise ValueError(
            f"merge_ adds up the same pipeline: this one has {len(own)} streaming stages, the other {len(theirs)}."
        )
    for mine, another in zip(own, theirs):
        mine.refuse_unlike(another)  # all before any: what is refused has changed nothing
    for mine, another in zip(own, theirs):
        mine.merge_(another)
    return pipeline


@answer_guesses
def reset(pipeline: nn.Module) -> None:
    """Forget every row, and count sequences from 0 again."""
    for part in pipeline.modules():
        forget: Any = getattr(part, "reset", None)
        if isinstance(part, Stage) and forget is not None:
            forget()


@answer_guesses
def sync_(pipeline: nn.Module) -> None:
    """Merge the states of all ranks into rank 0; the others become empty. Collective."""
    for stream in streams_of(pipeline):
        stream.sync_()


class Pipeline(TensorDictSequential):
    """A ``TensorDictSequential`` with a streaming stage's ``merge_``, ``reset`` and ``sync_``.

    ``run`` takes any ``TensorDictSequential``; this one is for those who call a pipeline batch by batch themselves. The three
    also stand alone (``tg.merge_(pipeline, other)``) for a plain sequence.
    """

    def merge_(self, other: nn.Module) -> Pipeline:
        """Add the streaming state of another pipeline of the same stages."""
        merge_(self, other)
        return self

    def reset(self) -> None:
        """Forget every row, and count sequences from 0 again."""
        reset(self)

    def sync_(self) -> None:
        """Merge the states of all ranks into rank 0. Collective."""
        sync_(self)


# ------------------------------------------------------------------------------------------ optional inputs


def _select(sequence: Any, given: list[Key] | None, wanted: list[Key] | None) -> TensorDictSequential | None:
    """The parts that can run from ``given`` and that ``wanted`` needs (None: no such filter); both lists grow on the way."""
    names = list(sequence.module) if isinstance(sequence.module, nn.ModuleDict) else None
    kept: list[tuple[int, Any]] = []
    part: Any
    for number, part in enumerate(parts_of(sequence)):
        if _transparent(part):
            part = _select(part, given, None) if given is not None else part
        elif given is not None:
            optional = set(optional_in_keys(part))
            part = part if all(_among(key, given) for key in part.in_keys if key not in optional) else None
            if part is not None:
                given.extend(part.out_keys)
        if part is not None:
            kept.append((number, part))
    if wanted is not None:
        needed = []
        for number, part in reversed(kept):
            if _transparent(part):
                part = _select(part, None, wanted)
            elif any(_among(key, wanted) for key in part.out_keys):
                wanted.extend(part.in_keys)
            else:
                part = None
            if part is not None:
                needed.append((number, part))
        kept = needed[::-1]
    if not kept:
        return None
    kind = getattr(sequence, "cut_into", type(sequence))
    made = (
        kind(OrderedDict((names[n], part) for n, part in kept))
        if names
        else kind(*(part for _, part in kept))
    )
    made.partial_tolerant, made.inplace = sequence.partial_tolerant, sequence.inplace
    return made


def _transparent(part: Any) -> bool:
    cut = type(part) is TensorDictSequential or isinstance(part, Pipeline)
    return cut and why_closed(part) is None


def _among(key: Key, keys: Iterable[Key]) -> bool:
    return any(touches(key_tuple(key), key_tuple(other)) for other in keys)


def _knows_optional(module: nn.Module) -> bool:
    return any(
        isinstance(part, Pipeline) or getattr(part, "optional_in_keys", None) for part in module.modules()
    )


_select_subsequence = TensorDictSequential.select_subsequence
_run_module = TensorDictSequential._run_module


def _selected(
    self: TensorDictSequential, in_keys: Iterable[Key] | None = None, out_keys: Iterable[Key] | None = None
) -> TensorDictSequential:
    """``TensorDictSequential.select_subsequence``, where a stage's optional inputs need not be among ``in_keys``."""
    if not _knows_optional(self):
        return _select_subsequence(self, in_keys, out_keys)
    given = unravel_key_list(list(self.in_keys if in_keys is None else in_keys))
    wanted = unravel_key_list(list(self.out_keys if out_keys is None else out_keys))
    found = _select(self, given, wanted)
    if found is None:
        raise ValueError(
            f"no stage of {describe(self)} runs from in_keys={given[:6]} towards out_keys={wanted[:6]}. Do they belong to it?"
        )
    return found


def _tolerant(self: TensorDictSequential, module: Any, tensordict: TensorDictBase, **kwargs: Any) -> Any:
    """``TensorDictSequential``'s own, where a missing optional input skips no stage under ``partial_tolerant``."""
    optional = set(optional_in_keys(module)) if self.partial_tolerant else set()
    if not optional or isinstance(tensordict, LazyStackedTensorDict):
        return _run_module(self, module, tensordict, **kwargs)
    have = tensordict.keys(include_nested=True)
    needed = (key for key in module.in_keys if key not in optional)
    return module(tensordict, **kwargs) if all(key in have for key in needed) else tensordict


# TensorDict has no word for an optional input yet: a plain sequence would leave out every stage that has one. Sequences without
# our stages in them go to its own methods.
setattr(TensorDictSequential, "select_subsequence", _selected)  # noqa: B010  # mypy knows no other way to replace a method
setattr(TensorDictSequential, "_run_module", _tolerant)  # noqa: B010
