"""A module whose keys are seen under other names: how one stage serves many sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch, set_skip_existing
from torch import Tensor, nn

from tdgeom.core.keys import NOT_WRITTEN, Key, optional_in_keys
from tdgeom.core.missing_parts import as_written, missing_part
from tdgeom.core.streaming_stage import StreamingStage, tensor_text, text_tensor
from tdgeom.core.warnings import at_site

__all__ = ["Renamed", "RenamedStream", "describe", "is_streaming", "stage_of"]


def is_streaming(module: object) -> bool:
    """True for a stage that accumulates rows, also under other names."""
    return isinstance(module, StreamingStage | RenamedStream)


def stage_of(module: nn.Module) -> Any:
    """The stage itself, behind every renaming."""
    while isinstance(module, Renamed):
        module = module.module
    return module


def describe(module: nn.Module) -> str:
    """A stage's name for messages."""
    module = getattr(module, "_orig_mod", module)
    if isinstance(module, Renamed):
        return f"{describe(module.module)} at {module.where}"
    inner = getattr(module, "module", None)
    if type(module).__name__ in ("TensorDictModule", "WrapModule"):
        inner = getattr(module, "func", None) if inner is None else inner
        return f"{type(module).__name__}({getattr(inner, '__name__', type(inner).__name__)})"
    return type(module).__name__


class Renamed(TensorDictModuleBase):
    """A module under other names; it is called whole, so that its own ``forward``, hooks and selections act.

    Args:
        module: any TensorDict module; it keeps its own names.
        rename: from the module's own key to the outer one.
        where: the site, for messages.
    """

    module: TensorDictModuleBase

    def __init__(self, module: TensorDictModuleBase, rename: Callable[[Key], Key], where: str) -> None:
        super().__init__()
        self.module = module
        self.where = where
        self.read_as: list[tuple[Key, Key]] = [(key, rename(key)) for key in module.in_keys]
        self.written_as: list[tuple[Key, Key]] = [
            (key, NOT_WRITTEN if key == NOT_WRITTEN else rename(key)) for key in module.out_keys
        ]
        optional = set(optional_in_keys(module))
        self.in_keys = cast(Any, [outer for _, outer in self.read_as])
        self.optional_in_keys = [outer for own, outer in self.read_as if own in optional]
        self.out_keys = cast(Any, [outer for _, outer in self.written_as])

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(
        self, tensordict: TensorDictBase, tensordict_out: TensorDictBase | None = None
    ) -> TensorDictBase:
        """Call the module on its own names and write what it wrote under the outer ones."""
        return self.outward(self.inner(tensordict), tensordict if tensordict_out is None else tensordict_out)

    def inner(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the module returns, under its own names; ``tensordict`` is only read."""
        try:
            return self.located(self.module, self.inward(tensordict))
        except KeyError as error:
            absent = [
                (own, outer)
                for own, outer in self.read_as
                if outer not in self.optional_in_keys and tensordict.get(outer, None) is None
            ]
            if not absent:
                raise
            have, missing = sorted(tensordict.keys(True, True), key=str), [outer for _, outer in absent]
            usual = missing_part(as_written(stage_of(self)), missing, have)
            raise KeyError(
                f"{describe(self.module)} reads {[own for own, _ in absent]}, here {missing}, but the TensorDict has {have[:12]}"
                f"{' ...' if len(have) > 12 else ''}. Put the stage that writes it before this one, or name another key with "
                f"in_keys=.{' ' + usual if usual else ''} [at {self.where}]"
            ) from error

    def located(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call, with the site named in an error or a warning."""
        try:
            with at_site(self.where):
                return function(*args)
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            if error.args and isinstance(error.args[0], str):
                error.args = (f"{error.args[0]} [at {self.where}]", *error.args[1:])
            raise

    def inward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the module reads, under its own names."""
        inner = TensorDict({}, batch_size=tensordict.batch_size)
        for own, outer in self.read_as:
            value = tensordict.get(outer, None)
            if isinstance(value, Tensor | TensorDictBase):
                inner.set(own, value)
            elif value is not None:
                inner.set_non_tensor(own, value)
        return inner

    def outward(self, inner: TensorDictBase, tensordict: TensorDictBase) -> TensorDictBase:
        """Write what the module wrote under the outer names."""
        if [own for own, _ in self.written_as] != self.module.out_keys:
            raise ValueError(
                f"{describe(self.module)} at {self.where} now writes {self.module.out_keys} and did write "
                f"{[own for own, _ in self.written_as]} when it was put under its site's names. Call select_out_keys before "
                f"ForEach, or on the ForEach."
            )
        for own, outer in self.written_as:
            if own != NOT_WRITTEN and outer in self.out_keys:  # what select_out_keys has left
                tensordict.set(outer, inner.get(own))
        return tensordict


class RenamedStream(Renamed):
    """``Renamed`` around a streaming stage, with a streaming stage's methods."""

    module: Any

    def update(self, tensordict: TensorDictBase) -> None:
        """Add the rows found under the outer names."""
        self.located(self.module.update, self.inward(tensordict))

    def publish(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the values so far under the outer names."""
        inner = TensorDict({}, batch_size=tensordict.batch_size)
        return self.outward(self.located(self.module.publish, inner), tensordict)

    def refuse_unlike(self, other: Any) -> None:
        """An error where ``merge_`` would not add up the same stage at the same site."""
        if not isinstance(other, RenamedStream) or other.where != self.where:
            raise ValueError(
                f"{describe(self)} cannot merge {describe(other)}: both must be of the same site."
            )
        self.located(self.module.refuse_unlike, other.module)

    def merge_(self, other: RenamedStream) -> RenamedStream:
        """Add the state of the same stage at the same site elsewhere."""
        self.refuse_unlike(other)
        self.located(self.module.merge_, other.module)
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

    # The site travels with the state, so that no site reads what another held.

    def get_extra_state(self) -> Tensor:
        """The site, beside the stage's own state in ``state_dict``."""
        return text_tensor(self.where)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: ``_load_from_state_dict`` has compared it."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = tensor_text(state_dict.get(f"{prefix}_extra_state"))
        if found is not None and found != self.where:
            # args: local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            args[4].append(
                f"{prefix.rstrip('.')}: the state of site {found!r} does not go to {self.where!r}."
            )
            for name in [name for name in state_dict if name.startswith(f"{prefix}module.")]:
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)
