"""What must hold of the site as built: links inside it arrive, no page is huge, and none asks for anything from elsewhere.

A breach is a warning, and so fails a build with -W.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urldefrag

if TYPE_CHECKING:  # the tests, which read this, need no Sphinx
    from sphinx.application import Sphinx

LARGEST = 300_000  # bytes a page
UNBOUNDED = ("genindex.html", "search.html", "notebooks/")  # notebooks hold their outputs


class Page(HTMLParser):
    """The links, the anchors and what is loaded, of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loaded.add(given["src"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.add(given.get("href", ""))


def outside(link: str) -> bool:
    """Whether a link leaves the site."""
    return link.startswith(("http:", "https:", "//", "mailto:", "data:"))


def faults(folder: Path) -> list[str]:
    """Everything that does not hold, in words."""
    pages = {
        path.relative_to(folder).as_posix(): Page(path.read_text("utf-8"))
        for path in sorted(folder.rglob("*.html"))
    }
    found = []
    for name, page in pages.items():
        size = (folder / name).stat().st_size
        if size > LARGEST and not name.startswith(UNBOUNDED):
            found.append(f"{name} has {size:,} bytes, more than {LARGEST:,}: split it")
        found += [
            f"{name} loads {one} from elsewhere"
            for one in sorted(page.loaded)
            if outside(one) and one[:5] != "data:"
        ]
        for link in sorted(page.links):
            target, anchor = urldefrag(link)
            if outside(link) or link == "#":
                continue
            place = (folder / name).parent / unquote(target) if target else folder / name
            where = place.resolve().relative_to(folder.resolve()).as_posix() if place.exists() else ""
            if not where:
                found.append(f"{name} links to {link}, which is no file")
            elif anchor and where in pages and unquote(anchor) not in pages[where].anchors:
                found.append(f"{name} links to {link}, an anchor that is not there")
    return found


def check(app: Sphinx, problem: Exception | None) -> None:
    """After an HTML build."""
    if problem is None and app.builder.name == "html":
        from sphinx.util import logging

        for fault in faults(Path(app.outdir)):
            logging.getLogger(__name__).warning(fault)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True}
