"""torch's own transformer layers: sites, edits, and batches with padding, which they like to cut out."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import tdgeom as tg
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene

KINDS = ["residual_input", "attn_output", "residual_mid", "mlp_output", "residual_output"]
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()


@pytest.fixture(params=[True, False])
def encoder(request):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=request.param)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=not request.param).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_stream(encoder):
    acts = Capture(encoder, KINDS, in_keys=["src"])(TensorDict({"src": X}))["acts"]
    for layer in range(3):
        before, attention, middle, mlp, after = (acts[f"{kind}.{layer}"] for kind in KINDS)
        torch.testing.assert_close(middle, before + attention)
        if encoder.layers[0].norm_first:
            torch.testing.assert_close(after, middle + mlp)


def test_patching_a_run_with_itself_changes_nothing_and_edits_arrive(encoder):
    with torch.no_grad():
        expected = encoder(X)
        for kind in KINDS:
            own = Capture(encoder, kind, in_keys=["src"])(TensorDict({"src": X}))
            with Intervene(encoder, {kind: tg.Patch(own)}):
                torch.testing.assert_close(encoder(X), expected)
            with Intervene(encoder, {f"{kind}.1": lambda x: x * torch.linspace(0.5, 1.5, 16)}):
                assert (encoder(X) - expected).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the bare call
def test_padded_batches_stay_whole_inside_and_are_cut_again_afterwards(encoder):
    """The fast path works on nested tensors without padding: with hooks there is none."""
    nested = encoder.use_nested_tensor
    with torch.no_grad():
        expected = encoder(X, src_key_padding_mask=PADDING)
        with Capture(encoder, KINDS, in_keys=["src"]) as calls:
            found = encoder(X, src_key_padding_mask=PADDING)
        with Intervene(encoder, {"residual_output.1": lambda x: 2 * x}):
            assert encoder(X, src_key_padding_mask=PADDING).shape == X.shape
    torch.testing.assert_close(found[~PADDING], expected[~PADDING])
    assert calls[0]["acts", "residual_output.2"].shape == X.shape
    alone = Capture(encoder, KINDS, in_keys=["src"])(TensorDict({"src": X[1:, :3]}))["acts"]
    torch.testing.assert_close(calls[0]["acts", "residual_output.1"][1, :3], alone["residual_output.1"][0])
    assert encoder.use_nested_tensor is nested
    with pytest.raises(ZeroDivisionError), Intervene(encoder, {"residual_output.1": lambda x: 1 / 0}):
        encoder(X)
    assert encoder.use_nested_tensor is nested
