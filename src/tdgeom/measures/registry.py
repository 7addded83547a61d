"""The measures that ``compare`` and the command line know by name, and the stage of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from tdgeom.core.pair_stage import PairStage
from tdgeom.measures.neighbors.information_imbalance import InformationImbalance
from tdgeom.measures.neighbors.neighborhood_overlap import JaccardKNN, NeighborhoodOverlap
from tdgeom.measures.similarity.cca import CCA, PWCCA, SVCCA
from tdgeom.measures.similarity.cknna import CKNNA
from tdgeom.measures.similarity.kernel_alignment import RBFCKA, DistanceCorrelation
from tdgeom.measures.similarity.linear_cka import LinearCKA
from tdgeom.measures.similarity.linear_r2 import LinearR2
from tdgeom.measures.similarity.matching import SoftMatching
from tdgeom.measures.similarity.procrustes import Procrustes
from tdgeom.measures.similarity.rsa import RSA

__all__ = ["ALIASES", "DEFAULT_MEASURES", "MEASURES", "NamedMeasure", "named_stages"]


class NamedMeasure(NamedTuple):
    """One line that says what it is; its stage, made with ``source=`` where ``rows`` is "all" or "sketch".

    ``rows``: a "sample" of the rows, "all" of them by exact moments, or "sketch": all, by moments or by a sketch of them.
    Names with the same ``stage`` are outputs of one stage.
    """

    says: str
    stage: Callable[..., PairStage]
    rows: Literal["sample", "all", "sketch"] = "sample"


MEASURES = {
    "linear_cka_debiased": NamedMeasure(
        "debiased linear CKA over all rows", partial(LinearCKA, estimator="debiased"), "sketch"
    ),
    "linear_cka": NamedMeasure("biased linear CKA over all rows", LinearCKA, "sketch"),
    "neighborhood_overlap": NamedMeasure("mutual 10 nearest neighbours", partial(NeighborhoodOverlap, k=10)),
    "jaccard_knn": NamedMeasure("Jaccard index of the 10 nearest neighbours", partial(JaccardKNN, k=10)),
    "rbf_cka": NamedMeasure("RBF CKA", RBFCKA),
    "rsa": NamedMeasure("RSA", RSA),
    "procrustes": NamedMeasure("Procrustes distance over all rows", Procrustes, "all"),
    "angular_shape": NamedMeasure("angular shape distance over all rows", Procrustes, "all"),
    "cca_mean": NamedMeasure("mean canonical correlation over all rows", CCA, "all"),
    "cca_r2": NamedMeasure("mean squared canonical correlation over all rows", CCA, "all"),
    "svcca": NamedMeasure("SVCCA", SVCCA),
    "pwcca_ab": NamedMeasure("PWCCA weighted by the first over all rows", PWCCA, "all"),
    "pwcca_ba": NamedMeasure("PWCCA weighted by the second over all rows", PWCCA, "all"),
    "linear_r2_ab": NamedMeasure("R² of the second from the first over all rows", LinearR2, "all"),
    "linear_r2_ba": NamedMeasure("R² of the first from the second over all rows", LinearR2, "all"),
    "cknna": NamedMeasure("CKNNA", CKNNA),
    "distance_correlation": NamedMeasure("distance correlation", DistanceCorrelation),
    "soft_matching": NamedMeasure("soft matching of features", SoftMatching),
    "information_imbalance_ab": NamedMeasure("information imbalance from the first", InformationImbalance),
    "information_imbalance_ba": NamedMeasure("information imbalance from the second", InformationImbalance),
}
"""By name. A stage of two outputs (Procrustes, CCA, ...) writes both, whichever is asked for."""

ALIASES = {
    "cka": "linear_cka_debiased",
    "rv_coefficient": "linear_cka",
    "mutual_knn": "neighborhood_overlap",
    "permutation_matching": "soft_matching",
}
"""Other names of the same measures."""

DEFAULT_MEASURES = ("linear_cka_debiased", "neighborhood_overlap")


def named_stages(names: Sequence[str], *, sketch: bool = False) -> list[PairStage]:
    """The stages that compute measures by name, each once, in the order of the names.

    Raises:
        ValueError: a name that is none, or with ``sketch`` a measure that needs exact moments.

        >>> [type(stage).__name__ for stage in named_stages(["cka", "procrustes", "angular_shape"])]
        ['LinearCKA', 'Procrustes']
    """
    full = [ALIASES.get(name, name) for name in names]
    if unknown := [name for name in full if name not in MEASURES]:
        others = ", ".join(f"{alias} for {name}" for alias, name in ALIASES.items())
        raise ValueError(f"metrics takes any of {', '.join(MEASURES)} ({others}), got {', '.join(unknown)}.")
    if sketch and (exact := [name for name in full if MEASURES[name].rows == "all"]):
        raise ValueError(f"metrics {', '.join(exact)} need exact moments: leave them out, or sketch.")
    sources = {"all": "moments", "sketch": "sketch" if sketch else "moments"}
    stages: dict[object, PairStage] = {}
    for name in full:
        _, stage, rows = MEASURES[name]
        if stage not in stages:
            stages[stage] = stage() if rows == "sample" else stage(source=sources[rows])
    return list(stages.values())
