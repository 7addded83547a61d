"""The base classes: a stage moves keys, its ``compute`` holds the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor

from tdgeom._sync import gather_states

__all__ = ["Key", "PairStage", "Stage", "StreamingStage"]

Key: TypeAlias = "str | tuple[str, ...]"


def key_tuple(key: Key) -> tuple[str, ...]:
    """``"a"`` as ``("a",)``; a tuple stays. Never splits on a dot."""
    return (key,) if isinstance(key, str) else tuple(key)


def as_key(parts: tuple[str, ...]) -> Key:
    """``("a",)`` as ``"a"``; the form in which TensorDict lists its keys."""
    return parts[0] if len(parts) == 1 else parts


def _is_key(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, tuple) and len(value) > 0 and all(isinstance(part, str) for part in value)
    )


def resolve_keys(
    given: Key | Sequence[Key] | None, defaults: Sequence[Key], *, what: str, owner: str
) -> list[Key]:
    """Every leaf key, from a list (all leaves), a single key (the root or the only leaf) or None (the defaults)."""
    names = [key_tuple(key)[-1] for key in defaults]
    if given is None:
        keys = list(defaults)
    elif _is_key(given):
        root = key_tuple(given)  # type: ignore[arg-type]
        unnamed = len(defaults) == 1 and (what == "in_keys" or isinstance(defaults[0], str))
        keys = [as_key(root)] if unnamed or what == "in_keys" else [(*root, name) for name in names]
    elif isinstance(given, list) and all(_is_key(key) for key in given):
        keys = [as_key(key_tuple(key)) for key in given]
    else:
        raise TypeError(
            f"{owner}: {what} takes a list of keys (one per leaf: {names}) or a single key (a string or a tuple of "
            f"strings), got {given!r}."
        )
    if len(set(keys)) != len(keys):
        # dispatch hands the second tensor to both entries, so CKA(x, y) would silently become CKA(y, y).
        raise ValueError(f"{owner}: {what} names a key twice: {keys}. Give every leaf a key of its own.")
    return keys


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

    def compute(self, *inputs: Tensor) -> Tensor | Sequence[Tensor] | Mapping[str, Tensor]:
        """The mathematics: tensors in the order of ``reads`` to a tensor, a sequence or a mapping by documented name."""
        raise TypeError(f"{type(self).__name__} defines no compute(): write the stage's function there.")

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Read ``in_keys``, call ``compute``, write ``out_keys``."""
        return self.write(tensordict, self.compute(*self.read(tensordict)))

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
        self._check_shapes(values, tensordict.batch_size)
        return values + [None] * (len(self._roles) - len(values))

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
        if len(outputs) != len(self._names):
            raise ValueError(
                f"{type(self).__name__}.compute returned {len(outputs)} outputs, its documented names are {self._names}."
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

    def prepare(self, *inputs: Tensor) -> Any:
        """What one side contributes, from its inputs in the order of ``reads``. Default: the inputs themselves."""
        return inputs[0] if len(inputs) == 1 else inputs

    def compare(self, a: Any, b: Any, *rest: Tensor) -> Tensor | Sequence[Tensor] | Mapping[str, Tensor]:
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

    def compute(self, *inputs: Tensor) -> Tensor | Sequence[Tensor] | Mapping[str, Tensor]:
        """``compare(prepare(a), prepare(b))``."""
        side_a, side_b, rest = ([inputs[i] for i in group] for group in self.sides())
        return self.compare(self.prepare(*side_a), self.prepare(*side_b), *rest)


class StreamingStage(Stage):
    """A stage whose buffers accumulate rows: exact, mergeable, independent of how rows are split into batches.

    A subclass calls ``add_state`` in ``__init__`` and defines ``start`` (the state before any row), ``accumulate``
    (add rows), ``combine`` (add another's state) and ``result`` (the outputs).

        >>> import torch, tdgeom as tg
        >>> class Largest(tg.StreamingStage):
        ...     reads = {"tokens": "N D"}
        ...     writes = ["largest"]
        ...     def __init__(self, **keys):
        ...         super().__init__(**keys)
        ...         self.add_state("top", torch.float64)
        ...     def start(self, tokens):
        ...         return {"top": tokens.new_full(tokens.shape[-1:], -torch.inf, dtype=torch.float64)}
        ...     def accumulate(self, tokens):
        ...         self.top = torch.maximum(self.top, tokens.double().amax(0))
        ...     def combine(self, other):
        ...         self.top = torch.maximum(self.top, other.top)
        ...     def result(self):
        ...         return self.top.clone()
        >>> stage = Largest()
        >>> _ = stage(tokens=torch.zeros(3, 2))
        >>> stage(tokens=torch.ones(1, 2))
        tensor([1., 1.], dtype=torch.float64)

    State lives in persistent buffers, of length zero before the first rows; it is made on the first rows' device (the
    CPU if that lacks float64), never changes dtype under ``.half()`` or ``.to(dtype)``, and holds no graph.
    """

    def add_state(self, name: str, dtype: torch.dtype) -> None:
        """Declare a piece of state; ``start`` gives it its shape when the first rows arrive."""
        self.register_buffer(name, torch.zeros(0, dtype=dtype))
        self.__dict__.setdefault("_state_names", []).append(name)

    def _state(self) -> dict[str, Tensor]:
        """What ``add_state`` declared; other buffers of a subclass are its settings."""
        names = self.__dict__.get("_state_names")
        if not names:
            raise TypeError(
                f"{type(self).__name__} declares no state: call self.add_state(name, dtype) in __init__."
            )
        return {name: self._buffers[name] for name in names}  # type: ignore[misc]

    def start(self, *rows: Tensor) -> Mapping[str, Tensor]:
        """The state before any row, with the shapes that these rows call for."""
        raise TypeError(
            f"{type(self).__name__} defines no start(): return the state before any row, by name."
        )

    def accumulate(self, *rows: Tensor) -> None:
        """Add rows to the state."""
        raise TypeError(f"{type(self).__name__} defines no accumulate(): add the rows to the state there.")

    def combine(self, other: StreamingStage) -> None:
        """Add the (non-empty) state of another stage of the same settings to the (non-empty) own."""
        raise TypeError(f"{type(self).__name__} defines no combine(): merge the other's state there.")

    def result(self) -> Tensor | Sequence[Tensor] | Mapping[str, Tensor]:
        """The outputs, as copies: never a view of the state."""
        raise TypeError(f"{type(self).__name__} defines no result(): return copies of the outputs there.")

    def settings(self) -> dict[str, Any]:
        """What two stages must share to be merged."""
        return {}

    @property
    def is_empty(self) -> bool:
        """True before the first rows."""
        return next(iter(self._state().values())).shape == (0,)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """``update`` with the rows in ``tensordict``, then ``publish`` the values so far into it."""
        if not torch.compiler.is_compiling():
            self._refuse_nonfinite(tensordict)
        self.update(tensordict)
        return self.publish(tensordict)

    def update(self, tensordict: TensorDictBase) -> None:
        """Add the rows at ``in_keys`` to the state."""
        rows = self.read(tensordict)
        if rows[0].ndim == 0:
            raise ValueError(
                f"{type(self).__name__} expects rows at {self.in_keys[0]!r}, (N, ...), got a tensor of shape ()."
            )
        if not rows[0].shape[0]:
            return
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(rows[0].device.type, enabled=False):
            rows = [None if row is None else row.detach() for row in rows]
            if self.is_empty:
                home = rows[0].device if rows[0].device.type != "mps" else torch.device("cpu")
                rows = [None if row is None else row.to(home) for row in rows]
                for name, value in self.start(*rows).items():
                    setattr(self, name, value.to(home))
            else:
                home = next(iter(self._state().values())).device
                rows = [None if row is None else row.to(home) for row in rows]
            self.accumulate(*rows)

    def publish(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the values so far under ``out_keys``."""
        if self.is_empty:
            raise ValueError(
                f"{type(self).__name__} has seen no rows at {self.in_keys}: update it first. In a run, an empty loader "
                f"or a selection that leaves no rows ends here."
            )
        home = next(iter(self._state().values())).device
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(home.type, enabled=False):
            return self.write(tensordict, self.result())

    def merge_(self, other: StreamingStage) -> StreamingStage:
        """Add the state of ``other``, which saw other rows; ``other`` keeps its own."""
        if type(other) is not type(self) or other.settings() != self.settings():
            raise ValueError(
                f"{type(self).__name__}{self.settings()} cannot merge {type(other).__name__}"
                f"{other.settings() if isinstance(other, StreamingStage) else ''}: both must be the same stage with the "
                f"same settings."
            )
        if other.is_empty:
            return self
        with torch.inference_mode(False), torch.no_grad():
            if self.is_empty:
                for name, value in other._state().items():
                    setattr(self, name, value.clone())
            else:
                for name, value in other._state().items():
                    if value.shape != self._buffers[name].shape:
                        raise ValueError(
                            f"{type(self).__name__} holds {name} of shape {tuple(self._buffers[name].shape)}, the stage to "
                            f"merge {tuple(value.shape)}: they saw rows of different width."
                        )
                self.combine(other)
        return self

    def reset(self) -> None:
        """Forget every row."""
        for name, value in self._state().items():
            setattr(self, name, torch.zeros(0, dtype=value.dtype, device=value.device))

    def settle(self) -> None:
        """Called before the state is saved: a stage that holds rows outside of it brings them to rest here."""

    def sync_(self) -> None:
        """Merge the states of all ranks into rank 0; the others become empty, so a second call changes nothing."""
        for state in gather_states(self._state()):
            other = self._with_state(state)
            self.merge_(other)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            self.reset()

    def _with_state(self, state: Mapping[str, Tensor]) -> StreamingStage:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._buffers = {**self._buffers, **state}
        return twin

    def _refuse_nonfinite(self, tensordict: TensorDictBase) -> None:
        for key in self.in_keys:
            value = tensordict.get(key, None)
            if value is not None and value.is_floating_point() and not rows_finite(value).all():
                raise ValueError(
                    f"{type(self).__name__}: {key!r} (shape {tuple(value.shape)}) holds NaN or Inf. Drop such rows first; "
                    f"run(..., nonfinite='drop') does it at all sites and counts them."
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StreamingStage:
        # Casting a float64 accumulator to half would destroy it: state follows devices, never dtypes.
        own = {id(buffer) for buffer in self._state().values()}

        def move_only(tensor: Tensor) -> Tensor:
            if id(tensor) not in own:
                return fn(tensor)
            try:
                moved = fn(tensor)
            except TypeError:  # a device without float64: the state stays where it is
                return tensor
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._state().items():
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.shape != buffer.shape:
                setattr(self, name, torch.zeros(value.shape, dtype=value.dtype, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def rows_finite(rows: Tensor) -> Tensor:
    """(N,) True where a row is finite throughout; one cheap pass when all are."""
    if not rows.is_floating_point():
        return torch.ones(rows.shape[:1], dtype=torch.bool, device=rows.device)
    if torch.isfinite(rows.sum(dtype=torch.float32)):
        return torch.ones(rows.shape[:1], dtype=torch.bool, device=rows.device)
    return torch.isfinite(rows).flatten(1).all(1) if rows.ndim > 1 else torch.isfinite(rows)
