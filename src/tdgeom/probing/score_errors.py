"""Standard errors of every score of a probe, over groups of documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.measures.jackknife import group_jackknife, warn_few_groups
from tdgeom.numerics.document_groups import document_groups

__all__ = ["SCORES_WITH_ERRORS", "score_errors"]

SCORES_WITH_ERRORS = (
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "r2",
    "majority_baseline",
    "control_accuracy",
    "selectivity",
)


def score_errors(
    scores: Callable[[Tensor], Mapping[str, Tensor]],
    found: Mapping[str, Tensor],
    document: Tensor,
    *,
    groups: int,
    owner: str = "score_errors",
) -> dict[str, Tensor]:
    """``<score>_se`` of every score: the delete-a-group jackknife over documents of the held-out rows. () each.

    The probe is that which was fitted: the errors are of how well *it* does on more such documents, not of what another training
    set would have given. A score without an error (its class is missing without some group) is NaN.

    Args:
        scores: function of the rows kept, bool (N,), that returns scores by name, each ().
        found: the scores of all rows.
        document: (N,) whole numbers.
        groups: of documents.

    >>> right = (torch.arange(60) % 3 > 0).double()
    >>> accuracy = lambda kept: {"accuracy": right[kept].mean()}
    >>> sorted(score_errors(accuracy, accuracy(right >= 0), torch.arange(60), groups=10))
    ['accuracy_se']
    """
    group = document_groups(document.long() << POSITION_BITS, groups)
    rows = torch.bincount(group, minlength=groups)
    warn_few_groups(owner, rows)
    values: dict[str, list[Tensor]] = {name: [value] for name, value in found.items()}
    for g in range(groups):
        kept = group != g
        try:
            left = found if not rows[g] else scores(kept) if bool(kept.any()) else {}
        except ValueError:  # no row of some class is left
            left = {}
        for name, several in values.items():
            several.append(
                torch.as_tensor(left.get(name, torch.nan), dtype=torch.float64).to(document.device)
            )
    return {
        f"{name}_se": group_jackknife(torch.stack([one.double() for one in several]), rows).standard_error
        for name, several in values.items()
    }
