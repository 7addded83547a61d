"""Row ids: which sequence a row is of, and where in it. ``row_id = sequence << 20 | position``."""

from __future__ import annotations

__all__ = ["POSITION_BITS"]

POSITION_BITS = 20  # positions are ranks among attended tokens, below 2^20
