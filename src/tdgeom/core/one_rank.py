"""One rank by itself: what a process does alone, though it is in a process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["alone", "is_alone"]

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works as if it were the only one: nothing is shared out, compared or waited for.

    For what one rank of a process group does by itself, such as ``if rank == 0: with tg.alone(): tg.run(...)``; without it all
    ranks call ``run``, ``analyze_model``, ``compare`` and ``Probing.run`` alike. Also for processes of one launcher that have
    nothing to do with one another. A model whose parts lie on several ranks cannot be run by one of them, and is refused.

        >>> import torch, tdgeom as tg
        >>> with tg.alone():
        ...     result = tg.run(tg.StreamingCovariance(), [{"tokens": torch.eye(4)}])
        >>> int(result["run", "rows"])
        4
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def is_alone() -> bool:
    """Whether this is inside ``alone``."""
    return _alone.get()
