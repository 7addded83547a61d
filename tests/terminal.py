"""What tests of the command line check of every mistake."""

from __future__ import annotations


def refused(result, *parts):
    """Exit code 2, one line on stderr that holds every part, nothing on stdout."""
    code, out, err = result
    assert code == 2 and out == ""
    assert err.startswith("tdgeom: error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err
    return True
