import numpy as np
import pytest

from dpal_edge.runtime.boxes import iou
from dpal_edge.runtime.preprocess import crop_people, letterbox_frame, pixel_boxes

pytest.importorskip("cv2")


def test_iou_by_hand():
    a = np.array([[0, 0, 4, 4], [0, 0, 0, 0]], np.float32)
    b = np.array([[2, 0, 6, 4], [10, 10, 12, 12]], np.float32)
    # 2 x 4 shared of 16 + 16 - 8; nothing shared; a box without area overlaps nothing
    np.testing.assert_allclose(iou(a, b), [[8 / 24, 0], [0, 0]])


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ((1.4, 2.6, 5.4, 7.6), (1, 3, 5, 8)),  # rounded
        ((-3, -2, 4, 5), (0, 0, 4, 5)),  # clipped at the top left
        ((6, 5, 30, 40), (6, 5, 10, 8)),  # clipped at the bottom right
        ((3.2, 3.2, 3.3, 3.3), (3, 3, 4, 4)),  # thinner than a pixel
        ((50, -20, 60, -10), (9, 0, 10, 1)),  # wholly outside: the nearest pixel
        ((6, 5, 2, 1), (6, 5, 7, 6)),  # inside out
    ],
)
def test_pixel_boxes_by_hand(box, pixels):
    assert pixel_boxes(np.array([box], np.float32), (8, 10, 3)).tolist() == [list(pixels)]


def test_a_crop_of_the_output_size_is_a_copy_in_rgb():
    frame = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    crops = crop_people(frame, np.array([[1, 2, 5, 8]], np.float32), (6, 4))
    assert crops.flags.c_contiguous
    np.testing.assert_array_equal(crops[0], frame[2:8, 1:5, ::-1])


def test_shrinking_averages_areas():
    frame = np.zeros((4, 4, 3), np.uint8)
    frame[:2, :2, 0] = [[0, 100], [200, 100]]  # blue, mean 100
    crop = crop_people(frame, np.array([[0, 0, 4, 4]], np.float32), (2, 2))[0]
    assert crop[..., 2].tolist() == [[100, 0], [0, 0]]


def test_enlarging_interpolates_linearly():
    frame = np.zeros((1, 2, 3), np.uint8)
    frame[0, 1] = 100
    crop = crop_people(frame, np.array([[0, 0, 2, 1]], np.float32), (1, 4))[0]
    assert crop[0, :, 0].tolist() == [0, 25, 75, 100]  # centres at -0.25, 0.25, 0.75, 1.25 of the two pixels


def test_no_boxes_give_an_empty_batch():
    crops = crop_people(np.zeros((8, 10, 3), np.uint8), np.empty((0, 4), np.float32), (6, 4))
    assert crops.shape == (0, 6, 4, 3)
    assert crops.dtype == np.uint8


def test_a_letterboxed_frame_is_rgb_at_the_top_left_of_grey():
    frame = np.zeros((4, 4, 3), np.uint8)
    frame[:2, :2, 0] = [[0, 100], [200, 100]]  # blue, mean 100
    image = letterbox_frame(frame, (2, 3))
    assert image[:, :2, 2].tolist() == [[100, 0], [0, 0]]
    assert (image[:, 2] == 114).all()
    larger = letterbox_frame(frame, (8, 9))  # twice as large, and one column of grey
    assert larger.shape == (8, 9, 3)
    assert (larger[:, 8] == 114).all()
    assert (larger[:, 5:8] == 0).all()
    same = letterbox_frame(frame, (4, 4))
    np.testing.assert_array_equal(same, frame[..., ::-1])
