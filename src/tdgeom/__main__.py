"""``python -m tdgeom``: the command line."""

import sys

from tdgeom.cli import main

if __name__ == "__main__":
    sys.exit(main())
