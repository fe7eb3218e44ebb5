from dataclasses import replace

import pytest
import torch

from dpal_edge.errors import ConfigError
from dpal_edge.models.vit import VisionTransformer, ViTConfig, Windows, init_student

TINY = ViTConfig(size=(64, 96), width=24, depth=3, heads=2, last_heads=2)  # 4 x 6 patches


def build(config):
    vit = VisionTransformer(config)
    init_student(vit, torch.Generator().manual_seed(0))
    return vit.eval()


@torch.no_grad()
@pytest.mark.parametrize("class_token", [True, False])
def test_one_window_over_the_grid_is_full_attention(class_token):
    config = replace(TINY, class_token=class_token)
    whole, windowed = build(config), build(replace(config, window=(4, 6)))
    windowed.load_state_dict(whole.state_dict())  # weights do not know about windows
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(windowed(images), whole(images))


@torch.no_grad()
def test_patches_see_their_window_and_the_class_token_sees_all():
    vit = build(replace(TINY, depth=1, window=(2, 3)))  # one block, with windows
    image = torch.zeros(1, 3, 64, 96)
    image[:, :, 48:64, 80:96] = 1  # the last patch
    changed = ((vit(image) - vit(torch.zeros_like(image))).abs().sum(-1)[0] > 1e-6).tolist()
    assert changed == [True, *(row >= 2 and column >= 3 for row in range(4) for column in range(6))]


@torch.no_grad()
def test_every_third_block_attends_everywhere():
    vit = build(replace(TINY, depth=6, window=(2, 3)))
    assert [block.windows is None for block in vit.blocks] == [False, False, True] * 2


def test_windows_are_cut_in_row_order_and_put_back():
    windows = Windows((2, 4), (2, 2), class_token=True)
    tokens = torch.arange(9.0).view(1, 9, 1)  # the class token, then 1 2 3 4 / 5 6 7 8
    cut = windows.split(tokens)
    assert cut[..., 0].tolist() == [[0, 1, 2, 5, 6], [0, 3, 4, 7, 8]]
    assert torch.equal(windows.merge(cut), tokens)
    cut[1, 0] = 4
    assert windows.merge(cut)[0, 0] == 2  # the mean of what the windows made of it


def test_windows_that_do_not_divide_the_grid_are_refused():
    with pytest.raises(ConfigError, match=r"window 3x3 does not divide the 4x6 patches of 64x96 pixels"):
        replace(TINY, window=(3, 3))
    with pytest.raises(ConfigError, match="window 0x3"):
        replace(TINY, window=(0, 3))


def test_images_of_another_size_are_refused():
    with pytest.raises(ConfigError, match="images of 64x64, expected 64x96"):
        build(replace(TINY, window=(2, 3)))(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("window", [None, (2, 3)])
def test_config_survives_a_checkpoint(window):
    config = replace(TINY, window=window)
    assert ViTConfig.from_dict(config.to_dict()) == config


def test_configs_from_before_windows_load():
    fields = TINY.to_dict()
    del fields["window"]
    assert ViTConfig.from_dict(fields) == TINY
