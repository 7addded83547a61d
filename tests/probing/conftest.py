from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict


class Data:
    """Rows of correlated features with an offset, their classes and a number, in sequences of ten rows."""

    def __init__(self, n=600, d=12, classes=3, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.label = torch.randint(classes, (n,), generator=g)
        self.label[:classes] = torch.arange(classes)
        mixing = torch.randn(d, d, generator=g).double()
        centres = torch.randn(classes, d, generator=g).double()
        self.x = torch.randn(n, d, generator=g).double() @ mixing + 2 * centres[self.label] + 5
        self.y = self.x @ torch.randn(d, generator=g).double() + torch.randn(n, generator=g).double()
        self.row_id = ((torch.arange(n) // 10) << 20) | (torch.arange(n) % 10)
        self.types = torch.randint(50, (n,), generator=g)


@pytest.fixture(scope="session")
def data():
    return Data()


@pytest.fixture(scope="session")
def make_data():
    return Data


@pytest.fixture(scope="session")
def feed():
    def feed(stage, sizes, x, label, *rest):
        """The same rows in batches of the given sizes, repeated."""
        start, turn = 0, 0
        while start < len(x):
            size = sizes[turn % len(sizes)]
            part = [t[start : start + size] for t in (x, label, *rest)]
            stage.update(TensorDict(dict(zip(stage.in_keys, part))))
            start, turn = start + size, turn + 1
        return stage

    return feed
