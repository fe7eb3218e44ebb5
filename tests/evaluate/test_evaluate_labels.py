"""Labels by name, and outputs for mirrored images."""

from pathlib import Path

import numpy as np
import pytest

from dpal_edge.errors import ConfigError
from dpal_edge.evaluate.labels import label_columns, mirror_back
from dpal_edge.evaluate.predictor import HeadInfo

HEAD = HeadInfo("pose", "simcc", ("nose", "left_hip", "right_hip"))


def test_labels_are_found_by_name():
    assert label_columns(("right_hip", "nose"), HEAD, Path("data")).tolist() == [2, 0]


def test_other_labels_are_refused():
    message = (
        r"^data: has neck, tail, which the model's pose head does not know \(it has besides: left_hip, right_hip\); "
        r"use data with the head's labels, or fine-tune on this set$"
    )
    with pytest.raises(ConfigError, match=message):
        label_columns(("neck", "nose", "tail"), HEAD, Path("data"))


def test_bins_of_x_are_reversed_and_joints_exchanged():
    raw = np.arange(18, dtype=np.float32).reshape(1, 3, 6)  # an input of 1x2 pixels: four bins of x, two of y
    assert mirror_back(raw, HEAD, (1, 2))[0].tolist() == [
        [3, 2, 1, 0, 4, 5],
        [15, 14, 13, 12, 16, 17],
        [9, 8, 7, 6, 10, 11],
    ]


@pytest.mark.parametrize(("task", "kind"), [("pose", "heatmap"), ("parsing", "linear")])
def test_maps_are_mirrored(task, kind):
    raw = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    found = mirror_back(raw, HeadInfo(task, kind, HEAD.labels), (8, 8))
    assert found[0].tolist() == [[[1, 0], [3, 2]], [[9, 8], [11, 10]], [[5, 4], [7, 6]]]


def test_rows_without_places():
    raw = np.array([[1, 2, 3]], np.float32)
    assert mirror_back(raw, HeadInfo("attributes", "query", HEAD.labels), (8, 8)).tolist() == [[1, 3, 2]]
    assert mirror_back(raw, HeadInfo("reid", "bnneck"), (8, 8)).tolist() == [[1, 2, 3]]
