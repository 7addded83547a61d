"""One pass over a loader: batches -> rows -> blocks -> streaming state -> results."""

from tdgeom.run.run import run

__all__ = ["run"]
