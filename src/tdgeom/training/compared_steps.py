"""What of a checkpoint others are compared with: rows of the sample and leading directions, kept while they are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tensordict import TensorDict
from torch import Tensor

from tdgeom.core.keys import key_tuple, optional_in_keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.warnings import at_site
from tdgeom.files.atomic import write_whole
from tdgeom.measures.registry import ALIASES, STEP_MEASURES, known_measures
from tdgeom.measures.similarity.subspace import SubspaceNovelty
from tdgeom.run.to_frame import cell, leaves

__all__ = ["HELD_ROOTS", "Held", "compared", "held_of", "pair_stages", "read_held", "write_held"]

HELD_ROOTS = ("sample", "eigenvectors", "eigenvalues")
Held = dict[str, Tensor]
"""Tensors by ``root/site``, and the ids of the sample's rows by ``sample_row_id/stack``."""


def held_of(parts: Mapping[str, TensorDict]) -> Held:
    """What an analysis held, by stack, as flat names."""
    found: Held = {}
    for stack, part in parts.items():
        for root in HELD_ROOTS:
            for (site,), value in leaves(part.get(root)) if root in part.keys() else ():
                found[f"{root}/{site}"] = value.detach().cpu().contiguous()
        if (ids := part.get("sample_row_id", None)) is not None:
            found[f"sample_row_id/{stack}"] = ids.cpu().contiguous()
    return found


def write_held(path: Path, held: Held) -> None:
    """Write it whole."""
    write_whole(path, [safetensors.torch.save(held)])


def read_held(path: Path) -> Held:
    """Read it back."""
    return safetensors.torch.load_file(path)


def pair_stages(
    given: str | PairStage | Sequence[str | PairStage], novelty_k: int, owner: str
) -> list[PairStage]:
    """Measures between a checkpoint and another, of matched samples or of leading directions.

    Raises:
        ValueError: an unknown measure, or one that reads something else.
    """
    known = known_measures()
    made: list[PairStage] = []
    for one in [given] if isinstance(given, str | PairStage) else given:
        stage: Any
        if isinstance(one, PairStage):
            stage = one
        elif (name := ALIASES.get(one, one)) not in known:
            raise ValueError(
                f"{owner}: similarity {one!r} is none; there are {', '.join(known)}, and pair stages of your own."
            )
        elif name in STEP_MEASURES and name == "feature_subspace_novelty":
            stage = SubspaceNovelty(k=novelty_k)
        else:
            asked = known[name]
            stage = asked.stage() if asked.rows == "sample" else asked.stage(source="sample")
        needed = set(getattr(stage, "in_keys", ())) - set(optional_in_keys(stage))
        roots = {key_tuple(key)[0] for key in needed}
        if not isinstance(stage, PairStage) or roots - set(HELD_ROOTS):
            raise ValueError(
                f"{owner}: similarity of checkpoints is measured between matched rows or leading directions (pair stages that "
                f"read {', '.join(HELD_ROOTS)}), got {type(stage).__name__}, which reads {sorted(roots)}."
            )
        made.append(stage)
    return made


def compared(
    reference: Held, held: Held, stages: Sequence[PairStage], owner: str
) -> dict[str, dict[str, float]]:
    """Every measure of every site: the reference's rows and directions are side ``a``, the checkpoint's side ``b``.

    Raises:
        ValueError: the two have other sites, or other rows were sampled.
    """
    if set(reference) != set(held):
        apart = sorted(set(reference) ^ set(held))
        raise ValueError(
            f"{owner}: checkpoints have different sites ({apart[0]}): they are no steps of one training."
        )
    if any(
        name.startswith("sample_row_id") and not torch.equal(ids, held[name])
        for name, ids in reference.items()
    ):
        raise ValueError(
            f"{owner}: other rows were sampled than at an earlier checkpoint, so rows are not matched."
        )
    sites = dict.fromkeys(name.split("/", 1)[1] for name in held if not name.startswith("sample_row_id"))
    found: dict[str, dict[str, float]] = {}
    for site in sites:
        values: dict[str, float] = {}
        for stage in stages:
            td = TensorDict({}, batch_size=[])
            for side, one in (("a", reference), ("b", held)):
                for root in HELD_ROOTS:
                    if f"{root}/{site}" in one:
                        td.set((root, side), one[f"{root}/{site}"])
            with at_site(site), torch.no_grad():
                written = stage(td)
            for key in stage.out_keys:
                value = cell(written.get(key))
                if isinstance(value, int | float) and key_tuple(key)[-1] != "k_used":
                    values[key_tuple(key)[-1]] = float(value)
        found[site] = values
    return found
