"""The command line: parse, call the library, print."""

from tdgeom.cli.app import app, main

__all__ = ["app", "main"]
