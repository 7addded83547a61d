"""Sphinx settings: `python -m sphinx -W -b html docs docs/_build/html`. Needs no network."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "tdgeom"
author = "tdgeom contributors"
copyright = "2026, tdgeom contributors"
version = release = installed_version("tdgeom")

extensions = [
    "myst_nb",
    "api_reference",
    "command_reference",
    "measure_pages",
    "notebook_pages",
    "whole_site",
]
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "warn"  # what a notebook warns of fails a build with -W
exclude_patterns = ["_build", "_ext"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = f"tdgeom {version}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["llms.txt"]
pygments_style = "friendly"
pygments_dark_style = "github-dark"
