"""Quantiles against NumPy's, of more values than ``torch.quantile`` takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tdgeom as tg
from tdgeom.numerics.quantiles import quantiles, quantiles_of_numbers

AT = (0.0, 0.05, 0.5, 0.95, 1.0)


def test_as_numpy_interpolates():
    values = torch.randn(3, 41, dtype=torch.float64)
    for share, found in zip(AT, quantiles(values, AT)):
        np.testing.assert_allclose(found, np.quantile(values.numpy(), share, axis=-1), rtol=1e-13)
    values[0, 5:] = values[1, ::3] = values[2, 1:] = torch.nan
    for share, found in zip(AT, quantiles_of_numbers(values, AT)):
        np.testing.assert_allclose(found, np.nanquantile(values.numpy(), share, axis=-1), rtol=1e-13)
    assert quantiles_of_numbers(torch.full((2, 3), torch.nan), [0.5])[0].isnan().all()


@pytest.mark.slow
def test_gride_cuts_the_ratios_of_many_rows():
    distances = torch.rand(2**24 + 8, 2, dtype=torch.float64).sort(-1).values
    found = tg.functional.gride_from_distances(distances, range_max=2, compat="dadapy")
    ratio = (distances[:, 1] / distances[:, 0]).numpy()
    middle, high = np.quantile(ratio, (0.5, 0.95))
    kept = ratio[ratio < middle + 20 * (high - middle)]
    assert float(found.estimate[0]) == pytest.approx((len(kept) - 1) / np.log(kept).sum(), rel=1e-9)
