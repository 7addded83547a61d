"""Every command of `tdgeom` and every option of it, read from the program itself.

A page holding `<!-- command reference -->` gets, in its place, a chapter a command: its words, how it is called, its arguments
and options with their defaults, its examples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from tdgeom.cli.app import app as program

if TYPE_CHECKING:  # the tests, which read this, need no Sphinx
    from sphinx.application import Sphinx

MARK = "<!-- command reference -->"


def commands(group: Any, before: str = "tdgeom") -> Iterator[tuple[str, Any]]:
    """(`tdgeom runs list`, its command), groups themselves left out."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before} {name}")
        elif not command.hidden:
            yield f"{before} {name}", command


def words(text: str | None) -> str:
    """The program's markup as Markdown."""
    plain = re.sub(r"\[bold\](.*?)\[/bold\]", r"`\1`", text or "").replace("|", "\\|")
    plain = re.sub(
        r"(?<![`\w-])(--[a-z][\w-]*)(?![^`]*`(?:[^`]*`[^`]*`)*[^`]*$)", r"`\1`", plain
    )  # or dashes become one
    parts = re.split(r"(`[^`]*`)", " ".join(plain.split()))
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*") for part in parts
    )


def value_of(option: Any) -> str:
    """What is written behind an option's name."""
    if getattr(option, "is_flag", False):
        return ""
    kind = getattr(option.type_descriptor.annotation, "__name__", "")
    return f" {option.metavar or {'int': 'N', 'float': 'X', 'Path': 'PATH'}.get(kind, 'WORDS')}"


def default_of(option: Any, said: str) -> tuple[str, str]:
    """The words of an option and its default: what the program says in brackets, or its value."""
    told = re.fullmatch(r"(.*?)\s*\[([^\[\]]+)\]", said)
    if told:
        return told[1], told[2]
    value = option.default
    shown = (
        value
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != ""
        else None
    )
    return said, "" if shown is None else f"`{shown}`"


def option_rows(command: Any) -> Iterator[str]:
    """A line an option."""
    for option in command.params:
        if option.param_type_name == "option" and not option.hidden:
            names = ", ".join(
                f"`{name}{value_of(option)}`" for name in (*option.opts, *option.secondary_opts)
            )
            said, default = default_of(option, words(option.help))
            yield f"| {names} | {said} | {default} |"


def chapter(name: str, command: Any) -> list[str]:
    """One command."""
    arguments = [option for option in command.params if option.param_type_name == "argument"]
    call = " ".join(
        f"{argument.metavar or argument.name.upper()}{'...' if argument.nargs != 1 else ''}"
        for argument in arguments
    )
    lines = [
        f"## `{name}`",
        "",
        words(command.help),
        "",
        "```text",
        f"{name} {call} [OPTIONS]".replace("  ", " "),
        "```",
        "",
    ]
    lines += [
        f"- `{argument.metavar or argument.name.upper()}`: {words(argument.help)}"
        for argument in arguments
        if argument.help
    ]
    rows = list(option_rows(command))
    if rows:
        lines += ["", "| option | what it does | default |", "|---|---|---|", *rows, ""]
    examples = re.findall(r"\[bold\](.*?)\[/bold\]", command.epilog or "")
    return [*lines, "", "```bash", *examples, "```", ""] if examples else lines


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the reference where the page asks for it."""
    if MARK in source[0]:
        found = commands(typer.main.get_command(program))
        lines = [line for name, command in found for line in chapter(name, command)]
        source[0] = source[0].replace(MARK, "\n".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", fill_in)
    app.connect("env-get-outdated", lambda *_: ["commands"])
    return {"parallel_read_safe": True}
