"""``torch.export`` of every measure: a program that gives the same numbers on other rows."""

from __future__ import annotations

import pytest
import torch

from stage_examples import EXAMPLES, is_streaming

NAMES = [
    name
    for name, example in EXAMPLES.items()
    if type(example.make()).__module__.startswith("tdgeom.measures")
    and not is_streaming(example.make())
    and "compile" not in example.exempt  # with the reason
]
QUICK = ("TwoNN", "NearestNeighbors", "LabelOverlap", "LinearCKA", "CKNNA", "SoftMatching", "SampleMetrics")


class Plain(torch.nn.Module):
    """A stage as a module of tensors."""

    def __init__(self, stage: torch.nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.stage(*inputs)
        return (found,) if isinstance(found, torch.Tensor) else tuple(found)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_an_exported_stage_gives_the_same_numbers(name: str) -> None:
    stage, inputs = Plain(EXAMPLES[name].make()), EXAMPLES[name].inputs()
    program = torch.export.export(stage, tuple(inputs)).module()
    others = [x.flip(0) * torch.linspace(1, 2, x.shape[-1]).double() if x.ndim == 2 else x for x in inputs]
    for found, expected in zip(program(*others), stage(*others)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_every_measure_is_tried() -> None:
    assert len(NAMES) > 35 and set(QUICK) <= set(NAMES)
