import json
import sys

import numpy as np
import pytest

from dpal_edge.errors import BackendUnavailable
from dpal_edge.runtime import Person
from dpal_edge.runtime.converters import to_coco, to_supervision

JOINTS = np.array([[11.0, 22.0, 0.5], [12.0, 23.0, 0.25]], np.float32)
PEOPLE = [
    Person((10.0, 20.0, 40.0, 90.0), 0.75, 3, embedding=np.array([1.0, 0.0], np.float32), keypoints=JOINTS),
    Person((0.5, 0.0, 8.0, 16.0), 0.5, None, embedding=np.array([0.0, 1.0], np.float32), keypoints=JOINTS + 1),
]


def test_coco():
    results = to_coco(PEOPLE, 7)
    assert results[0] == {
        "image_id": 7,
        "category_id": 1,
        "bbox": [10.0, 20.0, 30.0, 70.0],
        "score": 0.75,
        "keypoints": [11.0, 22.0, 0.5, 12.0, 23.0, 0.25],
    }
    assert "keypoints" not in to_coco([Person((0.0, 0.0, 1.0, 1.0), 0.5, 1)], 7)[0]
    json.dumps(results, allow_nan=False)


def test_supervision():
    pytest.importorskip("supervision")
    detections = to_supervision(PEOPLE)
    np.testing.assert_allclose(detections.xyxy, [[10, 20, 40, 90], [0.5, 0, 8, 16]])
    assert detections.tracker_id.tolist() == [3, -1]
    assert detections.data["keypoints"].shape == (2, 2, 3)
    assert detections[detections.confidence > 0.6].data["embedding"].tolist() == [[1, 0]]
    assert len(to_supervision([])) == 0


def test_supervision_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(BackendUnavailable, match=r"supervision cannot be imported .*pip install supervision"):
        to_supervision(PEOPLE)
