"""COCO's keypoint layout, PCK and OKS."""

import json

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.labels import flip_pairs
from dpal_edge.tasks.pose import Pose, oks_ap, oks_sigmas, pck, read_coco_keypoints
from tests.tasks.layouts import JOINTS, SIZE, write_coco

PARTS = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
COCO_JOINTS = ("nose", *(f"{side}_{part}" for part in PARTS for side in ("left", "right")))


def _edit(folder, change):
    path = folder / "annotations" / "person_keypoints_val.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("year", ["", "2017"])
def test_reader_gives_people_in_their_boxes(tmp_path, year):
    split = read_coco_keypoints(write_coco(tmp_path, year=year), "val")
    assert split.labels == JOINTS
    assert flip_pairs(split.labels) == ((1, 2), (3, 4))
    assert len(split.samples) == 12  # without the crowd and the person without joints
    right = split.samples[1]
    assert right.image.parent.name == f"val{year}"
    assert right.box == (SIZE[1], 0, 2 * SIZE[1], SIZE[0])  # clipped at the top
    assert right.target.labelled.tolist() == [True] * 5  # the hidden one as well
    assert split.samples[0].target.labelled.tolist() == [False] + [True] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["annotations"][0].update(keypoints=[1, 2]),
            r"annotation 0: ValueError.*expected id, bbox, 5 times",
        ),
        (lambda d: d["annotations"][1].update(keypoints=[float("nan")] * 15), "annotation 1: a keypoint .* not finite"),
        (
            lambda d: d["annotations"][1].update(bbox=[99, 0, 9, 9]),
            r"annotation 1: its box \[99, 0, 9, 9\] covers nothing",
        ),
        (lambda d: d["annotations"][1].update(bbox=[0, 0, float("nan"), 9]), "annotation 1: its box .* covers nothing"),
        (
            lambda d: d["annotations"][1].update(image_id=77),
            "annotation 1: KeyError: 77; expected .* the id of an image",
        ),
        (lambda d: d["annotations"][1].update(id=0), "annotation 0: another has the same id"),
        (lambda d: d["images"][2].update(file_name="gone.png"), r"annotation 20: no image .*gone\.png"),
        (lambda d: d["images"][2].pop("width"), "not keypoint annotations .KeyError: 'width'"),
        (lambda d: d["categories"][0].pop("keypoints"), "not keypoint annotations .StopIteration"),
        (lambda d: d["annotations"].clear(), "no person with a labelled joint"),
    ],
)
def test_reader_names_what_is_wrong(tmp_path, change, message):
    folder = write_coco(tmp_path)
    _edit(folder, change)
    with pytest.raises(DataError, match=message):
        read_coco_keypoints(folder, "val")


def test_reader_says_which_files_it_wants(tmp_path):
    folder = write_coco(tmp_path)
    (folder / "val").rename(folder / "images")
    with pytest.raises(DataError, match=r"val: missing; expected the COCO layout: annotations/person_keypoints_val"):
        read_coco_keypoints(folder, "val")
    (folder / "annotations" / "person_keypoints_val.json").write_text("[" * 100_000)
    (folder / "images").rename(folder / "val")
    with pytest.raises(DataError, match="not keypoint annotations"):
        read_coco_keypoints(folder, "val")
    (folder / "annotations" / "person_keypoints_val.json").unlink()
    with pytest.raises(DataError, match=r"person_keypoints_val\.json: missing"):
        read_coco_keypoints(folder, "val")


def _pose(joints, labelled, number=0, area=100.0):
    return Pose(number, number, np.array(joints, np.float32), np.array(labelled, bool), area)


def test_pck_by_hand():
    # The torso is 10 long, so a joint within 2 is found.
    joints = [[0, 0], [0, 0], [5, 5], [9, 9], [0, 10]]
    people = [_pose(joints, [1, 1, 1, 0, 1]), _pose(joints, [1, 0, 1, 1, 1]), _pose(joints, [0, 1, 0, 0, 1])]
    predicted = np.array([joints] * 3, np.float32)
    predicted[0, 0, 0] += 2  # found
    predicted[0, 2, 0] += 2.01  # missed
    predicted[0, 3] += 50  # not labelled
    predicted[1] += 50  # a person without the left shoulder: not counted
    predicted[2, 1] += 50  # missed
    assert pck(predicted, people, JOINTS) == pytest.approx(4 / 6)
    assert pck(predicted, people, JOINTS, ratio=0.21) == pytest.approx(5 / 6)


def test_pck_is_undefined_without_a_torso():
    people = [_pose(np.zeros((5, 2)), [1, 0, 1, 1, 1])]
    with pytest.raises(DataError, match="none of 1 people has both left_shoulder and right_hip"):
        pck(np.zeros((1, 5, 2), np.float32), people, JOINTS)
    with pytest.raises(DataError, match="no right_hip among a, left_shoulder"):
        pck(np.zeros((1, 2, 2), np.float32), people, ("a", "left_shoulder"))


def test_deviations_are_those_of_coco_and_crowdpose():
    coco = [26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]
    np.testing.assert_allclose(oks_sigmas(COCO_JOINTS) * 1000, coco)
    np.testing.assert_allclose(oks_sigmas(("neck", "head_top")), 0.079)
    with pytest.raises(DataError, match="no OKS deviation is known for the joint 'tail'"):
        oks_sigmas(("left_hip", "tail"))


def test_oks_ap_by_hand(capfd):
    area = 400.0
    joints = np.array([[5, 5], [10, 10], [20, 10], [12, 30], [18, 30]], np.float32)
    people = [_pose(joints, [1] * 5, number, area) for number in range(4)]
    predicted = np.stack([joints] * 4)
    # A joint off by d has similarity exp(-d^2 / (2 area (2 sigma)^2)): this makes each of person 3's 0.72.
    away = np.sqrt(-np.log(0.72) * 2 * area * (2 * oks_sigmas(JOINTS)) ** 2)
    predicted[3, :, 0] += away
    predicted[2] += 1000  # person 2 is missed, with the lowest score
    scores = oks_ap(predicted, np.array([0.9, 0.8, 0.1, 0.7]), people, JOINTS)
    # At full precision: recall 3/4, 76 of 101 recall points, up to similarity .7; and 2/4, 51 of 101, from .75 on.
    high, low = 76 / 101, 51 / 101
    expected = {"AP": (high + low) / 2, "AP50": high, "AP75": low, "AR": (3 / 4 + 2 / 4) / 2}
    assert scores == pytest.approx(expected)
    assert capfd.readouterr() == ("", "")  # the caller's JSON goes there


def test_oks_ap_ignores_what_is_not_labelled():
    joints = np.array([[5, 5], [10, 10], [20, 10], [12, 30], [18, 30]], np.float32)
    person = _pose(joints, [0, 1, 1, 1, 1])
    predicted = joints[None].copy()
    predicted[0, 0] += 500
    assert oks_ap(predicted, np.ones(1), [person], JOINTS) == pytest.approx(
        dict.fromkeys(("AP", "AP50", "AP75", "AR"), 1.0)
    )


def test_reader_on_real_data(shared):
    split = read_coco_keypoints(shared / "data" / "lspet", "val")
    assert len(split.samples) == 1000
    assert len(split.labels) == 14
    assert len(flip_pairs(split.labels)) == 6
    assert len(oks_sigmas(split.labels)) == 14
    poses = [sample.target for sample in split.samples]
    truth = np.stack([pose.joints for pose in poses])
    assert pck(truth, poses, split.labels) == 1.0
    assert oks_ap(truth, np.ones(len(truth)), poses, split.labels)["AP"] == pytest.approx(1.0)
