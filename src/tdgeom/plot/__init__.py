"""Pictures of results: every function takes axes (or makes them) and returns them; nothing is shown or saved unasked.

Comes in: tables and arrays, or what holds them under the names of a table. Goes out: axes, and PNG files.
Uses: measures' names of columns, and run's tables.
"""

from tdgeom.plot.depth import intrinsic_dimension, overlap
from tdgeom.plot.lines import profile
from tdgeom.plot.matrices import matrix
from tdgeom.plot.picture_files import write_plots
from tdgeom.plot.spectra import spectrum
from tdgeom.plot.style import require_matplotlib

__all__ = [
    "intrinsic_dimension",
    "matrix",
    "overlap",
    "profile",
    "require_matplotlib",
    "spectrum",
    "write_plots",
]
