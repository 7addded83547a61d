"""Checkpoints shared out among devices: a thread for each takes the next one as it is free."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from threading import Lock
from typing import Any

import torch
from torch import nn

from tdgeom.training.checkpoints import TrainedTo

__all__ = ["on_devices"]

Work = Callable[[TrainedTo, nn.Module, Any, AbstractContextManager[Any]], None]


def on_devices(
    devices: Sequence[Any], found: Iterable[TrainedTo], work: Work, done: Callable[[int], Any]
) -> None:
    """Open each checkpoint's model and do the work with it; models are opened one after the other, and one a device is open.

    ``work`` gets the checkpoint, its model, the device, and a lock under which what is shared is written. With one device
    everything happens in this thread. An error ends all: the first one is raised.

    Raises:
        ValueError: a function gives the model that another device works with.
    """
    waiting, serially, opening = deque(found), Lock(), Lock()
    open_now: dict[int, str] = {}
    failed: list[BaseException] = []

    def serve(device: Any) -> None:
        while not failed:
            with opening:
                if not waiting:
                    return
                one = waiting.popleft()
                model = one.open()
                if id(model) in open_now:
                    raise ValueError(
                        f"sweep: {one.name} is the same module as {open_now[id(model)]}, which another device works with. "
                        f"Let each checkpoint be a model of its own, or name one device."
                    )
                open_now[id(model)] = one.name
            try:
                work(one, model, device, serially)
            except BaseException as error:
                failed.append(error)
                raise
            finally:
                del open_now[id(model)]
                still = weakref.ref(model)
                del model
                if still() is not None and not one.given:  # a model that holds itself in a circle
                    gc.collect()
                if torch.cuda.is_available() and torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
            with serially:
                done(1)

    if len(devices) == 1:
        serve(devices[0])
        return
    with ThreadPoolExecutor(len(devices)) as pool:
        running = [pool.submit(copy_context().run, serve, device) for device in devices]
    for one in running:
        one.result()
