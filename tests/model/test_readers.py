"""What a hook sees becomes one tensor, and a tensor can be put back in the same place."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from tdgeom.model.sites import Site
from tdgeom.model.structure.readers import read_input, read_output, write_input, write_output
from tdgeom.model.structure.resolved_site import ResolvedSite

X, Y = torch.randn(3, 2, 4), torch.randn(3, 2, 4)


@pytest.mark.parametrize(
    "output",
    [
        X,
        (X, None),
        (None, X, Y),
        [X, Y],
        BaseModelOutput(last_hidden_state=X),
        {"logits": Y, "hidden_states": X},
    ],
)
def test_outputs(output):
    assert read_output((), {}, output) is X
    changed = write_output((), {}, output, Y)
    assert type(changed) is type(output)
    assert read_output((), {}, changed) is Y
    assert read_output((), {}, output) is X


@pytest.mark.parametrize("output", [None, "text", (None, 1), {}])
def test_no_tensor(output):
    assert read_output((), {}, output) is None
    assert read_input((output,), {}) is None


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, Y), {}),
        ((), {"mask": Y, "hidden_states": X}),
        ((None,), {"query": X}),
        ((), {"x": X, "y": Y}),
        ((None, X), {}),
    ],
)
def test_inputs(args, kwargs):
    assert read_input(args, kwargs) is X
    assert read_input(*write_input(args, kwargs, None, torch.zeros(1))).shape == (1,)


def test_a_scaled_site_writes_what_it_reads():
    entry = ResolvedSite(Site("mlp_output.0"), "mlp", "output", scale=0.25)
    assert repr(entry) == "<mlp_output.0: output of mlp>"
    torch.testing.assert_close(entry.read((), {}, (X, None)), X * 0.25)
    changed = entry.write((), {}, (X, None), Y)
    torch.testing.assert_close(entry.read((), {}, changed), Y)
