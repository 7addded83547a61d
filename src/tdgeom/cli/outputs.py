"""What a command that measures leaves: tables in the terminal or JSON, a bundle, a report and pictures."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tdgeom.cli.inputs import InputOptions, OneModelInputs
from tdgeom.cli.options import console, print_json
from tdgeom.core.visible_text import visible

if TYPE_CHECKING:
    from rich.console import Console

    from tdgeom.analysis.results import AnalysisResults

__all__: list[str] = []


@dataclass
class MeasuringOptions(InputOptions):
    """The options of every command that measures models."""

    out: Annotated[Path | None, typer.Option(help="Save a bundle in this new folder.", metavar="DIR")] = None
    plots: Annotated[bool, typer.Option("--plots", help="Write pictures into DIR/plots.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier bundle in DIR.")] = False

    def check_out(self, save_mode: str = "bundle") -> None:
        """Refuse before the work what would be refused after it."""
        from tdgeom.files.bundle import check_target
        from tdgeom.plot.style import require_matplotlib

        if save_mode not in ("bundle", "csv", "json"):
            raise typer.BadParameter(f"--save-mode takes bundle, csv or json, got {save_mode!r}")
        if self.plots:
            if self.out is None:
                raise typer.BadParameter("--plots needs --out DIR, the folder that the pictures go to")
            require_matplotlib()
        if self.out is not None:
            check_target(self.out, save_mode, self.overwrite)

    def finish(
        self,
        results: AnalysisResults | None,
        printed: Callable[[AnalysisResults, Console], None],
        save_mode: str = "bundle",
    ) -> None:
        """Save an analysis with its report, and draw it, where the options say so; print it, and say where it is."""
        if results is None:  # another rank of a process group has it
            return
        if self.command:
            results.metadata["command"] = {**self.command, "weights": self.weights}
        elsewhere = None
        if self.out is not None:
            elsewhere = self._saved_elsewhere(results, save_mode)
            if self.plots:
                results.write_plots()
            try:
                results.report()
            except ModuleNotFoundError as error:  # the tables are saved, and tdgeom report makes it later
                typer.echo(visible(f"tdgeom: no report: {error}"), err=True)
        self._show(results, printed)
        if elsewhere is not None:
            raise OSError(elsewhere)

    def _saved_elsewhere(self, results: AnalysisResults, save_mode: str) -> str | None:
        """Save an analysis in the folder asked for; where that fails, beside other temporary files, and what to say of it."""
        out = self.out or Path()
        try:
            results.save(out, save_mode, overwrite=self.overwrite)
            return None
        except (OSError, ValueError) as error:
            try:
                refuge = results.save(
                    Path(tempfile.gettempdir(), f"tdgeom-{secrets.token_hex(6)}", out.name), save_mode
                )
            except (OSError, ValueError):
                raise error from None
            return f"could not save in {out}: {error}. The analysis is in {refuge} instead; move it to where it should be."

    def _show(self, results: AnalysisResults, printed: Callable[[AnalysisResults, Console], None]) -> None:
        if self.as_json:
            print_json({**results.to_dict(), "folder": results.artifact_dir})
            return
        terminal = console()
        printed(results, terminal)
        if results.artifact_dir is not None:
            report, pictures = results.artifact_dir / "report.html", results.artifact_dir / "plots"
            terminal.print(f"\nSaved in {results.artifact_dir}", soft_wrap=True, markup=False)
            if report.is_file():
                terminal.print(f"Report, for a browser: {report}", soft_wrap=True, markup=False)
            if pictures.is_dir():
                terminal.print(f"Pictures in {pictures}", soft_wrap=True, markup=False)


@dataclass
class OneModelOptions(OneModelInputs, MeasuringOptions):
    """The options of every command that measures one model."""

    untrained: Annotated[
        bool, typer.Option("--untrained", help="Measure the same model with fresh random weights beside it.")
    ] = False
