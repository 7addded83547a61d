"""The notebooks of ``/notebooks`` as pages: copied under ``docs/notebooks``, where MyST-NB runs them; then a picture of each.

A cell that fails fails the build, one that lets out a warning does with ``-W``. ``-D nb_execution_mode=off`` runs none.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
# for the notebooks' kernels: what is shown of a run shall not depend on widgets, and loading a model is no result
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "TOKENIZERS_PARALLELISM": "false",
}


def bring(app: Sphinx) -> None:
    """Copy what changed, drop what is gone."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.pop("MPLBACKEND", None)  # a kernel then draws into the notebook
    there = Path(app.srcdir) / "notebooks"
    for page in there.glob("*.ipynb"):
        if not (NOTEBOOKS / page.name).exists():
            page.unlink()
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        page, held = there / notebook.name, notebook.read_bytes()
        if not page.exists() or page.read_bytes() != held:
            page.write_bytes(held)


def save_pictures(app: Sphinx, failed: Exception | None) -> None:
    """Write one picture of each executed notebook to ``_images/notebooks``, where the index of notebooks shows it."""
    if failed is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir) / "_images" / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for notebook in (Path(app.outdir).parent / "jupyter_execute" / "notebooks").glob("*.ipynb"):
        picture = picture_of(json.loads(notebook.read_text(encoding="utf-8")))
        if picture is not None:
            (folder / f"{notebook.stem}.png").write_bytes(picture)


def picture_of(notebook: dict[str, Any]) -> bytes | None:
    """The picture under the cell tagged ``thumbnail``; without one, the first."""
    cells = sorted(notebook["cells"], key=lambda cell: "thumbnail" not in cell["metadata"].get("tags", ()))
    pictures = (
        output["data"]["image/png"]
        for cell in cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    )
    found = next(pictures, None)
    return None if found is None else base64.b64decode(found)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", bring)
    app.connect("build-finished", save_pictures)
    return {"parallel_read_safe": True}
