"""p-values of several tests, corrected for there being several."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["adjusted_p_values"]


def adjusted_p_values(p: Tensor, method: Literal["holm", "fdr"] = "holm") -> Tensor:
    """p-values corrected for the number of tests: (..., m) -> (..., m); NaN entries are no tests and stay.

    ``"holm"``: max over j <= i of (m-j+1)·p_(j), at most 1: where all below a level are called significant, the chance of *any*
    false one is at most that level, whatever the tests have to do with each other. ``"fdr"``: min over j >= i of
    m·p_(j)/j: the expected share of false ones among those called significant is at most the level, for tests that are
    independent or vary together.

    Raises:
        ValueError: a p-value outside [0, 1]; another method.

    Holm 1979; Benjamini and Hochberg 1995.

        >>> adjusted_p_values(torch.tensor([0.01, 0.04, 0.03, 0.5]).double()).tolist()
        [0.04, 0.09, 0.09, 0.5]
    """
    if method not in ("holm", "fdr"):
        raise ValueError(f"adjusted_p_values: method is 'holm' or 'fdr', got {method!r}.")
    p = p.double()
    if bool(((p < 0) | (p > 1)).any()):
        raise ValueError(
            f"adjusted_p_values expects p-values in [0, 1], got {float(p.min())} to {float(p.max())}."
        )
    known = ~torch.isnan(p)
    ordered, order = torch.where(known, p, torch.inf).sort(-1)
    tests = known.sum(-1, keepdim=True)
    rank = torch.arange(1, p.shape[-1] + 1, device=p.device)
    if method == "holm":
        adjusted = (ordered * (tests - rank + 1)).cummax(-1).values
    else:
        adjusted = (ordered * tests / rank).flip(-1).cummin(-1).values.flip(-1)
    found = torch.empty_like(p).scatter(-1, order, adjusted.clamp(max=1))
    return torch.where(known, found, torch.nan)
