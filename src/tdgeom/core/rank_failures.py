"""Ranks that fail together: a flag beside the work, a heartbeat, and meetings that end when another rank has failed.

A collective of torch waits for the group's whole timeout where one rank has raised and lives on. Here no rank enters a collective
before all have come (:func:`together`), and who waits looks at a flag in the group's store meanwhile. A thread of each rank
says that its process lives, looks after the next rank, and notes the flag.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from tdgeom.core.one_rank import is_alone
from tdgeom.core.torch_internals import default_group, default_store, group_timeout
from tdgeom.core.warnings import tell

__all__ = ["RankFailed", "check_ranks", "fail_together", "forward_together", "together", "watched"]

Given = ParamSpec("Given")
Result = TypeVar("Result")

_PERIOD = 0.25  # seconds between two looks at the flag
_BEAT = 4  # looks between two heartbeats
_LOST = 8  # heartbeats in a row that may be left out by a rank whose process cannot be seen from here
_FAREWELL = 3.0  # seconds that a rank which leaves waits until the others know why
_SOON = 10.0  # seconds that ranks may begin later than others, before it is said
_ALIKE = (
    "Every rank of the group must make the call, with the same arguments: not behind 'if rank == 0'. What one rank is to do by "
    "itself goes into tg.alone(): with tg.alone(): tg.run(...)."
)
_LONGEST = 4000  # characters of an error that travel


class RankFailed(RuntimeError):
    """Another rank of the process group has failed, and this one has ended with it; ``rank`` is the number of that one."""

    def __init__(self, rank: int, said: str) -> None:
        super().__init__(said)
        self.rank = rank


_NUMBERS: WeakKeyDictionary[Any, Iterator[int]] = WeakKeyDictionary()  # of the works of each process group
_current: _Watch | None = None


@contextmanager
def watched(work: str) -> Iterator[None]:
    """Inside, a rank that fails ends the work on all ranks, and nobody leaves before all have come to the end.

    An exception that leaves the block is told to the others, which raise :class:`RankFailed` with its rank and text as soon as
    they wait for others (:func:`together`) or look (:func:`check_ranks`); so is a process that is gone. A block inside another
    is part of that. Nothing happens without a process group, or with one that keeps no store.

    Args:
        work: what is done, for messages.

    >>> with watched("run"):
    ...     check_ranks()
    """
    global _current
    store = _store() if _current is None else None
    if store is None:
        yield
        return
    watch = _current = _Watch(work, store)
    try:
        watch.begin()
        try:
            yield
            watch.meet("the end")
        except BaseException as error:
            watch.tell(error)
            raise
    finally:
        _current = None
        watch.leave()


def fail_together(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function that all ranks call, ``watched``.

    >>> fail_together(lambda rows: rows + 1)(2)
    3
    """

    @functools.wraps(function)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with watched(function.__name__):
            return function(*args, **kwargs)

    return called


@contextmanager
def together(place: str) -> Iterator[None]:
    """A collective, entered once all ranks have come to it; where it breaks, the error names the rank that is gone.

    Raises:
        RankFailed: another rank has failed. RuntimeError: another rank has come to another place.
    """
    watch = _current
    if watch is None:
        yield
        return
    watch.meet(place)
    try:
        yield
    except RuntimeError as error:
        if type(error) is RuntimeError or isinstance(error, dist.DistError):  # what backends raise
            watch.explain(error)
        raise


@contextmanager
def forward_together(groups: Sequence[Any]) -> Iterator[None]:
    """A pass of a model that ranks run together, over these process groups.

    Who fails inside leaves the others waiting in a collective of the model's: once they have been told and have not come out of
    it, the groups are destroyed on this rank, which breaks their connections. They raise :class:`RankFailed`.
    """
    try:
        yield
    except BaseException as error:
        watch = _current
        if watch is not None and groups:
            if _is_broken_connection(error):
                watch.explain(error)
            elif watch.failure is None:
                watch.held = groups
        raise


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a backend says that another rank does not answer."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out waiting")
    return type(error) is RuntimeError and any(word in str(error) for word in words)


def check_ranks() -> None:
    """Raise :class:`RankFailed` where another rank is known to have failed; costs a look at a flag of this process."""
    if _current is not None:
        _current.check()


