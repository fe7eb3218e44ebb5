import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from dpal_edge.models.vit import VisionTransformer, ViTConfig, init_student, resize_positions

TINY = ViTConfig(size=(64, 32), width=24, depth=3, heads=2, last_heads=2)


def build(config, seed=0, **options):
    vit = VisionTransformer(config)
    init_student(vit, torch.Generator().manual_seed(seed), **options)
    return vit.eval()


@torch.no_grad()
@pytest.mark.parametrize(("size", "patches"), [((64, 32), 8), ((32, 16), 2), ((96, 64), 24)])
def test_tokens_are_one_more_than_the_patches(size, patches):
    assert build(TINY)(torch.randn(2, 3, *size)).shape == (2, 1 + patches, TINY.width)


@torch.no_grad()
def test_layer_stops_early_and_normalises():
    vit, images = build(TINY), torch.randn(1, 3, 64, 32)
    torch.testing.assert_close(vit(images, layer=3), vit(images))
    assert not torch.allclose(vit(images, layer=2), vit(images), atol=1e-3)
    assert vit(images, layer=2).mean(-1).abs().max() < 1e-5  # the final norm was applied


@torch.no_grad()
def test_patches_are_in_row_order():
    vit = build(TINY)
    vit.blocks = torch.nn.ModuleList()
    image = torch.zeros(1, 3, 64, 32)
    image[:, :, 16:32, 16:32] = 1  # row 1, column 1 of 4 x 2
    changed = (vit(image) - vit(torch.zeros_like(image))).abs().sum(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [1 + 1 * 2 + 1]


@torch.no_grad()
def test_heads_change_the_output_and_not_the_weights():
    images = torch.randn(1, 3, 64, 32)
    config = ViTConfig(size=(64, 32), width=48, depth=2, heads=6, last_heads=12)
    published = build(config)
    outputs = [published(images)]
    for heads, last in ((3, 3), (6, 6), (12, 12)):
        other = VisionTransformer(ViTConfig(size=(64, 32), width=48, depth=2, heads=heads, last_heads=last))
        other.load_state_dict(published.state_dict())
        outputs.append(other(images))
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-3


def column_error(mode, wanted, stored=(16, 8)):
    """Resize a map that holds each cell's column; return the mean gap to the columns of the wanted grid."""
    columns = torch.arange(stored[1], dtype=torch.float32).expand(stored)
    pos = torch.cat([torch.zeros(1), columns.flatten()]).view(1, -1, 1)
    found = resize_positions(pos, stored, wanted, mode)[0, 1:, 0].view(wanted)
    expected = (torch.arange(wanted[1]) + 0.5) * stored[1] / wanted[1] - 0.5
    return (found - expected).abs().mean().item()


def test_2d_keeps_columns_and_1d_scrambles_them():
    assert column_error("2d", (8, 6)) < 0.15
    assert column_error("2d-dino", (8, 6)) < 0.15
    assert column_error("1d", (8, 6)) == pytest.approx(2.0, abs=0.1)  # METHOD.md 2.2
    assert column_error("1d", (16, 16)) == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("mode", ["2d", "2d-dino", "1d"])
def test_same_grid_is_identity_and_the_class_position_stays(mode):
    pos = torch.randn(1, 9, 5)
    assert resize_positions(pos, (4, 2), (4, 2), mode) is pos
    resized = resize_positions(pos, (4, 2), (6, 3), mode)
    assert resized.shape == (1, 19, 5)
    assert torch.equal(resized[:, 0], pos[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("layer_scale", [False, True])
def test_tokens_equal_timm(layer_scale):
    config = ViTConfig(size=(64, 32), width=24, depth=3, heads=3, last_heads=3, layer_scale=layer_scale)
    theirs = TimmVisionTransformer(
        img_size=config.size,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=0,
        init_values=0.7 if layer_scale else None,
    ).eval()
    torch.nn.init.normal_(theirs.cls_token)
    ours = VisionTransformer(config)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(ours(images), theirs.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pos_init", "mean", "std", "low", "high"),
    [("uniform", 0.5, 1 / math.sqrt(12), 0, 1), ("trunc_normal", 0, 0.02, -2, 2)],
)
def test_position_statistics(pos_init, mean, std, low, high):
    pos = build(ViTConfig(depth=1), pos_init=pos_init).pos_embed
    assert pos.mean().item() == pytest.approx(mean, abs=0.01)
    assert pos.std().item() == pytest.approx(std, rel=0.02)
    assert low <= pos.min() < pos.max() <= high


def test_init_follows_its_seed_and_xavier():
    one, same, other = build(TINY), build(TINY), build(TINY, seed=1)
    for key, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[key]), key
    assert not torch.equal(one.pos_embed, other.pos_embed)
    for weight, fan_in, fan_out in (
        (one.blocks[0].attn.qkv.weight, 24, 72),
        (one.patch_embed["proj"].weight, 3 * 256, 24),
    ):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.9 * bound < weight.abs().max() <= bound
    assert not one.blocks[0].mlp["fc1"].bias.any()
    assert not one.patch_embed["proj"].bias.any()
