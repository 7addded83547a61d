"""verify_sites: what is read and changed in a model, compared with the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.model.calls.checked_sites import available_sites, resolve_sites
from tdgeom.model.calls.model_inputs import InKeys
from tdgeom.model.sites import LayerSpec, select_layers
from tdgeom.model.structure.resolved_site import ResolvedSite
from tdgeom.model.verification.edit_checks import edit_checks
from tdgeom.model.verification.plain_hooks import no_hooks_left
from tdgeom.model.verification.read_checks import read_checks
from tdgeom.model.verification.site_evidence import gather

__all__ = ["verify_sites"]

COLUMNS = ["site", "stack", "kind", "layer", "check", "difference", "outcome", "note"]


@answer_guesses
def verify_sites(
    model: nn.Module,
    batch: Mapping[str, Any] | TensorDictBase,
    *,
    sites: str | Sequence[str] | None = None,
    layers: LayerSpec = "all",
    edits: bool = True,
    tolerance: float | None = None,
    withhold: Sequence[str] = (),
    in_keys: InKeys | None = None,
) -> pd.DataFrame:
    """Compare what is read at a model's sites, and edits there, with the model itself on one batch.

    What is read is compared with a plain hook, with the model's own ``hidden_states``, with the ``attentions`` of its eager
    attention, and with what must add up: attention and MLP onto the stream, heads to their sum, the pattern's values to the
    heads' outputs. An edit is compared with the same change by a plain hook, and what is said to be added is looked for in
    the stream. Costs about three forward passes for each site; ``layers=[0, -1]`` and ``edits=False`` save most of them.

    Args:
        model: any ``nn.Module`` that :class:`Capture` takes. It stays as it is.
        batch: the model's inputs, a few short sequences.
        sites, layers: which, as for ``Capture``; default: all that the model has.
        edits: check edits too.
        tolerance: what counts as equal, relative to the largest value; default 1e-3, or 0.05 for a model in half precision.
        withhold, in_keys: as for ``Capture``.

    Returns:
        A table, a row for each site and check: ``site``, ``stack``, ``kind``, ``layer``, ``check``, ``difference`` (the
        largest, relative to the largest value; NaN where nothing was compared), ``outcome`` and ``note``. ``outcome`` is
        ``"ok"``, ``"failed"``, or ``"unchecked"``: what could not be compared (the note says why) counts as nothing. A site
        that is refused is unchecked, with the refusal as its note.

    >>> layers = [nn.Linear(4, 4) for _ in range(2)]
    >>> table = verify_sites(nn.Sequential(*layers), {"input": torch.randn(2, 4)}, sites="residual_output")
    >>> set(table[table.check == "edit"].outcome)
    {'ok'}
    """
    td = batch if isinstance(batch, TensorDictBase) else TensorDict(dict(batch), batch_size=[])
    entries = _all_sites(model, layers) if sites is None else resolve_sites(model, sites, layers=layers)
    if tolerance is None:
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
        tolerance = 0.05 if half else 1e-3
    with no_hooks_left(model):
        found = gather(model, td, entries, {"withhold": withhold, "in_keys": in_keys})
        checks = list(read_checks(found, tolerance))
        if edits:
            checks += edit_checks(found, tolerance)
    order = {entry.site: i for i, entry in enumerate(entries)}
    rows = [
        (str(c.site), c.site.stack, c.site.kind, c.site.layer, c.check, c.difference, c.outcome, c.note)
        for c in sorted(checks, key=lambda c: order[c.site])
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype({"layer": "Int64"})


def _all_sites(model: nn.Module, layers: LayerSpec) -> list[ResolvedSite]:
    """Every site of a model in the layers asked for."""
    known = available_sites(model)
    if not known:
        raise ValueError(
            f"verify_sites found no repeated blocks in {type(model).__name__}, and so no sites. Remedy: "
            "sites='module_output:<path>'."
        )
    wanted: dict[str | None, list[int]] = {}
    for stack in dict.fromkeys(entry.site.stack for entry in known):
        depth = 1 + max(entry.site.layer or 0 for entry in known if entry.site.stack == stack)
        wanted[stack] = select_layers(
            layers, depth, f"the stack {stack!r}" if stack else type(model).__name__
        )
    return [e for e in known if e.site.layer is None or e.site.layer in wanted[e.site.stack]]
