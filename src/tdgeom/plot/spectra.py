"""Eigenvalue spectra, one line a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tdgeom.numerics.numerical_rank import above_rounding
from tdgeom.plot.palette import COLOURS, depth_colours
from tdgeom.plot.style import as_array, axes_or_new, layer_legend, tidy
from tdgeom.run.several_models import by_model
from tdgeom.run.to_frame import to_frame

__all__ = ["spectrum"]


def spectrum(
    eigenvalues: Any, ax: Any = None, *, normalize: bool = True, legend: bool | None = None, **style: Any
) -> Any:
    """Eigenvalues against their rank, both axes logarithmic, one line a layer from dark (first) to light (last).

    Eigenvalues beyond the numerical rank are not drawn: a logarithm would make noise look like a spectrum. A cliff
    at the last 2 % of ranks (directions that a layer norm removes, say) leaves the picture at its lower edge.

    Args:
        eigenvalues: ``AnalysisResults``, a result of ``run`` with ``("eigenvalues", site)``, a mapping from name to (D,),
            or one (D,) array or tensor; descending. A list or mapping of several models' ``AnalysisResults`` too. With
            ``normalize=False`` also a leading part, NaN beyond.
        ax: matplotlib axes; made if None.
        normalize: draw shares of the total variance, λ/Σλ, else λ.
        legend: a legend; default up to 12 named lines, a colour bar beyond.
        style: passed to ``ax.plot``.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: no matplotlib. ValueError: nothing to draw.

        >>> ax = spectrum({"layer_00": np.array([4.0, 2.0, 1.0])})
        >>> ax.get_lines()[0].get_xdata().tolist()
        [1, 2, 3]
    """
    series = _spectra(eigenvalues)
    ax = axes_or_new(ax, (6.0, 4.2))

    colours = depth_colours(len(series)) if len(series) > 1 else [COLOURS[0]]
    bottoms = []
    for (name, values), colour in zip(series.items(), colours):
        values = np.asarray(values, dtype=np.float64)
        if normalize and np.isnan(values).any():
            raise ValueError(
                f"spectrum expects whole spectra to take shares of, {name or 'it'!r} has {int((~np.isnan(values)).sum())} of "
                f"{len(values)} eigenvalues (NaN beyond, as StreamingSketch leaves them). normalize=False draws those."
            )
        shown = above_rounding(torch.as_tensor(values)).numpy()
        drawn = values / values.sum() if normalize else values
        bottoms.append(drawn[shown][int(0.98 * (shown.sum() - 1))])
        ax.plot(
            1 + np.flatnonzero(shown),
            drawn[shown],
            **{"color": colour, "linewidth": 1.5, "label": name, **style},
        )
    ax.set(xscale="log", yscale="log", xlabel="rank of the eigenvalue")
    ax.set_ylabel("share of variance, λ/Σλ" if normalize else "eigenvalue of the covariance, λ")
    if ax.get_ylim()[0] < min(bottoms) / 4:
        ax.set_ylim(bottom=min(bottoms) / 4)
    tidy(ax)
    layer_legend(ax, [name for name in series if name], legend)
    return ax


def _spectra(eigenvalues: Any) -> dict[str, np.ndarray]:
    models = by_model(eigenvalues)
    if models is not None and any(hasattr(one, "eigenvalues") for one in models.values()):
        return {
            f"{model}, {name}": values
            for model, one in models.items()
            for name, values in _spectra(one).items()
        }
    own = getattr(eigenvalues, "eigenvalues", None)
    if isinstance(own, Mapping):  # AnalysisResults
        series = dict(own)
    elif hasattr(eigenvalues, "batch_size") and hasattr(eigenvalues, "keys"):  # a TensorDict
        frame = to_frame(eigenvalues, "eigenvalues")
        series = dict(zip(frame["site"], frame["eigenvalues"]))
    elif isinstance(eigenvalues, Mapping):
        series = dict(eigenvalues)
    else:
        series = {"": eigenvalues}
    series = {_layer_name(name): as_array(values) for name, values in series.items()}
    for name, values in series.items():
        if values.ndim != 1 or not len(values) or not values[0] > 0:
            raise ValueError(
                f"spectrum expects descending eigenvalues of shape (D,), the first above 0; {name or 'it'!r} has shape "
                f"{values.shape} and starts {values.ravel()[:3].tolist()}."
            )
    if not series:
        raise ValueError(
            "spectrum found no eigenvalues: the analysis ran without them (metrics='default' has them)."
        )
    return series


def _layer_name(name: object) -> str:
    name = str(name)
    return f"layer {int(name[6:])}" if name.startswith("layer_") and name[6:].isdigit() else name
