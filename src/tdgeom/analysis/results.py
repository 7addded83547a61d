"""``AnalysisResults``: the tables of one analysis, and its bundle on disk."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tensordict import TensorDictBase

from tdgeom.analysis.exports import arrow_tables, eigenvalue_table, parquet_files, to_xarray
from tdgeom.analysis.interval_rows import with_intervals
from tdgeom.analysis.model_card import model_card
from tdgeom.analysis.packed_tensors import pack, unpack
from tdgeom.analysis.reports import reported, write_report
from tdgeom.core.visible_text import visible
from tdgeom.files.bundle import METADATA, Bundle, read_bundle, safe_name, write_bundle
from tdgeom.files.json_text import plain
from tdgeom.plot.overview import overview, picture
from tdgeom.plot.picture_files import write_plots

__all__ = ["AnalysisResults"]

# results whose class builds on the one here, found when a bundle names them
FURTHER = {
    "Comparison": "tdgeom.analysis.comparison:Comparison",
    "Sweep": "tdgeom.training.sweep_results:Sweep",
}


@dataclass
class AnalysisResults:
    """What ``analyze_model`` measured.

    Attributes:
        metrics: one row a site: identity columns, then every metric.
        novelty: one row a pair of consecutive sites.
        router: one row a router; empty without a mixture of experts.
        diagnostics: tables by name, such as "normalization_ablation".
        eigenvalues: covariance eigenvalues, descending, by ``layer_00`` (or by site where kinds or stacks are several).
        metadata: model, data, settings, versions, counts, times; in a loaded bundle also file hashes.
        artifact_dir: where the bundle is, once saved or loaded.
        neighbors: neighbour tables of the sample's rows (with ``neighbors=True``): a TensorDict with ``("neighbors", site,
            leaf)``, ``"sample_row_id"`` and the labels that the sample carried, for stages with ``source="neighbors"``.
        result: the TensorDict that the tables were made from, which profiles read; by stack where a model has several. A
            bundle keeps its tensors.
        baseline: the analysis of the untrained model (with ``untrained=True``), whose rows are in the tables too.
    """

    metrics: pd.DataFrame
    novelty: pd.DataFrame
    router: pd.DataFrame = field(default_factory=pd.DataFrame)
    diagnostics: dict[str, pd.DataFrame] = field(default_factory=dict)
    eigenvalues: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    artifact_dir: Path | None = None
    neighbors: TensorDictBase | None = field(default=None, repr=False)
    result: TensorDictBase | None = field(default=None, repr=False)
    baseline: AnalysisResults | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        label = self.metadata.get("model_id") or self.metadata.get("model_class") or "no model"
        tables = [
            f"{name} {len(table)} x {len(table.columns)}"
            for name, table in self._tables().items()
            if len(table)
        ]
        return visible(f"{type(self).__name__}({label}: {', '.join(tables) or 'no tables'})")

    def _tables(self) -> dict[str, pd.DataFrame]:
        """Every table, under its name in a bundle."""
        own = {f"diagnostics/{safe_name(name)}": table for name, table in self.diagnostics.items()}
        return {"metrics": self.metrics, "novelty": self.novelty, "router": self.router, **own}

    @property
    def pairs(self) -> pd.DataFrame:
        """Every measure between two sites, one row a pair: the table ``novelty``, which keeps the seed's name."""
        return self.novelty

    def _repr_html_(self) -> str:
        return visible(self.metrics.to_html(max_rows=60, index=False))

    def save(
        self, save_dir: str | Path | None = None, save_mode: str = "bundle", *, overwrite: bool = False
    ) -> Path:
        """Write the bundle, whole or not at all, and return its folder.

        Args:
            save_dir: the folder to make (or an empty one); default the run's name, or ``tdgeom_run``. Where these same results
                stand in the other format already, their tables are written beside.
            save_mode: "bundle" or "csv" (tables as CSV), or "json" (tables as JSON records).
            overwrite: replace an earlier bundle there; any other existing folder is always refused.

        Raises:
            FileExistsError: the folder exists. ValueError: an unknown mode.
        """
        save_dir = default_folder(self.metadata.get("run_name")) if save_dir is None else save_dir
        tables = {
            name: table for name, table in self._tables().items() if name != "router" or not table.empty
        }
        other = self.baseline
        packed = {
            "neighbors": pack(self.neighbors),
            "result": pack(self.result),
            "baseline": pack(None if other is None else other.result),
            "baseline_neighbors": pack(None if other is None else other.neighbors),
        }
        arrays = {"eigenvalues": self.eigenvalues, **{name: own for name, (own, _) in packed.items()}}
        words = {name: said for name, (_, said) in packed.items() if said}
        metadata = {**self.metadata, "save_mode": save_mode, "results": type(self).__name__, "words": words}
        if other is not None:
            metadata["baseline_metadata"] = other.metadata
        self.artifact_dir = write_bundle(Path(save_dir), tables, arrays, metadata, save_mode, overwrite)
        self.metadata = {**self.metadata, "save_mode": save_mode, "artifact_dir": str(self.artifact_dir)}
        return self.artifact_dir

    @classmethod
    def load(cls, path: str | Path | Bundle) -> AnalysisResults:
        """Results from a bundle: its folder, after checking the hash of every file, or what ``store.load_analysis`` gave.

        A comparison's bundle comes back as ``Comparison``, a sweep's as ``Sweep``.

        Raises:
            FileNotFoundError: no bundle there. ValueError: a file is missing, added to or changed, or the schema is newer.
        """
        found = path if isinstance(path, Bundle) else read_bundle(Path(path))
        tables, arrays, metadata = found.tables, found.arrays, dict(found.metadata)
        if missing := {"metrics", "novelty"} - set(tables):
            raise ValueError(
                f"{found.folder} lacks the tables {sorted(missing)}: the bundle is incomplete, or holds other results "
                "(tg.load_results reads those)."
            )
        words = metadata.pop("words", {})
        if not isinstance(words, Mapping):
            raise ValueError(f"{found.folder / METADATA}: words are no object: the bundle is damaged.")
        diagnostics = {
            name.split("/", 1)[1]: table for name, table in tables.items() if name.startswith("diagnostics/")
        }
        further = FURTHER.get(str(metadata.get("results")))
        made = cls if further is None else pkgutil.resolve_name(further)
        return made(
            metrics=tables["metrics"],
            novelty=tables["novelty"],
            router=tables.get("router", pd.DataFrame()),
            diagnostics=diagnostics,
            eigenvalues=dict(arrays["eigenvalues"]),
            neighbors=unpack(arrays["neighbors"], words.get("neighbors")),
            result=unpack(arrays["result"], words.get("result")),
            baseline=_baseline(tables, diagnostics, arrays, {**metadata, "words": words}),
            metadata={**metadata, "artifact_dir": str(found.folder)},
            artifact_dir=found.folder,
        )

    def write_plots(self, folder: str | Path | None = None) -> list[Path]:
        """The pictures of the tables as PNG files, and their paths; see ``tg.plot.write_plots``.

        Args:
            folder: default ``plots`` in the saved bundle.

        Raises:
            ValueError: no folder, and nothing saved. ModuleNotFoundError: no matplotlib.
        """
        return write_plots(self, self._plots_folder(folder))

    def _plots_folder(self, folder: str | Path | None) -> Path:
        if folder is not None:
            return Path(folder)
        if self.artifact_dir is None:
            raise ValueError(
                f"{type(self).__name__}.write_plots: nothing is saved yet. Call save() first, or name a folder."
            )
        return self.artifact_dir / "plots"

    def with_intervals(self, level: float = 0.95) -> AnalysisResults:
        """The same with ``<metric>_low`` and ``<metric>_high`` behind every ``<metric>_se`` of the tables: see ``tg.intervals``.

        Of estimates at several scales ``tg.intervals`` alone has them; without errors the tables are as they were.

            >>> import torch, tdgeom as tg
            >>> model, batches = torch.nn.Sequential(torch.nn.Linear(6, 6)), [{"input": torch.randn(400, 6)}]
            >>> how = dict(sites="module_output:0", errors=True, metrics="spectrum", progress=False)
            >>> row = tg.analyze_model(model, batches, **how).with_intervals().metrics.iloc[0]
            >>> bool(row["d_pr_low"] < row["d_pr"] < row["d_pr_high"])
            True
        """
        tables = with_intervals(self, level)
        return replace(self, metrics=tables["metrics"], novelty=tables["novelty"])

    def plot(self, what: str | None = None, ax: Any = None, **style: Any) -> Any:
        """The main panels in one figure, or one picture in ``ax``.

        Args:
            what: None for all; "spectrum", "ablation", "router", "intrinsic_dimension", "scale_profile", "overlap",
                "convergence", or a measure by its column, of sites (over depth) or of pairs (over depth, or a matrix).
            ax: matplotlib axes for one picture; made if None.
            style: passed to the function of ``tg.plot`` that draws; ``yerr="interval"`` draws intervals as bars in place of ±
                one standard error.

        Returns:
            The axes (an array of them where ``what`` is None).

        Raises:
            KeyError: no such picture or measure here. ModuleNotFoundError: no matplotlib.
        """
        shown = self.with_intervals() if style.get("yerr") == "interval" else self
        return overview(self) if what is None else picture(shown, what, ax, **style)

    def report(
        self,
        path: str | Path | None = None,
        *,
        beside: AnalysisResults | Sequence[AnalysisResults] = (),
        title: str | None = None,
    ) -> Path:
        """Write the report, one HTML file that shows everything here and needs no network, and return its path.

        Args:
            path: the file, or an existing folder; default ``report.html`` in the saved bundle.
            beside: further results, drawn over these, with their differences from these.
            title: default what was measured.

        Raises:
            ValueError: no path, and nothing saved.
        """
        if path is None and self.artifact_dir is None:
            raise ValueError(
                f"{type(self).__name__}.report: nothing is saved yet. Call save() first, or name a file, such as report.html."
            )
        others = [beside] if isinstance(beside, AnalysisResults) else list(beside)
        path = self.artifact_dir if path is None else path
        return write_report([self, *others] if others else self, Path(path or ""), title=title)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, ready for ``json.dumps`` (NaN becomes None)."""
        return plain(
            {
                "metrics": self.metrics.to_dict(orient="records"),
                "novelty": self.novelty.to_dict(orient="records"),
                "router": self.router.to_dict(orient="records"),
                "diagnostics": {
                    name: table.to_dict(orient="records") for name, table in self.diagnostics.items()
                },
                "eigenvalues": self.eigenvalues,
                "metadata": self.metadata,
            }
        )

    def to_arrow(self) -> dict[str, Any]:
        """Every table as a ``pyarrow.Table``, by its name in a bundle, and the ``eigenvalues`` as one; empty ones left out.

        The metadata is JSON under ``b"tdgeom"`` in the schema of each.

        Raises:
            ModuleNotFoundError: no pyarrow.
        """
        return arrow_tables(
            {**self._tables(), "eigenvalues": eigenvalue_table(self.eigenvalues)}, self.metadata
        )

    def to_parquet(self, folder: str | Path) -> list[Path]:
        """The tables of ``to_arrow`` as Parquet files in a folder, and their paths; files of those names are replaced.

        Raises:
            ModuleNotFoundError: no pyarrow.
        """
        return parquet_files(self.to_arrow(), Path(folder))

    def to_xarray(self, *, pairs: bool = False) -> Any:
        """Layer x step x metric as one ``xarray.DataArray``: see ``tg.to_xarray``."""
        return to_xarray(self, pairs=pairs)

    def to_model_card(self, pictures: str | Path | None = None) -> str:
        """A section for the model's card, in Markdown: what was measured, the main figures layer by layer, what stands out.

        Args:
            pictures: a folder beside the card; the pictures of ``write_plots`` are written there and shown.
        """
        shown = [] if pictures is None else self.write_plots(pictures)
        return model_card(reported(self), shown)


def default_folder(run_name: str | None) -> Path:
    """Where a bundle goes that was given no folder."""
    return Path(safe_name(run_name or "tdgeom_run"))


def _untrained(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the baseline in a table that holds both."""
    if "weights" not in table:
        return table
    return table[table["weights"] == "untrained"].drop(columns="weights").reset_index(drop=True)


def _baseline(
    tables: Mapping[str, pd.DataFrame],
    diagnostics: Mapping[str, pd.DataFrame],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    metadata: Mapping[str, Any],
) -> AnalysisResults | None:
    """The untrained model's own results, from a bundle that holds both."""
    words = metadata.get("words", {})
    result = unpack(arrays["baseline"], words.get("baseline"))
    if result is None:
        return None
    first = "untrained_"
    return AnalysisResults(
        metrics=_untrained(tables["metrics"]),
        novelty=_untrained(tables["novelty"]),
        router=_untrained(tables.get("router", pd.DataFrame())),
        diagnostics={name: _untrained(table) for name, table in diagnostics.items()},
        eigenvalues={
            name.removeprefix(first): values
            for name, values in arrays["eigenvalues"].items()
            if name.startswith(first)
        },
        metadata=dict(metadata.get("baseline_metadata") or {}),
        neighbors=unpack(arrays["baseline_neighbors"], words.get("baseline_neighbors")),
        result=result,
    )
