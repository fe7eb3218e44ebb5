import numpy as np
import pytest
from PIL import Image

from dpal_edge.finetune.frames import IGNORED, PERSON, View, covering_view, draw_view
from dpal_edge.tasks.letterbox import GREY

PEOPLE = np.array([PERSON], np.int8)


def boxes(*rows):
    return np.array(rows, np.float32).reshape(-1, 4)


def test_boxes_by_hand():
    view = View(2.0, (-10.0, 5.0), False, (100, 200))
    moved, kinds = view.people(boxes([10, 10, 30, 40]), PEOPLE)
    assert moved.tolist() == [[10, 25, 50, 85]]
    assert kinds.tolist() == [PERSON]
    mirrored, _ = View(2.0, (-10.0, 5.0), True, (100, 200)).people(boxes([10, 10, 30, 40]), PEOPLE)
    assert mirrored.tolist() == [[150, 25, 190, 85]]


@pytest.mark.parametrize(
    ("box", "expected", "kind"),
    [
        ([-70, 20, 30, 60], [0, 20, 30, 60], PERSON),  # 0.3 of it inside
        ([-80, 20, 20, 60], [0, 20, 20, 60], IGNORED),  # 0.2
        ([20, 20, 30, 27], [20, 20, 30, 27], IGNORED),  # 7 pixels high
        ([20, 90, 30, 120], [20, 90, 30, 100], PERSON),
    ],
)
def test_people_cut_off_or_tiny_are_ignored(box, expected, kind):
    moved, kinds = View(1.0, (0.0, 0.0), False, (100, 200)).people(boxes(box), PEOPLE)
    assert moved.tolist() == [expected]
    assert kinds.tolist() == [kind]


def test_who_is_outside_is_gone():
    outside = boxes([200, 0, 230, 50], [0, -9, 9, 0])
    moved, kinds = View(1.0, (0.0, 0.0), False, (100, 200)).people(outside, PEOPLE[[0, 0]])
    assert moved.shape == (0, 4)
    assert kinds.shape == (0,)


def test_ignored_stays_ignored():
    _, kinds = View(1.0, (0.0, 0.0), False, (100, 200)).people(boxes([0, 0, 50, 50]), np.array([IGNORED], np.int8))
    assert kinds.tolist() == [IGNORED]


@pytest.mark.parametrize("draw", [draw_view, covering_view])
def test_pixels_and_boxes_move_alike(draw):
    pixels = np.full((150, 250, 3), 40, np.uint8)
    pixels[60:100, 90:120] = 250
    frame, box = Image.fromarray(pixels), boxes([90, 60, 120, 100])
    seen = 0
    for seed in range(40):
        view = draw((150, 250), (96, 128), np.random.default_rng(seed))
        shown = view.image(frame)
        assert shown.shape == (96, 128, 3)
        moved, _ = view.people(box, PEOPLE)
        rows, columns = np.nonzero(shown[..., 0] > 145)
        if len(moved) and len(rows):
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(moved[0] - found).max() <= 1.01
            seen += 1
    assert seen >= 15


def test_what_the_frame_does_not_reach_is_grey():
    shown = View(0.5, (10.0, 4.0), False, (64, 64)).image(Image.new("RGB", (40, 40), (200, 0, 0)))
    inside = np.zeros((64, 64), bool)
    inside[4:24, 10:30] = True
    assert (shown[inside] == (200, 0, 0)).all()
    assert (shown[~inside] == GREY).all()


def test_a_frame_that_lies_outside_leaves_grey():
    shown = View(1.0, (70.0, 0.0), False, (64, 64)).image(Image.new("RGB", (40, 40)))
    assert (shown == GREY).all()


def test_scales_are_0_4_to_2_of_fitting():
    scales = [draw_view((480, 640), (384, 512), np.random.default_rng(seed)).scale / 0.8 for seed in range(200)]
    assert 0.4 <= min(scales) < 0.45
    assert 1.8 < max(scales) <= 2.0


def test_covering_views_leave_no_grey():
    frame = Image.new("RGB", (50, 90), (1, 2, 3))
    for seed in range(20):
        assert (covering_view((90, 50), (96, 128), np.random.default_rng(seed)).image(frame) == (1, 2, 3)).all()
