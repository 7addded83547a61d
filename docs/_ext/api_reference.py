"""The API reference, a page a room, generated from the package itself, so that no public name is forgotten.

A page of docs/api holding `<!-- api reference: ROOM, ROOM -->` gets, in its place, every public name that these rooms define
(the innermost room counts): signature, docstring, public methods. Docstrings are plain text with formulas, doctests and
`Args:`-like sections; they are read as Markdown, in which a formula cannot be a syntax error, and `Formula:` sections are set.
A public name without a docstring, or of a room that no page holds, is a warning, and so fails the build.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import plain_formula
import torch
from public_names import modules
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.inspect import safe_getattr, signature, stringify_signature

import tdgeom

FOLDER = Path(__file__).parent.parent / "api"
MARK = re.compile(r"<!-- api reference: ([\w., ]+) -->")
INDEX = "<!-- api index -->"
# what a stage does inside, described where it is asked for: at the base classes of core/
INSIDE = {
    "prepare",
    "compare",
    "compute",
    "measure",
    "neighbors_needed",
    "start",
    "accumulate",
    "combine",
    "result",
}
logger = logging.getLogger(__name__)


def markdown(docstring: str) -> str:
    """A docstring as Markdown: sections become headings, doctests become code, formulas stay as they are."""
    lines: list[str] = []
    pending = inspect.cleandoc(docstring).splitlines()
    while pending:
        line = pending.pop(0)
        section = re.fullmatch(r"([A-Z][\w ]{0,30}):", line)
        if section and pending and pending[0].startswith("  "):
            body = take(pending, lambda text: not text.strip() or text.startswith(" "))
            body = inspect.cleandoc("\n".join(["", *body])).splitlines()
            if section[1] == "Formula":
                lines += ["", *plain_formula.section(body), ""]
            else:
                lines += ["", f"**{section[1]}**", "", *entries(body), ""]
        elif line.lstrip().startswith(">>>"):
            block = [line, *take(pending, lambda text: bool(text.strip()))]
            lines += ["", "```pycon", *inspect.cleandoc("\n".join(["", *block])).splitlines(), "```", ""]
        elif pending and re.fullmatch(r"[-=]{3,}", pending[0]):
            pending.pop(0)
            lines += ["", f"**{line}**", ""]
        else:
            lines.append(line if line.startswith("    ") else escaped(line))
    return "\n".join(lines)


def take(pending: list[str], belongs: Any) -> list[str]:
    """Pop lines as long as they belong."""
    taken = []
    while pending and belongs(pending[0]):
        taken.append(pending.pop(0))
    return taken


def entries(lines: list[str]) -> list[str]:
    """The body of a section: `name (type): text` entries become a list, anything else is a docstring of its own."""
    entry = re.compile(r"(\*{0,2}\w[\w.]*(?:, \*{0,2}\w[\w.]*)*)( \([^)]*\))?: (.*)")
    if not lines or not entry.fullmatch(lines[0]):
        return markdown("\n".join(lines)).splitlines()
    result: list[str] = []
    for number, line in enumerate(lines):
        found = entry.fullmatch(line)
        if found:
            result.append(f"- `{found[1]}`{escaped(found[2] or '')}: {escaped(found[3])}")
        elif line.startswith(">>>") or (line and not line.startswith(" ") and not lines[number - 1]):
            return [*result, "", *markdown("\n".join(lines[number:])).splitlines()]
        elif line:
            result.append("  " + escaped(line.strip()))
    return result


def escaped(line: str) -> str:
    """One line of prose: `(*B, N)` and `a < b` are no markup; `` `Name` `` of a public name becomes a link."""
    parts = re.split(r"(``.+?``|`[^`]+`)", re.sub(r":(?:py:)?\w+:`~?([^`]+)`", r"`\1`", line))
    for i, part in enumerate(parts):
        if i % 2 == 0:
            part = re.sub(r"(?<!\*)\*(?!\*)(?! )", r"\\*", part.replace("\\*", "*"))
            part = re.sub(r"(?<![\w(])\\\*([a-z][\w -]*)\\\*(?!\w)", r"*\1*", part)  # what is stressed
            parts[i] = part.replace("<", "&lt;").replace("[", "\\[")
        else:
            name = part.strip("`").removesuffix("()").removeprefix("tg.").removeprefix("tdgeom.")
            if name in tdgeom.__all__:
                parts[i] = f"{{py:obj}}`{name} <tdgeom.{name}>`"
    return "".join(parts)


def described(
    kind: str, name: str, call: str, docstring: str | None, inside: list[str] | None = None
) -> list[str]:
    """A directive of the Python domain, one colon longer than what it holds."""
    if not (docstring or "").strip():
        logger.warning("%s has no docstring", name)
    fence = "::::" if kind in ("class", "exception") else ":::"
    return [
        f"{fence}{{py:{kind}}} {name}{call}",
        "",
        *markdown(docstring or "").splitlines(),
        *(inside or []),
        fence,
        "",
    ]


class Named(str):
    """A default shown by its name, such as a function."""

    __repr__ = str.__str__


def call_of(obj: Any) -> str:
    """The signature, or nothing where there is none."""
    try:
        found = signature(obj)
    except (TypeError, ValueError):
        return ""
    parameters = [
        p.replace(default=Named(p.default.__name__))
        if hasattr(p.default, "__name__") and p.default is not p.empty
        else p
        for p in found.parameters.values()
    ]
    call = stringify_signature(found.replace(parameters=parameters), unqualified_typehints=True)
    return re.sub(r"\s+", " ", call)


def members(cls: type, name: str) -> Iterator[str]:
    """The documented public methods and properties that the class itself defines, or, unless it is a module, an inner base."""
    inner = [
        one
        for one in cls.__mro__
        if one.__module__.startswith("tdgeom.") and one.__name__ not in tdgeom.__all__
    ]
    bases = [cls] if issubclass(cls, torch.nn.Module) else [cls, *inner]
    nearest = {key: value for base in reversed(bases) for key, value in vars(base).items()}
    for key, value in nearest.items():
        raw = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        docstring = safe_getattr(raw, "__doc__", None)
        if key.startswith("_") or not docstring or key == "forward":
            continue
        if (
            key in INSIDE
            and issubclass(cls, torch.nn.Module)
            and not cls.__module__.startswith("tdgeom.core.")
        ):
            continue
        if isinstance(value, property):
            yield from described("property", f"{name}.{key}", "", docstring)
        elif callable(raw) and inspect.isfunction(inspect.unwrap(raw)):
            kind = {classmethod: "classmethod", staticmethod: "staticmethod"}.get(type(value), "method")
            call = call_of(getattr(cls, key) if kind == "classmethod" else raw)
            call = re.sub(r"^\(self(, )?", "(", call)
            yield from described(kind, f"{name}.{key}", call, docstring)


@cache
def guides() -> dict[str, str]:
    """Public name -> the page of docs/measures that says when to use it."""
    found: dict[str, str] = {}
    for path in sorted((FOLDER.parent / "measures").glob("*.md")):
        for mark in re.findall(r"<!-- measure: (.*?) -->", path.read_text(encoding="utf-8")):
            found |= dict.fromkeys(re.findall(r"\w+", mark), f"/measures/{path.stem}")
    return found


def reference(name: str, obj: Any) -> list[str]:
    """One public name."""
    guide = guides().get(name.rpartition(".")[2])
    further = [f"When to use it, how many rows it needs, traps: {{doc}}`{guide}`.", ""] if guide else []
    if inspect.isclass(obj):
        kind = "exception" if issubclass(obj, BaseException) else "class"
        return described(kind, name, call_of(obj), obj.__doc__, [*further, *members(obj, name)])
    if callable(obj):
        return described("function", name, call_of(obj), obj.__doc__, further)
    return [
        f":::{{py:data}} {name}",
        "",
        f"`{obj!r}`"
        if isinstance(obj, (str, int, float, tuple))
        else ", ".join(f"`{key}`" for key in obj)
        if isinstance(obj, dict)
        else "",
        ":::",
        "",
    ]


@cache
def rooms() -> dict[str, str]:
    """Room -> the page of docs/api that holds its names."""
    found = {}
    for path in sorted(FOLDER.glob("*.md")):
        for mark in MARK.findall(path.read_text(encoding="utf-8")):
            found |= {room.strip(): f"api/{path.stem}" for room in mark.split(",")}
    return found


def page_of(module: str) -> str:
    """The page of an object defined there, or nothing."""
    inside = f"{module.removeprefix('tdgeom.')}."
    fitting = [room for room in rooms() if inside.startswith(f"{room}.")]
    return rooms()[max(fitting, key=len)] if fitting else ""


def home(name: str, obj: Any) -> str:
    """The page of a public name; functions of tensors stand where their file does."""
    defined = getattr(inspect.unwrap(obj) if callable(obj) else obj, "__module__", None) or ""
    if not page_of(defined):
        logger.warning("no page of docs/api holds the room of tdgeom.%s, %s", name, defined)
    return page_of(defined)


@cache
def pages() -> dict[str, dict[str, list[tuple[str, Any]]]]:
    """Page -> chapter ("" for the top level, else a module) -> the names and objects on it, in order."""
    names = {name: getattr(tdgeom, name) for name in tdgeom.__all__ if not name.startswith("__")}
    found: dict[str, dict[str, list[tuple[str, Any]]]] = {page: {} for page in rooms().values()}
    for name, obj in names.items():
        if not isinstance(obj, types.ModuleType):
            found.setdefault(home(name, obj), {}).setdefault("", []).append((name, obj))
    for module, (made, listed) in modules().items():
        for key in listed:
            obj = getattr(made, key)
            if names.get(key) is obj:
                continue
            page = home(f"{module}.{key}", obj) if module == "functional" else page_of(made.__name__)
            found.setdefault(page, {}).setdefault(module, []).append((f"{module}.{key}", obj))
    return found


def link(name: str) -> str:
    """A link to an entry, by the name users write."""
    return f"{{py:obj}}`{name.rpartition('.')[2]} <tdgeom.{name}>`"


def summary(docstring: str | None) -> str:
    """The first sentence, on one line."""
    paragraph = " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())
    return escaped(re.split(r"(?<=[\w`)])[.:;](?: |$)", paragraph)[0])


def page(docname: str) -> str:
    """The reference of one page's rooms."""
    lines = []
    for module, entries_of in pages().get(docname, {}).items():
        if module == "functional":
            lines += [
                "## Functions of tensors",
                "",
                "Behind the stages, in {doc}`tdgeom.functional <functional>`.",
                "",
            ]
        elif module:
            lines += [f"## `tdgeom.{module}`", "", markdown(modules()[module][0].__doc__ or ""), ""]
        for name, obj in entries_of:
            lines += reference(f"tdgeom.{name}", obj)
    return "\n".join(lines)


