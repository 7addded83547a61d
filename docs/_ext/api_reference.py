"""The API reference, generated from `tdgeom.__all__` and the modules beside it, so that no public name is forgotten.

A page holding `<!-- api reference -->` gets, in its place, every public name under its theme: signature,
docstring, public methods. Docstrings are plain text with formulas, doctests and `Args:`-like sections; they are
read as Markdown, in which a formula cannot be a syntax error. A public name without a docstring is a warning, and
so fails the build.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
from public_names import modules
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.inspect import safe_getattr, signature, stringify_signature

import tdgeom

MARK = "<!-- api reference -->"
# title -> rooms of tdgeom, in the order of the page; the innermost room counts, what is nowhere here comes last, under "More"
THEMES = {
    "Composing stages": ("core", "run"),
    "Around the model": ("model",),
    "From activations to rows": ("rows",),
    "One pass over all rows": ("stream",),
    "Spectra and single-site measures": ("measures", "concepts"),
    "Comparing two sites": ("measures.similarity",),
    "Neighbours": ("measures.neighbors",),
    "Intrinsic dimension": ("measures.dimension",),
    "Probing and lenses": ("probing", "model.lens"),
    "Analyses, results, pictures": ("analysis", "plot"),
    "Keeping activations and runs": ("store",),
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
            lines += [
                "",
                f"**{section[1]}**",
                "",
                *entries(inspect.cleandoc("\n".join(["", *body])).splitlines()),
                "",
            ]
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
        if isinstance(value, property):
            yield from described("property", f"{name}.{key}", "", docstring)
        elif callable(raw) and inspect.isfunction(inspect.unwrap(raw)):
            kind = {classmethod: "classmethod", staticmethod: "staticmethod"}.get(type(value), "method")
            call = call_of(getattr(cls, key) if kind == "classmethod" else raw)
            call = re.sub(r"^\(self(, )?", "(", call)
            yield from described(kind, f"{name}.{key}", call, docstring)


def reference(name: str, obj: Any) -> list[str]:
    """One public name."""
    if inspect.isclass(obj):
        kind = "exception" if issubclass(obj, BaseException) else "class"
        return described(kind, name, call_of(obj), obj.__doc__, list(members(obj, name)))
    if callable(obj):
        return described("function", name, call_of(obj), obj.__doc__)
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


def theme_of(obj: Any) -> str:
    """The theme of the room that defines an object."""
    module = f"{(getattr(obj, '__module__', None) or '').removeprefix('tdgeom.')}."
    fitting = [
        (room, title) for title, rooms in THEMES.items() for room in rooms if module.startswith(f"{room}.")
    ]
    return max(fitting, key=lambda one: len(one[0]), default=("", "More"))[1]


def page() -> str:
    """The whole reference."""
    names = {name: getattr(tdgeom, name) for name in tdgeom.__all__ if not name.startswith("__")}
    groups: dict[str, list[str]] = {title: [] for title in (*THEMES, "More")}
    for name, obj in names.items():
        if not isinstance(obj, types.ModuleType):
            groups[theme_of(obj)] += reference(f"tdgeom.{name}", obj)
    lines = []
    for title, body in groups.items():
        lines += [f"## {title}", "", *body] if body else []
    for name, (module, listed) in modules().items():
        lines += [f"## `tdgeom.{name}`", "", markdown(module.__doc__ or ""), ""]
        for key in listed:
            obj = getattr(module, key)
            if names.get(key) is obj:
                lines += [f"- {{py:obj}}`{key} <tdgeom.{key}>`", ""]
            else:
                lines += reference(f"tdgeom.{name}.{key}", obj)
    return "\n".join(lines)


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the reference where a page asks for it."""
    if MARK in source[0]:
        source[0] = source[0].replace(MARK, page())


def always_read(app: Sphinx, env: Any, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """The reference depends on the package, not on its page alone."""
    return ["api"]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", fill_in)
    app.connect("env-get-outdated", always_read)
    return {"parallel_read_safe": True}
