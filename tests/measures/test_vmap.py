"""``torch.vmap`` over every function of ``tdgeom.functional`` that takes rows: the numbers of a loop, or a refusal in words."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves

from function_examples import CALLS, OTHERS
from tdgeom import functional as F

# What vmap cannot do, and the words in which it is refused.
REFUSED = {
    "logistic_probe": "backward\\(\\) called inside",  # minimises until it has converged
}


def test_every_function_has_an_example_or_a_reason() -> None:
    assert set(CALLS) | set(OTHERS) == set(F.__all__)
    assert not set(CALLS) & set(OTHERS) and set(REFUSED) <= set(CALLS)


def batch(name: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*(CALLS[name].inputs(seed) for seed in range(3))))


@pytest.mark.parametrize("name", [name for name in CALLS if name not in REFUSED])
def test_vmap_is_a_loop(name: str) -> None:
    call, given = CALLS[name], batch(name)
    expected = [tree_leaves(call.function(*(part[i] for part in given))) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of operators it maps one by one
        found = tree_leaves(torch.vmap(call.function)(*given))
    assert len(found) == len(expected[0])
    for whole, parts in zip(found, zip(*expected)):
        torch.testing.assert_close(whole, torch.stack(parts), rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_vmap_cannot_do_is_refused_in_words(name: str) -> None:
    with pytest.raises(RuntimeError, match=REFUSED[name]):
        torch.vmap(CALLS[name].function)(*batch(name))
