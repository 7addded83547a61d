"""What the columns of result tables are: their names on an axis, units, ranges, and a sentence to read each by."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from typing import NamedTuple

__all__ = [
    "BETWEEN_STEPS",
    "ESTIMATORS", "THEMES", "Column", "accompanies", "column_of", "error_column", "fixed_ends", "interval_columns", "is_detail",
    "is_error",
    "of_chance",
]  # fmt: skip

THEMES = ("dimension", "concentration", "direction", "between", "router", "other")
"""Which question a measure answers: how many directions, how uneven, which way rows point, what changes from site to site."""

ERRORS = ("_standard_error", "_se")


class Column(NamedTuple):
    """A column: what an axis calls it, its unit, the ends of its range (None: open), its theme, and how to read it."""

    label: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    theme: str = "other"
    says: str = ""

    @property
    def axis(self) -> str:
        """The label with its unit in brackets."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


def _of(theme: str, rows: dict[str, tuple[str, str, float | None, float | None, str]]) -> dict[str, Column]:
    return {
        name: Column(label, unit, low, high, theme, says)
        for name, (label, unit, low, high, says) in rows.items()
    }


COLUMNS: dict[str, Column] = {
    "layer": Column("layer"),
    "from_layer": Column("layer, the first of the two"),
    "relative_depth": Column("relative depth", "layer / last layer", 0.0, 1.0),
    "layer_norm_depth": Column("relative depth", "layer / last analysed layer", 0.0, 1.0),
    "transition": Column("from layer -> to layer"),
    **_of("dimension", {
        "d_pr": ("participation ratio", "dimensions", 1, None, "Over how many directions the variance spreads evenly."),
        "d_pr_norm": ("participation ratio / width", "", 0, 1, "The share of the width over which the variance spreads."),
        "d_entropy": ("entropy dimension", "dimensions", 1, None,
                      "As the participation ratio, but small directions count for more."),
        "d_entropy_norm": ("entropy dimension / width", "", 0, 1, "The entropy dimension as a share of the width."),
        "effective_rank": ("effective rank", "dimensions", 1, None,
                           "As the entropy dimension, of standard deviations: the tail of the spectrum counts most."),
        "stable_rank": ("stable rank", "dimensions", 1, None,
                        "Total variance over that of the first direction: 1 when one direction has it all."),
        "rankme": ("RankMe", "dimensions", 1, None, "Effective rank of the uncentred rows."),
        "k90": ("components for 90 % of the variance", "", 1, None, "How many leading directions hold 90 % of the variance."),
        "k95": ("components for 95 % of the variance", "", 1, None, "How many leading directions hold 95 % of the variance."),
        "k99": ("components for 99 % of the variance", "", 1, None, "How many leading directions hold 99 % of the variance."),
        "numerical_rank": ("numerical rank", "dimensions", 0, None,
                           "How many directions vary more than rounding: what lies beyond is not measured."),
        "sv_numerical_rank": ("numerical rank of the sample", "dimensions", 0, None,
                              "How many directions of the sample vary more than rounding."),
        "sv_participation_ratio": ("participation ratio of the sample", "dimensions", 1, None,
                                   "The participation ratio of the sampled rows alone."),
        "sv_effective_rank": ("effective rank of the sample", "dimensions", 1, None,
                              "The effective rank of the sampled rows alone."),
        "sv_stable_rank": ("stable rank of the sample", "dimensions", 1, None, "The stable rank of the sampled rows alone."),
    }),
    **_of("concentration", {
        "top1_share": ("variance in the first component", "share", 0, 1, "Near 1, a single direction dominates."),
        "top10_share": ("variance in the first 10 components", "share", 0, 1, "How much ten directions hold."),
        "top32_share": ("variance in the first 32 components", "share", 0, 1, "How much 32 directions hold."),
        "ve_4": ("variance in the first 4 components of the sample", "share", 0, 1, "How much 4 directions hold."),
        "ve_8": ("variance in the first 8 components of the sample", "share", 0, 1, "How much 8 directions hold."),
        "ve_16": ("variance in the first 16 components of the sample", "share", 0, 1, "How much 16 directions hold."),
        "ve_32": ("variance in the first 32 components of the sample", "share", 0, 1, "How much 32 directions hold."),
        "alpha_req": ("power-law exponent of the spectrum", "", None, None,
                      "How steeply the spectrum falls; about 1 is slow, above 2 fast."),
        "log_spectrum_slope_10_200": ("slope of ln λ over ranks 10 to 200", "per rank", None, None,
                                      "How fast the middle of the spectrum falls."),
        "isoscore": ("IsoScore", "", 0, 1, "1 when variance is the same in all directions, 0 when one has it all."),
        "top_feature_share": ("variance of the largest feature", "share", 0, 1,
                              "Near 1, one coordinate of the model dominates (a massive activation)."),
    }),
    **_of("direction", {
        "cos_sim_mean": ("mean cosine between rows", "", -1, 1,
                         "Near 0 rows point every way, near 1 all into one narrow cone."),
        "cos_sim_std": ("spread of the cosine between rows", "", 0, 1, "Standard deviation over pairs of rows."),
        "norm_mean": ("mean norm of a row", "", 0, None, "The length of the rows."),
        "norm_q05": ("norm of a row, 5 % quantile", "", 0, None, "5 % of rows are shorter."),
        "norm_q50": ("norm of a row, median", "", 0, None, "Half of the rows are shorter."),
        "norm_q95": ("norm of a row, 95 % quantile", "", 0, None, "5 % of rows are longer."),
        "norm_max": ("largest norm of a row", "", 0, None, "Far above the 95 % quantile, a few rows carry the geometry."),
    }),
    **_of("between", {
        "feature_subspace_novelty": ("subspace novelty", "", 0, 1,
                                     "0 if the leading subspace stays, 1 if it turns orthogonal."),
        "linear_cka": ("linear CKA", "", 0, 1, "1 if the geometry of the rows stays; biased upwards by few rows."),
        "linear_cka_sampled": ("linear CKA of the populations", "", 0, 1,
                               "Of all features of which these are a random sample: 1 if the geometry of the rows stays."),
        "linear_cka_debiased": ("linear CKA, debiased", "", 0, 1, "1 if the geometry of the rows stays, about 0 by chance."),
        "rv": ("RV coefficient", "", 0, 1, "Another name of linear CKA."),
        "layer_cosine_sim": ("mean cosine, same row", "", -1, 1, "1 if each row keeps its direction."),
        "neighborhood_overlap": ("neighbourhood overlap", "", 0, 1, "The share of nearest neighbours that stay the same."),
        "jaccard_knn": ("Jaccard index of neighbours", "", 0, 1, "Shared nearest neighbours over all that either side has."),
        "rbf_cka": ("RBF CKA", "", 0, 1, "1 if near rows stay near."),
        "rsa": ("representational similarity", "", -1, 1, "Correlation of the distances between rows on both sides."),
        "procrustes": ("Procrustes distance", "", 0, None, "0 if one side is a rotation of the other."),
        "angular_shape": ("angular shape distance", "radians", 0, 1.5707963267948966,
                          "0 if one side is a rotation of the other."),
        "cca_mean": ("mean canonical correlation", "", 0, 1, "1 if each side is a linear function of the other."),
        "cca_r2": ("mean squared canonical correlation", "", 0, 1, "1 if each side is a linear function of the other."),
        "svcca": ("SVCCA", "", 0, 1, "Mean canonical correlation of the leading directions."),
        "pwcca_ab": ("PWCCA, weighted by the first", "", 0, 1, "Canonical correlation weighted by what the first side uses."),
        "pwcca_ba": ("PWCCA, weighted by the second", "", 0, 1, "Canonical correlation weighted by what the second uses."),
        "linear_r2_ab": ("R² of the second from the first", "", 0, 1, "How much of the second side the first predicts."),
        "linear_r2_ba": ("R² of the first from the second", "", 0, 1, "How much of the first side the second predicts."),
        "cknna": ("CKNNA", "", 0, 1, "Kernel alignment of mutual nearest neighbours."),
        "distance_correlation": ("distance correlation", "", 0, 1, "0 for independent rows, of many, 1 for similar shapes."),
        "soft_matching": ("soft matching of features", "", 0, 1, "1 if features match one to one."),
        "information_imbalance_ab": ("information imbalance, from the first", "", 0, 1,
                                     "0 if the first side tells the neighbours of the second, 1 if it tells nothing."),
        "information_imbalance_ba": ("information imbalance, from the second", "", 0, 1,
                                     "0 if the second side tells the neighbours of the first, 1 if it tells nothing."),
    }),
    **_of("router", {
        "load": ("share of assignments", "", 0, None, "Even columns: experts are used alike."),
        "mean_probability": ("mean router probability", "", 0, 1, "What the router would give each expert."),
        "router_entropy": ("router entropy", "nats", 0, None, "The logarithm of how many experts are used alike."),
        "router_entropy_norm": ("router entropy / ln(experts)", "", 0, 1, "1 if all experts are used alike, 0 if one is."),
        "load_imbalance": ("largest load over even load", "", 1, None, "1 if loads are even."),
        "top_expert_load": ("load of the most used expert", "share", 0, 1, "Near 1, one expert gets everything."),
    }),
    "label_overlap": Column("neighbours with the same label", "share", 0, 1, "dimension",
                            "1 if all neighbours of a row share its label."),
    "value": Column("overlap", "", 0, 1, "between", "0: no neighbour is shared; 1: all are."),
    "estimate": Column("intrinsic dimension", "dimensions", 0, None, "dimension",
                       "How many coordinates the rows need near each row."),
}  # fmt: skip

