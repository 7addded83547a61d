"""``python -m tdgeom``."""

import sys

from tdgeom.cli import main

sys.exit(main())
