"""What stages that hold rows of several sites share: their keys, widths and row ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key, as_key, site_key
from tdgeom.core.streaming_stage import StreamingStage

__all__: list[str] = []


class RowsStage(StreamingStage):
    """A streaming stage that reads the same rows at several sites, and ``"row_id"`` last."""

    takes_complex = True  # rows are held as they come

    def __init__(
        self,
        root: str,
        sites: Iterable[Any] | None,
        also: Sequence[str],
        *,
        in_keys: Key | list[Key] | None,
        out_keys: Key | list[Key] | None,
    ) -> None:
        if isinstance(sites, str) or isinstance(also, str):
            raise TypeError(
                f"{type(self).__name__}: sites and also are lists of names, got {sites!r} and {also!r}."
            )
        if sites is None and also:
            raise ValueError(
                f"{type(self).__name__}: also={list(also)} needs sites=; without sites it reads 'tokens' alone."
            )
        parts = [()] if sites is None else [site_key(site) for site in sites]
        carried = [str(name) for name in also]
        super().__init__(
            in_keys=in_keys,
            out_keys=out_keys,
            reads=[
                *(as_key(("tokens", *site)) for site in parts),
                *(("carried", name) for name in carried),
                "row_id",
            ],
            writes=[
                *(as_key((root, *site)) for site in parts),
                *((f"{root}_carried", name) for name in carried),
                f"{root}_row_id",
            ],
        )
        self.held = [f"rows_{i}" for i in range(len(parts) + len(carried))]
        self.add_state("ids", torch.int64)
        for name in self.held:
            self.add_state(name, None)

    def blank(self, rows: Sequence[Tensor], capacity: int) -> dict[str, Tensor]:
        """Buffers of ``capacity`` rows with each site's width and dtype."""
        home = rows[0].device
        state = {"ids": torch.full((capacity,), -1, dtype=torch.int64, device=home)}
        for name, value in zip(self.held, rows):
            state[name] = torch.zeros((capacity, *value.shape[1:]), dtype=value.dtype, device=home)
        return state

    def check_rows(self, rows: Sequence[Tensor], row_id: Tensor) -> None:
        """All inputs share their first dimension, and keep the width they came with."""
        for key, value, name in zip(self.in_keys, rows, self.held):
            held = self.state()[name]
            if value.shape[:1] != row_id.shape or value.shape[1:] != held.shape[1:]:
                raise ValueError(
                    f"{type(self).__name__} expects {key!r} of shape ({row_id.shape[0]}, "
                    f"{', '.join(map(str, held.shape[1:]))}) beside {self.in_keys[-1]!r} of shape {tuple(row_id.shape)}, "
                    f"got {tuple(value.shape)}. Rows of all sites must come from one selection (SelectTokens)."
                )