def _store() -> Any:
    """A connection of one's own to the store of the process group."""
    if is_alone() or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    store = default_store()
    if store is None:
        return None
    number = next(_NUMBERS.setdefault(default_group(), count()))
    return dist.PrefixStore(f"tdgeom/{number}", store.clone())


class _Watch:
    """One piece of work that ranks do together: its flag, its heartbeat and its meetings.

    In the store: ``who/r`` the process of rank r, ``beat/r`` its heartbeat, ``failed`` the flag, ``heard``, ``out`` and ``left``
    how many ranks know of it, have ended by it, and have ended without it, ``n/here/place`` how many have come to meeting n,
    and ``n/all`` once all have.
    """

    def __init__(self, work: str, store: Any) -> None:
        self.work, self.store = work, store
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.failure: RankFailed | None = None
        self.held: Sequence[Any] = ()  # process groups in which others may wait for this rank
        self._meetings, self._began = 0, time.monotonic()
        self._next_look = _SOON  # seconds after which ranks that are absent are looked for
        self._awaited = self.world  # ranks that will hear of a failure
        self._heard, self._lock, self._stop = False, Lock(), Event()
        self._beats = store.clone()  # a connection serves one call at a time
        self._thread = Thread(target=self._watch, name="tdgeom heartbeat", daemon=True)

    def begin(self) -> None:
        """Say who this is, and begin to look."""
        self.store.set(f"who/{self.rank}", json.dumps(_this_process()))
        self._thread.start()

    def check(self) -> None:
        """Raise what another rank has failed with."""
        if self.failure is not None:
            raise RankFailed(self.failure.rank, str(self.failure))

    def meet(self, place: str) -> None:
        """Wait until all have come."""
        number, self._meetings = self._meetings, self._meetings + 1
        begin, pause = time.monotonic(), 0.0
        with self._reaching_store():
            if self.store.add(f"{number}/here/{place}", 1) == self.world:
                self.store.set(f"{number}/all", place)
                self.store.delete_key(f"{number}/here/{place}")
                self.store.delete_key(f"{number - 1}/all")  # where nobody waits any more
                return
            while not self.store.check([f"{number}/all"]):
                self.check()
                if pause >= _PERIOD:
                    self._refuse_other_place(number, place)
                    self._refuse_absent()
                time.sleep(pause)
                pause = min((time.monotonic() - begin) / 10, _PERIOD)

    def explain(self, error: BaseException) -> None:
        """Raise what lies behind a collective that broke: a rank that is gone is missed a little later."""
        end = time.monotonic() + _PERIOD * _BEAT * (_LOST + 2)
        while self.failure is None and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(_PERIOD / 5)
        if self.failure is not None:
            raise RankFailed(self.failure.rank, str(self.failure)) from error

    def tell(self, error: BaseException) -> None:
        """Raise the flag, unless another rank has; with the flag, or the store, wait a little until the others know."""
        end = time.monotonic() + _FAREWELL
        with suppress(RuntimeError):
            if not isinstance(error, RankFailed):
                self._raise_flag(self.store, self.rank, f"failed: {type(error).__name__}: {error}"[:_LONGEST])
            self._note_heard(self.store)
            self.store.add("out", 1)
            waits = self.rank == 0 or not isinstance(error, RankFailed)
            while waits and self.store.add("heard", 0) < self._awaited and time.monotonic() < end:
                time.sleep(0.02)
            while self.held and self.store.add("out", 0) < self.world and time.monotonic() < end:
                time.sleep(0.02)
            if self.held and self.store.add("out", 0) < self.world:
                for group in self.held:
                    dist.destroy_process_group(group)

    def leave(self) -> None:
        """End the heartbeat; rank 0, whose process may hold the store, goes last."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_FAREWELL)  # a store whose machine is gone may not answer
        if self.failure is not None:
            return
        end = time.monotonic() + _FAREWELL
        with suppress(RuntimeError):
            self.store.set(f"beat/{self.rank}", "left")
            left = self.store.add("left", 1)
            while self.rank == 0 and left < self.world and time.monotonic() < end:
                time.sleep(0.001)
                left = self.store.add("left", 0)

    @contextmanager
    def _reaching_store(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            self._note_lost_store(error)
            self.check()

    def _refuse_other_place(self, number: int, place: str) -> None:
        """All ranks must wait for the same: else they would wait for ever."""
        other = self.store.compare_set(f"{number}/at", "", place).decode()
        if other != place:
            raise RuntimeError(
                f"{self.work}: rank {self.rank} has come to {place!r}, another rank to {other!r}. All ranks must do the same "
                f"steps: the same pipeline with the same settings."
            )

    def _refuse_absent(self) -> None:
        """A rank that never begins is waited for as long as the group waits for one."""
        waited = time.monotonic() - self._began
        if waited < self._next_look:
            return
        limit = group_timeout()
        absent = [rank for rank in range(self.world) if not self.store.check([f"who/{rank}"])]
        if absent and waited > limit:
            raise RuntimeError(
                f"{self.work}: the ranks {absent} have not begun within the {limit:.0f} s of the process group's timeout. "
                f"{_ALIKE}"
            )
        if absent:  # they may be loading a model
            self._next_look = limit
            tell(
                f"{self.work}: this is rank {self.rank}, which has waited {waited:.0f} s for the ranks {absent}: they have not "
                f"called it. It waits {limit:.0f} s in all, the process group's timeout. {_ALIKE}",
                UserWarning,
                at_once=True,
            )

    # ------------------------------------------------------------------------------------------------ the heartbeat's thread

    def _watch(self) -> None:
        looks = silent = 0
        before = b""
        follower = (self.rank + 1) % self.world
        while True:
            try:
                if self.failure is None and self._beats.check(["failed"]):
                    self._take(self._beats.get("failed"))
                if self.failure is not None:
                    self._note_heard(self._beats)
                if looks % _BEAT == 0:
                    self._beats.set(f"beat/{self.rank}", str(looks))
                    beat = self._read(f"beat/{follower}")
                    silent = silent + 1 if beat == before else 0
                    before = beat
                    if self.failure is None and beat != b"left" and (who := self._read(f"who/{follower}")):
                        self._miss(follower, _lives(json.loads(who)), silent)
            except RuntimeError as error:
                self._note_lost_store(error)
                return
            if self._stop.wait(_PERIOD):
                return
            looks += 1

    def _read(self, key: str) -> bytes:
        """What a key holds; nothing where it is not there yet, for which the store would wait."""
        return self._beats.get(key) if self._beats.check([key]) else b""

    def _miss(self, rank: int, lives: bool | None, silent: int) -> None:
        """Flag a rank whose process has ended, or whose heartbeat has stayed away where its process cannot be seen."""
        if lives is None and silent > _LOST:
            said = f"is gone: no heartbeat for {silent * _BEAT * _PERIOD:.0f} s"
        elif lives is False and self._read(f"beat/{rank}") != b"left":
            said = "is gone: its process has ended without a word (killed, or out of memory?)"
        else:
            return
        self._raise_flag(self._beats, rank, said, gone=True)

    def _raise_flag(self, store: Any, rank: int, said: str, gone: bool = False) -> None:
        told = json.dumps({"rank": rank, "said": said, "gone": gone})
        self._take(store.compare_set("failed", "", told))

    def _take(self, told: bytes) -> None:
        found = json.loads(told)
        self._awaited = self.world - bool(found["gone"])
        self.failure = RankFailed(found["rank"], f"{self.work}: rank {found['rank']} {found['said']}")

    def _note_heard(self, store: Any) -> None:
        with self._lock:
            if not self._heard:
                self._heard = True
                store.add("heard", 1)

    def _note_lost_store(self, error: Exception) -> None:
        if self.failure is None:
            self._awaited = 0
            self.failure = RankFailed(
                0,
                f"{self.work}: rank 0 is gone, or whoever else holds the process group's store: it does not answer "
                f"({str(error).splitlines()[0][:200]})",
            )


def _this_process() -> dict[str, Any]:
    """What tells others on this machine whether this process lives."""
    return {"machine": _machine(), "pid": os.getpid(), "began": _began(os.getpid())}


def _machine() -> str:
    """This machine since it was started, and the process numbers that count here."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot}"


def _lives(process: dict[str, Any]) -> bool | None:
    """Whether a process runs; None where that cannot be seen from here."""
    if process["machine"] != _machine() or process["began"] is None:
        return None
    return _began(process["pid"]) == process["began"]


def _began(pid: int) -> str | None:
    """When a process was started; None where it has ended (also where nobody has asked for its exit code), or cannot be seen."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    return None
