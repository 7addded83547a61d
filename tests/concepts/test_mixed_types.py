"""Rows in one type and directions in another: what float64 gives of the same rounded numbers, in the widest type given."""

from __future__ import annotations

from functools import reduce
from itertools import product

import pytest
import torch

from tdgeom import functional as F

GENERATOR = torch.Generator().manual_seed(0)
ROWS = 4 * torch.randn(20, 6, generator=GENERATOR, dtype=torch.float64)
BASIS = torch.linalg.qr(torch.randn(6, 3, generator=GENERATOR, dtype=torch.float64))[0]
OTHER = torch.linalg.qr(torch.randn(6, 3, generator=GENERATOR, dtype=torch.float64))[0]
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)

CALLS = {
    "project": (F.project, (ROWS, BASIS, ROWS.mean(0))),
    "reconstruct": (F.reconstruct, (ROWS[:, :3], BASIS, ROWS.mean(0))),
    "interpolate": (lambda a, b: F.interpolate(a, b, 0.3), (ROWS[0], ROWS[1])),
    "interpolate on the sphere": (lambda a, b: F.interpolate(a, b, 0.3, spherical=True), (ROWS[0], ROWS[1])),
    "erase": (F.erase, (ROWS, BASIS, OTHER, ROWS.mean(0))),
    "linear_decision": (F.linear_decision, (ROWS, OTHER.mT.contiguous(), ROWS[0, :3])),
    "feature_subspace_novelty": (F.feature_subspace_novelty, (BASIS, OTHER)),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_mixture_of_types(name):
    function, given = CALLS[name]
    for types in product(TYPES, repeat=len(given)):
        if name == "feature_subspace_novelty" and torch.int64 in types:
            continue  # orthonormal columns are no integers
        rounded = [x.round().to(t) if t == torch.int64 else x.to(t) for x, t in zip(given, types)]
        right = function(*(x.double() for x in rounded))
        found = function(*rounded)
        widest = reduce(torch.promote_types, (torch.float64 if t == torch.int64 else t for t in types))
        if name == "feature_subspace_novelty":
            widest = torch.float64
        assert found.dtype == widest
        slack = 60 * torch.finfo(widest).eps
        torch.testing.assert_close(found.double(), right, rtol=slack, atol=slack * 8)
