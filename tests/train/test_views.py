import math

import numpy as np
import pytest
from PIL import Image

from dpal_edge.train import views

SIZES = [(256, 128), (224, 224), (256, 192), (384, 128)]
ASPECTS = [(0.4, 0.6), (0.75, 1.33), (0.4, 0.6), (0.25, 0.4)]  # METHOD.md 2.1


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def image():
    return Image.fromarray(generator(9).integers(0, 256, (120, 60, 3)).astype(np.uint8))


@pytest.fixture
def ramp():
    """A picture whose red is the column and whose green is the row."""
    y, x = np.mgrid[:200, :100]
    return Image.fromarray(np.stack([x * 2, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


VIEWS = {
    "global": lambda image, rng: views.global_cut(image, (64, 32), rng).pixels(),
    "local": lambda image, rng: views.local_cut(image, (32, 16), (64, 32), rng).pixels(),
    "background": lambda image, rng: views.background_cut(image, (48, 80), rng).pixels(),
    "crowd": lambda image, rng: views.crowd_cut(image, (48, 80), rng).pixels(),
}


@pytest.mark.parametrize(
    ("name", "size"), [("global", (64, 32)), ("local", (32, 16)), ("background", (48, 80)), ("crowd", (48, 80))]
)
def test_a_view_has_its_size_and_follows_its_generator(name, size, image):
    view = VIEWS[name]
    first = view(image, generator())
    assert first.shape == (*size, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, view(image, generator()))
    assert any(not np.array_equal(first, view(image, generator(seed))) for seed in range(1, 4))


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_extreme_images_give_views(name, size):
    extreme = Image.fromarray(np.full((*size, 3), 128, np.uint8))
    for seed in range(10):
        assert VIEWS[name](extreme, generator(seed)).shape[2] == 3


@pytest.mark.parametrize(("size", "aspect"), [*zip(SIZES, ASPECTS, strict=True)])
def test_aspect_of_crops_follows_the_view(size, aspect):
    assert views._aspect(size) == aspect


def box_of(crop, ramp):
    """Read the box (left, top, right, bottom) in shares of the image off a crop of the ramp."""
    red, green = np.asarray(crop)[..., 0] / 2, np.asarray(crop)[..., 1]
    return (
        red.min() / ramp.width,
        green.min() / ramp.height,
        (red.max() + 1) / ramp.width,
        (green.max() + 1) / ramp.height,
    )


@pytest.mark.parametrize("seed", range(8))
def test_crop_keeps_scale_and_aspect(ramp, seed):
    scale, aspect = (0.3, 0.5), (0.4, 0.6)
    crop = views.random_crop(ramp, (100, 50), generator(seed), scale=scale, aspect=aspect)
    assert crop.size == (50, 100)
    left, top, right, bottom = box_of(crop, ramp)
    assert 0 <= left < right <= 1.02
    assert 0 <= top < bottom <= 1.02
    assert scale[0] * 0.9 <= (right - left) * (bottom - top) <= scale[1] * 1.1
    shape = (right - left) * ramp.width / ((bottom - top) * ramp.height)
    assert aspect[0] * 0.9 <= shape <= aspect[1] * 1.1


def test_crops_reach_every_border(ramp):
    boxes = [
        box_of(views.random_crop(ramp, (60, 60), generator(seed), scale=(0.1, 0.9), aspect=(0.4, 0.6)), ramp)
        for seed in range(60)
    ]
    assert min(box[0] for box in boxes) < 0.03
    assert min(box[1] for box in boxes) < 0.03
    assert max(box[2] for box in boxes) > 0.97
    assert max(box[3] for box in boxes) > 0.97


def test_crop_that_never_fits_is_the_largest_centred_box():
    array = np.zeros((20, 400, 3), np.uint8)
    array[:, 193:207] = 255
    wide = Image.fromarray(array)
    crop = np.asarray(views.random_crop(wide, (20, 10), generator(), scale=(0.9, 1.0), aspect=(0.4, 0.6)))
    assert crop.min() > 200  # 12 x 20 pixels from the middle


def painted(size, value):
    return np.full((*size, 3), value, np.uint8)


def boxes_in(crowd, value):
    rows, columns = np.nonzero(crowd[..., 0] == value)
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def paste_twins(crowd, left, right, rng):
    return views.paste(crowd, [left, right], views.twin_boxes(crowd.shape[:2], left.shape[:2], rng))


@pytest.mark.parametrize(("crowd", "person"), [((256, 256), (128, 96)), ((64, 48), (32, 16)), ((34, 34), (32, 16))])
def test_pasted_twins_lie_inside_side_by_side(crowd, person):
    h, w = person
    for seed in range(200):
        found = paste_twins(painted(crowd, 0), painted(person, 100), painted(person, 200), generator(seed))
        left, right = boxes_in(found, 70), boxes_in(found, 140)  # 0.7 of each
        for top, bottom, start, end in (left, right):
            assert (bottom - top, end - start) == (h, w)
        assert left[3] <= right[2]
        assert set(np.unique(found)) == {0, 70, 140}


def test_published_paste_ranges():
    boxes = [views.twin_boxes((256, 256), (128, 96), generator(seed)) for seed in range(1500)]
    tops = {box[0] for pair in boxes for box in pair}
    assert (min(tops), max(tops)) == (0, 126)
    lefts = {left[1] for left, _ in boxes}
    assert (min(lefts), max(lefts)) == (0, 62)
    starts = {right[1] for _, right in boxes}
    assert min(starts) >= 96
    assert max(starts) <= 158


def test_blend_by_hand():
    crowd = views.paste(painted((4, 4), 100), [painted((2, 3), 200)], [(1, 1, 2, 3)])
    assert crowd[0, 0, 0] == crowd[3, 3, 0] == crowd[1, 0, 0] == 100
    assert (crowd[1:3, 1:4] == round(0.7 * 200 + 0.3 * 100)).all()


def test_later_people_cover_earlier_ones():
    crowd = views.paste(painted((4, 4), 0), [painted((4, 4), 100), painted((2, 2), 200)], [(0, 0, 4, 4), (0, 0, 1, 4)])
    assert (crowd[0] == round(0.7 * 200 + 0.3 * 70)).all()
    assert (crowd[1:] == 70).all()


def test_paste_leaves_the_background_it_was_given():
    background = painted((64, 48), 9)
    assert (views.paste(background, [painted((32, 16), 99)], [(0, 0, 8, 8)]) != 9).any()
    assert (background == 9).all()


def test_nearest_by_hand():
    pixels = np.arange(12, dtype=np.uint8).reshape(4, 3, 1).repeat(3, 2)
    assert views.nearest(pixels, (2, 3))[..., 0].tolist() == [[3, 4, 5], [9, 10, 11]]
    assert views.nearest(pixels, (1, 6))[..., 0].tolist() == [[6, 6, 7, 7, 8, 8]]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_crowds_have_many_scales_and_stay_inside(count):
    heights = set()
    for seed in range(60):
        boxes = views.crowd_boxes((100, 80), (64, 32), count, generator(seed))
        assert len(boxes) == count
        for i, (top, left, h, w) in enumerate(boxes):
            heights.add(h)
            assert 0 <= top <= 100 - h
            assert 0 <= left <= 80 - w
            assert w == round(h / 2)
            assert left <= (i + 0.8) * 80 / count  # in its own part of the width
    assert min(heights) >= 40
    assert max(heights) < 95
    assert len(heights) > 15


def test_wide_people_are_cut_to_the_crowd():
    [box] = views.crowd_boxes((64, 32), (32, 640), 1, generator())
    assert box[1:] == (0, box[2], 32)


def image_of(*levels):
    return Image.fromarray(np.array([levels], np.uint8))


@pytest.mark.parametrize(
    ("look", "expected"),
    [
        (views.Look(), [[100, 50, 200], [0, 0, 250]]),
        (views.Look(factors=(0.5, 1, 1)), [[50, 25, 100], [0, 0, 125]]),
        # Gray levels 82 and 28 (0.299 R + 0.587 G + 0.114 B), mean 55: 55 + 0.5 (100 - 55) is 77.5.
        (views.Look(factors=(1, 0.5, 1)), [[77, 52, 127], [27, 27, 152]]),
        (views.Look(factors=(1, 1, 0)), [[82, 82, 82], [28, 28, 28]]),
        (views.Look(gray=True), [[82, 82, 82], [28, 28, 28]]),
        (views.Look(solarise=True), [[100, 50, 55], [0, 0, 5]]),
        (views.Look(hue=1 / 3), [[200, 100, 50], [250, 0, 0]]),  # green is a third of a turn from red
    ],
)
def test_looks_by_hand(look, expected):
    found = np.asarray(views.Cut(image_of([100, 50, 200], [0, 0, 250]), look).pixels())[0]
    assert np.abs(found.astype(int) - expected).max() <= 4  # of 255: Pillow rounds after every step, hues to 256


def test_looks_follow_their_order():
    def changed(order):
        look = views.Look(factors=(1.4, 0.6, 1.0), order=order)
        return views.Cut(image_of([100] * 3, [200] * 3), look).pixels()[0, :, 0].tolist()

    # Brighter first: 140 and 255, mean 198 -> 163 and 232. Contrast first, around 150: 120 and 180 -> 168 and 252.
    assert changed((0, 1, 2, 3)) == [163, 232]
    assert changed((3, 1, 0, 2)) == [168, 252]


def test_looks_are_rows_of_numbers():
    look = views.Look(factors=(0.7, 1.1, 0.9), hue=0.05, order=(2, 0, 3, 1), gray=True, blur=1.5)
    assert look.row() == [0.7, 1.1, 0.9, 0.05, 2, 0, 3, 1, 1, 1.5, 0]
    assert len(look.row()) == sum(views.LOOK_COLUMNS)


def test_drawn_looks_have_the_published_shares(image):
    looks = [views.background_cut(image, (8, 8), generator(seed)).look for seed in range(1000)]
    shares = {
        0.8: [look.factors != (1.0, 1.0, 1.0) for look in looks],
        0.2: [look.gray for look in looks] + [look.solarise for look in looks],
        0.1: [look.blur > 0 for look in looks],
    }
    for share, hits in shares.items():
        assert np.mean(hits) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 1000))
    assert all(0.1 <= look.blur <= 2 for look in looks if look.blur)
    assert {look.order[0] for look in looks} == {0, 1, 2, 3}
    persons = [views.global_cut(image, (8, 8), generator(seed)).look for seed in range(200)]
    assert all(look.blur and not look.solarise for look in persons)


def test_half_of_the_cuts_are_mirrored(ramp):
    reds = [views.global_cut(ramp, (20, 10), generator(seed)).plain()[0, :, 0].astype(int) for seed in range(400)]
    mirrored = [red[0] > red[-1] for red in reds]
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("grid", "count"), [((16, 8), 64), ((4, 2), 4), ((5, 3), 7), ((1, 9), 4), ((2, 2), 4), ((3, 3), 0)]
)
def test_block_masks_hide_exactly_the_count(grid, count):
    for seed in range(40):
        mask = views.block_mask(grid, count, generator(seed))
        assert (mask.shape, mask.dtype) == ((grid[0] * grid[1],), bool)
        assert mask.sum() == count


