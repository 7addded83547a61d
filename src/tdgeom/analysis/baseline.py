"""The untrained baseline in the same tables as the trained model."""

from __future__ import annotations

from typing import Any

import pandas as pd

from tdgeom.analysis.results import AnalysisResults

__all__ = ["with_baseline"]


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
