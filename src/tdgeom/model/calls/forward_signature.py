"""What a module's forward takes by name, through wrappers around it: read once for every function."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdgeom.core.keys import optional_in_keys

_NO_TENSORS = {"class", "bool", "int", "float", "str", "None", "NoneType", "Optional", "Union"}
_MAPPING = re.compile(r"(<class ')?(typing\.|collections\.abc\.)?([Dd]ict|Mapping)\b")


@dataclass(frozen=True)
class Signature:
    """The parameters of a model's forward that can be given by name, those that must be, and those that may hold tensors."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    positional_only: tuple[str, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Forward:
    """What is read of one forward: whether it hands on what it does not name, names nothing at all, or takes one mapping."""

    signature: Signature
    hands_on: bool
    names_nothing: bool
    features: str | None


_READ: WeakKeyDictionary[FunctionType, Forward] = WeakKeyDictionary()


def read_signature(model: nn.Module) -> Signature:
    """The signature of ``model.forward``, through wrappers that take ``*args, **kwargs`` around another model.

    A TensorDict module names the keys that it reads.

    >>> read_signature(nn.Sequential(nn.Linear(2, 2))).required
    ('input',)
    """
    model = unwrapped(model)
    if isinstance(model, TensorDictModuleBase):
        keys = tuple(key for key in model.in_keys if isinstance(key, str))
        return Signature(keys, tuple(k for k in keys if k not in optional_in_keys(model)), (), keys)
    forward = read_forward(model)
    signature, base = forward.signature, _base_of(model) if forward.hands_on else None
    if base is None:
        return signature
    # adapters hand on what they do not name
    inner, own = read_signature(base()), set(signature.names)
    more = [tuple(name for name in names if name not in own) for names in (inner.names, inner.tensors)]
    return replace(signature, names=signature.names + more[0], tensors=signature.tensors + more[1])


def read_forward(model: nn.Module) -> Forward:
    """What ``model.forward`` takes, as it is written. Sentence encoders are called with one mapping of names to tensors.

    >>> import torch
    >>> class Encoder(nn.Module):
    ...     def forward(self, features: dict[str, torch.Tensor]):
    ...         return features["x"]
    >>> read_forward(Encoder()).features
    'features'
    """
    function = type(model).forward
    if not isinstance(function, FunctionType) or "forward" in model.__dict__:  # another was put in its place
        return _read(model)
    if function not in _READ:
        _READ[function] = _read(model)
    return _READ[function]


def _read(model: nn.Module) -> Forward:
    parameters = tuple(inspect.signature(model.forward).parameters.values())
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = tuple(p.name for p in named if p.default is p.empty)
    signature = Signature(
        tuple(p.name for p in named),
        required,
        tuple(p.name for p in named if p.kind is p.POSITIONAL_ONLY),
        tuple(p.name for p in named if p.name in required or _may_hold_tensor(p)),
    )
    said = "" if len(required) != 1 else str(next(p.annotation for p in named if p.name == required[0]))
    return Forward(
        signature,
        hands_on=any(p.kind is p.VAR_KEYWORD for p in parameters),
        names_nothing=not named,
        features=parameters[0].name if _MAPPING.match(said) else None,
    )


def _may_hold_tensor(parameter: inspect.Parameter) -> bool:
    """Whether nothing says that an argument is a flag, a number, a word or a cache."""
    words = re.findall(
        r"[\w.]+", "" if parameter.annotation is parameter.empty else str(parameter.annotation)
    )
    kinds = [word.rpartition(".")[2] for word in words]
    certain = bool(kinds) and all(kind in _NO_TENSORS or kind.endswith("Cache") for kind in kinds)
    return not certain and not isinstance(parameter.default, bool)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers whose forward names nothing, such as those for several devices or with adapters.

    >>> unwrapped(nn.DataParallel(layer := nn.Linear(2, 2))) is layer
    True
    """
    bare = on_one_device(model)
    if bare is not model:
        return unwrapped(bare)
    inner = _base_of(model) if read_forward(model).names_nothing else None
    return model if inner is None else unwrapped(inner())


def on_one_device(model: nn.Module) -> nn.Module:
    """The model inside torch's own wrappers for several devices or processes."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def names_another(model: nn.Module) -> bool:
    """Whether what a module takes is (also) said by a module inside, or by keys that may change."""
    wraps = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | TensorDictModuleBase)
    return wraps or _base_of(model) is not None


def _base_of(model: nn.Module) -> Callable[[], Any] | None:
    """An adapter's way to the model inside."""
    kind = type(model)
    if kind.__getattr__ is nn.Module.__getattr__ and not hasattr(kind, "get_base_model"):
        return None  # so that a module need not be asked, which takes long to say no
    base = getattr(model, "get_base_model", None)
    return base if callable(base) else None


def reads_tokens(model: nn.Module) -> nn.Module | None:
    """The outermost module whose forward names token ids or a mask, the model itself first; None where there is none."""
    for module in model.modules():
        if {"input_ids", "attention_mask"} & set(read_signature(module).names):
            return module
    return None
