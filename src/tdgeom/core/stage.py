"""The base class of stages: a stage moves keys, its ``compute`` holds the mathematics."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, cast

import torch
from tensordict import TensorDictBase, is_non_tensor
from tensordict.nn import TensorDictModuleBase, dispatch, set_skip_existing
from torch import Tensor

from tdgeom.core.devices import with_float64
from tdgeom.core.keys import NOT_WRITTEN, Key, key_tuple, resolve_keys
from tdgeom.core.missing_parts import as_written, missing_part
from tdgeom.core.stage_settings import Configured
from tdgeom.core.surroundings import steady
from tdgeom.core.words import Words, put, words_of

__all__ = ["Outputs", "Stage", "device_of"]

Outputs: TypeAlias = "Tensor | Sequence[Any] | Mapping[str, Any]"


class Stage(Configured, TensorDictModuleBase):
    """A TensorDict module around a pure function of tensors.

    A stage of one's own names what it reads and writes and holds one function:

        >>> import torch, tdgeom as tg
        >>> class MeanNorm(tg.Stage):
        ...     reads = {"sample": "N D"}
        ...     writes = [("sample_metrics", "mean_norm")]
        ...     def compute(self, sample):
        ...         return sample.norm(dim=-1).mean(-1)
        >>> MeanNorm()(sample=torch.ones(5, 4))
        tensor(2.)

    Class attributes:
        reads: default in_keys. A mapping from key to event shape (``"N D"``: two event dimensions behind any leading
            batch dimensions; a letter that comes twice must have one size) or a plain list of keys.
        writes: default out_keys, a list; the last part of a key is the output's documented name.
        optional: names among ``reads`` that may be absent; ``compute`` then receives None, and ``optional_in_keys`` lists
            their keys.
        shared: keys (or their roots) that stay as they are under ``ForEach``, one value for all sites, beside its own
            ``shared=``.
        takes_complex: whether rows may be complex; elsewhere they are refused, since products would drop a part.
        takes_words: roots of keys among ``reads`` that may hold words (text, None, lists) in place of numbers, which ``compute``
            gets as a ``Words``; elsewhere they are refused.
        one_thread_a_site: ``compute`` may run at several sites at once at the end of a run, each on one thread. Only for
            a ``compute`` that keeps nothing on ``self``; pays where it is one matrix decomposition a site.

    Args:
        in_keys: a list names every leaf read, in the order of ``reads``; a single key stands for a one-element list.
        out_keys: a list names every leaf written, in the order of ``writes``; a single key is the root under which
            the outputs take their documented names (for one output without a root: exactly that key).

    Raises:
        KeyError: an input is missing. ValueError: wrong shape, clashing sizes or a batch size that covers rows.
    """

    reads: ClassVar[Mapping[Key, str | None] | Sequence[Key]] = ()
    writes: ClassVar[Sequence[Key]] = ()
    optional: ClassVar[Collection[str]] = frozenset()
    shared: Collection[Key] = frozenset()
    takes_complex: ClassVar[bool] = False
    two_sided: ClassVar[bool] = False  # whether keys carry the side of a pair second
    takes_words: ClassVar[Collection[str]] = frozenset()
    one_thread_a_site: ClassVar[bool] = False

    shapes: list[str | None]
    in_roles: list[Key]
    optional_in_keys: list[Key]
    out_names: list[str]
    _usual: ClassVar[
        tuple[tuple[Any, ...], dict[str, list[Any]]]
    ]  # of a class: its declared keys, and what they come to

    def __init__(
        self,
        *,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
        reads: Mapping[Key, str | None] | Sequence[Key] | None = None,
        writes: Sequence[Key] | None = None,
        optional: Collection[Key] | None = None,
    ) -> None:
        super().__init__()
        given = (in_keys, out_keys, reads, writes, optional)
        kind, declared = type(self), (type(self).reads, type(self).writes, type(self).optional)
        usual = kind.__dict__.get("_usual") if given == (None,) * 5 else None
        if usual is not None and all(map(operator.is_, usual[0], declared)):
            self._set_plain(**{name: list(keys) for name, keys in usual[1].items()})
            return
        before = set(self.__dict__)
        self._name_keys(*given)
        if given == (None,) * 5:  # what the next one of this class begins with
            made = {name: keys for name, keys in self.__dict__.items() if name not in before}
            if all(isinstance(keys, list) for keys in made.values()):
                kind._usual = declared, {name: list(keys) for name, keys in made.items()}

    def _name_keys(
        self,
        in_keys: Key | list[Key] | None,
        out_keys: Key | list[Key] | None,
        reads: Mapping[Key, str | None] | Sequence[Key] | None,
        writes: Sequence[Key] | None,
        optional: Collection[Key] | None,
    ) -> None:
        owner = type(self).__qualname__
        reads = type(self).reads if reads is None else reads
        writes = type(self).writes if writes is None else writes
        if isinstance(reads, str) or isinstance(writes, str):
            raise TypeError(f"{owner}: reads and writes are lists of keys, got {reads!r} and {writes!r}.")
        shapes: list[str | None] = [None] * len(reads)
        if isinstance(reads, Mapping):
            shapes = list(reads.values())
        roles = list(reads)
        names = type(self).optional
        may_miss = [key_tuple(key)[-1] in names if optional is None else key in optional for key in roles]
        in_keys = resolve_keys(in_keys, roles, what="in_keys", owner=owner)
        required = may_miss.index(True) if True in may_miss else len(roles)
        if not required <= len(in_keys) <= len(roles):
            raise ValueError(
                f"{owner} reads {len(roles)} leaves, in this order: {roles}; in_keys has {in_keys}."
            )
        self.in_keys = cast(Any, in_keys)
        out_names = [key_tuple(key)[-1] for key in writes]
        self._set_plain(
            shapes=shapes[: len(in_keys)],
            in_roles=roles,
            optional_in_keys=[key for key, free in zip(in_keys, may_miss) if free],
            out_names=out_names,
        )
        out_keys = resolve_keys(out_keys, list(writes), what="out_keys", owner=owner)
        if len(out_keys) != len(out_names):
            raise ValueError(
                f"{owner} writes {len(out_names)} leaves, in this order: {out_names}; out_keys has {out_keys}."
            )
        self.out_keys = cast(Any, out_keys)

    def compute(self, *inputs: Any, **options: Any) -> Outputs:
        """The mathematics: tensors in the order of ``reads`` to a tensor, a sequence or a mapping by documented name."""
        raise TypeError(f"{type(self).__name__} defines no compute(): write the stage's function there.")

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(
        self, tensordict: TensorDictBase, tensordict_out: TensorDictBase | None = None, **named: Any
    ) -> TensorDictBase:
        """Read ``in_keys``, call ``compute``, write ``out_keys`` (into ``tensordict_out``, if it is given)."""
        outputs = self.computed(self.read(self.with_named(tensordict, named)))
        return self.write(tensordict if tensordict_out is None else tensordict_out, outputs)

    def computed(self, inputs: Sequence[Any]) -> Outputs:
        """``compute``, whatever autocast, default dtype and default device are set around it."""
        inputs = [with_float64(value) for value in inputs]
        with steady(device_of(inputs)):
            return self.compute(*inputs)

    def with_named(self, tensordict: TensorDictBase, named: Mapping[str, Any]) -> TensorDictBase:
        """``tensordict`` and the tensors given by the last part of their key (``label=`` for ("sample_carried", "label"))."""
        if not named:
            return tensordict
        last = [key_tuple(key)[-1] for key in self.in_keys]
        given = tensordict.copy()
        for name, value in named.items():
            if last.count(name) != 1:
                known = ["_".join(key_tuple(key)) for key in self.in_keys]
                raise TypeError(
                    f"{type(self).__name__} takes a TensorDict, or tensors by keyword: {', '.join(known)}; got "
                    f"{sorted(named)}. Name other inputs with in_keys=."
                )
            given.set(self.in_keys[last.index(name)], value)
        return given

    def read(self, tensordict: TensorDictBase) -> list[Any]:
        """The inputs (None for an optional one that is absent), checked against the event shapes of ``reads``."""
        values = [tensordict.get(key, None) for key in self.in_keys]
        missing = [k for k, v in zip(self.in_keys, values) if v is None and k not in self.optional_in_keys]
        if missing:
            have = sorted(tensordict.keys(True, True), key=str)
            usual = missing_part(as_written(self), missing, have, pair=self.two_sided)
            raise KeyError(
                f"{type(self).__name__} reads {missing}, but the TensorDict has {have[:12]}"
                f"{' ...' if len(have) > 12 else ''}. Put the stage that writes it before this one, or name another "
                f"key with in_keys=.{' ' + usual if usual else ''}"
            )
        for place, (key, value) in enumerate(zip(self.in_keys, values)):
            if value is None or isinstance(value, Tensor):
                pass
            elif (
                self.may_be_words(place)
                and (words := words_of(value, key, type(self).__qualname__)) is not None
            ):
                values[place] = words
            else:
                self._refuse_nested(key, value)
            if isinstance(value, Tensor) and value.is_complex() and not self.takes_complex:
                raise TypeError(
                    f"{type(self).__name__} expects real numbers at {key!r}, got {value.dtype} of shape {tuple(value.shape)}. "
                    f"Stack real and imaginary parts as features: torch.view_as_real(x).flatten(-2)."
                )
        self._check_shapes(values, tensordict.batch_size)
        return values + [None] * (len(self.in_roles) - len(values))

    def may_be_words(self, place: int) -> bool:
        """Whether the input at a place of ``reads`` may hold words."""
        return key_tuple(self.in_roles[place])[0] in self.takes_words

    def _refuse_nested(self, key: Key, value: Any) -> None:
        if isinstance(value, TensorDictBase) and not is_non_tensor(value):
            sites = [str(name) for name in value.keys()]
            first = (*key_tuple(key), sites[0]) if sites else key
            raise TypeError(
                f"{type(self).__name__} reads one tensor at {key!r}, which holds the sites {sites[:6]}. For all of them: "
                f"tg.ForEach({as_written(self)}(...), sites); for one: in_keys=[{first!r}]."
            )
        words = getattr(value, "data", None)
        got = f"words: {words[:300]!r}" if isinstance(words, str) else type(value).__name__
        raise TypeError(
            f"{type(self).__name__} reads a tensor at {key!r}, got {got}. Give numbers as a tensor; text goes with rows where "
            f"SelectTokens(also=[...]) carries it, to Collect, RowSample, StoreActivations, LabelOverlap and probes."
        )

    def write(self, tensordict: TensorDictBase, outputs: Outputs) -> TensorDictBase:
        """Write the outputs of ``compute`` under ``out_keys``: those that ``select_out_keys`` has left."""
        selected = set(self.out_keys)
        for key, value in zip(self.out_keys_source, self.listed(outputs)):
            if key in selected and key != NOT_WRITTEN:
                self._check_batch_size(key, value, tensordict.batch_size)
                put(tensordict, key, value)
        return tensordict

    def _check_batch_size(self, key: Key, value: Tensor, batch_size: torch.Size) -> None:
        if len(batch_size) and value.shape[: len(batch_size)] != batch_size:
            raise ValueError(
                f"{type(self).__name__} writes {key!r} of shape {tuple(value.shape)} into a TensorDict of batch size "
                f"{list(batch_size)}, which does not fit: rows and positions are no batch dimensions here. Give it a TensorDict "
                f"with batch_size=[] (td.auto_batch_size_(0))."
            )

    def listed(self, outputs: Outputs) -> list[Any]:
        """The outputs of ``compute`` in the order of ``writes``."""
        if isinstance(outputs, Mapping):
            if set(outputs) != set(self.out_names):
                raise ValueError(
                    f"{type(self).__name__}.compute returned {sorted(outputs)}, its documented names are "
                    f"{sorted(self.out_names)}."
                )
            outputs = [outputs[name] for name in self.out_names]
        elif isinstance(outputs, Tensor):
            outputs = [outputs]
        elif not isinstance(outputs, Sequence) or isinstance(outputs, str):
            raise TypeError(
                f"{type(self).__name__}.compute returned {type(outputs).__name__}, but a tensor (or a sequence or mapping of "
                f"tensors) is written to a TensorDict. Return a tensor: torch.as_tensor(value)."
            )
        if len(outputs) != len(self.out_names):
            raise ValueError(
                f"{type(self).__name__}.compute returned {len(outputs)} outputs, its documented names are {self.out_names}."
            )
        wrong = [
            name for name, value in zip(self.out_names, outputs) if not isinstance(value, Tensor | Words)
        ]
        if wrong:
            kind = type(outputs[self.out_names.index(wrong[0])]).__name__
            raise TypeError(
                f"{type(self).__name__}.compute returned {kind} for {wrong[0]!r}, a tensor is needed: torch.as_tensor(value)."
            )
        return list(outputs)

    def _check_shapes(self, values: Sequence[Tensor | None], batch_size: torch.Size) -> None:
        sizes: dict[str, tuple[int, Key]] = {}
        for key, value, shape in zip(self.in_keys, values, self.shapes):
            if shape is None or value is None:
                continue
            letters = shape.split()
            given = tuple(value.shape)
            if value.ndim < len(letters):
                raise ValueError(
                    f"{type(self).__name__} expects {key!r} of shape (..., {', '.join(letters)}), got {given}."
                )
            if len(batch_size) > value.ndim - len(letters):
                raise ValueError(
                    f"{type(self).__name__} reads {key!r} with event dimensions ({', '.join(letters)}), got {given} in a "
                    f"TensorDict of batch size {list(batch_size)}: the batch size covers {letters[0]}, which the stage "
                    f"reduces. Give it a TensorDict with batch_size=[] (td.auto_batch_size_(0))."
                )
            for letter, size in zip(letters, given[value.ndim - len(letters) :]):
                if letter.isdigit():
                    continue
                first, where = sizes.setdefault(letter, (size, key))
                if first != size:
                    raise ValueError(
                        f"{type(self).__name__} expects {where!r} and {key!r} to have the same {letter}, "
                        f"got {first} and {size} (shape {given})."
                    )


def device_of(inputs: Sequence[Any]) -> torch.device:
    """Where the first tensor is; the CPU without one."""
    for value in inputs:
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")
