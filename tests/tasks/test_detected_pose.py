"""Pose in the boxes of a published detector."""

import json

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.detected_pose import Detection, detected_pose_metrics, read_detected_people
from tests.tasks.layouts import SIZE, write_coco
from tests.tasks.pose_fixtures import DETECTED, edit_json, write_detected_people


def _detect(folder, boxes):
    path = folder / DETECTED
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(boxes))
    return folder


def _box(image=0, category=1, box=(-3, 1, 19, 20), score=0.5):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def test_reader_takes_people_in_clipped_boxes(tmp_path):
    folder = _detect(write_coco(tmp_path, year="2017"), [_box(), _box(category=2), _box(image=2, score=0.25)])
    split = read_detected_people(folder)
    assert [sample.target for sample in split.samples] == [Detection(0, 0.5), Detection(2, 0.25)]
    assert split.samples[1].box == (0, 1, 16, 21)
    assert split.samples[1].image == folder / "val2017" / "000000000002.png"


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (_box(image=99), "box number 2 of the list: KeyError: 99; expected image_id, category_id, bbox and score"),
        (_box(box=[0, 0, -1, 5]), r"box number 2 of the list: its box \[0, 0, -1, 5\] covers nothing of an image"),
        (_box(image=3), r"box number 2 of the list: no image .*gone\.png"),
        ("box", "box number 2 of the list: TypeError"),
    ],
)
def test_reader_names_bad_boxes(tmp_path, box, message):
    folder = write_coco(tmp_path, year="2017")
    edit_json(
        folder / "annotations" / "person_keypoints_val2017.json", lambda d: d["images"][3].update(file_name="gone.png")
    )
    with pytest.raises(DataError, match=r"person\.json: " + message + ".*more than 5 % are bad"):
        read_detected_people(_detect(folder, [_box(), box]))
    split = read_detected_people(_detect(folder, [_box(), box, *[_box()] * 20]))
    assert (len(split.samples), len(split.problems)) == (21, 1)


def test_reader_says_what_it_wants(tmp_path):
    folder = write_coco(tmp_path, year="2017")
    with pytest.raises(DataError, match=r"person\.json: missing; expected person_detection_results/COCO_val2017_det"):
        read_detected_people(folder)
    with pytest.raises(DataError, match=r"person\.json: not a list; expected person_detection_results"):
        read_detected_people(_detect(folder, {}))
    (_detect(folder, []) / "annotations" / "person_keypoints_val2017.json").unlink()
    with pytest.raises(DataError, match=r"person_keypoints_val\.json: missing; expected the COCO layout"):
        read_detected_people(folder)


def test_doubles_crowds_and_people_without_joints_count_neither_way(tmp_path):
    folder = write_coco(tmp_path, people=2, year="2017")
    path = folder / "annotations" / "person_keypoints_val2017.json"
    people = json.loads(path.read_text())["annotations"]
    assert [person["id"] for person in people] == [0, 1, 900, 901]  # a crowd over the first person; one without joints
    for person, place in zip(people[2:], ([0, 0, 8, 8], [200, 200, 20, 20]), strict=True):
        person.update(bbox=place, keypoints=[0] * 15, num_keypoints=0)
    edit_json(path, lambda d: d.update(annotations=people))
    boxes = [_box(score=score) for score in (0.5, 0.4, 0.9, 0.8)]
    split = read_detected_people(_detect(folder, boxes))
    joints = np.array([np.reshape(person["keypoints"], (5, 3))[:, :2] + 0.5 for person in people[:2]], np.float32)
    # The two people; the first again, with a lower score; and somebody where nobody's joints are labelled.
    found = np.stack([*joints, joints[0] + 0.1, joints[0] + 200])
    confidence = np.array([[0.9] * 5, [0.9] * 5, [0.3] * 5, [0.9] * 5])
    metrics = detected_pose_metrics(found, confidence, split, folder)
    assert metrics == pytest.approx(dict.fromkeys(["OKS_AP", "OKS_AP50", "OKS_AP75", "OKS_AR"], 1.0))
    # Away from everything the last one, the best by far, is a false alarm: precision 1/2 and 2/3 become 2/3 at most.
    found[3] += 300
    assert detected_pose_metrics(found, confidence, split, folder)["OKS_AP50"] == pytest.approx(2 / 3)
    assert split.samples[0].box == (0, 1, SIZE[1], 21)


def test_metrics_are_those_of_pycocotools(tmp_path):
    joints, confidence = write_detected_people(tmp_path)
    metrics = detected_pose_metrics(joints + 0.5, confidence, read_detected_people(tmp_path), tmp_path)
    # What pycocotools 2.0.11 gives on the same annotations and the 132 people of 160 that are not suppressed.
    expected = [0.22332805006114517, 0.39135088859016676, 0.20071124343332564, 0.2875]
    assert list(metrics.values()) == pytest.approx(expected)


def test_metrics_need_named_keypoints(tmp_path):
    folder = _detect(write_coco(tmp_path, year="2017"), [_box()])
    split = read_detected_people(folder)
    edit_json(folder / "annotations" / "person_keypoints_val2017.json", lambda d: d["categories"][0].pop("keypoints"))
    with pytest.raises(DataError, match="no category names its keypoints"):
        detected_pose_metrics(np.zeros((1, 5, 2), np.float32), np.ones((1, 5)), split, folder)
