"""The measures that analyses, comparisons and the command line know by name, and the stage of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from tensordict.nn import TensorDictModuleBase

__all__ = [
    "ALIASES",
    "DEFAULT_MEASURES",
    "MEASURES",
    "SITE_MEASURES",
    "STEP_MEASURES",
    "NamedMeasure",
    "StageAt",
    "known_measures",
    "named_stages",
]

GROUP = "tdgeom.measures"


class NamedMeasure(NamedTuple):
    """One line that says what it is; its stage, made with ``source=`` where ``rows`` is "all" or "sketch".

    ``rows``: a "sample" of the rows, "all" of them by exact moments, or "sketch": all, by moments or by a sketch of them; where
    the stage itself says what it reads, leave it "sample". Names with the same ``stage`` are outputs of one stage.
    """

    says: str
    stage: Callable[..., TensorDictModuleBase]
    rows: Literal["sample", "all", "sketch"] = "sample"


@dataclass(frozen=True)
class StageAt:
    """A stage of this room, imported when it is made: names are listed without torch."""

    place: str

    def __call__(self, **settings: Any) -> TensorDictModuleBase:
        """The stage, with these settings."""
        module, _, name = self.place.partition(":")
        return getattr(import_module(f"tdgeom.measures.{module}"), name)(**settings)


MEASURES = {
    "linear_cka_debiased": NamedMeasure(
        "debiased linear CKA over all rows",
        partial(StageAt("similarity.linear_cka:LinearCKA"), estimator="debiased"),
        "sketch",
    ),
    "linear_cka": NamedMeasure(
        "biased linear CKA over all rows", StageAt("similarity.linear_cka:LinearCKA"), "sketch"
    ),
    "linear_cka_sampled": NamedMeasure(
        "linear CKA of populations whose features these are a random sample of, with its error",
        StageAt("similarity.sampled_cka:SampledCKA"),
    ),
    "neighborhood_overlap": NamedMeasure(
        "mutual 10 nearest neighbours",
        partial(StageAt("neighbors.neighborhood_overlap:NeighborhoodOverlap"), k=10),
    ),
    "jaccard_knn": NamedMeasure(
        "Jaccard index of the 10 nearest neighbours",
        partial(StageAt("neighbors.neighborhood_overlap:JaccardKNN"), k=10),
    ),
    "rbf_cka": NamedMeasure("RBF CKA", StageAt("similarity.kernel_alignment:RBFCKA")),
    "rsa": NamedMeasure("RSA", StageAt("similarity.rsa:RSA")),
    "procrustes": NamedMeasure(
        "Procrustes distance over all rows", StageAt("similarity.procrustes:Procrustes"), "all"
    ),
    "angular_shape": NamedMeasure(
        "angular shape distance over all rows", StageAt("similarity.procrustes:Procrustes"), "all"
    ),
    "cca_mean": NamedMeasure(
        "mean canonical correlation over all rows", StageAt("similarity.cca:CCA"), "all"
    ),
    "cca_r2": NamedMeasure(
        "mean squared canonical correlation over all rows", StageAt("similarity.cca:CCA"), "all"
    ),
    "svcca": NamedMeasure("SVCCA", StageAt("similarity.cca:SVCCA")),
    "pwcca_ab": NamedMeasure(
        "PWCCA weighted by the first over all rows", StageAt("similarity.cca:PWCCA"), "all"
    ),
    "pwcca_ba": NamedMeasure(
        "PWCCA weighted by the second over all rows", StageAt("similarity.cca:PWCCA"), "all"
    ),
    "linear_r2_ab": NamedMeasure(
        "R² of the second from the first over all rows", StageAt("similarity.linear_r2:LinearR2"), "all"
    ),
    "linear_r2_ba": NamedMeasure(
        "R² of the first from the second over all rows", StageAt("similarity.linear_r2:LinearR2"), "all"
    ),
    "cknna": NamedMeasure("CKNNA", StageAt("similarity.cknna:CKNNA")),
    "distance_correlation": NamedMeasure(
        "distance correlation", StageAt("similarity.kernel_alignment:DistanceCorrelation")
    ),
    "soft_matching": NamedMeasure("soft matching of features", StageAt("similarity.matching:SoftMatching")),
    "information_imbalance_ab": NamedMeasure(
        "information imbalance from the first",
        StageAt("neighbors.information_imbalance:InformationImbalance"),
    ),
    "information_imbalance_ba": NamedMeasure(
        "information imbalance from the second",
        StageAt("neighbors.information_imbalance:InformationImbalance"),
    ),
}
"""Between two sites. A stage of two outputs (Procrustes, CCA, ...) writes both, whichever is asked for."""

SITE_MEASURES = {
    "twonn": NamedMeasure("TwoNN dimension", StageAt("dimension.twonn:TwoNN")),
    "gride": NamedMeasure("Gride dimension at every scale", StageAt("dimension.gride:Gride")),
    "levina_bickel": NamedMeasure(
        "Levina and Bickel's dimension", StageAt("dimension.likelihood:LevinaBickel")
    ),
    "mom": NamedMeasure("method of moments dimension", StageAt("dimension.likelihood:MOM")),
    "tle": NamedMeasure("tight local dimension", StageAt("dimension.tle:TLE")),
    "local_knn": NamedMeasure("local dimension by neighbour counts", StageAt("dimension.local:LocalKNN")),
    "local_pca": NamedMeasure("local PCA dimension", StageAt("dimension.local:LocalPCA")),
    "ca_pca": NamedMeasure("curvature-adjusted local PCA dimension", StageAt("dimension.ca_pca:CAPCA")),
    "global_pca": NamedMeasure("PCA dimension", StageAt("dimension.pca:GlobalPCA")),
    "participation_ratio": NamedMeasure(
        "participation ratio over all rows", StageAt("dimension.pca:ParticipationRatio")
    ),
    "decimation": NamedMeasure(
        "TwoNN dimension of smaller and smaller shares of the rows",
        StageAt("dimension.decimation:Decimation"),
    ),
    "rankme": NamedMeasure("RankMe over all rows", StageAt("spectrum_metrics:RankMe")),
    "label_overlap": NamedMeasure(
        "how often neighbours share a label", StageAt("neighbors.label_overlap:LabelOverlap")
    ),
}
"""Of one site, and of its sample or moments, as the stage says."""

STEP_MEASURES = {
    "feature_subspace_novelty": NamedMeasure(
        "share of the leading subspace that the next site does not have",
        StageAt("similarity.subspace:SubspaceNovelty"),
    ),
    "layer_cosine_sim": NamedMeasure(
        "mean cosine of a row with itself at the next site", StageAt("similarity.subspace:LayerCosine")
    ),
}  # of consecutive sites of one model: they need one space

ALIASES = {
    "2nn": "twonn",
    "subspace_novelty": "feature_subspace_novelty",
    "layer_cosine": "layer_cosine_sim",
    "lpca": "local_pca",
    "cka": "linear_cka_debiased",
    "rv_coefficient": "linear_cka",
    "mutual_knn": "neighborhood_overlap",
    "permutation_matching": "soft_matching",
}
"""Other names of the same measures."""

DEFAULT_MEASURES = ("linear_cka_debiased", "neighborhood_overlap")


@cache
def known_measures() -> Mapping[str, NamedMeasure]:
    """Every measure by name: those above, and those of installed packages.

    A package adds its own by entry points of the group ``tdgeom.measures``: the name, and a stage class, a function that makes a
    stage, or a ``NamedMeasure``. Names above cannot be taken.

        >>> known_measures()["twonn"].says
        'TwoNN dimension'
    """
    own = {**MEASURES, **SITE_MEASURES, **STEP_MEASURES}
    others = {point.name: point.load() for point in entry_points(group=GROUP) if point.name not in own}
    return own | {name: _named(name, made) for name, made in others.items()}


def _named(name: str, made: Any) -> NamedMeasure:
    if isinstance(made, NamedMeasure):
        return made
    if not callable(made):
        raise TypeError(
            f"the entry point {name!r} of {GROUP!r} should be a stage class, a function that makes a stage, or a "
            f"NamedMeasure, got {type(made).__name__}."
        )
    return NamedMeasure(" ".join((made.__doc__ or name).strip().partition("\n")[0].split()), made)


def named_stages(
    names: Sequence[str], *, between: bool = False, sketch: bool = False, also: Sequence[str] = ()
) -> list[Any]:
    """The stages that compute measures by name, each once, in the order of the names.

    Args:
        names: of measures, see ``known_measures``, or their ``ALIASES``.
        between: only measures between two models will do.
        sketch: all rows by a sketch in place of exact moments.
        also: further names that were possible, for the message.

    Raises:
        ValueError: a name that is none, one of a single site with ``between``, or with ``sketch`` a measure that needs exact
            moments.

        >>> [type(stage).__name__ for stage in named_stages(["cka", "procrustes", "angular_shape", "twonn"])]
        ['LinearCKA', 'Procrustes', 'TwoNN']
    """
    known = known_measures()
    full = [ALIASES.get(name, name) for name in names]
    possible = [n for n in known if not between or n not in (*SITE_MEASURES, *STEP_MEASURES)]
    if unknown := [name for name in full if name not in possible]:
        short = {alias: name for alias, name in ALIASES.items() if name in possible}
        near = get_close_matches(unknown[0].lower(), [*possible, *also, *short], n=1, cutoff=0.5)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        others = ", ".join(f"{alias} for {name}" for alias, name in short.items())
        raise ValueError(
            f"metrics: {', '.join(map(repr, unknown))} is none.{meant} There are {', '.join([*also, *possible])}; {others}; and "
            f"stages of your own such as tg.{'LinearCKA' if between else 'TwoNN'}()."
        )
    if sketch and (exact := [name for name in full if known[name].rows == "all"]):
        raise ValueError(f"metrics {', '.join(exact)} need exact moments: leave them out, or sketch.")
    sources = {"all": "moments", "sketch": "sketch" if sketch else "moments"}
    stages: dict[object, TensorDictModuleBase] = {}
    for name in full:
        _, stage, rows = known[name]
        if stage not in stages:
            stages[stage] = stage() if rows == "sample" else stage(source=sources[rows])
    return list(stages.values())
