"""The demo's parts on the real clips; `make demo` runs the whole."""

from itertools import islice

import cv2
import numpy as np
import pytest

from dpal_edge.demo import steps
from dpal_edge.demo.footage import NEW_PEOPLE, ROOM_CLIP, TABLE_CLIP, EmptyRoomDetector, cut_people, empty_room
from dpal_edge.errors import ConfigError
from dpal_edge.runtime.video import Video


def test_empty_room_detector_finds_the_people_and_nobody_in_an_empty_room():
    detector = EmptyRoomDetector(empty_room(ROOM_CLIP))
    with Video(ROOM_CLIP) as clip:
        frames = list(islice(clip, 46))
    assert len(detector(frames[5]).scores) == 0
    [box] = detector(frames[45]).boxes  # one woman, walking; her box was looked at
    assert box == pytest.approx([428, 78, 520, 290], abs=25)


def test_cut_people_writes_crops_of_the_chosen_frames(tmp_path):
    count = cut_people(TABLE_CLIP, tmp_path, first=80, last=100, every=10)
    files = sorted(tmp_path.iterdir())
    assert count == len(files) == 2
    assert [file.name.split("-")[-2] for file in files] == ["00080", "00090"]
    height, width = cv2.imread(str(files[0])).shape[:2]
    assert 1.3 < height / width < 5


def test_training_never_sees_the_new_people():
    with Video(ROOM_CLIP) as clip:
        detector = EmptyRoomDetector(empty_room(ROOM_CLIP))
        before = [len(detector(frame).scores) for frame in islice(clip, 300, NEW_PEOPLE)]
    assert not any(before)  # the room is empty between those seen in training and the new ones


def test_rank_agreement_by_hand():
    points = np.array([[0.0, 1.0], [1.0, 0.0], [0.9, 0.3], [-1.0, -1.0]], np.float32)
    assert steps.rank_agreement(points, points) == pytest.approx(1)
    turned = points @ np.array([[0, 1], [-1, 0]], np.float32)  # a rotation keeps every similarity
    assert steps.rank_agreement(points, 3 * turned) == pytest.approx(1)


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="no earlier demo"):
        steps.run_demo(tmp_path, updates=2, say=print)
    assert (tmp_path / "precious.txt").read_text() == "keep me"
