"""One pass over a loader: batches -> rows -> blocks -> streaming state -> results -> tables.

Comes in: a pipeline and a loader. Goes out: a TensorDict of results; ``to_frame`` makes tables of it.
Uses: every room before it. It drives stages by what they declare and knows none by name.
"""

from tdgeom.run.run import run

__all__ = ["run"]
