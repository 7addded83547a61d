"""Golden layers and reference numbers for the similarity tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


@pytest.fixture(scope="session")
def layers():
    return torch.from_numpy(np.load(GOLDEN / "inputs.npz")["layers"]).double()


@pytest.fixture(scope="session")
def reference():
    return json.loads((GOLDEN / "reference.json").read_text())["tools"]