ESTIMATORS = {
    "twonn": "TwoNN", "gride": "Gride", "levina_bickel": "Levina-Bickel", "mom": "method of moments", "tle": "TLE",
    "local_knn": "local kNN", "local_pca": "local PCA", "ca_pca": "curvature-adjusted PCA", "global_pca": "PCA",
    "participation_ratio": "participation ratio", "decimation": "TwoNN by decimation",
}  # fmt: skip


# ending -> what stands beside a measure: its label around the measure's, its range ("own" is the measure's), a sentence, a unit
BESIDE: dict[str, tuple[str, tuple[float | None, float | None] | str, str, str | None]] = {
    "_standard_error": ("{}, standard error", (0, None), "How far it would vary over other rows.", None),
    "_se": ("{}, standard error", (0, None), "How far it would vary over other documents.", None),
    "_bias": ("{}, bias", (None, None), "What it is too large by, on average.", None),
    "_low": ("{}, lower end of its interval", "own", "", None),
    "_high": ("{}, upper end of its interval", "own", "", None),
    "_null_mean": (
        "{}, by chance",
        "own",
        "What sides that have nothing to do with each other give on average.",
        None,
    ),
    "_null_sd": ("{}, spread by chance", (0, None), "How far chance varies.", None),
    "_null_rows": ("{}, rows behind its level by chance", (0, None), "", "rows"),
    "_z": (
        "{}, above chance",
        (None, None),
        "How many standard deviations of chance lie below it.",
        "standard deviations",
    ),
    "_p": ("{}, p-value", (0, 1), "How often chance gives as much; below 0.05 is rare.", ""),
    "_p_adjusted": (
        "{}, p-value for the best of all pairs",
        (0, 1),
        "How often chance gives as much to any of the pairs; below 0.05 is rare.",
        "",
    ),
    "_to_first": ("{}, to the first", "own", "", None),
    "_to_last": ("{}, to the last", "own", "", None),
    "_to_previous": ("{}, to the one before", "own", "", None),
    "_calibrated": ("{}, calibrated", (None, None), "0 by chance, 1 for what cannot be more alike.", ""),
}
BETWEEN_STEPS = ("_to_first", "_to_last", "_to_previous")
DETAILS = ("_bias", "_low", "_high", "_null_sd", "_null_rows")
UNDRAWN = (*ERRORS, *DETAILS, "_null_mean", "_z", "_p_adjusted")
CHANCE = ("_null_mean", "_null_sd", "_null_rows", "_z", "_p", "_p_adjusted", "_calibrated")


