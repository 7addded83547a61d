"""The README's picture: the demo's report in Chromium, light and dark. `tdgeom demo`, then run this file.

Needs the extra `browser` and a Chromium on the path. Writes `report-light.png` and `report-dark.png` beside this file.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
SIZE = {"width": 1240, "height": 900}
HIGH = 1790  # how much of the report is shown, at the scale of the page
COLOURS = 200  # of the file: charts have few


def main(report: Path) -> None:
    """Write both pictures of a report."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={**SIZE, "height": HIGH}, color_scheme=scheme)
            page.goto(report.resolve().as_uri())
            page.locator("html[data-drawn=yes]").wait_for(state="attached")
            picture = Image.open(io.BytesIO(page.screenshot(clip={"x": 0, "y": 0, **SIZE, "height": HIGH})))
            few = picture.convert("RGB").quantize(
                COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
            )
            few.save(HERE / f"report-{scheme}.png", optimize=True)
            page.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tdgeom-demo/report.html"))
