"""``--config FILE``: a command's options from a YAML or TOML file, and the options of a call as a bundle records them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from tdgeom.files.atomic import file_sha256
from tdgeom.files.errors import StoreError

__all__ = ["defaults_of", "hashes_of", "option_names", "read_config", "recorded"]

OF_ONE_CALL = {
    "out",
    "overwrite",
    "plots",
    "as_json",
    "config",
    "columns",
    "checkpoint",
    "every",
}  # they change no number
LARGEST = 2**20


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of ``--config``: what the file names becomes the default of each option and argument.

    Raises:
        BadParameter: no such file, a format that is neither, a key that is no option, a value that fits none.
    """
    if path is not None and not context.resilient_parsing:
        context.default_map = {
            **(context.default_map or {}),
            **defaults_of(context.command, _parsed(path), str(path)),
        }
    return path


def defaults_of(command: Any, given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Values by option as values by parameter, lists joined by commas where one text is wanted."""
    from tdgeom.core.guessed_names import right_name

    names = option_names(command)
    parameters = {parameter.name: parameter for parameter in command.params}
    found = {}
    for key, value in given.items():
        option = str(key).lstrip("-").replace("-", "_")
        if option == "command":
            if value != command.name:
                raise typer.BadParameter(f"{source} is for tdgeom {value}, not for tdgeom {command.name}")
            continue
        if option not in names or names[option] == "config":
            near = right_name(f"tdgeom {command.name}", option, sorted(set(names) - {"config"}))
            raise typer.BadParameter(f"{source}: {key} is no option of tdgeom {command.name}. {near}")
        parameter = parameters[names[option]]
        if isinstance(value, Mapping) or (
            isinstance(value, list) and any(isinstance(one, list | dict) for one in value)
        ):
            raise typer.BadParameter(f"{source}: {key} takes one value or a list, got {value!r}")
        several = parameter.multiple or parameter.nargs != 1
        if isinstance(value, list) and not several:
            value = ",".join(map(str, value))
        if value is not None:
            found[parameter.name] = value if isinstance(value, bool) or several else str(value)
    return found


def option_names(command: Any) -> dict[str, str]:
    """Every name of an option or argument, with underscores, and the parameter it is for."""
    named = {}
    for parameter in command.params:
        for name in (parameter.name, *parameter.opts):
            named[name.lstrip("-").replace("-", "_")] = parameter.name
    named.pop("help", None)
    return {name: parameter for name, parameter in named.items() if len(name) > 1}


def _parsed(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise typer.BadParameter(f"--config: {path} does not exist")
        if path.stat().st_size > LARGEST:
            raise typer.BadParameter(f"--config: {path} is larger than 1 MiB: is it a file of options?")
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml", ".json"):  # JSON is YAML
            import yaml

            found = yaml.safe_load(text)
        elif path.suffix == ".toml":
            found = _toml(text)
        else:
            raise typer.BadParameter(f"--config takes a .yaml, .yml, .json or .toml file, got {path}")
    except typer.BadParameter:
        raise
    except OSError as error:
        raise typer.BadParameter(f"--config: {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise typer.BadParameter(f"--config: {path} cannot be read: {error}") from error
    except Exception as error:  # YAML's errors are its own
        raise typer.BadParameter(f"--config: {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise typer.BadParameter(
            f"--config: {path} should hold an option a line, such as max_rows: 5000, got {type(found).__name__}"
        )
    return found


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib.loads(text)
    import tomli

    return tomli.loads(text)


def recorded(command: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A call as the metadata keep it: the command, every option that may change a number, and the files it read by their hash."""
    options = {name: value for name, value in given.items() if name not in OF_ONE_CALL}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return {"name": command, "options": plain, "files": hashes_of(plain)}


def hashes_of(options: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of every file that an option names (FILE, or FILE:FIELD)."""
    texts = [value for value in options.values() if isinstance(value, str)]
    found = {}
    for path in (part for text in texts for part in (text, text.rpartition(":")[0])):
        with suppress(OSError, StoreError):  # a file that cannot be read is refused by who reads it
            if path and Path(path).is_file():
                found[path] = file_sha256(Path(path))
    return found
