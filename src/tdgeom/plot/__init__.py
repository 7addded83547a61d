"""Pictures of results: every function takes axes (or makes them) and returns them; nothing is shown or saved unasked.

Comes in: tables and arrays, or what holds them under the names of a table. Goes out: axes, and PNG files.
Uses: measures' names of columns, rows' texts, and run's tables.
"""

from tdgeom.plot.ablations import ablation
from tdgeom.plot.attributions import attribution
from tdgeom.plot.convergence_curves import convergence
from tdgeom.plot.depth import intrinsic_dimension, overlap
from tdgeom.plot.lines import profile
from tdgeom.plot.matrices import matrix
from tdgeom.plot.overview import overview
from tdgeom.plot.patching_grids import patching_grid
from tdgeom.plot.picture_files import write_plots
from tdgeom.plot.router_loads import router
from tdgeom.plot.scale_profiles import scale_profile
from tdgeom.plot.spectra import spectrum
from tdgeom.plot.style import require_matplotlib
from tdgeom.plot.token_tables import attention, concept_examples, lens_table

__all__ = [
    "ablation",
    "attention",
    "attribution",
    "concept_examples",
    "convergence",
    "intrinsic_dimension",
    "lens_table",
    "matrix",
    "overlap",
    "overview",
    "patching_grid",
    "profile",
    "require_matplotlib",
    "router",
    "scale_profile",
    "spectrum",
    "write_plots",
]
