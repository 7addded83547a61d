"""The command line: parse, call the library, print.

Comes in: words typed in a shell. Goes out: tables, files, an exit code.
Uses: every room.
"""

from tdgeom.cli.app import app, main

__all__ = ["app", "main"]
