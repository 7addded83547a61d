"""The normalisation ablation without each group of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import key_tuple
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.warnings import Gathered, gathered
from tdgeom.measures.normalization import normalized
from tdgeom.measures.sample_metrics import covariance_of, working
from tdgeom.measures.sample_without_groups import variances_without
from tdgeom.measures.spectrum_errors import replicate_spectrum_metrics
from tdgeom.measures.spectrum_metrics import SpectrumMetrics

__all__ = ["ablation_without"]

_EXACT = 128  # up to this width measuring anew costs no more
_ALONG = ("raw", "token_l2", "token_rms", "feature_standardized")


def ablation_without(
    stage: Any, inputs: Sequence[Tensor | None], group: Tensor, groups: int
) -> list[Tensor] | None:
    """``NormalizationAblation`` of spectra of a sample, of all rows and without each group: (groups+1,) each.

    Beyond D = 128 the four variants of the default are seen along the eigenvectors of all rows, which is first order in what a
    group changes (of standardised features also how their own spread changes); any other variant is measured anew. k90 and its
    kin by their interpolated values. None where other metrics than those of spectra are asked for.
    """
    sample, row_id = inputs[:2]
    if sample is None or sample.ndim != 2 or type(stage.metrics) is not SpectrumMetrics:
        return None
    group, alpha = group.to(sample.device), stage.metrics.alpha_ranks
    whole = dict(
        zip(
            ((key[-2], key[-1]) for key in map(key_tuple, stage.out_keys_source)),
            stage.listed(stage.compute(*inputs)),
        )
    )
    rows = working(sample)
    apart: dict[str, dict[str, Tensor]] = {}
    position = None if row_id is None else row_id & ((1 << POSITION_BITS) - 1)
    with gathered(Gathered()):
        for name, what in stage.variants.items():
            if what == "token_rms" and "token_l2" in apart:  # the same up to scale
                apart[name] = apart["token_l2"]
                continue
            along = sample.shape[1] > _EXACT and what in _ALONG
            spectra = (
                _along(rows, what, group, groups)
                if along
                else _anew(stage, rows, position, name, what, group, groups)
            )
            values = replicate_spectrum_metrics(spectra, alpha_ranks=alpha)
            apart[name] = {metric: value[1:] - value[0] for metric, value in values.items()}
    outputs = []
    for (variant, metric), value in whole.items():
        own = apart[variant].get(metric)
        nothing = [torch.full_like(value, torch.nan) if value.is_floating_point() else value] * groups
        outputs.append(
            torch.stack([value, *nothing])
            if own is None
            else torch.cat((value.double()[None], value.double() + own))
        )
    return outputs


def _anew(
    stage: Any, rows: Tensor, position: Tensor | None, name: str, what: Any, group: Tensor, groups: int
) -> Tensor:
    found = []
    for g in range(-1, groups):
        kept = group != g
        found.append(
            stage._eigenvalues(rows[kept], None if position is None else position[kept], name, what, {})[0]
        )
    return torch.stack(found)


def _along(rows: Tensor, what: str, group: Tensor, groups: int) -> Tensor:
    """Variances along the eigenvectors of all rows, (groups+1, D) descending."""
    rows = normalized(rows, what)
    rows = rows - rows.mean(0)
    rows = rows / rows.abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)
    basis = torch.linalg.eigh(covariance_of(rows))[1]
    total, without = variances_without(rows @ basis.to(rows.dtype), group, groups)
    if what == "feature_standardized":
        own, owns = variances_without(rows, group, groups)
        change = torch.where(own > 0, owns / own.clamp(min=torch.finfo(own.dtype).tiny) - 1, 0.0)
        without = without - total * (change @ basis.square().to(change.dtype))
    return torch.cat((total[None], without)).clamp(min=0).sort(-1, descending=True).values
