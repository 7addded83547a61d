"""Confidence intervals of everything that an analysis measured with errors, as one tidy table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tdgeom.analysis.interval_rows import interval_rows
from tdgeom.analysis.results import AnalysisResults
from tdgeom.core.guessed_names import answer_guesses

__all__ = ["intervals"]


@answer_guesses
def intervals(results: AnalysisResults | str | Path, *, level: float = 0.95) -> pd.DataFrame:
    """The interval of every metric that has a standard error: one row a metric and place.

    Student's t with groups - 1 degrees of freedom on the scale where the metric is closest to normal (``scale_of``), about the
    value less its jackknife bias: the finite number of documents makes spectra look steeper than they are, and this is most of
    what is wrong with a plain effective rank. The interval is then of the population's value. Where no bias is known (what
    nearest neighbours say; a CKA over all rows, whose error is the sample's; rows wider than their groups are held) it is about
    the value itself and of its expectation at this many rows. A bias has an error too: a third of it counts as one. Where it is
    more than a fifth of the value the rows are too few to correct for, and there is no interval.

    Args:
        results: of ``analyze_model(..., errors=True)`` or ``compare(..., errors=True)``, or the folder of saved ones. A folder
            saved as CSV alone has no biases.
        level: of the interval.

    Returns:
        Columns ``table`` ("metrics" or "pairs"), ``site``, ``metric``, ``step`` (of estimates at several scales), ``value``,
        ``se``, ``bias`` (NaN: not known), ``low``, ``high``, ``scale``, ``reason`` (of ends that are NaN); of an untrained
        baseline, its rows with ``weights``. k90, k95 and k99 between whole numbers.

    Raises:
        ValueError: no standard errors in the results; a level that is none.

    Busing, Meijer and van der Leeden 1999; how often these intervals hold the truth is in docs/errors.md.

        >>> import torch, tdgeom as tg
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 6))
        >>> batches = [{"input": torch.randn(400, 6)}]
        >>> results = tg.analyze_model(model, batches, sites="module_output:0", errors=True, metrics="spectrum", progress=False)
        >>> table = tg.intervals(results).set_index("metric")
        >>> bool(table.loc["d_pr", "low"] < table.loc["d_pr", "value"] < table.loc["d_pr", "high"])
        True
    """
    one = results if isinstance(results, AnalysisResults) else AnalysisResults.load(results)
    rows = list(interval_rows(one, level))
    if not rows:
        raise ValueError(
            "intervals: the results have no standard errors. Measure with errors=True (--errors on the command line)."
        )
    return pd.DataFrame(rows).drop(columns="row")
