"""The untrained baseline: the same model with re-initialised weights, measured in the same tables."""

from __future__ import annotations

import copy
from typing import Any

import pandas as pd
import torch
from torch import nn

from tdgeom.results import AnalysisResults

__all__ = ["untrained_copy", "with_baseline"]


def untrained_copy(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """The same architecture with freshly initialised weights; the model given is left as it is.

    A Hugging Face model is built anew from its configuration, so its weights follow its own initialisation. Of any other
    module a copy is made and every submodule's ``reset_parameters`` called.

    Args:
        model: the trained model.
        seed: seed of the weights; the caller's random state is left as it was.

    Returns:
        A model of the same class, dtype, device and mode.

    Raises:
        ValueError: parameters that no ``reset_parameters`` initialises, by name.

        >>> model = nn.Linear(3, 2)
        >>> fresh = untrained_copy(model)
        >>> bool((fresh.weight == model.weight).any()), fresh.weight.shape
        (False, torch.Size([2, 3]))
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(model, "config", None)
        fresh = _reset(model) if config is None else type(model)(copy.deepcopy(config))
    first = next(model.parameters(), None)
    if first is not None:
        fresh = fresh.to(device=first.device, dtype=first.dtype)
    return fresh.train(model.training)


def _reset(model: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(model)
    kept: list[str] = []
    for path, module in fresh.named_modules():
        # nn.MultiheadAttention spells it with an underscore; it also initialises its parts.
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
        else:
            kept += [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
    if kept:
        raise ValueError(
            f"an untrained copy of {type(model).__name__} needs fresh values for {kept[:6]}, but the modules that hold them "
            f"have no reset_parameters(). Define it there, or give the untrained model itself: untrained=MODEL."
        )
    return fresh


def with_baseline(trained: AnalysisResults, untrained: AnalysisResults) -> AnalysisResults:
    """One analysis with the rows of both, told apart by the column ``weights``; the baseline stays whole at ``baseline``."""
    both = {"trained": trained, "untrained": untrained}

    def joined(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
        marked = []
        for weights, table in tables.items():
            if not table.empty:
                marked.append(table.copy())
                marked[-1].insert(0, "weights", weights)
        return pd.concat(marked, ignore_index=True) if marked else pd.DataFrame()

    def of(attribute: str) -> pd.DataFrame:
        return joined({weights: getattr(one, attribute) for weights, one in both.items()})

    baseline: dict[str, Any] = {f"untrained_{name}": values for name, values in untrained.eigenvalues.items()}
    return AnalysisResults(
        metrics=of("metrics"),
        novelty=of("novelty"),
        router=of("router"),
        diagnostics={
            name: joined({weights: one.diagnostics[name] for weights, one in both.items()})
            for name in trained.diagnostics
        },
        eigenvalues={**trained.eigenvalues, **baseline},
        metadata={**trained.metadata, "baseline": "untrained"},
        neighbors=trained.neighbors,
        result=trained.result,
        baseline=untrained,
    )
