"""The colours, marks and dashes that pictures and reports share, each told apart by readers with any colour vision."""

from __future__ import annotations

import math

__all__ = ["COLOURS", "COLOURS_ON_DARK", "DASHES", "GRADIENT", "MARKERS", "depth_colours"]

# Okabe and Ito's colours; black is kept for text
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B3A800")
COLOURS_ON_DARK = ("#4DA3DB", "#E8702A", "#1DB88C", "#DE93BC", "#F0B32E", "#8ACBF2", "#A6A6A6", "#F0E442")
MARKERS = "osD^vP*X"
# lines that coincide show through each other's gaps
DASHES = ("-", (0, (7, 2)), (0, (2, 2)), (0, (7, 2, 2, 2)))
GRADIENT = "viridis"

# every sixteenth of it
_VIRIDIS = (
    "#440154", "#48186a", "#472d7b", "#424086", "#3b528b", "#33638d",
    "#2c728e", "#26828e", "#21918c", "#1fa088", "#28ae80", "#3fbc73",
    "#5ec962", "#84d44b", "#addc30", "#d8e219", "#fde725",
)  # fmt: skip
_LIGHT, _DARK = (0.0, 0.8), (0.34, 1.0)  # what shows up on white, and on black


def depth_colours(count: int, *, on_dark: bool = False) -> list[str]:
    """``count`` colours from the first layer's to the last's, as hexadecimal RGB.

    >>> depth_colours(2), len(depth_colours(32, on_dark=True))
    (['#440154', '#7cd250'], 32)
    """
    low, high = _DARK if on_dark else _LIGHT
    steps = [low + (high - low) * (i / max(count - 1, 1)) for i in range(count)]
    return [_at(step * (len(_VIRIDIS) - 1)) for step in steps]


def _at(place: float) -> str:
    below = min(math.floor(place), len(_VIRIDIS) - 2)
    parts = [[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in (_VIRIDIS[below], _VIRIDIS[below + 1])]
    mixed = [round(a + (b - a) * (place - below)) for a, b in zip(*parts)]
    return "#" + "".join(f"{value:02x}" for value in mixed)
