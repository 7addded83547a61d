"""Arrays, tables and lists given where a function takes tensors: made tensors at the door."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdgeom.core.devices import with_float64
from tdgeom.core.guessed_names import refuse_unknown

__all__ = ["taking_arrays", "tensor_of"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def taking_arrays(function: _Function, module: str) -> _Function:
    """``function``, public as a name of ``module``, with arrays in place of the tensors that its annotations name.

    Whatever ``numpy.asarray`` makes an array of numbers of (NumPy, pandas, JAX, lists and lists of lists) becomes a tensor of the
    same numbers, on the device of the tensors beside it; Python numbers become float64 or int64. What comes out stays as it
    is: tensors, as from a stage. Tensors pass untouched, also under ``vmap``, ``torch.compile`` and ``torch.export``; those of
    a device without float64 go to the CPU first.
    """
    kinds = {
        name: str(parameter.annotation)
        for name, parameter in inspect.signature(function).parameters.items()
        if "Tensor" in str(parameter.annotation) and "Callable" not in str(parameter.annotation)
    }
    names = list(inspect.signature(function).parameters)
    known = set(names)

    @wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        if not options.keys() <= known:
            refuse_unknown(function.__name__, options, names)
        args = tuple(with_float64(value) for value in args)
        options = {name: with_float64(value) for name, value in options.items()}
        for name, value in (*zip(names, args), *options.items()):
            if name in kinds and not isinstance(value, Tensor):
                break
        else:
            return function(*args, **options)
        device = _device((*args, *options.values()))
        taken = [
            _taken(value, kinds.get(name), device, function.__name__, name)
            for name, value in zip(names, args)
        ]
        named = {
            name: _taken(value, kinds.get(name), device, function.__name__, name)
            for name, value in options.items()
        }
        return function(*taken, *args[len(names) :], **named)

    called.__module__ = module
    return cast(_Function, called)


def _device(values: Sequence[Any]) -> torch.device:
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))


def _taken(value: Any, kind: str | None, device: torch.device, owner: str, name: str) -> Any:
    """A value as its parameter, annotated ``kind``, takes it."""
    if kind is None or isinstance(value, Tensor | TensorDictBase) or (value is None and "None" in kind):
        return value
    if isinstance(value, Mapping) and "Mapping" in kind:
        return {key: _taken(one, "Tensor", device, owner, f"{name}[{key!r}]") for key, one in value.items()}
    if kind == "Sequence[Tensor]":
        return [tensor_of(one, owner, name).to(device) for one in value]
    if isinstance(value, int | float | list | tuple) and ("float" in kind or "int" in kind):
        return value  # a number, or several, as it is annotated
    return tensor_of(value, owner, name).to(device)


def tensor_of(value: Any, owner: str, name: str) -> Tensor:
    """A tensor of the numbers in ``value``: shared memory where that is possible, the type kept where torch has it.

    Raises:
        TypeError: what is no array of numbers. ValueError: a masked array, integers beyond int64.

    >>> tensor_of([[1.0, 2.0]], "f", "x").dtype
    torch.float64
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and any(isinstance(one, Tensor) for one in value):
        return torch.stack([tensor_of(one, owner, name) for one in value])
    if isinstance(value, np.ma.MaskedArray) and np.ma.getmaskarray(value).any():
        raise ValueError(
            f"{owner}: {name} (shape {value.shape}) is a masked array, and a mask would be lost here. Drop the masked rows "
            f"first, or fill them (value.filled(...))."
        )
    try:
        array = None if isinstance(value, str | bytes) or value is None else np.asarray(value)
    except ValueError:  # lists of unequal lengths
        array = None
    if array is None or array.dtype.kind not in "fiubc":
        what = type(value).__name__ if array is None else f"{type(value).__name__} of {array.dtype}"
        raise TypeError(
            f"{owner} expects numbers as {name}: a tensor (torch.as_tensor), a NumPy array, or what numpy.asarray makes one of, "
            f"got {what}. Words are numbered first (sklearn.preprocessing.LabelEncoder)."
        )
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.dtype.itemsize == 8 and array.size and array.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{owner}: {name} holds integers beyond int64. Give ids below 2^63, or floats.")
        array = array.astype(np.int64)
    widest = {"f": np.float64, "c": np.complex128}.get(array.dtype.kind)
    if widest is not None and array.dtype.itemsize > np.dtype(widest).itemsize:
        array = array.astype(widest)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)
