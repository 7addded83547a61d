"""``as_metric`` where torchmetrics is not installed."""

from __future__ import annotations

import sys

import pytest

import tdgeom as tg
from tdgeom.training import stage_metric as file


def test_without_torchmetrics_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    file._metric_class.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install torchmetrics"):
        tg.as_metric(tg.StreamingMean())
    file._metric_class.cache_clear()
