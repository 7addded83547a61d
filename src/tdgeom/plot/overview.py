"""The first picture of an analysis: its main panels in one figure; and any one of them by name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from tdgeom.plot.ablations import ablation
from tdgeom.plot.convergence_curves import convergence
from tdgeom.plot.depth import intrinsic_dimension, overlap
from tdgeom.plot.lines import profile
from tdgeom.plot.matrices import matrix
from tdgeom.plot.picture_files import title_of, told_apart_by
from tdgeom.plot.router_loads import router
from tdgeom.plot.scale_profiles import scale_profile
from tdgeom.plot.spectra import spectrum
from tdgeom.plot.style import require_matplotlib

__all__ = ["overview", "picture"]

PICTURES = {
    "spectrum": spectrum,
    "ablation": ablation,
    "router": router,
    "intrinsic_dimension": intrinsic_dimension,
    "scale_profile": scale_profile,
    "overlap": overlap,
    "convergence": convergence,
}
SITES = ("d_pr", "twonn_estimate", "effective_rank", "top1_share", "cos_sim_mean")
PAIRS = ("linear_cka_debiased", "linear_cka", "feature_subspace_novelty", "neighborhood_overlap")


def overview(results: Any, figure: Any = None) -> Any:
    """Up to six panels: the spectra, measures over depth, what changes from site to site, the ablation, the routers' loads.

    Args:
        results: ``AnalysisResults``.
        figure: a matplotlib figure; made if None.

    Returns:
        The axes, an array of them.

    Raises:
        ValueError: the results hold nothing to draw.
    """
    names = ["spectrum"] if results.eigenvalues else []
    names += [name for name in SITES if _there(results.metrics, name)][: 2 if "load" in results.router else 3]
    names += [name for name in PAIRS if _there(results.novelty, name)][:1]
    names += ["ablation"] if "normalization_ablation" in results.diagnostics else []
    names += ["router"] if "load" in results.router else []
    names = names[:6]
    if not names:
        raise ValueError("results.plot: there is nothing to draw: no eigenvalues, no measures.")
    across = min(3, len(names))
    down = -(-len(names) // across)
    if figure is None:
        require_matplotlib()
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(4.4 * across, 3.4 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, name in zip(axes, names):
        picture(results, name, ax)
    for ax in axes[len(names) :]:
        ax.remove()
    figure.suptitle(title_of(results.metadata), fontsize="medium", parse_math=False)
    return axes[: len(names)]


def picture(results: Any, what: str, ax: Any = None, **style: Any) -> Any:
    """One picture by name: of ``PICTURES``, or a measure: of sites over depth, of pairs as lines or a matrix.

    Raises:
        KeyError: no such picture or measure; the message names the nearest.
    """
    if what in PICTURES:
        draw: Any = PICTURES[what]
        return draw(results, ax=ax, **style)
    if _there(results.metrics, what):
        return profile(results.metrics, what, hue=told_apart_by(results.metrics), ax=ax, **style)
    if _there(results.novelty, what):
        pairs = results.novelty
        apart = [name for name in ("weights",) if name in pairs]
        if "transition" in pairs and not pairs.duplicated([*apart, "a"]).any():
            return profile(pairs, what, "layer", hue=told_apart_by(pairs), ax=ax, **style)
        return matrix(pairs, what, ax, **style)
    known = [*PICTURES, *results.metrics.select_dtypes("number"), *results.novelty.select_dtypes("number")]
    near = get_close_matches(what, map(str, known), n=1, cutoff=0.5)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise KeyError(f"plot: {what!r} is no picture and no measure here.{meant} Pictures are {list(PICTURES)}.")


def _there(table: Any, name: str) -> bool:
    return name in set(table.select_dtypes(["number", "bool"])) and bool(table[name].notna().any())
