"""What ``on_an_accelerator.py`` holds, on a CUDA device; collected only where there is one (see ``conftest.py``)."""

from __future__ import annotations

from on_an_accelerator import *  # noqa: F403
