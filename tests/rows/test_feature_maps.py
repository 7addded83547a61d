"""Feature maps of images as rows: which axis counts channels, from the module, a setting, or refused."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictSequential
from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetModel, SwinConfig, SwinModel

import tdgeom as tg

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def rows_of(model, site, images=PIXELS, **settings):
    capture = tg.Capture(model, site)
    stages = [tg.SelectTokens(capture.sites, **settings), tg.Collect(capture.sites)]
    result = tg.run(TensorDictSequential(capture, *stages), [images[:2], images[2:]], progress=False)
    return result["collected", capture.sites[0]], result["collected_row_id"]


def seen(model, path, images=PIXELS):
    kept = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, out: kept.append(out))
    with torch.no_grad():
        model(images)
    handle.remove()
    return kept[0]


def networks():
    torch.manual_seed(0)
    resnet = ResNetConfig(embedding_size=10, hidden_sizes=[10, 12], depths=[1, 1], layer_type="basic")
    convnext = ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1])
    return {"resnet": ResNetModel(resnet).eval(), "convnext": ConvNextModel(convnext).eval()}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("resnet", "encoder.stages.0"),
        ("resnet", "encoder.stages.1.layers.0"),
        ("convnext", "encoder.stages.1"),
    ],
)
def test_positions_of_maps_become_rows(name, path):
    model = networks()[name]
    value = seen(model, path)
    found, row_id = rows_of(model, f"module_output:{path}")
    torch.testing.assert_close(
        found, value.permute(0, 2, 3, 1).reshape(-1, value.shape[1]), rtol=1e-4, atol=1e-5
    )
    positions = value.shape[2] * value.shape[3]
    assert row_id.tolist() == [(i << 20) + p for i in range(3) for p in range(positions)]
    pooled, _ = rows_of(model, f"module_output:{path}", pool="mean")
    torch.testing.assert_close(pooled, value.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_maps_with_channels_last_and_maps_that_are_square_in_all():
    class Last(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.conv, self.mlp = (
                torch.nn.Conv2d(3, width, 4, 4),
                torch.nn.Sequential(torch.nn.Linear(width, width)),
            )

        def forward(self, pixel_values):
            return self.mlp(self.conv(pixel_values).permute(0, 2, 3, 1))

    torch.manual_seed(0)
    model = Last(6).eval()
    found, _ = rows_of(model, "module_output:mlp")
    torch.testing.assert_close(found, seen(model, "mlp").reshape(-1, 6), rtol=1e-4, atol=1e-5)
    square = Last(8).eval()  # 8 channels, 8 x 8 positions: torch's own modules say, a block of them does not
    conv = seen(square, "conv")
    torch.testing.assert_close(
        rows_of(square, "module_output:conv")[0],
        conv.permute(0, 2, 3, 1).reshape(-1, 8),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        rows_of(square, "module_output:mlp.0")[0], seen(square, "mlp").reshape(-1, 8), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(
        ValueError,
        match=r"the 8 channels of its module do not say which axis counts channels.*channels='first'",
    ):
        rows_of(square, "module_output:mlp")
    told, _ = rows_of(square, "module_output:mlp", channels="last")
    torch.testing.assert_close(told, seen(square, "mlp").reshape(-1, 8), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="channels takes 'first', 'last' or None"):
        tg.SelectTokens(["x"], channels="channels_first")


def test_maps_of_several_sizes_go_together_as_images():
    model = networks()["resnet"]
    capture = tg.Capture(model, ["module_output:encoder.stages.0", "module_output:encoder.stages.1"])
    stages = [tg.SelectTokens(capture.sites, pool="mean"), tg.Collect(capture.sites)]
    result = tg.run(TensorDictSequential(capture, *stages), [{"pixel_values": PIXELS}], progress=False)
    for site, path in zip(capture.sites, ("encoder.stages.0", "encoder.stages.1")):
        torch.testing.assert_close(
            result["collected", site], seen(model, path).mean((2, 3)), rtol=1e-4, atol=1e-5
        )


def test_labels_of_pairs_and_blocks_of_swin():
    torch.manual_seed(0)
    model = SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    ).eval()
    capture = tg.Capture(model, "module_output:encoder.layers.0.blocks.0")
    stages = [tg.SelectTokens(capture.sites, also=["labels"]), tg.Collect(capture.sites, also=["labels"])]
    result = tg.run(
        TensorDictSequential(capture, *stages), [(PIXELS, torch.tensor([2, 0, 1]))], progress=False
    )
    assert result["collected", capture.sites[0]].shape == (3 * 64, 8)
    assert result["collected", "labels"].tolist() == [2] * 64 + [0] * 64 + [1] * 64
    with pytest.raises(ValueError, match=r"batch of 2 unnamed value\(s\): name them with in_keys="):
        plain = TensorDictSequential(capture, tg.SelectTokens(capture.sites), tg.Collect(capture.sites))
        tg.run(plain, [(PIXELS, torch.zeros(3, 4))], progress=False)
