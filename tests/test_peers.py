"""Every row of the table of other tools' numbers."""

from __future__ import annotations

import numpy as np
import pytest

import tdgeom as tg
from peers import PEERS, expected, names, tools
from tdgeom import functional as F


@pytest.fixture(scope="module")
def given() -> dict:
    return names()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: f"{peer.measure}, {peer.tool}: {peer.theirs}")
def test_ours_is_theirs(given, peer):
    ours = np.asarray(eval(peer.ours, given), dtype=np.float64)
    theirs = np.asarray(expected(peer, tools(), given), dtype=np.float64)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=peer.tolerance, atol=peer.tolerance * np.abs(theirs).max())


def test_a_row_is_of_a_name_that_there_is():
    metrics = {*tg.SpectrumMetrics().out_keys, *tg.SampleMetrics().out_keys}
    known = {*F.__all__, *tg.__all__, *(key[-1] for key in metrics)}
    known |= {f"{name}_{way}" for name in F.__all__ for way in ("ab", "ba")}
    assert {peer.measure for peer in PEERS} <= known
    assert len({(peer.measure, peer.tool, peer.theirs) for peer in PEERS}) == len(PEERS)
