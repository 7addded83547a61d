"""A stage's settings: what it was made with, as plain data, for its ``repr``, for metadata, and to make it again."""

from __future__ import annotations

import hashlib
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, cached_property, partial, wraps
from os import PathLike, fspath
from types import CodeType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdgeom.core.guessed_names import is_about, refuse_unknown
from tdgeom.core.visible_text import visible

__all__ = ["Configured", "differences", "made_again", "plain_setting"]

_SAME = {type(None), bool, int, str}  # plain as they are
_SMALL = 1024  # values of a tensor that are written out; of a larger one the hash
_Self = TypeVar("_Self", bound="Configured")


class _ConstructorSignature:
    """What ``help`` and ``inspect.signature`` show of a class: all that ``**keys`` passes on stands by its own name."""

    def __get__(self, instance: object, owner: Any) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")  # an instance is called with tensors, not with settings
        own = set(_signature(owner).parameters)
        if "__init__" not in owner.__dict__:
            own -= _FOR_SUBCLASSES
        parameters = [
            p for name, p in _parameters(owner).items() if name in own or name not in _FOR_SUBCLASSES
        ]
        shown = [p if p.name in own else p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        last = ("in_keys", "out_keys")
        return inspect.Signature(sorted(shown, key=lambda p: (p.kind, p.name in last)))


_FOR_SUBCLASSES = {"self", "reads", "writes", "optional", "further"}


class Configured:
    """A module that knows what ``__init__`` was given.

    A subclass declares nothing: arguments are taken from the call. Functions, models and large tensors are named, not held.
    """

    __signature__ = _ConstructorSignature()
    _kinds: dict[str, type[Configured]] = {}
    _told_anew: frozenset[str] = (
        frozenset()
    )  # arguments of which ``_current`` says at every asking what they are

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Configured._kinds[cls.__name__] = cls
        if "__init__" in cls.__dict__:
            setattr(cls, "__init__", _noting(cls.__dict__["__init__"]))  # noqa: B010  # mypy knows no other way

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments down; unpickling and copies, which call this without any, bring their own."""
        if is_dataclass(cls):  # whose __init__ is written after the class was noted
            refuse_unknown(cls.__name__, kwargs, _parameters(cls))
        make = super().__new__
        self = make(cls) if make is object.__new__ else make(cls, *args, **kwargs)
        self.__dict__["_call"] = _noted(cls, args, kwargs)
        return self

    @cached_property
    def _given(self) -> dict[str, Any]:
        """What ``__init__`` was given, by name: named where somebody asks, which few ever do."""
        return _bound(type(self), *self.__dict__["_call"])

    def _set_plain(self, **values: Any) -> None:
        """Set attributes that are words, numbers and lists: by assignment a module looks for parameters and modules in each."""
        self.__dict__.update(values)

    def _set_keys(self, **keys: list[Any]) -> None:
        """Set ``in_keys`` or ``out_keys``, properties for which a module's assignment would look for parameters first."""
        for name, listed in keys.items():
            object.__setattr__(self, name, listed)

    def settings(self) -> dict[str, Any]:
        """The arguments of ``__init__`` by name, as plain data; one whose attribute was set to something else since, as set.

        Numbers, strings, None and lists are themselves; a tuple is ``{"tuple": [...]}``, a slice ``{"slice": [...]}``, a dtype
        ``{"dtype": name}``, a function ``{"function": qualified name}`` (a lambda also a hash of its code), a stage
        ``{"made": class, "settings": {...}}``, a model ``{"model": class}``, a tensor its values or, above 1,024 of them, its
        SHA-256, a TensorDict the SHA-256 of what it holds.

            >>> import tdgeom as tg
            >>> tg.TwoNN(discard=0.2).settings()["discard"]
            0.2
        """
        return {name: plain_setting(v) if _is_tensors(v) else v for name, v in self._current().items()}

    def _current(self) -> dict[str, Any]:
        """What was given, or what the attribute of that name has been set to since ``__init__``."""
        held, made = self.__dict__, self.__dict__.get("_made", {})
        now = {name: _kept(held[name]) for name in self._given if name in held}
        changed = {
            name: value for name, value in now.items() if name not in made or not _alike(value, made[name])
        }
        return self._given | changed

    def all_settings(self) -> dict[str, Any]:
        """``settings()``, and the defaults of what ``**keys`` would have passed on: spelt out or not, they are the same."""
        usual = _parameters(cast(Any, type(self))).values()
        told = {p.name: _default(p) for p in usual if p.default is not inspect.Parameter.empty}
        return told | self.settings()

    def effective_settings(self) -> dict[str, Any]:
        """``all_settings()`` as the attributes of their names have them: one form of what can be said in two."""
        held = {n: plain_setting(self.__dict__[n]) for n in self._given if n in self.__dict__}
        return self.all_settings() | held

    @classmethod
    def from_settings(cls: type[_Self], settings: Mapping[str, Any], **live: Any) -> _Self:
        """Made again from ``settings()``.

        Args:
            settings: what ``settings()`` gave, also after a way through JSON.
            live: values that plain data cannot hold (functions, models, large tensors), by argument name.

        Raises:
            TypeError: a value that must be given again.

            >>> import tdgeom as tg
            >>> tg.TwoNN.from_settings(tg.TwoNN(discard=0.2).settings())
            TwoNN(discard=0.2)
        """
        values = {name: value for name, value in settings.items() if name not in live}
        made = {name: made_again(value, f"{cls.__name__}.{name}") for name, value in values.items()} | live
        parameters = list(_parameters(cast(Any, cls)).values())
        listed = [n for n, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL]
        before = parameters[: listed[0]] if listed else []  # what stands before *args goes by position too
        positional = [made.pop(p.name) for p in before if p.name in made]
        positional += [value for n in listed for value in made.pop(parameters[n].name, [])]
        return cls(*positional, **made)

    def __repr__(self) -> str:
        return _call_shown(type(self).__name__, self._current(), type(self))


def _noting(init: Callable[..., None]) -> Callable[..., None]:
    """``__init__`` that notes how it left the attributes of its arguments' names: ``self.scale = log(scale)`` is no change."""

    @wraps(init)
    def __init__(self: Configured, *args: Any, **kwargs: Any) -> None:
        if type(self).__init__ is not __init__:  # of a class above the one that is made
            return init(self, *args, **kwargs)
        try:
            init(self, *args, **kwargs)
        except TypeError as error:
            known = inspect.signature(type(self)).parameters
            unknown = [name for name in kwargs if name not in known]
            if unknown and is_about(error, unknown[0]):
                refuse_unknown(type(self).__name__, unknown, known)
            raise
        held, own, noted = self.__dict__, _names(cast(Any, type(self))), self.__dict__["_call"]
        given = dict(zip(own, zip(args, noted[0]))) | {n: (v, noted[1].get(n)) for n, v in kwargs.items()}
        made = {name: held[name] for name in (*own, *kwargs) if name in held}
        # what was put there as it came is known already
        held["_made"] = {
            name: given[name][1] if name in given and given[name][0] is value else _kept(value)
            for name, value in made.items()
        }

    return __init__


def _kept(value: Any) -> Any:
    """Tensors themselves, of anything else its plain form: never a model, nor a list that may change later."""
    if isinstance(value, list) and _is_tensors(value):
        return list(value)
    return value if type(value) in _SAME or _is_tensors(value) else plain_setting(value)


def _is_tensors(value: Any) -> bool:
    """Whether something is a tensor, a TensorDict or a list of these: what it holds is looked at where somebody asks."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(one, TensorDictBase) for one in value)
    return isinstance(value, Tensor | TensorDictBase)


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list) and _is_tensors(a):
        return len(a) == len(b) and all(map(operator.is_, a, b))
    return a is b if _is_tensors(a) or _is_tensors(b) else a == b


def plain_setting(value: Any) -> Any:
    """One setting as plain data; see ``Configured.settings``."""
    kind = type(value)
    if kind in _SAME:
        return value
    if kind is float and math.isfinite(value):
        return value
    if isinstance(value, bool | int):
        return value
    if kind is list:
        return [plain_setting(part) for part in value]
    if kind is tuple:
        return {"tuple": [plain_setting(part) for part in value]}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, nn.Module) and not isinstance(value, Configured | TensorDictBase):
        return _named(value)
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, np.generic):
        return plain_setting(value.item())
    if isinstance(value, list):
        return [plain_setting(part) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [plain_setting(part) for part in value]}
    if isinstance(value, set | frozenset):
        return {"set": [plain_setting(part) for part in sorted(value, key=repr)]}
    if isinstance(value, slice | range):
        return {type(value).__name__: [value.start, value.stop, value.step]}
    if isinstance(value, TensorDictBase):
        return {"object": type(value).__name__, "sha256": _content(value)}
    if isinstance(value, Mapping):
        if all(isinstance(name, str) for name in value) and not set(value) & _TAGS:
            return {str(name): plain_setting(part) for name, part in value.items()}
        return {"mapping": [[plain_setting(name), plain_setting(part)] for name, part in value.items()]}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        return _plain_tensor(value)
    if isinstance(value, Configured):
        return {"made": type(value).__name__, "settings": value.settings()}
    return _named(value)


def _plain_tensor(value: Tensor) -> dict[str, Any]:
    about = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    value = value.detach().cpu()
    if value.numel() <= _SMALL and not value.is_complex():
        return {"tensor": [plain_setting(one) for one in value.flatten().tolist()], **about}
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"tensor_sha256": hashlib.sha256(raw).hexdigest(), **about}


def _content(value: TensorDictBase) -> str:
    """The SHA-256 of what a TensorDict holds, by key."""
    leaves = sorted(value.items(True, True), key=lambda item: str(item[0]))
    told = [[str(key), _plain_tensor(one) if isinstance(one, Tensor) else repr(one)] for key, one in leaves]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _named(value: Any) -> dict[str, Any]:
    """What plain data cannot hold, by its name."""
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: plain_setting(getattr(value, field.name)) for field in fields(value)}
        return {"made": type(value).__name__, "settings": held}
    if isinstance(value, nn.Module):
        return {"model": type(value).__name__}
    if isinstance(value, partial):
        return {"partial": [plain_setting(part) for part in (value.func, value.args, value.keywords)]}
    if callable(value) and hasattr(value, "__qualname__"):
        return _function(value)
    parameters = getattr(value, "get_params", None)  # scikit-learn's estimators
    told = {} if parameters is None else {"parameters": plain_setting(parameters(deep=False))}
    return {"object": type(value).__name__, **told}


def _function(value: Any) -> dict[str, Any]:
    """A function by its name; one that shares its name with others (a lambda, a function inside one) by its code too."""
    named = {"function": f"{value.__module__}.{value.__qualname__}"}
    if "<" not in value.__qualname__ or not hasattr(value, "__code__"):
        return named
    around = [cell.cell_contents for cell in value.__closure__ or ()]
    around = [part.__qualname__ if hasattr(part, "__qualname__") else plain_setting(part) for part in around]
    text = repr((_code(value.__code__), plain_setting(value.__defaults__), around))
    return {**named, "code": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _code(code: CodeType) -> tuple[object, ...]:
    constants = [_code(one) if isinstance(one, CodeType) else plain_setting(one) for one in code.co_consts]
    return code.co_code, code.co_names, constants


_TAGS = {
    "tuple",
    "set",
    "slice",
    "range",
    "mapping",
    "dtype",
    "device",
    "float",
    "tensor",
    "tensor_sha256",
    "made",
}
_TAGS |= {"model", "function", "partial", "object"}


def made_again(value: Any, where: str) -> Any:
    """One setting from its plain form; an error for what plain data cannot hold."""
    if isinstance(value, list):
        return [made_again(part, where) for part in value]
    if not isinstance(value, dict):
        return value
    tag = next((name for name in value if name in _TAGS), None)
    if tag is None:
        return {name: made_again(part, where) for name, part in value.items()}
    held: Any = value[tag]
    if tag in ("tuple", "set"):
        return (tuple if tag == "tuple" else frozenset)(made_again(part, where) for part in held)
    if tag in ("slice", "range"):
        return (slice if tag == "slice" else range)(*held)
    if tag == "mapping":
        return {made_again(name, where): made_again(part, where) for name, part in held}
    if tag == "float":
        return float(held)
    if tag == "device":
        return torch.device(held)
    if tag == "tensor":
        values, dtype = [made_again(one, where) for one in held], getattr(torch, value["dtype"])
        flat = torch.tensor(values, dtype=dtype, device="cpu")
        return flat.reshape(value["shape"])
    if tag == "dtype" and isinstance(getattr(torch, str(held), None), torch.dtype):
        return getattr(torch, held)
    if tag == "made" and held in Configured._kinds:
        return Configured._kinds[held].from_settings(value["settings"])
    name = where.rpartition(".")[2]
    raise TypeError(
        f"{where} was {_shown(value)}, which plain data cannot hold. Give it again: from_settings(settings, {name}=...)."
    )


def _call_shown(name: str, settings: Mapping[str, Any], kind: Any) -> str:
    """A class called with those settings that are not its defaults."""
    usual = {} if kind is None else _parameters(kind)
    told = [
        f"{argument}={_shown(value)}"
        for argument, value in settings.items()
        if argument not in usual or _is_tensors(value) or value != _default(usual[argument])
    ]
    return f"{name}({', '.join(told)})"


def _default(parameter: inspect.Parameter) -> Any:
    return [] if parameter.kind is parameter.VAR_POSITIONAL else plain_setting(parameter.default)


def _shown(value: Any) -> str:
    """A plain setting as one would write it."""
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, TensorDictBase):
        return type(value).__name__
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value[:8]))}{', ...' if len(value) > 8 else ''}]"
    if not isinstance(value, dict):
        return repr(value)
    tag = next((name for name in value if name in _TAGS), None)
    if tag is None:
        return "{" + ", ".join(f"{name!r}: {_shown(part)}" for name, part in value.items()) + "}"
    held = value[tag]
    if tag in ("tuple", "set"):
        inside = ", ".join(map(_shown, held))
        return f"({inside}{',' if len(held) == 1 else ''})" if tag == "tuple" else "{" + inside + "}"
    if tag in ("slice", "range"):
        return f"{tag}({', '.join(map(str, held))})"
    if tag == "mapping":
        return "{" + ", ".join(f"{_shown(name)}: {_shown(part)}" for name, part in held) + "}"
    if tag in ("tensor", "tensor_sha256"):
        return f"tensor of shape {tuple(value['shape'])}"
    if tag == "made":
        return _call_shown(held, value["settings"], Configured._kinds.get(held))
    if tag == "partial":
        return f"partial({', '.join(map(_shown, held))})"
    return held.rpartition(".")[2] if tag == "function" else str(held)


def differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """Where two records of plain data differ, a line each.

    >>> differences({"a": [1, 2]}, {"a": [1, 3]})
    ['a[1] is 2 there and 3 here']
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = sorted(set(found) | set(wanted))
        return [
            one for name in names for one in differences(found.get(name), wanted.get(name), f"{where}.{name}")
        ]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return [
            one
            for number, pair in enumerate(zip(found, wanted))
            for one in differences(*pair, f"{where}[{number}]")
        ]
    if found == wanted:
        return []
    return [visible(f"{where.lstrip('.')} is {str(found)[:120]} there and {str(wanted)[:120]} here")]


# ------------------------------------------------------------------------------------------------ what was given


@cache
def _parameters(cls: Any) -> dict[str, inspect.Parameter]:
    """The arguments of ``__init__`` by name; where it passes ``**keys`` on, those of the class above it too."""
    found: dict[str, inspect.Parameter] = {}
    for one in cls.__mro__:
        if "__init__" not in one.__dict__:
            continue
        own = list(inspect.signature(one.__dict__["__init__"]).parameters.values())[1:]
        found |= {
            p.name: p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD and p.name not in found
        }
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own):
            break
    return found


