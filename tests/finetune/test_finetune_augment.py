"""Views of a person: geometry that image, mask and joints share, and colours."""

import numpy as np
import pytest
from PIL import Image

from dpal_edge.errors import ConfigError
from dpal_edge.finetune.augment import Augmentation, change_colours, draw_warp, plain_warp

NOTHING = Augmentation(
    flip=0, scale=0, rotate=0, rotate_share=0, shift=0, colour=0, grey=0, low_resolution=0, erase=0
)  # fmt: skip


def dotted(place, size=(60, 40)) -> Image.Image:
    """A black image with one green dot of 3x3 pixels around ``place`` (x, y): what lies outside is grey."""
    pixels = np.zeros((*size, 3), np.uint8)
    x, y = (int(v) for v in place)
    pixels[y - 1 : y + 2, x - 1 : x + 2, 1] = 255
    return Image.fromarray(pixels)


def test_the_plain_view_is_the_image_itself():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 16, 3), dtype=np.uint8)
    warp = plain_warp((0, 0, 16, 32), (32, 16))
    np.testing.assert_array_equal(warp.image(Image.fromarray(pixels)), pixels)
    np.testing.assert_allclose(warp.points(np.array([[3.5, 7.5]])), [[3.5, 7.5]])


def test_points_of_a_box_by_hand():
    """A box of 20x40 at (10, 5) seen in 16x32 pixels: 0.8 per pixel."""
    warp = plain_warp((10, 5, 30, 45), (32, 16))
    np.testing.assert_allclose(
        warp.points(np.array([[10, 5], [30, 45], [20, 25]])), [[0, 0], [16, 32], [8, 16]], atol=1e-5
    )


@pytest.mark.parametrize("seed", range(8))
def test_points_fall_where_the_image_shows_them(seed):
    rng = np.random.default_rng(seed)
    place = np.array([[20.5, 30.5]])
    warp = draw_warp((5, 8, 35, 55), (64, 32), Augmentation(rotate_share=1), rng)
    view = warp.image(dotted(place[0])).astype(int)
    x, y = warp.points(place)[0]
    rows, columns = np.nonzero(view[..., 1] - view[..., 0] > 100)
    assert abs(columns.mean() + 0.5 - x) < 0.6
    assert abs(rows.mean() + 0.5 - y) < 0.6


@pytest.mark.parametrize("seed", range(4))
def test_masks_move_with_the_image(seed):
    mask = np.zeros((60, 40), np.uint8)
    mask[20:40, 10:30] = 7
    image = Image.fromarray(np.where(mask[..., None] == 7, 255, 0).astype(np.uint8).repeat(3, -1))
    warp = draw_warp((0, 0, 40, 60), (64, 32), Augmentation(rotate_share=1), np.random.default_rng(seed))
    view, ids = warp.image(image).mean(-1), warp.mask(mask, 255)
    inside = ids != 255
    assert ((view > 127) == (ids == 7))[inside].mean() > 0.97
    assert set(np.unique(ids)) <= {0, 7, 255}


def test_a_mirrored_view():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 16, 3), dtype=np.uint8)
    settings = Augmentation(**{**vars(NOTHING), "flip": 1.0})
    warp = draw_warp((0, 0, 16, 32), (32, 16), settings, np.random.default_rng(0))
    assert warp.flipped
    np.testing.assert_array_equal(warp.image(Image.fromarray(pixels)), pixels[:, ::-1])
    np.testing.assert_allclose(warp.points(np.array([[1.0, 2.0]])), [[15, 2]], atol=1e-5)


def test_a_turn_bends_nothing():
    """Right angles in the image stay right angles there, though the crop squeezes its axes unequally."""
    warp = draw_warp((0, 0, 40, 20), (64, 32), Augmentation(rotate_share=1, scale=0, shift=0), np.random.default_rng(3))
    rows = warp.to_image[:, :2] * (32 / 40, 64 / 20)  # image pixels per crop pixel of the box, undone
    np.testing.assert_allclose(rows.T @ rows, np.eye(2) * (rows[:, 0] @ rows[:, 0]), atol=1e-9)


def test_large_images_are_averaged_not_sampled():
    board = (np.indices((256, 128)).sum(0) % 2 * 255).astype(np.uint8)
    view = plain_warp((0, 0, 128, 256), (32, 16)).image(Image.fromarray(board).convert("RGB"))
    np.testing.assert_allclose(view, 127.5, atol=2)


def test_no_change_of_colour_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 16, 3), dtype=np.uint8)
    changed = change_colours(pixels, NOTHING, np.random.default_rng(0))
    np.testing.assert_allclose(changed, pixels, atol=1)
    assert changed is not pixels


def test_grey_views_have_equal_channels():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 16, 3), dtype=np.uint8)
    grey = change_colours(pixels, Augmentation(**{**vars(NOTHING), "grey": 1.0}), np.random.default_rng(0))
    assert np.ptp(grey.astype(int), axis=-1).max() <= 1


def test_muted_views_keep_at_most_half_of_their_colour():
    red = np.zeros((8, 4, 3), np.uint8)
    red[..., 0] = 200
    settings = Augmentation(**{**vars(NOTHING), "muted": 1.0})
    spread = [np.ptp(change_colours(red, settings, np.random.default_rng(i))[0, 0].astype(int)) for i in range(40)]
    assert 60 < max(spread) <= 101
    assert min(spread) < 20


def test_reduced_and_erased_views():
    pixels = np.full((64, 32, 3), 90, np.uint8)
    pixels[::2] = 200
    reduced = change_colours(pixels, Augmentation(**{**vars(NOTHING), "low_resolution": 1.0}), np.random.default_rng(1))
    assert reduced.std() < pixels.std()
    plain = np.full((64, 32, 3), 90, np.uint8)
    erased = change_colours(plain, Augmentation(**{**vars(NOTHING), "erase": 1.0}), np.random.default_rng(1))
    hidden = (abs(erased.astype(int) - 90) > 2).any(-1).mean()
    assert 0.01 < hidden < 0.26


def test_a_view_is_a_function_of_its_generator():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 16, 3), dtype=np.uint8)
    one, two = (change_colours(pixels, Augmentation(), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_a_turn_of_hue_keeps_grey_and_moves_colours():
    settings = Augmentation(**{**vars(NOTHING), "hue": 1.0})
    grey = np.full((8, 4, 3), 100, np.uint8)
    assert np.abs(change_colours(grey, settings, np.random.default_rng(0)).astype(int) - 100).max() <= 1
    red = np.zeros((8, 4, 3), np.uint8)
    red[..., 0] = 90
    seen = np.stack([change_colours(red, settings, np.random.default_rng(i))[0, 0] for i in range(40)])
    assert set(seen.argmax(1)) == {0, 1, 2}  # red, green and blue all come up
    assert np.abs(seen.astype(int).sum(1) - 90).max() <= 70  # a turn keeps the sum, but for what is clipped below 0


def test_values_out_of_range():
    with pytest.raises(ConfigError, match=r"augmentation scale is 1\.2, expected 0 to 0\.9"):
        Augmentation(scale=1.2)
