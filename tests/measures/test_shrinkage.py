"""Shrunk covariances against scikit-learn's of the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS, LedoitWolf
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F


@pytest.mark.parametrize(("n", "width"), [(20, 5), (10, 30), (300, 12)])
@pytest.mark.parametrize(("rule", "reference"), [("ledoit_wolf", LedoitWolf), ("oas", OAS)])
def test_streamed_moments_shrink_as_rows_do(n: int, width: int, rule: str, reference: type) -> None:
    generator = np.random.default_rng(n)
    x = generator.standard_t(5, (n, width)) * generator.gamma(1.0, size=width) + 3
    want = reference().fit(x)
    stream = tg.StreamingCovariance()
    for part in np.array_split(x, 3):
        td = stream(TensorDict({"tokens": torch.as_tensor(part)}))
    td = tg.ShrunkCovariance(rule=rule)(td)
    assert float(td["shrunk", "shrinkage"]) == pytest.approx(want.shrinkage_, rel=1e-9)
    assert td["shrunk", "covariance"].numpy() == pytest.approx(want.covariance_, rel=1e-9, abs=1e-12)


def test_batches_and_errors() -> None:
    covariance = torch.stack([torch.eye(3), 2 * torch.eye(3)]).double()
    assert F.oracle_approximating(torch.tensor(9), covariance).shrinkage.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="expects a covariance"):
        F.ledoit_wolf(torch.tensor(9), torch.ones(3), torch.tensor(1.0))
    with pytest.warns(tg.UndefinedMeasureWarning, match="shrunk covariance"):
        assert F.oracle_approximating(torch.tensor(9), torch.zeros(2, 2)).shrinkage.isnan()
