"""Which call is meant of a module that runs several times in one pass."""

from __future__ import annotations

from tdgeom.model.structure.resolved_site import ResolvedSite

CallsSpec = str | int | None


class FiredTooOften(RuntimeError):
    """A module ran more often in one pass than a site of it can mean."""


def check_calls(calls: CallsSpec) -> CallsSpec:
    """``None``, ``"first"``, ``"last"``, ``"all"`` or a number from 0, as given (-1 is the last); anything else is an error.

    >>> check_calls(-1)
    'last'
    """
    if calls is None or calls in ("first", "last", "all"):
        return calls
    if isinstance(calls, int) and not isinstance(calls, bool) and calls >= -1:
        return "last" if calls == -1 else calls
    raise ValueError(f"calls= expects 'first', 'last', 'all' or the number of a call from 0, got {calls!r}.")


def is_meant(calls: CallsSpec, count: int, total: int | None = None) -> bool:
    """Whether the call after ``count`` others is meant; of "last" every one without a ``total``, the newest then winning.

    >>> [is_meant("first", 0), is_meant(1, 0), is_meant("last", 1, total=2), is_meant(None, 0)]
    [True, False, True, True]
    """
    if calls == "first" or calls is None:
        return count == 0
    if calls == "last":
        return total is None or count == total - 1
    return calls in ("all", count)


def fired_too_often(entry: ResolvedSite, fired: int) -> FiredTooOften:
    """The error where nobody has said which call is meant."""
    shared = entry.calls > 1
    remedy = (
        "a module that runs once, sites='module_output:<path>'"
        if shared
        else (
            "calls='first', 'last', 'all' or a number from 0 says which call is meant, skip_classes= leaves such modules "
            "(activations, say) out of globs; or sites='module_output:<path>' of a module that runs once"
        )
    )
    return FiredTooOften(
        f"the site {str(entry.site)!r} fired {fired} times in one forward pass, expected {entry.calls}: the module "
        f"{entry.module_path!r} runs more than once. Remedy: {remedy}, or list the shared block once a layer."
    )
