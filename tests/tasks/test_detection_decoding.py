import numpy as np
import pytest
import torch
from torchvision.ops import nms

from dpal_edge.tasks.detection_decoding import decode_people, suppress


def logit(score):
    return np.log(score / (1 - score))


def test_decode_by_hand():
    raw = np.array(
        [
            [0, 0, 10, 20, logit(0.6)],
            [100, 0, 110, 20, logit(0.7)],
            [1, 0, 11, 20, logit(0.9)],  # shares 9/11 with the first
            [50, 50, 60, 70, logit(0.2)],
        ],
        np.float32,
    )
    boxes, scores = decode_people(raw, threshold=0.3, iou=0.6)
    assert boxes.tolist() == [[1, 0, 11, 20], [100, 0, 110, 20]]
    assert scores == pytest.approx([0.9, 0.7])
    assert len(decode_people(raw, threshold=0.3, iou=0.85)[0]) == 3  # 9/11 is 0.818
    assert len(decode_people(raw, threshold=0.1, iou=0.6)[0]) == 3


def test_nobody():
    boxes, scores = decode_people(np.full((5, 5), -9, np.float32), threshold=0.3, iou=0.6)
    assert boxes.shape == (0, 4)
    assert scores.shape == (0,)
    assert boxes.dtype == scores.dtype == np.float32


def test_what_a_dropped_box_overlaps_stays():
    boxes = np.array([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]], np.float32)  # a chain: 6/14 each
    assert suppress(boxes, 0.4).tolist() == [0, 2]


def test_boxes_without_area_hide_nothing():
    boxes = np.array([[5, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10], [9, 9, 1, 1]], np.float32)
    assert suppress(boxes, 0.5).tolist() == [0, 1, 2, 3]


def test_suppress_agrees_with_torchvision():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (400, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 30, (400, 2))], axis=1).astype(np.float32)
    scores = torch.arange(400, 0, -1.0)
    for iou in (0.3, 0.5, 0.7):
        assert suppress(boxes, iou).tolist() == nms(torch.from_numpy(boxes), scores, iou).tolist()
