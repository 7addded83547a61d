"""An accelerator that is not there: tensors that live elsewhere, and a count of how often the host waits for them.

``OnDevice`` wraps a tensor of the CPU and says that it lies on another device. Every operation on it is run on the CPU and its
result wrapped again; what a real device refuses is refused: a tensor of the host beside one of the device, NumPy, float64 where
the device has none. What makes the host wait for a real device (a number read, rows chosen by a mask, a copy to the host) is
counted with the line of ours that asked for it.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

aten = torch.ops.aten

# The size of the result, or a number on the host, follows from values on the device: the host waits for them.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::unique_dim_consecutive",
    "aten::repeat_interleave",
    "aten::bincount",
    "aten::histc",
    # LAPACK's report of success is read after each of these.
    "aten::_linalg_eigh",
    "aten::linalg_eigh",
    "aten::_linalg_svd",
    "aten::linalg_eig",
    "aten::linalg_cholesky",
    "aten::linalg_inv",
    "aten::linalg_lstsq",
}


class OnDevice(Tensor):
    """A tensor of the simulated device; ``host`` holds its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device, requires_grad: bool = False) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=device,
            requires_grad=requires_grad,
        )
        made.host = host
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.host!r}, {self.device})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mode = SimulatedDevice.current
        if mode is None:
            raise RuntimeError(f"{func}: a tensor of the simulated device outside of it.")
        return mode.run(func, args, kwargs or {})


class SimulatedDevice(TorchDispatchMode):
    """While entered, a device of the type ``kind`` exists; ``waits`` counts (operation, file:line) that made the host wait."""

    current: SimulatedDevice | None = None

    def __init__(self, *, float64: bool = True) -> None:
        super().__init__()
        _register()
        self.device = torch.device("privateuseone", 0)
        self.float64 = float64
        self.waits: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> SimulatedDevice:
        SimulatedDevice.current = self
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) goes through operations, too
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        SimulatedDevice.current = None

    def put(self, x: Tensor) -> Tensor:
        """``x`` on the device."""
        return OnDevice(x.detach().clone(), self.device, x.requires_grad)

    @property
    def count(self) -> int:
        """How often the host has waited."""
        return sum(self.waits.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    # ------------------------------------------------------------------------------------------ one operation

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``func`` on the CPU, where a real device would allow it."""
        name = func._schema.name
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        inside = [x for x in given if isinstance(x, OnDevice)]
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked)
        to_device = bool(inside)
        if asked is not None:
            to_device = asked.type == self.device.type
            kwargs = {**kwargs, "device": torch.device("cpu")}
        moves = name in ("aten::_to_copy", "aten::copy_")
        if not moves:
            outside = [x for x in given if not isinstance(x, OnDevice) and x.dim() > 0]
            indexing = name.startswith(("aten::index", "aten::_index_put"))
            if (
                inside
                and outside
                and not (indexing and all(x.dtype in (torch.int64, torch.bool) for x in outside))
            ):
                raise RuntimeError(
                    f"{name}: expected all tensors on one device, got {self.device} {tuple(inside[0].shape)} beside "
                    f"{outside[0].device} {tuple(outside[0].shape)}."
                )
        if inside and self._waits(name, args, to_device):
            self.waits[name, _line()] += 1
        host = tree_map(lambda x: x.host if isinstance(x, OnDevice) else x, (args, kwargs))
        result = func(*host[0], **host[1])
        if func._schema.is_mutable:
            changed = self._written(func, args, kwargs)
            if changed is not None:
                for x in changed if isinstance(changed, tuple) else (changed,):
                    if isinstance(x, OnDevice) and x.shape != x.host.shape:
                        with no_dispatch():  # unsqueeze_ and its like: the wrapper takes its new shape
                            func(*args, **kwargs)
                return changed
        if not to_device:
            return result
        return tree_map(self._wrapped, result)

    def _waits(self, name: str, args: tuple[Any, ...], to_device: bool) -> bool:
        if name == "aten::_to_copy":
            return not to_device
        if name == "aten::copy_":
            return isinstance(args[1], OnDevice) and not isinstance(args[0], OnDevice)
        if name.startswith("aten::index.") or name in (
            "aten::index",
            "aten::index_put_",
            "aten::index_put",
            "aten::_index_put_impl_",
        ):
            masks = [x for x in tree_iter(args[1]) if isinstance(x, OnDevice) and x.dtype == torch.bool]
            # A value put where a mask says is written without a count of the places.
            return bool(masks) and name in ("aten::index", "aten::index.Tensor")
        return name in WAITS

    def _wrapped(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, OnDevice):
            return x
        if x.dtype == torch.float64 and not self.float64:
            raise TypeError(f"{self.device.type} has no float64: asked for at {_line()}.")
        return OnDevice(x, self.device)

    @staticmethod
    def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation returns that writes into one of its arguments: that argument."""
        named = {a.name: v for a, v in zip(func._schema.arguments, args)} | kwargs
        written = [
            named[a.name]
            for a in func._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write and a.name in named
        ]
        if not func._schema.returns:
            return ()
        return None if not written else written[0] if len(func._schema.returns) == 1 else tuple(written)


def _line() -> str:
    """The line that asked: of ours, or "the model" where a library's model did."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/transformers/" in name:
            return "the model"
        if "/tdgeom/" in name and "/src/" in name:
            return f"{name.split('/src/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@cache
def _register() -> None:
    """Tell PyTorch of a device type without a driver. It stays for the life of the process."""
    backend_registration._setup_privateuseone_for_python_backend()


def moved(device: SimulatedDevice, model: nn.Module) -> nn.Module:
    """A model with its parameters and buffers on the device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(device.put(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = device.put(buffer)
    return model
