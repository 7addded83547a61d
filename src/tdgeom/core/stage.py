"""The base classes of stages: a stage moves keys, its ``compute`` holds the mathematics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from tensordict import TensorDictBase, is_non_tensor
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor

from tdgeom.core.keys import Key, key_tuple, resolve_keys

__all__ = ["Outputs", "PairStage", "Stage"]

Outputs: TypeAlias = "Tensor | Sequence[Tensor] | Mapping[str, Tensor]"


class Stage(TensorDictModuleBase):
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
        optional: names among ``reads`` that may be absent; ``compute`` then receives None.
        shared: keys that stay as they are under ``ForEach`` (one value for all sites), beside its own ``shared=``; a
            mapping reads the stage's own key from another shared one.
        one_thread_a_site: ``compute`` may run at several sites at once at the end of a run, each on one thread. Only for
            a ``compute`` that keeps nothing on ``self``; pays where it is one matrix decomposition a site.

    Args:
        in_keys: a list names every leaf read, in the order of ``reads``; a single key stands for a one-element list.
        out_keys: a list names every leaf written, in the order of ``writes``; a single key is the root under which
            the outputs take their documented names (for one output without a root: exactly that key).

    Raises:
        KeyError: an input is missing. ValueError: wrong shape, clashing sizes or a batch size that covers rows.
    """

    reads: ClassVar[Mapping[Key, str] | Sequence[Key]] = ()
    writes: ClassVar[Sequence[Key]] = ()
    optional: ClassVar[frozenset[str]] = frozenset()
    shared: ClassVar[frozenset[Key] | Mapping[Key, Key]] = frozenset()
    one_thread_a_site: ClassVar[bool] = False

    def __init__(
        self,
        *,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
        reads: Mapping[Key, str] | Sequence[Key] | None = None,
        writes: Sequence[Key] | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        reads = type(self).reads if reads is None else reads
        writes = type(self).writes if writes is None else writes
        if isinstance(reads, str) or isinstance(writes, str):
            raise TypeError(f"{owner}: reads and writes are lists of keys, got {reads!r} and {writes!r}.")
        shapes = list(reads.values()) if isinstance(reads, Mapping) else [None] * len(reads)
        roles = list(reads)
        self._optional = [key_tuple(key)[-1] in type(self).optional for key in roles]
        in_keys = resolve_keys(in_keys, roles, what="in_keys", owner=owner)
        required = self._optional.index(True) if True in self._optional else len(roles)
        if not required <= len(in_keys) <= len(roles):
            raise ValueError(
                f"{owner} reads {len(roles)} leaves, in this order: {roles}; in_keys has {in_keys}."
            )
        self._shapes = shapes[: len(in_keys)]
        self._roles = roles
        self.in_keys = in_keys
        self._names = [key_tuple(key)[-1] for key in writes]
        out_keys = resolve_keys(out_keys, list(writes), what="out_keys", owner=owner)
        if len(out_keys) != len(self._names):
            raise ValueError(
                f"{owner} writes {len(self._names)} leaves, in this order: {self._names}; out_keys has {out_keys}."
            )
        self.out_keys = out_keys

    def compute(self, *inputs: Any, **options: Any) -> Outputs:
        """The mathematics: tensors in the order of ``reads`` to a tensor, a sequence or a mapping by documented name."""
        raise TypeError(f"{type(self).__name__} defines no compute(): write the stage's function there.")

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase, **unknown: Any) -> TensorDictBase:
        """Read ``in_keys``, call ``compute``, write ``out_keys``."""
        self.refuse_unknown(unknown)
        return self.write(tensordict, self.compute(*self.read(tensordict)))

    def refuse_unknown(self, names: Mapping[str, Any]) -> None:
        """An error for tensors given by a keyword that no input has."""
        if names:
            known = ["_".join(key_tuple(key)) for key in self.in_keys]
            raise TypeError(
                f"{type(self).__name__} takes a TensorDict, or tensors by keyword: {', '.join(known)}; got {sorted(names)}. "
                f"Name other inputs with in_keys=."
            )

    def read(self, tensordict: TensorDictBase) -> list[Tensor | None]:
        """The inputs, checked against the event shapes of ``reads``."""
        values = [tensordict.get(key, None) for key in self.in_keys]
        missing = [
            key
            for key, value, optional in zip(self.in_keys, values, self._optional)
            if value is None and not optional
        ]
        if missing:
            have = sorted(tensordict.keys(True, True), key=str)
            raise KeyError(
                f"{type(self).__name__} reads {missing}, but the TensorDict has {have[:12]}"
                f"{' ...' if len(have) > 12 else ''}. Put the stage that writes it before this one, or name another "
                f"key with in_keys=."
            )
        for key, value in zip(self.in_keys, values):
            if value is not None and not isinstance(value, Tensor):
                self._refuse_nested(key, value)
        self._check_shapes(values, tensordict.batch_size)
        return values + [None] * (len(self._roles) - len(values))

    def _refuse_nested(self, key: Key, value: Any) -> None:
        if isinstance(value, TensorDictBase) and not is_non_tensor(value):
            sites = [str(name) for name in value.keys()]
            first = (*key_tuple(key), sites[0]) if sites else key
            raise TypeError(
                f"{type(self).__name__} reads one tensor at {key!r}, which holds the sites {sites[:6]}. For all of them: "
                f"tg.ForEach({type(self).__name__}(...), sites); for one: in_keys=[{first!r}]."
            )
        raise TypeError(
            f"{type(self).__name__} reads a tensor at {key!r}, got {type(value).__name__}. Give numbers as a tensor; words are "
            f"numbered first (sklearn.preprocessing.LabelEncoder)."
        )

    def write(
        self, tensordict: TensorDictBase, outputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]
    ) -> TensorDictBase:
        """Write the outputs of ``compute`` under ``out_keys``."""
        for key, value in zip(self.out_keys_source, self.listed(outputs)):
            tensordict.set(key, value)
        return tensordict

    def listed(self, outputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of ``compute`` in the order of ``writes``."""
        if isinstance(outputs, Mapping):
            if set(outputs) != set(self._names):
                raise ValueError(
                    f"{type(self).__name__}.compute returned {sorted(outputs)}, its documented names are {sorted(self._names)}."
                )
            outputs = [outputs[name] for name in self._names]
        elif isinstance(outputs, Tensor):
            outputs = [outputs]
        elif not isinstance(outputs, Sequence) or isinstance(outputs, str):
            raise TypeError(
                f"{type(self).__name__}.compute returned {type(outputs).__name__}, but a tensor (or a sequence or mapping of "
                f"tensors) is written to a TensorDict. Return a tensor: torch.as_tensor(value)."
            )
        if len(outputs) != len(self._names):
            raise ValueError(
                f"{type(self).__name__}.compute returned {len(outputs)} outputs, its documented names are {self._names}."
            )
        wrong = [name for name, value in zip(self._names, outputs) if not isinstance(value, Tensor)]
        if wrong:
            kind = type(outputs[self._names.index(wrong[0])]).__name__
            raise TypeError(
                f"{type(self).__name__}.compute returned {kind} for {wrong[0]!r}, a tensor is needed: torch.as_tensor(value)."
            )
        return list(outputs)

    def _check_shapes(self, values: Sequence[Tensor | None], batch_size: torch.Size) -> None:
        sizes: dict[str, tuple[int, Key]] = {}
        for key, value, shape in zip(self.in_keys, values, self._shapes):
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


class PairStage(Stage):
    """A stage on two sides, split so that each side is prepared once.

    Keys that belong to a side carry it second (``("sample", "a")``, ``("sample", "b")``); a subclass defines
    ``prepare(*inputs of one side)`` and ``compare(prepared_a, prepared_b, *other inputs)``. ``ForEachPair`` calls
    ``prepare`` once per site and ``compare`` once per pair.

        >>> import torch, tdgeom as tg
        >>> class MeanDistance(tg.PairStage):
        ...     reads = {("sample", "a"): "N D", ("sample", "b"): "M D"}
        ...     writes = [("between", "mean_distance")]
        ...     def prepare(self, sample):
        ...         return sample.mean(-2)
        ...     def compare(self, a, b):
        ...         return (a - b).norm(dim=-1)
        >>> MeanDistance()(sample_a=torch.zeros(3, 4), sample_b=torch.ones(5, 4))
        tensor(2.)
    """

    def prepare(self, *inputs: Any, **options: Any) -> Any:
        """What one side contributes, from its inputs in the order of ``reads``. Default: the inputs themselves."""
        return inputs[0] if len(inputs) == 1 else inputs

    def compare(self, *sides: Any, **options: Any) -> Outputs:
        """The outputs, from two prepared sides and the inputs that belong to neither."""
        raise TypeError(f"{type(self).__name__} defines no compare(): write the stage's function there.")

    def sides(self) -> tuple[list[int], list[int], list[int]]:
        """Positions in ``in_keys`` of side a, side b and neither."""
        groups: tuple[list[int], list[int], list[int]] = ([], [], [])
        for position, key in enumerate(self._roles):
            parts = key_tuple(key)
            side = parts[1] if len(parts) > 1 else None
            groups[{"a": 0, "b": 1}.get(side, 2)].append(position)
        return groups

    def compute(self, *inputs: Any, **options: Any) -> Outputs:
        """``compare(prepare(a), prepare(b))``."""
        side_a, side_b, rest = ([inputs[i] for i in group] for group in self.sides())
        return self.compare(self.prepare(*side_a), self.prepare(*side_b), *rest)