def column_of(name: str) -> Column:
    """What a column is; of one that nobody described, its name with spaces.

    >>> column_of("d_pr").axis, column_of("twonn_estimate").label, column_of("my_score").label
    ('participation ratio (dimensions)', 'intrinsic dimension, TwoNN', 'my score')
    >>> column_of("linear_cka_p").label, column_of("d_pr_se").axis, column_of("my_p").label
    ('linear CKA, p-value', 'participation ratio, standard error (dimensions)', 'my p')
    """
    if name in COLUMNS:
        return COLUMNS[name]
    stem, ending = _split(name)
    if ending and (stem in COLUMNS or stem in ESTIMATORS or stem.endswith("_estimate")):
        measure = column_of(f"{stem}_estimate" if stem in ESTIMATORS else stem)
        label, ends, says, unit = BESIDE[ending]
        low, high = (measure.low, measure.high) if isinstance(ends, str) else ends
        unit = measure.unit if unit is None else unit
        return Column(label.format(measure.label), unit, low, high, measure.theme, says)
    if name.endswith("_estimate"):
        stem = name.removesuffix("_estimate")
        said = ESTIMATORS.get(stem, stem.replace("_", " "))
        return COLUMNS["estimate"]._replace(label=f"intrinsic dimension, {said}")
    return Column(name.replace("_", " "))


