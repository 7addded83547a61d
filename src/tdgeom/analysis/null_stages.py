"""What an analysis puts beside its measures of two sites to say what they would be by chance, and corrects for their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdgeom.analysis.error_stages import has_own_error
from tdgeom.core.keys import NOT_WRITTEN, Key, key_tuple
from tdgeom.core.pair_stage import PairStage
from tdgeom.measures.significance.calibrated import Calibrated, joint_p_values, less_is_alike
from tdgeom.measures.significance.cka_null import CKANull
from tdgeom.measures.similarity.linear_cka import LinearCKA
from tdgeom.measures.similarity.pair_sources import of_matched_rows

__all__ = ["null_stages", "with_joint_p"]

DRAWS, SHUFFLES, ROWS = 499, 199, 512
_KEPT = ("_null_mean", "_null_sd", "_z", "_p", "_calibrated", "_draws")


def null_stages(stages: Sequence[PairStage], *, significance: bool, seed: int = 0) -> list[PairStage]:
    """The stages that judge these: linear CKA's in closed form; with ``significance`` every other one's by shuffled documents.

    Both write ``<measure>_z``, ``_p``, ``_calibrated`` and the draws that ``with_joint_p`` takes, of the sample's first rows.
    """
    found: list[PairStage] = []
    if any(isinstance(stage, LinearCKA) for stage in stages) and not any(
        isinstance(one, CKANull) for one in stages
    ):
        found.append(_without_rest(CKANull(sample_size=ROWS, draws=DRAWS, seed=seed)))
    for stage in stages if significance else ():
        if isinstance(stage, LinearCKA | CKANull | Calibrated) or (judged := _of_rows(stage)) is None:
            continue
        made = Calibrated(judged, repeats=SHUFFLES, sample_size=ROWS, alike=True, keep_draws=True, seed=seed)
        found.append(_without_rest(made))
    return found


def _without_rest(stage: PairStage) -> PairStage:
    """The stage, writing what the tables show and what corrects it."""
    keys: list[Key] = [key if key_tuple(key)[-1].endswith(_KEPT) else NOT_WRITTEN for key in stage.out_keys]
    return type(stage).from_settings({**stage.settings(), "out_keys": keys})


def _of_rows(stage: PairStage) -> PairStage | None:
    """The same measure of matched rows; None where there is none."""
    if has_own_error(stage):
        return None
    if of_matched_rows(stage):
        return stage
    made = {name: value for name, value in stage.settings().items() if name not in ("source", "in_keys")}
    try:
        other = type(stage).from_settings(made)
    except (TypeError, ValueError):
        return None
    same = of_matched_rows(other) and other.out_keys == stage.out_keys
    return other if same else None


def with_joint_p(result: TensorDictBase) -> None:
    """``<measure>_p_adjusted`` beside every p-value that has draws: by the largest of all pairs in each. The draws go."""
    branch = result.get("between", None)
    if branch is None:
        return
    held: dict[str, list[tuple[TensorDictBase, Tensor, Tensor]]] = {}
    for pair, name, draws in list(_draws(branch)):
        measure = name.removesuffix("_draws")
        mean, deviation, z = (pair.get(f"{measure}_{leaf}") for leaf in ("null_mean", "null_sd", "z"))
        side = -1 if less_is_alike(measure) else 1
        held.setdefault(measure, []).append((pair, side * mean + z * deviation, side * draws))
        for leaf in ("draws", "null_mean", "null_sd"):
            pair.del_(f"{measure}_{leaf}")
    for measure, found in held.items():
        values, draws = (torch.stack(part) for part in list(zip(*found))[1:])
        for (pair, *_), p in zip(found, joint_p_values(values, draws)):
            pair.set(f"{measure}_p_adjusted", p)


def _draws(branch: TensorDictBase) -> Iterator[tuple[TensorDictBase, str, Tensor]]:
    for key in branch.keys():
        pair = branch.get(key)
        if isinstance(pair, TensorDictBase):
            yield from (
                (pair, name, pair.get(name)) for name in map(str, pair.keys()) if name.endswith("_draws")
            )