def functions() -> str:
    """Every function of `tdgeom.functional`, a line each."""
    module, listed = modules()["functional"]
    rows = [f"| {link(f'functional.{key}')} | {summary(getattr(module, key).__doc__)} |" for key in listed]
    return "\n".join([markdown(module.__doc__ or ""), "", "| function | what it gives |", "|---|---|", *rows])


def index() -> str:
    """Every page, with the names on it."""
    lines = ["| page | names |", "|---|---|"]
    order = (FOLDER / "index.md").read_text(encoding="utf-8").split("```{toctree}")[1].split()
    for docname, chapters in sorted(
        pages().items(), key=lambda one: order.index(one[0].removeprefix("api/"))
    ):
        own = {chapter: named for chapter, named in chapters.items() if chapter != "functional"} or chapters
        names = ", ".join(link(name) for named in own.values() for name, _ in named)
        lines.append(f"| {{doc}}`/{docname}` | {names} |")
    return "\n".join(lines)


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the reference where a page asks for it."""
    source[0] = MARK.sub(lambda found: page(docname), source[0])
    if INDEX in source[0]:
        source[0] = source[0].replace(INDEX, index())
    if "<!-- functions of tensors -->" in source[0]:
        source[0] = source[0].replace("<!-- functions of tensors -->", functions())


def always_read(app: Sphinx, env: Any, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """The reference depends on the package, not on its pages alone."""
    return [name for name in env.found_docs if name.startswith("api/")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", fill_in)
    app.connect("env-get-outdated", always_read)
    return {"parallel_read_safe": True}
