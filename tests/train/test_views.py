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
    "global": lambda image, rng: views.global_view(image, (64, 32), rng),
    "local": lambda image, rng: views.local_view(image, (32, 16), (64, 32), rng),
    "background": lambda image, rng: views.background_view(image, (48, 80), rng),
    "crowd": lambda image, rng: views.crowd_view(image, (48, 80), rng),
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


@pytest.mark.parametrize(("crowd", "person"), [((256, 256), (128, 96)), ((64, 48), (32, 16)), ((34, 34), (32, 16))])
def test_pasted_twins_lie_inside_side_by_side(crowd, person):
    h, w = person
    for seed in range(200):
        found = views.paste_self(painted(crowd, 0), painted(person, 100), painted((16, 8), 200), generator(seed))
        left, right = boxes_in(found, 70), boxes_in(found, 140)  # 0.7 of each
        for top, bottom, start, end in (left, right):
            assert (bottom - top, end - start) == (h, w)
        assert left[3] <= right[2]
        assert set(np.unique(found)) == {0, 70, 140}


def test_published_paste_ranges():
    tops, lefts, starts = set(), set(), set()
    for seed in range(1500):
        found = views.paste_self(
            painted((256, 256), 0), painted((128, 96), 100), painted((128, 96), 200), generator(seed)
        )
        left, right = boxes_in(found, 70), boxes_in(found, 140)
        tops |= {left[0], right[0]}
        lefts.add(left[2])
        starts.add(right[2])
    assert (min(tops), max(tops)) == (0, 126)
    assert (min(lefts), max(lefts)) == (0, 62)
    assert max(starts) <= 158
    assert min(starts) >= 96


def test_blend_by_hand():
    canvas = painted((4, 4), 100)
    views._blend(canvas, painted((2, 3), 200), 1, 1)
    assert canvas[0, 0, 0] == canvas[3, 3, 0] == canvas[1, 0, 0] == 100
    assert (canvas[1:3, 1:4] == round(0.7 * 200 + 0.3 * 100)).all()


def test_paste_leaves_the_background_it_was_given():
    background = painted((64, 48), 9)
    views.paste_self(background, painted((32, 16), 1), painted((32, 16), 1), generator())
    views.paste_others(background, [painted((32, 16), 1)], generator())
    assert (background == 9).all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pasted_others_have_many_scales_and_stay_inside(count):
    heights = set()
    for seed in range(60):
        found = views.paste_others(painted((100, 80), 0), [painted((64, 32), 100)] * count, generator(seed))
        assert found.shape == (100, 80, 3)
        top, bottom, _, _ = boxes_in(found, 70)
        heights.add(bottom - top)
    assert min(heights) >= 40
    assert max(heights) <= 95 or count > 1
    assert len(heights) > 15


def test_wide_people_are_cut_to_the_crowd():
    found = views.paste_others(painted((64, 32), 0), [painted((32, 640), 100)], generator())
    assert found.shape == (64, 32, 3)


@pytest.mark.parametrize(("seed_range", "name", "share"), [(400, "global", 0.2)])
def test_a_fifth_of_the_views_is_grey(image, seed_range, name, share):
    grey = 0
    for seed in range(seed_range):
        view = VIEWS[name](image, generator(seed)).astype(int)
        grey += np.abs(view[..., 0] - view[..., 1]).max() == 0
    assert grey / seed_range == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / seed_range))


def test_blurred_stand_in_keeps_size_and_loses_detail(image):
    blurred = np.asarray(views.blurred(image)).astype(float)
    assert blurred.shape == np.asarray(image).shape
    assert blurred.std() < 0.2 * np.asarray(image).std()