@cache
def _signature(cls: Any) -> inspect.Signature:
    return inspect.signature(cls.__init__)


@cache
def _names(cls: Any) -> tuple[str, ...]:
    """The arguments of a class's own ``__init__``, in order, without ``**keys``."""
    own = list(_signature(cls).parameters.values())[1:]
    return tuple(p.name for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD)


_Noted = tuple[tuple[Any, ...], dict[str, Any]]


def _noted(cls: type[Configured], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Noted:
    """The arguments of a call, as they are now."""
    if anew := cls._told_anew:
        names = (*_names(cast(Any, cls)), *[""] * len(args))
        args = tuple(None if name in anew else value for name, value in zip(names, args))
        kwargs = {name: None if name in anew else value for name, value in kwargs.items()}
    return tuple(map(_kept, args)), {name: _kept(value) for name, value in kwargs.items()}


def _bound(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Noted arguments by name, those left out at their own defaults; {} where they do not fit (``__init__`` will say so)."""
    signature = _signature(cls)
    try:
        bound = signature.bind(None, *args, **kwargs).arguments
    except TypeError:
        return {}
    given: dict[str, Any] = {}
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= bound.get(parameter.name, {})
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            listed = bound.get(parameter.name, ())
            given[parameter.name] = [plain_setting(v) if isinstance(v, Tensor) else v for v in listed]
        else:
            usual = parameter.default
            given[parameter.name] = bound[parameter.name] if parameter.name in bound else _kept(usual)
    unsaid = () if "__init__" in cls.__dict__ else _FOR_SUBCLASSES  # what such a class never meant to take
    return {name: one for name, one in given.items() if one is not None or name not in unsaid}
