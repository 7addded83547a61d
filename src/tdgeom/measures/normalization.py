"""``NormalizationAblation``: how much of a spectrum is a matter of row norms and feature scales."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdgeom.core.keys import Key, Keys, key_tuple, optional_in_keys
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.wrong_objects import refuse_class
from tdgeom.measures.eigen_spectrum import covariance_eigenvalues
from tdgeom.measures.sample_metrics import (
    PRODUCTS,
    SampleStage,
    centred,
    covariance_of,
    sample_eigenvalues,
    unit_rows,
    working,
)
from tdgeom.measures.spectrum_metrics import SPECTRUM_MARKS, SpectrumMetrics

__all__ = ["VARIANTS", "NormalizationAblation", "Variant", "normalized"]

Variant = Callable[..., Tensor]


def token_l2(sample: Tensor) -> Tensor:
    """Rows to unit L2 norm; rows of zeros stay zero."""
    return unit_rows(sample)[0]


def token_rms(sample: Tensor) -> Tensor:
    """Rows to unit root mean square."""
    return token_l2(sample) * sample.shape[-1] ** 0.5


def feature_standardized(sample: Tensor) -> Tensor:
    """Columns to mean 0 and unbiased standard deviation 1; constant columns become 0."""
    rows = centred(sample)
    std = rows.std(-2, keepdim=True)
    return rows / torch.where(std > 0, std, torch.inf)


def remove_top_pc(sample: Tensor) -> Tensor:
    """Rows without their component along the first principal axis."""
    rows = centred(sample)
    axis = torch.linalg.eigh(covariance_of(sample)).eigenvectors[..., -1:]
    return rows - (rows @ axis) @ axis.mT


def drop_outlier_features(sample: Tensor) -> Tensor:
    """Columns whose variance exceeds 25 times the median of those that vary set to 0 (massive-activation features)."""
    variance = centred(sample).square().mean(-2, keepdim=True)
    # Of dead columns (ReLU units, codes) there may be more than of others: they are no scale.
    typical = torch.where(variance > 0, variance, torch.nan).nanmedian(-1, keepdim=True).values
    return torch.where(variance > 25 * typical, 0, sample)


def without_first_token(sample: Tensor, position: Tensor) -> Tensor:
    """Only rows whose position in their sequence is not 0."""
    return sample[..., position > 0, :]


VARIANTS: dict[str, Variant] = {
    "raw": lambda sample: sample,
    "token_l2": token_l2,
    "token_rms": token_rms,
    "feature_standardized": feature_standardized,
    "remove_top_pc": remove_top_pc,
    "drop_outlier_features": drop_outlier_features,
    "without_first_token": without_first_token,
}
DEFAULT = ("raw", "token_l2", "token_rms", "feature_standardized")


def normalized(sample: Tensor, variant: str, position: Tensor | None = None) -> Tensor:
    """The sample (*B, N, D) under a named variant.

    >>> normalized(torch.tensor([[3.0, 4.0]]), "token_l2")
    tensor([[0.6000, 0.8000]])
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown: one of {list(VARIANTS)}, or pass a function.")
    rows = working(sample)
    return _apply(VARIANTS[variant], rows.double(), position, variant).to(rows.dtype)


def _apply(function: Variant, sample: Tensor, position: Tensor | None, name: str) -> Tensor:
    if not _wants_position(function):
        return function(sample)
    if position is None and name == "without_first_token":
        raise ValueError(
            "NormalizationAblation variant 'without_first_token' needs 'sample_row_id', which RowSample writes beside the "
            "sample: pass it, or leave the variant out."
        )
    return function(sample, position)


def _wants_position(function: Variant) -> bool:
    """True for a second positional parameter that is required or called position."""
    try:
        parameters = inspect.signature(getattr(function, "forward", function)).parameters.values()
    except ValueError:  # a builtin, such as torch.tanh
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and (
        positional[1].default is inspect.Parameter.empty or positional[1].name == "position"
    )


