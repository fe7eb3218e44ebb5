import numpy as np
import pytest

from dpal_edge.tasks.letterbox import GREY, fit, letterbox, to_frame, to_input


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ((480, 640), (384, 512)),  # the same proportions
        ((720, 1280), (288, 512)),  # wide: grey below
        ((640, 480), (384, 288)),  # tall: grey at the right
        ((96, 128), (384, 512)),  # small frames are enlarged
        ((1, 5000), (1, 512)),  # never nothing
    ],
)
def test_fit(frame, expected):
    assert fit(frame, (384, 512)) == expected


def test_letterbox_puts_the_frame_at_the_top_left():
    pixels = np.full((100, 400, 3), 200, np.uint8)
    padded = letterbox(pixels, (32, 64))  # 16 x 64 of it
    assert padded.shape == (32, 64, 3)
    assert (padded[:16] == 200).all()
    assert (padded[16:] == GREY).all()


def test_letterbox_averages_where_it_shrinks():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    inner = letterbox(stripes, (8, 8))[:, 1:-1]
    assert abs(inner.astype(int) - 100).max() <= 2


def test_boxes_go_there_and_back():
    frame, size = (719, 1279), (384, 512)
    boxes = np.array([[0, 0, 1279, 719], [100, 50, 160, 230]], np.float32)
    inside = to_input(boxes, frame, size)
    assert inside[0].tolist() == pytest.approx([0, 0, 512, 288])
    np.testing.assert_allclose(to_frame(inside, frame, size), boxes, rtol=1e-5)


def test_boxes_are_clipped_to_the_frame():
    found = to_frame(np.array([[-5, -5, 600, 400]], np.float32), (480, 640), (384, 512))
    assert found.tolist() == [[0, 0, 640, 480]]


def test_no_boxes():
    assert to_frame(np.zeros((0, 4), np.float32), (480, 640), (384, 512)).shape == (0, 4)
