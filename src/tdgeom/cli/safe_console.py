"""A console that shows text of others as text: whatever file, model or data set it came from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from tdgeom.core.visible_text import visible

__all__ = ["SafeConsole"]


class SafeConsole(Console):
    """rich's console, whose own codes alone reach the terminal."""

    def render(self, *given: Any, **named: Any) -> Iterable[Segment]:
        """Segments whose text is visible."""
        for segment in super().render(*given, **named):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
