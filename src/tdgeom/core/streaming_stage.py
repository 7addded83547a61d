"""The base class of streaming stages: rows in, state that merges, results out."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch, set_skip_existing
from torch import Tensor

from tdgeom.core.devices import has_float64
from tdgeom.core.process_groups import gather_states, rank_and_world
from tdgeom.core.rank_failures import watched
from tdgeom.core.stage import Outputs, Stage
from tdgeom.core.stage_settings import differences
from tdgeom.core.surroundings import steady

__all__ = ["StreamingStage", "refuse_ordered", "rows_finite", "tensor_text", "text_tensor"]

STATE_VERSION = 1


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
    CPU if that lacks float64), keeps the dtype it was declared in, also under ``.half()`` or ``.to(dtype)``, and holds no graph.
    ``state_dict()`` carries what the stage was made with; a state made otherwise is refused.

    Class attributes:
        publishing: names of settings that change only what is published: states that differ in them can be merged.
    """

    takes_complex = False
    publishing: ClassVar[Collection[str]] = frozenset()

    def add_state(self, name: str, dtype: torch.dtype | None) -> None:
        """Declare a piece of state; ``start`` gives it its shape when the first rows arrive.

        It is held in ``dtype``, whatever ``start`` returns; None takes the dtype that ``start`` gives it (that of the rows).
        """
        self.register_buffer(name, torch.zeros(0, dtype=dtype or torch.float32, device="cpu"))
        self.__dict__.setdefault("_state_dtypes", {})[name] = dtype

    def state(self) -> dict[str, Tensor]:
        """What ``add_state`` declared, by name; other buffers of a subclass are its settings."""
        declared = self.__dict__.get("_state_dtypes")
        if not declared:
            raise TypeError(
                f"{type(self).__name__} declares no state: call self.add_state(name, dtype) in __init__."
            )
        return {name: getattr(self, name) for name in declared}

    def set_state(self, values: Mapping[str, Tensor]) -> None:
        """Replace pieces of the state, each in the dtype that it was declared in."""
        for name, value in values.items():
            dtype = self.__dict__["_state_dtypes"][name]
            setattr(self, name, value if dtype is None else value.to(dtype))

    def start(self, *rows: Any, **options: Any) -> Mapping[str, Tensor]:
        """The state before any row, with the shapes that these rows call for."""
        raise TypeError(
            f"{type(self).__name__} defines no start(): return the state before any row, by name."
        )

    def accumulate(self, *rows: Any, **options: Any) -> None:
        """Add rows to the state."""
        raise TypeError(f"{type(self).__name__} defines no accumulate(): add the rows to the state there.")

    def combine(self, other: Any) -> None:
        """Add the (non-empty) state of another stage of the same settings to the (non-empty) own."""
        raise TypeError(f"{type(self).__name__} defines no combine(): merge the other's state there.")

    def result(self) -> Outputs:
        """The outputs, as copies: never a view of the state."""
        raise TypeError(f"{type(self).__name__} defines no result(): return copies of the outputs there.")

    def merging_settings(self) -> dict[str, Any]:
        """What two stages must share to be merged, or a state to be loaded: all settings but keys and ``publishing``."""
        apart = {"in_keys", "out_keys", *self.publishing}
        return {name: value for name, value in self.effective_settings().items() if name not in apart}

    @property
    def ordered(self) -> bool:
        """Whether the order of rows counts: older ones are forgotten (``halflife=``), and ``merge_`` takes what came later."""
        return self.__dict__.get("halflife") is not None

    @property
    def is_empty(self) -> bool:
        """True before the first rows."""
        return next(iter(self.state().values())).shape == (0,)

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(
        self, tensordict: TensorDictBase, tensordict_out: TensorDictBase | None = None, **named: Any
    ) -> TensorDictBase:
        """``update`` with the rows in ``tensordict``, then ``publish`` the values so far into it."""
        given = self.with_named(tensordict, named)
        if not torch.compiler.is_compiling():
            self._refuse_nonfinite(given)
        self.update(given)
        return self.publish(tensordict if tensordict_out is None else tensordict_out)

    def update(self, tensordict: TensorDictBase) -> None:
        """Add the rows at ``in_keys`` to the state."""
        rows = self.read(tensordict)
        self._refuse_no_rows(rows, tensordict.batch_size)
        if not rows[0].shape[0]:
            return
        with torch.inference_mode(False), torch.no_grad(), steady(rows[0].device):
            # The very tensor where it has no graph: what the host knows of it is kept beside it.
            rows = [row.detach() if isinstance(row, Tensor) and row.requires_grad else row for row in rows]
            if self.is_empty:
                home = rows[0].device if has_float64(rows[0].device) else torch.device("cpu")
                rows = [None if row is None else row.to(home) for row in rows]
                self.set_state({name: value.to(home) for name, value in self.start(*rows).items()})
            else:
                home = self.home
                rows = [None if row is None else row.to(home) for row in rows]
            self.accumulate(*rows)
        self._check_dtypes()

    @property
    def home(self) -> torch.device:
        """Where the state is."""
        return next(iter(self.state().values())).device

    def _refuse_no_rows(self, rows: Sequence[Any], batch_size: torch.Size) -> None:
        if rows[0].ndim == 0 or len(batch_size):
            raise ValueError(
                f"{type(self).__name__} expects rows at {self.in_keys[0]!r}, (N, ...), in a TensorDict of batch size [], got a "
                f"tensor of shape {tuple(rows[0].shape)} in one of batch size {list(batch_size)}: it adds rows up "
                f"(td.auto_batch_size_(0))."
            )
        for key, value, shape in zip(self.in_keys, rows, self.shapes):
            if value is not None and shape is not None and value.ndim > len(shape.split()):
                raise ValueError(
                    f"{type(self).__name__} expects rows at {key!r}, ({', '.join(shape.split())}), got {tuple(value.shape)}. "
                    f"SelectTokens makes rows of (B, T, D) activations and leaves padding out; without padding "
                    f"x.flatten(0, -2) does."
                )

    def _check_dtypes(self) -> None:
        for name, dtype in self.__dict__["_state_dtypes"].items():
            found = getattr(self, name).dtype
            if dtype is not None and found != dtype:
                raise TypeError(
                    f"{type(self).__name__} declared the state {name!r} as {dtype} (add_state), accumulate left it as {found}. "
                    f"Declare it so, or round before adding."
                )

    def publish(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the values so far under ``out_keys``."""
        if self.is_empty:
            raise ValueError(
                f"{type(self).__name__} has seen no rows at {self.in_keys}: update it first. In a run, an empty loader "
                f"or a selection that leaves no rows ends here."
            )
        with torch.inference_mode(False), torch.no_grad(), steady(self.home):
            return self.write(tensordict, self.result())

    def refuse_unlike(self, other: Any) -> None:
        """An error where ``merge_`` would not add up the same stage on the same features."""
        if type(other) is not type(self) or other.merging_settings() != self.merging_settings():
            raise ValueError(
                f"{self!r} cannot merge {other!r}: both must be the same stage with the same settings"
                f"{self._apart(other.merging_settings()) if isinstance(other, StreamingStage) else ''}."
            )
        for name, value in () if self.is_empty or other.is_empty else other.state().items():
            if not self.fits(name, value):
                raise ValueError(
                    f"{type(self).__name__} holds {name} of shape {tuple(self.state()[name].shape)}, the stage to "
                    f"merge {tuple(value.shape)}: they saw rows of different width."
                )

    def merge_(self, other: StreamingStage) -> StreamingStage:
        """Add the state of ``other``, which saw other rows; ``other`` keeps its own."""
        self.refuse_unlike(other)
        if other.is_empty:
            return self
        with torch.inference_mode(False), torch.no_grad(), steady(other.home):
            if self.is_empty:
                self.set_state({name: value.clone() for name, value in other.state().items()})
            else:
                self.combine(other)
        return self

    def fits(self, name: str, value: Tensor) -> bool:
        """Whether another's piece of state can be merged with the own: its shape is the same."""
        return value.shape == self.state()[name].shape

    def _apart(self, theirs: Mapping[str, Any]) -> str:
        """ ": where they differ" for messages."""
        found = differences(json.loads(json.dumps(theirs)), json.loads(json.dumps(self.merging_settings())))
        return f": {'; '.join(found[:4])}{'; ...' if len(found) > 4 else ''}" if found else ""

    def reset(self) -> None:
        """Forget every row."""
        self.set_state({name: value.new_zeros(0) for name, value in self.state().items()})

    def settle(self) -> None:
        """Called before the state is saved: a stage that holds rows outside of it brings them to rest here."""

    def begin(self) -> bool:
        """Called where a run with a checkpoint begins: what a stage will begin outside of it, it names here in its state.

        True where there is such a thing: the checkpoint is then written before the stage has rows.
        """
        return False

    def go_on(self) -> None:
        """Called where a run goes on from a checkpoint, when the state is set: what a stage began is this process' again."""

    def release(self) -> None:
        """Called where a run ends in an exception: a stage that holds files or locks lets go of them here."""

    def sync_(self) -> None:
        """Merge the states of all ranks into rank 0; the others become empty, so a second call changes nothing.

        Raises:
            ValueError: on all ranks, a stage with ``halflife=`` and ranks that have rows at the same time: neither's came later.
        """
        refuse_ordered(self, rank_and_world()[1], f"{type(self).__name__}.sync_()")
        with watched(f"{type(self).__name__}.sync_()"):
            for state in gather_states(self.state()):
                self.merge_(self.with_state(state))
            if rank_and_world()[0] != 0:
                self.reset()

    def with_state(self, state: Mapping[str, Tensor]) -> Any:
        """A stage of the same settings that holds this state; the own is left as it is."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.__dict__["_buffers"] = {**self._buffers, **state}
        return twin

    def _refuse_nonfinite(self, tensordict: TensorDictBase) -> None:
        for key in self.in_keys:
            value = tensordict.get(key, None)
            if isinstance(value, Tensor) and value.is_floating_point() and not rows_finite(value).all():
                raise ValueError(
                    f"{type(self).__name__}: {key!r} (shape {tuple(value.shape)}) holds NaN or Inf. Drop such rows first; "
                    f"run(..., nonfinite='drop') does it at all sites and counts them."
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StreamingStage:
        # Casting a float64 accumulator to half would destroy it: state follows devices, never dtypes.
        own = {id(buffer) for buffer in self.state().values()}

        def move_only(tensor: Tensor) -> Tensor:
            if id(tensor) not in own:
                return fn(tensor)
            try:
                moved = fn(tensor)
            except TypeError:  # a device without float64: the state stays where it is
                return tensor
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)

    # What a state was made with travels with it, as JSON in a tensor: no pickle is needed to read it back.

    def get_extra_state(self) -> Tensor:
        """Stage, settings and version, beside the state in ``state_dict``."""
        about = {"version": STATE_VERSION, "stage": type(self).__name__, "settings": self.merging_settings()}
        return text_tensor(json.dumps(about, sort_keys=True))

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: ``_load_from_state_dict`` has compared it."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: Any,
        unexpected: Any, errors: list[str],
    ) -> None:  # fmt: skip
        found = tensor_text(state_dict.get(f"{prefix}_extra_state"))
        if found is not None:
            refused = self._refusal(json.loads(found))
            if refused:
                errors.append(f"{prefix.rstrip('.') or 'the state'}: {refused}")
                return
        saved = {name: state_dict.get(prefix + name) for name in self.state()}
        given = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
        for name, value in given.items():
            if self.__dict__["_state_dtypes"][name] not in (None, value.dtype):
                errors.append(
                    f"{prefix}{name} is {value.dtype}, {type(self).__name__} declares it as {self.state()[name].dtype} "
                    f"(add_state): a state that was cast has lost rows. Save it as state_dict() gives it."
                )
                return
        with torch.inference_mode(False):  # state made there could never be added to
            for name, value in given.items():
                home = self.state()[name].device
                self._buffers[name] = torch.zeros(value.shape, dtype=value.dtype, device=home)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _refusal(self, about: Mapping[str, Any]) -> str:
        if about["version"] > STATE_VERSION or about["stage"] != type(self).__name__:
            return f"a state of {about['stage']} (version {about['version']}) does not go into {type(self).__name__}."
        apart = self._apart(about["settings"])
        return (
            f"the state of another {type(self).__name__}{apart}. Make the stage as it was." if apart else ""
        )


def refuse_ordered(stage: StreamingStage, parts: int, owner: str) -> None:
    """An error where a stage that forgets older rows would get its rows from several ranks or jobs, in no order of time."""
    if stage.ordered and parts > 1:
        raise ValueError(
            f"{owner}: {stage!r} forgets older rows (halflife=), and {parts} processes that share the data out have none that "
            f"came later. Run it in one process, or leave halflife= out."
        )


def rows_finite(rows: Tensor) -> Tensor:
    """(N,) True where a row is finite throughout; one cheap pass when all are."""
    if not rows.is_floating_point():
        return torch.ones(rows.shape[:1], dtype=torch.bool, device=rows.device)
    if torch.isfinite(rows.sum(dtype=torch.float32)):
        return torch.ones(rows.shape[:1], dtype=torch.bool, device=rows.device)
    return torch.isfinite(rows).flatten(1).all(1) if rows.ndim > 1 else torch.isfinite(rows)


def text_tensor(text: str) -> Tensor:
    """Text as bytes in a tensor, the form in which it travels in a ``state_dict``."""
    if not text:
        return torch.zeros(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def tensor_text(value: object) -> str | None:
    """What ``text_tensor`` was given; None where there is none."""
    return bytes(value.cpu().numpy()).decode() if isinstance(value, Tensor) else None
