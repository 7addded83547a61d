"""A command in several processes that a launcher (``torchrun``) has started: one group, one output, one exit code."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

__all__ = ["SHARED", "Ranks", "launched"]

SHARED = frozenset(
    {"analyze", "compare", "demo", "dimension", "overlap", "rerun", "store"}
)  # what ranks do together
_NUMBER = count()
_PATIENCE = 10.0  # seconds for which a rank that failed waits for the others to end by themselves
_SINCE_ANOTHER = 6.0  # and for rank 0 to say the same


class Ranks:
    """This process among those that a launcher started, and where they leave word of how they ended."""

    def __init__(self) -> None:
        import torch
        from torch import distributed

        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if devices:
            torch.cuda.set_device(local % devices)
        apart = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) <= devices
        backend = "nccl" if apart and distributed.is_nccl_available() else "gloo"
        try:
            store, self.rank, self.world = next(distributed.rendezvous("env://"))
        except ValueError as error:
            raise ValueError(
                f"RANK and WORLD_SIZE say that this is one of several processes, but they cannot find each other: {error} Start "
                f"them with torchrun --nproc-per-node N -m tdgeom ..., or take both out of the environment."
            ) from error
        store = distributed.PrefixStore(
            f"tdgeom/{next(_NUMBER)}", store
        )  # of several commands each has its own
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        self.store: Any = distributed.PrefixStore("ended", store)

    @contextlib.contextmanager
    def output(self) -> Iterator[None]:
        """Nothing is printed on ranks other than the first."""
        with contextlib.ExitStack() as stack:
            if self.rank:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield

    def is_said(self, error: str) -> bool:
        """Whether rank 0 has said it: one has failed with the other, or both with the same words."""
        if not self.rank:
            self.store.set("error", error)
            return False
        if not self._comes("error", _SINCE_ANOTHER):
            return False
        told = self.store.get("error").decode()
        return error in told or told in error

    def agreed(self, code: int) -> int:
        """The exit code of all: the largest. A rank that ended well waits for rank 0, which has the results to finish."""
        from torch import distributed

        self.store.set(f"code {self.rank}", str(code))
        try:
            if self.rank:
                if self._comes("code of all", _PATIENCE if code else None):
                    code = int(self.store.get("code of all"))
                self.store.add("have read", 1)
            else:
                until = time.monotonic() + _PATIENCE
                for rank in range(1, self.world):
                    if self._comes(f"code {rank}", until - time.monotonic()):
                        code = max(code, int(self.store.get(f"code {rank}")))
                self.store.set("code of all", str(code))
                while self.store.add("have read", 0) < self.world - 1 and time.monotonic() < until:
                    time.sleep(0.02)  # the store may live in this process
        except RuntimeError:  # the process that has the store is gone
            return code or 1
        if (
            not code or distributed.get_backend() == "gloo"
        ):  # with NCCL a collective that broke off may be waited for
            distributed.destroy_process_group()
        return code

    def _comes(self, key: str, seconds: float | None) -> bool:
        """Whether a word comes in time; None: however long it takes."""
        begin = time.monotonic()
        while not self.store.check([key]):
            if seconds is not None and time.monotonic() - begin > seconds:
                return False
            time.sleep(0.02)
        return True


def launched() -> Ranks | None:
    """The group of the processes that a launcher started; None where this is the only one, or a group is there already."""
    world = os.environ.get("WORLD_SIZE", "1")
    if "RANK" not in os.environ or not world.isdigit() or int(world) < 2:
        return None
    from torch import distributed

    if not distributed.is_available() or distributed.is_initialized():
        return None
    return Ranks()
