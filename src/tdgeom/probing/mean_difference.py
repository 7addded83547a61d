"""``MeanDifferenceProbe``: the direction between class means."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdgeom.probing.closed_form import mean_difference
from tdgeom.probing.probe import Probe
from tdgeom.probing.rules import Fitted, Task

__all__ = ["MeanDifferenceProbe"]


class MeanDifferenceProbe(Probe):
    """The classifier halfway between class means, from means streamed over every row.

    Formula:
        coef = μ₁ - μ₀; the two classes' means
        intercept = -(|μ₁|² - |μ₀|²)/2; both are divided by |coef| when ``normalize``

    Class 1 where coef·x + intercept > 0. More classes: the nearest mean. It has no regularisation to choose and ignores
    the covariance. ``fitted["coef"]`` and ``fitted["intercept"]`` for two classes; ``direction()`` is coef at length 1.

    Args:
        normalize: divide by |coef| (no prediction changes).

    For the other arguments, what it reads and its scores see ``Probe``. Also writes ``("probe_fit", "weight" | "bias")``,
    (K, D) and (K,), with weight = (-coef/2, coef/2) for two classes.

        >>> import torch, tdgeom as tg
        >>> probe = tg.MeanDifferenceProbe().fit(torch.tensor([[0.0, 1.0], [4.0, 1.0]]), torch.tensor([0, 1]))
        >>> probe.direction(), float(probe.fitted["intercept"])
        (tensor([[-1., -0.],
                [ 1.,  0.]], dtype=torch.float64), -2.0)
    """

    needs_rows = False
    needs_scatter = False
    parameters_out = ("weight", "bias")

    def __init__(self, *, normalize: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.normalize = normalize

    def solve_moments(self, moments: dict[str, Tensor], task: Task) -> Fitted:
        """See ``mean_difference``."""
        task.refuse_numbers("MeanDifferenceProbe")
        weight, bias = mean_difference(moments, normalize=self.normalize)
        fitted = {"weight": weight, "bias": bias}
        if task.classes == 2:
            fitted |= {"coef": weight[1] - weight[0], "intercept": bias[1] - bias[0]}
        return fitted