def fixed_ends(column: Column, values: Iterable[float]) -> list[float] | None:
    """The axis of a measure that has a range: the range, and what lies outside of it; None where it is open.

    >>> fixed_ends(column_of("linear_cka"), [0.4, 0.9]), fixed_ends(column_of("linear_cka_debiased"), [-0.5, 0.9])
    ([0.0, 1.0], [-0.5, 1.0])
    """
    if column.low is None or column.high is None:
        return None
    found = [value for value in map(float, values) if math.isfinite(value)]
    # a cosine that is never negative needs no lower half
    low = 0.0 if column.low == -1 and min(found, default=0.0) >= 0 else column.low
    return [float(min([low, *found])), float(max([column.high, *found]))]


def _split(name: str) -> tuple[str, str]:
    """A column's name as that of the measure it stands beside and the ending; no ending for a measure itself."""
    ending = max((one for one in BESIDE if name.endswith(one) and name != one), key=len, default="")
    return (name.removesuffix(ending), ending) if ending else (name, "")


def is_detail(name: str, columns: Container[str]) -> bool:
    """Whether a column says of another of these what only its error bar, or a download, has to show.

    >>> is_detail("d_pr_low", ["d_pr", "d_pr_low"]), is_detail("energy_low", ["energy_low"])
    (True, False)
    """
    stem, ending = _split(name)
    return ending in DETAILS and _among(stem, columns)


def accompanies(name: str, columns: Container[str]) -> bool:
    """Whether a column belongs to another of these, and has no picture of its own.

    >>> accompanies("linear_cka_z", ["linear_cka"]), accompanies("linear_cka_p", ["linear_cka"])
    (True, False)
    """
    stem, ending = _split(name)
    return is_error(name) or (ending in UNDRAWN and _among(stem, columns))


def of_chance(name: str) -> bool:
    """Whether a column says what a measure is by chance.

    >>> of_chance("linear_cka_p"), of_chance("rsa_calibrated"), of_chance("linear_cka")
    (True, True, False)
    """
    return _split(name)[1] in CHANCE


def _among(stem: str, columns: Container[str]) -> bool:
    return stem in columns or f"{stem}_estimate" in columns or f"{stem}_p" in columns


def is_error(name: str) -> bool:
    """Whether a column is another's standard error."""
    return name.endswith(ERRORS)


def interval_columns(name: str, columns: Container[str]) -> tuple[str, str] | None:
    """The columns that hold the ends of the interval of ``name``, among these.

    >>> interval_columns("d_pr", ["d_pr", "d_pr_low", "d_pr_high"])
    ('d_pr_low', 'd_pr_high')
    """
    low, high = f"{name}_low", f"{name}_high"
    return (low, high) if low in columns and high in columns else None


def error_column(name: str, columns: Container[str]) -> str | None:
    """The column that holds the standard error of ``name``, among these.

    >>> error_column("twonn_estimate", ["twonn_estimate", "twonn_standard_error"])
    'twonn_standard_error'
    """
    stems = (name, name.removesuffix("_estimate")) if name != "estimate" else (name, "")
    wanted = [f"{stem}{ending}".lstrip("_") for stem in stems for ending in ERRORS]
    return next((one for one in wanted if one in columns), None)
