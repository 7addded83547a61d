"""The untrained baseline in the same tables as the trained model."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from tdgeom.analysis.results import AnalysisResults

__all__ = ["with_baseline"]


def with_baseline(trained: AnalysisResults, untrained: AnalysisResults) -> AnalysisResults:
    """One analysis with the rows of both, told apart by the column ``weights``; the baseline stays whole at ``baseline``."""
    own = {f"untrained_{name}": values for name, values in untrained.eigenvalues.items()}
    return replace(
        trained,
        metrics=_both(trained.metrics, untrained.metrics),
        novelty=_both(trained.novelty, untrained.novelty),
        router=_both(trained.router, untrained.router),
        diagnostics={
            name: _both(table, untrained.diagnostics[name]) for name, table in trained.diagnostics.items()
        },
        eigenvalues={**trained.eigenvalues, **own},
        metadata={**trained.metadata, "baseline": "untrained"},
        baseline=untrained,
    )


def _both(trained: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    tables = {"trained": trained, "untrained": untrained}
    filled = [table.assign(weights=weights) for weights, table in tables.items() if not table.empty]
    if not filled:
        return pd.DataFrame()
    both = pd.concat(filled, ignore_index=True)
    return both[["weights", *both.columns.drop("weights")]]