def named_variants(variants: Any) -> dict[str, str | Variant]:
    """Variants by name: of a mapping as they are, of a list the names, and functions by theirs.

    >>> list(named_variants(["raw", torch.tanh])), list(named_variants({"half": lambda x: x / 2}))
    (['raw', 'tanh'], ['half'])
    """
    ways = f"names of {list(VARIANTS)}, functions with a name, or a mapping {{name: name or function(sample, position)}}"
    where = "NormalizationAblation: variants"
    if isinstance(variants, str) or not isinstance(variants, Iterable):
        raise TypeError(f"{where} is a list of names or a mapping, got {variants!r:.80}. It takes {ways}.")
    listed = (
        list(variants.items()) if isinstance(variants, Mapping) else [(_named(one), one) for one in variants]
    )
    named = dict(listed)
    wrong = [
        one
        for one in named.values()
        if not isinstance(one, str) and (isinstance(one, type) or not callable(one))
    ]
    if wrong:
        raise TypeError(f"{where} are {ways}, got {wrong[0]!r:.80}.")
    odd = [
        name for name in named if not isinstance(name, str) or not name.isprintable() or name.startswith("<")
    ]
    if odd or len(named) < len(listed):
        what = "a function without a name" if odd else "one name twice"
        raise ValueError(f"{where} has {what}. Name each: variants={{'raw': 'raw', 'mine': function}}.")
    unknown = [what for what in named.values() if isinstance(what, str) and what not in VARIANTS]
    if unknown or not named:
        raise ValueError(
            f"NormalizationAblation: unknown variants {unknown}; one of {list(VARIANTS)}, or a mapping from name to "
            f"function(sample, position)."
        )
    return named


def _named(variant: Any) -> str:
    return variant if isinstance(variant, str) else getattr(variant, "__name__", "<no name>")


