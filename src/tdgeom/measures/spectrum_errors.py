"""Standard errors of what eigenvalues say, from the spectra without each group of documents."""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.stage import Stage
from tdgeom.measures.jackknife import group_jackknife, value_and_parts, with_errors
from tdgeom.measures.spectrum_metrics import SPECTRUM_METRICS, spectrum_metrics

__all__ = ["ERROR_METRICS", "SpectrumErrors", "components_interpolated", "replicate_spectrum_metrics"]

ERROR_METRICS = tuple(name for name in SPECTRUM_METRICS if name != "near_rank1")


def components_interpolated(eigenvalues: Tensor, level: float) -> Tensor:
    """How many components make a share ``level`` of the variance, between whole numbers: descending (*B, D) -> (*B,).

    The cumulative share is joined by lines between whole numbers of components, with 0 for none: the smallest k of
    ``SpectrumMetrics`` is this rounded up. A whole number hardly ever differs between replicates; this one does.

    >>> components_interpolated(torch.tensor([6.0, 3.0, 1.0]), 0.75)
    tensor(1.5000)
    """
    shares = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    reached = shares.cumsum(-1)
    k = (reached < level - 1e-12).sum(-1, keepdim=True).clamp(max=shares.shape[-1] - 1)
    before = torch.where(k > 0, reached.gather(-1, (k - 1).clamp(min=0)), 0.0)
    return (k + (level - before) / shares.gather(-1, k))[..., 0]


def replicate_spectrum_metrics(
    eigenvalues: Tensor, *, alpha_ranks: tuple[int, int] = (11, 100)
) -> dict[str, Tensor]:
    """``spectrum_metrics`` as errors are taken of it: (*B, D) -> (*B,) each, float64, k90 and its kin interpolated.

    >>> round(float(replicate_spectrum_metrics(torch.ones(10))["k90"]), 6)
    9.0
    """
    found = spectrum_metrics(eigenvalues, alpha_ranks=alpha_ranks)
    ordered = eigenvalues.double().clamp(min=0).sort(-1, descending=True).values
    levels = {f"k{level}": components_interpolated(ordered, level / 100) for level in (90, 95, 99)}
    return {name: levels.get(name, found[name]) for name in ERROR_METRICS}


class SpectrumErrors(Stage):
    """The jackknife's standard error of every measure of ``SpectrumMetrics``, beside it as ``<measure>_se``.

    Reads ``("replicates", "spectra")`` (groups+1, D) and ``("replicates", "rows")`` (groups,) of ``LeaveOutSpectrum``;
    writes ``("spectrum", f"{name}_se")`` () for all but ``near_rank1``. Those of k90, k95 and k99 are of their interpolated
    values, see ``components_interpolated``. See ``group_jackknife``; ``tdgeom.functional.error_interval`` makes intervals.

    Args:
        alpha_ranks: see ``alpha_req``.
        parts: also write ``("spectrum_parts", name)`` (groups+1,): the value that the error is of, then what each group adds to
            it, and ``("spectrum_bias", name)`` (): what the value is too large by, as ``Jackknife(parts=True)`` does. Where the
            spectra are by perturbation it comes from two halves of the documents: mean of the two less the value of all.
        in_keys, out_keys: see ``Stage``.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> td = TensorDict(tokens=torch.randn(2000, 8), row_id=torch.arange(2000) << 20)
        >>> for stage in (tg.GroupedCovariance(), tg.LeaveOutSpectrum(), tg.SpectrumErrors()):
        ...     td = stage(td)
        >>> 0.005 < td["spectrum", "d_pr_se"] < 0.06
        tensor(True)
    """

    reads = {("replicates", "spectra"): "R D", ("replicates", "rows"): "G", ("replicates", "halves"): None}
    optional = frozenset({"halves"})
    writes = [("spectrum", f"{name}_se") for name in ERROR_METRICS]

    def __init__(
        self,
        *,
        alpha_ranks: tuple[int, int] = (11, 100),
        parts: bool = False,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        beside = [
            (root, name) for root in ("spectrum_parts", "spectrum_bias") for name in ERROR_METRICS if parts
        ]
        super().__init__(in_keys=in_keys, out_keys=out_keys, writes=[*type(self).writes, *beside])
        self.alpha_ranks, self.parts = alpha_ranks, parts

    def compute(self, eigenvalues: Tensor, rows: Tensor, halves: Tensor | None = None) -> list[Tensor]:
        """See ``group_jackknife``."""
        values = replicate_spectrum_metrics(eigenvalues, alpha_ranks=self.alpha_ranks)
        found = list(with_errors(values, rows).values())
        if not self.parts:
            return found
        found += [value_and_parts(value, rows) for value in values.values()]
        if halves is None or not len(halves):
            return found + [group_jackknife(value, rows).bias for value in values.values()]
        half = replicate_spectrum_metrics(halves, alpha_ranks=self.alpha_ranks)
        return found + [half[name].mean() - value[0] for name, value in values.items()]
