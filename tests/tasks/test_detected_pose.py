"""Pose in the boxes of a published detector."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.detected_pose import Detection, detected_pose_metrics, read_detected_people
from dpal_edge.tasks.pose import pose_metrics, read_coco_keypoints
from tests.tasks.layouts import write_coco
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
        (_box(box=[0, 0, 5]), "box number 2 of the list: ValueError: a box of 3 numbers; expected image_id"),
        (_box(score=float("nan")), "box number 2 of the list: its score is nan; expected 0 to 1"),
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
    for boxes in ([], [_box(category=2)]):
        with pytest.raises(DataError, match=r"person\.json: no box of a person, category_id 1; expected person_detec"):
            read_detected_people(_detect(folder, boxes))
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
    edit_json(path, lambda d: [image.update(width=400, height=400) for image in d["images"]])
    boxes = [_box(score=score) for score in (0.5, 0.4, 0.9, 0.8)]
    split = read_detected_people(_detect(folder, boxes))
    joints = np.array([np.reshape(person["keypoints"], (5, 3))[:, :2] + 0.5 for person in people[:2]], np.float32)
    # The two people; the first again, with a lower score; and somebody where nobody's joints are labelled.
    found = np.stack([*joints, joints[0] + 0.1, joints[0] + 200])
    confidence = np.array([[0.9] * 5, [0.9] * 5, [0.3] * 5, [0.9] * 5])
    metrics = detected_pose_metrics(found, confidence, split.samples, split, folder)
    assert metrics == pytest.approx(dict.fromkeys(["OKS_AP", "OKS_AP50", "OKS_AP75", "OKS_AR"], 1.0))
    # Away from everything the last one, the best by far, is a false alarm: precision 1/2 and 2/3 become 2/3 at most.
    found[3] += 300
    assert detected_pose_metrics(found, confidence, split.samples, split, folder)["OKS_AP50"] == pytest.approx(2 / 3)
    assert split.samples[0].box == (0, 1, 16, 21)


def test_metrics_are_those_of_pycocotools(tmp_path):
    joints, confidence = write_detected_people(tmp_path)
    split = read_detected_people(tmp_path)
    metrics = detected_pose_metrics(joints + 0.5, confidence, split.samples, split, tmp_path)
    # What pycocotools 2.0.11 gives on the same annotations and the 132 people of 160 that are not suppressed.
    expected = [0.22332805006114517, 0.39135088859016676, 0.20071124343332564, 0.2875]
    assert list(metrics.values()) == pytest.approx(expected)


def test_metrics_need_named_keypoints(tmp_path):
    folder = _detect(write_coco(tmp_path, year="2017"), [_box()])
    split = read_detected_people(folder)
    edit_json(folder / "annotations" / "person_keypoints_val2017.json", lambda d: d["categories"][0].pop("keypoints"))
    with pytest.raises(DataError, match="no category names its keypoints"):
        detected_pose_metrics(np.zeros((1, 5, 2), np.float32), np.ones((1, 5)), split.samples, split, folder)


def _break(change):
    """Change the annotation of the second person, which every image has two of."""
    return lambda d: change(d["annotations"][1])


@pytest.mark.parametrize(
    "change",
    [
        _break(lambda person: person.pop("category_id")),
        _break(lambda person: person.update(category_id=9)),
        _break(lambda person: person.update(area="abc")),
        _break(lambda person: person.update(bbox=[1, 2])),
        _break(lambda person: person.update(keypoints=[0, 0, 1])),
        lambda d: d["annotations"].__setitem__(1, None),
        lambda d: d["annotations"].append(d["annotations"][0]),
        lambda d: d["images"].append({"file_name": "a.png"}),
        lambda d: d["images"][1].update(file_name="gone.png"),
    ],
)
def test_who_is_left_out_as_bad_is_not_missed(tmp_path, change):
    folder = write_coco(tmp_path, people=48, year="2017")
    edit_json(folder / "annotations" / "person_keypoints_val2017.json", change)
    annotated = read_coco_keypoints(folder, "val")
    assert annotated.problems
    good = [sample.target for sample in annotated.samples]
    split = read_detected_people(_detect(folder, [_box(image=pose.image_id) for pose in good]))
    found = np.stack([np.where(pose.labelled[:, None], pose.joints, 0) for pose in good])
    metrics = detected_pose_metrics(found, np.ones((len(good), 5)), split.samples, split, folder)
    assert metrics["OKS_AP"] == metrics["OKS_AR"] == 1


@pytest.mark.parametrize("least", [-7, 2**70])
def test_ids_may_be_any_numbers(tmp_path, least):
    folder = write_coco(tmp_path, year="2017")

    def move(document):
        for record in document["images"] + document["annotations"]:
            record["id"] += least
        for record in document["annotations"]:
            record["image_id"] += least

    edit_json(folder / "annotations" / "person_keypoints_val2017.json", move)
    annotated = read_coco_keypoints(folder, "val")
    poses = [sample.target for sample in annotated.samples]
    joints, ones = np.stack([pose.joints for pose in poses]), np.ones((len(poses), 5))
    assert pose_metrics(joints, ones[:, 0], annotated)["OKS_AP"] == 1
    split = read_detected_people(_detect(folder, [_box(image=pose.image_id) for pose in poses]))
    assert detected_pose_metrics(joints, ones, split.samples, split, folder)["OKS_AP"] == 1


def test_an_image_that_could_not_be_read_counts_neither_way(tmp_path):
    folder = write_coco(tmp_path, year="2017")
    poses = [sample.target for sample in read_coco_keypoints(folder, "val").samples]
    split = read_detected_people(_detect(folder, [_box(image=pose.image_id) for pose in poses]))
    kept = [i for i, pose in enumerate(poses) if pose.image_id != 2]
    joints, ones = np.stack([poses[i].joints for i in kept]), np.ones((len(kept), 5))
    samples = [split.samples[i] for i in kept]
    assert detected_pose_metrics(joints, ones, samples, split, folder)["OKS_AR"] == 1
    # A detector that finds nobody on an image misses who is there.
    seen = replace(split, samples=tuple(samples))
    assert detected_pose_metrics(joints, ones, samples, seen, folder)["OKS_AR"] == pytest.approx(10 / 12)