class NormalizationAblation(SampleStage):
    """Spectrum metrics of the sample under several normalisations.

    Formula:
        token_l2 = x/|x|; rows to unit L2
        token_rms = √D x/|x|; rows to unit RMS: the spectrum of ``token_l2`` up to scale
        feature_standardized = (x_j - x̄_j)/sd_j; columns to mean 0 and unbiased std 1: the correlation matrix

    ``raw`` is the sample as it came. Also by name:
    ``remove_top_pc``, ``drop_outlier_features`` (variance over 25 times the median of the features that vary),
    ``without_first_token``. All in float64.

    Args:
        variants: names and named functions, or a mapping from name to ``function(sample)`` or
            ``function(sample, position)``, where position is each row's place in its sequence (None when
            ``"sample_row_id"`` is absent); a name maps to itself.
        metrics: the stage that measures each variant's ``"eigenvalues"`` (or its ``"sample"``); its outputs' last key
            parts are the metric names. Default ``SpectrumMetrics()``.

    Reads ``"sample"`` (*B, N, D), and where present ``"sample_row_id"`` (N,) and what ``SampleSpectrum`` wrote of the same
    rows; writes ``("ablation", variant, metric)`` (*B,), the marks ``numerical_rank``, ``few_rows``, ``unresolved`` behind the
    measures of all. Covariances are unbiased and centred after normalisation.

    Raises:
        ValueError: an unknown variant, fewer than 2 rows, or a variant that changes nothing but needs positions it lacks.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> double = {"raw": "raw", "shifted": lambda sample, position: sample + 1}
        >>> td = tg.NormalizationAblation(variants=double)(TensorDict(sample=torch.eye(3)))
        >>> round(float(td["ablation", "shifted", "d_pr"]), 6)
        2.0
    """

    reads = {"sample": "N D", "sample_row_id": "N", **PRODUCTS}
    optional = frozenset({"sample_row_id", *map(str, PRODUCTS)})
    shared = frozenset({"sample_row_id"})
    one_thread_a_site = True

    def __init__(
        self,
        *,
        variants: Iterable[str | Variant] | Mapping[str, str | Variant] = DEFAULT,
        metrics: TensorDictModuleBase | None = None,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        named = named_variants(variants)
        metrics = SpectrumMetrics() if metrics is None else metrics
        refuse_class("NormalizationAblation: metrics", metrics)
        if not isinstance(metrics, nn.Module) or not TensorDictModuleBase.is_tdmodule_compatible(metrics):
            raise TypeError(
                f"NormalizationAblation: metrics is a stage such as tg.SpectrumMetrics() or tg.RankMe(), got {metrics!r:.80}."
            )
        wanted = [key for key in metrics.in_keys if key not in optional_in_keys(metrics)]
        if wanted not in (["eigenvalues"], ["sample"]):
            raise ValueError(
                f"NormalizationAblation: metrics must read 'eigenvalues' or 'sample' alone, {type(metrics).__name__} reads "
                f"{wanted}. Rename its input with in_keys=."
            )
        names = [key_tuple(key)[-1] for key in metrics.out_keys]
        marks = [name for name in names if name in SPECTRUM_MARKS]
        paths = [(variant, name) for variant in named for name in names if name not in marks]
        paths += [(variant, name) for variant in named for name in marks]
        # A root takes (variant, metric) under it: one name alone would clash between variants.
        if isinstance(out_keys, str | tuple):
            out_keys = [(*key_tuple(out_keys), *path) for path in paths]
        writes: list[Key] = [("ablation", *path) for path in paths]
        super().__init__(in_keys=in_keys, out_keys=out_keys, writes=writes)
        self.variants = named
        self.metrics = metrics

    def compute(self, sample: Tensor, row_id: Tensor | None = None, *products: Tensor | None) -> list[Tensor]:
        """Measure every variant, sharing what variants share."""
        eigenvalues, covariance, unit_covariance = self.products_of(sample, products)
        sample = working(self.checked(sample))
        position = None if row_id is None else row_id & ((1 << POSITION_BITS) - 1)
        known = {"raw": eigenvalues, "covariance": covariance, "unit_covariance": unit_covariance}
        shared = {name: value for name, value in known.items() if value is not None}
        measured: list[list[Tensor]] = []
        marked: list[list[Tensor]] = []
        names = [key_tuple(key)[-1] for key in self.metrics.out_keys]
        for name, what in self.variants.items():
            td = TensorDict({}, batch_size=[])
            if self.metrics.in_keys[0] == "eigenvalues":
                eigenvalues, rows = self._eigenvalues(sample, position, name, what, shared)
                td.set("eigenvalues", eigenvalues)
                count = torch.full(eigenvalues.shape[:-1], rows, device=eigenvalues.device)
                td.set(("moments", "count"), count)
            elif isinstance(what, str):
                td.set("sample", _apply(VARIANTS[what], sample.double(), position, name).to(sample.dtype))
            else:
                td.set("sample", _apply(what, sample, position, name))
            self.metrics(td)
            values = [td.get(key) for key in self.metrics.out_keys]
            measured.append([value for n, value in zip(names, values) if n not in SPECTRUM_MARKS])
            marked.append([value for n, value in zip(names, values) if n in SPECTRUM_MARKS])
        return [value for values in (*measured, *marked) for value in values]

    @staticmethod
    def _eigenvalues(
        sample: Tensor, position: Tensor | None, name: str, what: str | Variant, shared: dict[str, Tensor]
    ) -> tuple[Tensor, int]:
        """The eigenvalues of a variant, and how many rows it has."""
        if not isinstance(what, str):
            rows = _apply(what, sample, position, name)
            return sample_eigenvalues(rows), rows.shape[-2]
        # token_rms is token_l2 times √D, so one spectrum serves both; feature_standardized is the correlation matrix.
        family, n = {"token_rms": "token_l2"}.get(what, what), sample.shape[-2]
        if what == "without_first_token":
            rows = _apply(without_first_token, sample, position, what)
            return sample_eigenvalues(rows), rows.shape[-2]
        if family not in shared:
            if family == "feature_standardized":
                shared[family] = _correlation_eigenvalues(sample, shared)
            elif family == "raw":
                shared[family] = covariance_eigenvalues(_covariance(sample, shared), n - 1)
            elif family == "token_l2" and "unit_covariance" in shared:
                shared[family] = covariance_eigenvalues(shared["unit_covariance"], n - 1)
            else:
                rows = _apply(VARIANTS[family], sample.double(), position, family)
                shared[family] = sample_eigenvalues(rows)
        return shared[family] * (sample.shape[-1] if what == "token_rms" else 1), n


def _covariance(sample: Tensor, shared: dict[str, Tensor]) -> Tensor:
    if "covariance" not in shared:
        shared["covariance"] = covariance_of(sample)
    return shared["covariance"]


def _correlation_eigenvalues(sample: Tensor, shared: dict[str, Tensor]) -> Tensor:
    covariance = _covariance(sample, shared)
    std = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(std > 0, 1 / std, 0)
    correlation = covariance * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    return covariance_eigenvalues(correlation, sample.shape[-2] - 1)
