"""The surroundings in which a number is computed: the same whatever autocast, default dtype or device is set outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

__all__ = ["steady"]


def steady(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off, float32 as default dtype and in full precision in products, new tensors on ``device``.

    What differs outside is put back afterwards. Gradients are left as they are set.

        >>> with torch.autocast("cpu", dtype=torch.bfloat16), steady(torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    if torch.compiler.is_compiling():  # which follows autocast, and compiles for the rest as it stands
        return torch.autocast(device.type, enabled=False)
    plain = not torch.is_autocast_enabled(device.type) and torch.get_default_dtype() == torch.float32
    # a default device is a mode on torch's stack, and asking for it by name takes as long as all the rest
    if plain and torch.get_float32_matmul_precision() == "highest" and not _modes():
        return nullcontext()
    return _steady(device)


# a torch that does not count says: some
_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 1)


@contextmanager
def _steady(device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        if (precision := torch.get_float32_matmul_precision()) != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device(device))
        yield
