from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import write_bundle, write_detector_bundle

import dpal_edge
from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.runtime import Detections, HogDetector, ModelDetector
from dpal_edge.runtime.boxes import iou
from dpal_edge.runtime.detector import DefaultDetector
from dpal_edge.runtime.video import Video

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


@pytest.fixture
def detector(tmp_path):
    pytest.importorskip("onnxruntime")
    return write_detector_bundle(tmp_path / "detector")


def halves(size, left, right):
    frame = np.zeros((*size, 3), np.uint8)
    frame[:, : size[1] // 2], frame[:, size[1] // 2 :] = left, right
    return frame


def test_boxes_come_back_in_pixels_of_the_frame(detector):
    find = ModelDetector.open(detector)
    found = find(halves((32, 64), left=255, right=130))  # a quarter of it is the input's 8 x 16
    assert found.boxes.tolist() == [[4, 4, 28, 28], [36, 4, 60, 28]]
    assert found.scores.tolist() == pytest.approx([1, 1 / (1 + np.exp(-2))])  # logits 127 and 2
    assert find(halves((32, 64), left=0, right=130)).boxes.tolist() == [[36, 4, 60, 28]]
    assert find(halves((32, 64), left=0, right=0)).boxes.shape == (0, 4)


def test_the_frame_keeps_its_proportions(detector):
    # Half of 16 x 16 fills the input's left half; the grey of the right one, 114, is no person.
    found = ModelDetector.open(detector)(np.full((16, 16, 3), 255, np.uint8))
    assert found.boxes.tolist() == [[2, 2, 14, 14]]
    # A small frame is enlarged four times; the second box lies on the grey and is not found.
    found = ModelDetector.open(detector)(np.full((2, 2, 3), 255, np.uint8))
    assert found.boxes.tolist() == [[0.25, 0.25, 1.75, 1.75]]


def test_boxes_are_clipped_to_the_frame(detector):
    found = ModelDetector.open(detector, threshold=0.0)(np.full((8, 8, 3), 255, np.uint8))
    assert found.boxes.tolist() == [[1, 1, 7, 7], [8, 1, 8, 7]]


def test_threshold(detector):
    frame = halves((32, 64), left=255, right=130)
    assert len(ModelDetector.open(detector, threshold=0.9)(frame).boxes) == 1
    for wrong in ({"threshold": 1.5}, {"iou": 0.0}):
        with pytest.raises(ConfigError, match=r"threshold .* and iou .* found, expected both in 0\.\.1"):
            ModelDetector.open(detector, **wrong)


def test_frames_that_are_none(detector):
    find = ModelDetector.open(detector)
    with pytest.raises(ValueError, match=r"frame has shape \(4, 4\), expected \(H, W, 3\)"):
        find(np.zeros((4, 4), np.uint8))
    find.close()
    with pytest.raises(ValueError, match="the model is closed"):
        find(np.zeros((4, 4, 3), np.uint8))


def test_a_model_of_people_is_no_detector(tmp_path):
    pytest.importorskip("onnxruntime")
    text = r"not a detector's bundle: its heads are embedding \(5,\), expected one for detection of shape \(any, 5\)"
    with pytest.raises(ModelFileError, match=text):
        ModelDetector.open(write_bundle(tmp_path / "bundle"))


def test_detections_must_be_consistent():
    with pytest.raises(ValueError, match=r"boxes \(2, 4\) and scores \(3,\) found, expected \(n, 4\) and \(n,\)"):
        Detections(np.zeros((2, 4), np.float32), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="infinite or not a number"):
        Detections(np.full((1, 4), np.nan, np.float32), np.zeros(1, np.float32))


def test_a_frame_goes_to_the_input_that_it_fills_best(tmp_path):
    tall, wide = (
        write_detector_bundle(tmp_path / name, size=size) for name, size in (("a", (48, 64)), ("b", (36, 64)))
    )
    opened = []

    def load(bundle):
        opened.append(bundle)
        return ModelDetector.open(bundle)

    find = DefaultDetector(load, (tall, wide))
    assert opened == []  # until a frame comes
    for shape, bundle in ((480, 640), tall), ((432, 768), wide), ((640, 480), tall), ((1080, 1920), wide):
        frame = np.zeros((*shape, 3), np.uint8)
        expected = ModelDetector.open(bundle)(frame)
        found = find(frame)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert opened == [tall, wide]  # once each
    frames = [np.full((rows, 64, 3), shade, np.uint8) for rows, shade in ((48, 255), (36, 0), (48, 130))]
    together = find.detect(frames)
    assert [len(found.scores) for found in together] == [2, 0, 2]
    for frame, found in zip(frames, together, strict=True):
        np.testing.assert_array_equal(found.boxes, find(frame).boxes)
    with pytest.raises(ValueError, match="frame has shape"):
        find(np.zeros((4, 4), np.uint8))
