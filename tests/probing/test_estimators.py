"""Probes around other estimators: what a default training reaches."""

from __future__ import annotations

import pytest
import torch

import tdgeom as tg


@pytest.mark.parametrize("massive, offset", [(1.0, 0.0), (1e3, 0.0), (1e3, 1e3)])
@pytest.mark.parametrize("regression", [False, True])
def test_a_linear_module_with_defaults_reaches_the_closed_form(massive, offset, regression):
    """Whatever one feature's size, the rows' offset, or the size of the numbers to predict."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 24, generator=generator)
    line = x @ torch.randn(24, generator=generator) / 24**0.5 + 0.3 * torch.randn(3000, generator=generator)
    y = 500 + 40 * line if regression else (line > 0).long()
    x[:, 0] *= massive
    x = x + offset
    name = "r2" if regression else "accuracy"
    linear = tg.LinearProbe().fit(x[:2000], y[:2000]).score(x[2000:], y[2000:])[name]
    made = tg.TorchProbe(lambda features, outputs: torch.nn.Linear(features, outputs)).fit(x[:2000], y[:2000])
    assert made.score(x[2000:], y[2000:])[name] > linear - 0.01
