"""``Pushed``: a run whose batches are handed to it one by one, for calls that somebody else makes."""

from __future__ import annotations

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase

from tdgeom.run.batch_stages import BatchStages
from tdgeom.run.one_pass import OnePass
from tdgeom.run.plan import make_plan
from tdgeom.run.run import end_of

__all__ = ["Pushed"]


class Pushed:
    """``run`` with its loader turned around: the same plan, the same blocks, the same end. For one process.

    Args:
        pipeline: as for ``run``; its streaming state is reset first.
    """

    def __init__(self, pipeline: TensorDictModuleBase) -> None:
        plan = make_plan(pipeline)
        self.one_pass = OnePass(plan, BatchStages(plan))
        self.batches = 0

    def feed(self, batch: TensorDictBase) -> None:
        """One batch: its rows to every streaming stage."""
        self.one_pass.take(self.one_pass.batch_stages.td(batch), self.batches)
        self.batches += 1

    def end(self) -> TensorDict:
        """What the streaming and end stages write."""
        self.one_pass.flush()
        found = end_of(self.one_pass, None, None)
        assert found is not None  # in one process
        return found
