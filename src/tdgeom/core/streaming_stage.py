"""The base class of streaming stages: rows in, state that merges, results out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor

from tdgeom.core.stage import Outputs, Stage
from tdgeom.core.state_transfer import gather_states

__all__ = ["StreamingStage", "rows_finite"]


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

    def settings(self) -> dict[str, Any]:
        """What two stages must share to be merged."""
        return {}

    @property
    def is_empty(self) -> bool:
        """True before the first rows."""
        return next(iter(self._state().values())).shape == (0,)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase, **unknown: Any) -> TensorDictBase:
        """``update`` with the rows in ``tensordict``, then ``publish`` the values so far into it."""
        self.refuse_unknown(unknown)
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
        for key, value, shape in zip(self.in_keys, rows, self._shapes):
            if value is not None and shape is not None and value.ndim > len(shape.split()):
                raise ValueError(
                    f"{type(self).__name__} expects rows at {key!r}, ({', '.join(shape.split())}), got {tuple(value.shape)}. "
                    f"SelectTokens makes rows of (B, T, D) activations and leaves padding out; without padding "
                    f"x.flatten(0, -2) does."
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

    def release(self) -> None:
        """Called where a run ends in an exception: a stage that holds files or locks lets go of them here."""

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
