"""Warnings: at the user's line, with the site, once, from threads and from under ``vmap`` too."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.core.warnings import UndefinedMeasureWarning

CONSTANT, ROWS = torch.ones(3, 20, 4), torch.randn(3, 20, 4)


def told(call):
    """The warnings of a call, and the line on which it was made."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [w for w in seen if issubclass(w.category, UndefinedMeasureWarning)]


CALLS = {
    "a function": lambda: F.linear_cka(CONSTANT[0], ROWS[0]),
    "a batch": lambda: F.cca_mean(CONSTANT, ROWS),
    "vmap": lambda: torch.vmap(F.linear_cka)(CONSTANT, ROWS),
    "vmap of vmap": lambda: torch.vmap(torch.vmap(F.procrustes))(CONSTANT[None], ROWS[None]),
    "a stage": lambda: tg.LinearCKA()(sample_a=CONSTANT[0], sample_b=ROWS[0]),
    "pairs": lambda: tg.ForEachPair(tg.RSA(kind="euclidean"), ["x", "y"])(
        TensorDict({("sample", "x"): CONSTANT[0], ("sample", "y"): ROWS[0]})
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_reason_is_told_once_at_the_users_line(name):
    seen = told(CALLS[name])
    first = inspect.getsourcelines(CALLS[name])[1]
    assert len(seen) == 1 and "undefined, NaN:" in str(seen[0].message)
    assert seen[0].filename == __file__ and seen[0].lineno in range(first, first + 3)
    assert ("[at x->y]" in str(seen[0].message)) == (name == "pairs")


def test_one_bad_item_of_many_is_told_under_vmap():
    mixed = torch.cat([CONSTANT[:1], ROWS[1:]])
    with pytest.warns(UndefinedMeasureWarning, match="no variance") as caught:
        value = torch.vmap(F.linear_cka)(mixed, ROWS)
    assert len(caught) == 1 and value.isnan().tolist() == [True, False, False]
    assert not told(lambda: torch.vmap(F.linear_cka)(ROWS, ROWS))


def test_what_a_thread_of_ours_tells_is_told_where_it_was_started():
    batch = {("tokens", site): torch.ones(30, 3) for site in ("x", "y")}
    batch = TensorDict({**batch, "row_id": torch.arange(30)})
    sequence = TensorDictSequential(
        tg.RowSample(["x", "y"], size=20), tg.ForEach(tg.SampleMetrics(), ["x", "y"])
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = told(lambda: tg.run(sequence, [batch]))
    finally:
        torch.set_num_threads(threads)
    assert {w.filename for w in seen} == {__file__}
    assert len(seen) == 1 and str(seen[0].message)[-9:] in (
        "[at x, y]",
        "[at y, x]",
    )  # whichever thread was first
