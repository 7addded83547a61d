"""One HTML file that shows what was measured: charts, tables, and how it was done; opens from disk, asks nobody for anything.

Comes in: tables and arrays of one or several runs, under their names in a bundle. Goes out: an HTML file.
Uses: measures' names of columns, run's profiles, plot's colours and grids, and files.
"""

from tdgeom.report.reported_run import ReportedRun
from tdgeom.report.write_report import write_report

__all__ = ["ReportedRun", "write_report"]