def test_block_masks_are_blocks():
    """Hidden patches have far more hidden neighbours than half of the patches at random would."""
    masks = [views.block_mask((16, 8), 64, generator(seed)).reshape(16, 8) for seed in range(40)]
    alike = np.mean([(mask[:, 1:] == mask[:, :-1]).mean() for mask in masks])
    assert alike > 0.7
    assert np.mean(masks, axis=0).min() > 0  # and every place is hidden at times


@pytest.mark.parametrize(("seed_range", "name", "share"), [(400, "global", 0.2)])
def test_a_fifth_of_the_views_is_grey(image, seed_range, name, share):
    grey = 0
    for seed in range(seed_range):
        view = VIEWS[name](image, generator(seed)).astype(int)
        grey += np.abs(view[..., 0] - view[..., 1]).max() == 0
    assert grey / seed_range == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / seed_range))


@pytest.mark.parametrize(("size", "expected"), [((60, 120), (48, 96)), ((60, 30), (60, 30)), ((1, 900), (1, 96))])
def test_blurred_stand_in_keeps_shape_and_loses_detail(size, expected):
    noise = Image.fromarray(generator(1).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    blurred = views.blurred(noise)
    assert blurred.size == expected
    assert np.asarray(blurred).std() < 0.2 * np.asarray(noise).std()
