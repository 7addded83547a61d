"""The checks of one architecture: what tdgeom reads and changes, against the model's own outputs and hooks of our own."""

from __future__ import annotations

from torch import Tensor

from model.zoo.edit_checks import EditChecks
from model.zoo.examined import Report, refusal
from model.zoo.kind_checks import KindChecks
from model.zoo.stream_checks import StreamChecks

__all__ = ["Report", "Zoo"]


class Zoo(StreamChecks, KindChecks, EditChecks):
    """One architecture, built once, and the checks of it."""

    def run(self) -> Report:
        """Every check. A check that ends in an error that is no refusal is a fault too."""
        acts: dict[str, Tensor] = {}
        checks = {
            "stream": self.check_stream,
            "kinds": lambda: acts.update(self.check_kinds()),
            "padding": self.check_padding,
            "sums": lambda: self.check_sums(acts),
            "added": lambda: self.check_added(acts),
            "patterns": lambda: self.check_patterns(acts),
            "heads": lambda: self.check_heads(acts),
            "edits": lambda: self.check_edits(acts),
            "router": lambda: self.check_router(acts),
            "generate": self.check_generate,
        }
        for name, check in checks.items():
            try:
                check()
            except Exception as error:
                if name == "stream" and refusal(error):  # then nothing else can be compared
                    self.report.refused.setdefault("residual_output", str(error))
                else:
                    self.wrong(f"{name}: raw {type(error).__name__}: {str(error)[:200]}")
        return self.report
