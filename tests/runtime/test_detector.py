from pathlib import Path

import numpy as np
import pytest

import dpal_edge
from dpal_edge.errors import ConfigError
from dpal_edge.runtime import Detections, HogDetector, Video
from dpal_edge.runtime.boxes import iou

pytest.importorskip("cv2")

FRAME = 136
PERSON = (388, 14, 513, 394)  # read off the frame by eye


def test_hog_finds_the_person_in_the_shipped_clip():
    with Video(Path(dpal_edge.__file__).parent / "assets" / "one-by-one-person-detection.mp4") as clip:
        frame = next(frame for index, frame in enumerate(clip) if index == FRAME)
    found = HogDetector(min_height=256)(frame)
    assert len(found.boxes) == 1
    assert iou(found.boxes, np.array([PERSON], np.float32)).item() > 0.5
    assert 0 < found.scores[0] < 1
    again = HogDetector(min_height=256)(frame)
    np.testing.assert_array_equal(found.boxes, again.boxes)


@pytest.mark.parametrize("size", [(300, 200), (40, 30), (1, 1)])
def test_hog_finds_nobody_on_grey(size):
    found = HogDetector()(np.full((*size, 3), 128, np.uint8))
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == (0,)


def test_hog_parameters():
    with pytest.raises(ConfigError, match="min_height is 0, expected 32 or more pixels"):
        HogDetector(min_height=0)


def test_detections_must_be_consistent():
    with pytest.raises(ValueError, match=r"boxes \(2, 4\) and scores \(3,\) found, expected \(n, 4\) and \(n,\)"):
        Detections(np.zeros((2, 4), np.float32), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="infinite or not a number"):
        Detections(np.full((1, 4), np.nan, np.float32), np.zeros(1, np.float32))
