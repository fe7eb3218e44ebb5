"""COCO's keypoint layout, and the metrics of pose: PCK, PCKh and OKS."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.aic import AIC_JOINTS
from dpal_edge.tasks.labels import flip_pairs
from dpal_edge.tasks.mpii import MPII_JOINTS
from dpal_edge.tasks.oks import oks_sigmas
from dpal_edge.tasks.pose import Pose, oks_ap, pck, pckh, pose_metrics, read_coco_keypoints
from dpal_edge.tasks.pose_layouts import COCO_JOINTS, CROWDPOSE_JOINTS
from tests.tasks.layouts import JOINTS, SIZE, write_coco
from tests.tasks.pose_fixtures import pose_split, random_people

NAN = float("nan")
# One annotation of the twelve in the file is wrong, which is more than is read without.
TOO_MANY = ".*more than 5 % are bad, so nothing is read"


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
    assert split.protocol == "coco"
    assert split.problems == ()
    assert split.samples[0].target.labelled.tolist() == [False] + [True] * 4


def _bad_annotations():
    """Changes of one annotation, or one image, and what must be said of it."""
    return [
        (
            lambda d: d["annotations"][0].update(keypoints=[1, 2]),
            "annotation 0: ValueError.*expected id, bbox, 5 times",
        ),
        (lambda d: d["annotations"][1].update(keypoints=[NAN] * 15), "annotation 1: a keypoint .* not finite"),
        (lambda d: d["annotations"][1].update(keypoints=[1e300] * 15), "annotation 1: a keypoint .* not finite"),
        (lambda d: d["annotations"][1].update(area=float("inf")), "annotation 1: a keypoint or the area is not finite"),
        (lambda d: d["annotations"][1].update(area=-3), "annotation 1: its area is -3; expected pixels"),
        (
            lambda d: d["annotations"][1].update(bbox=[99, 0, 9, 9]),
            r"annotation 1: its box \[99, 0, 9, 9\] covers nothing of an image of 32x32",
        ),
        (lambda d: d["annotations"][1].update(bbox=[0, 0, NAN, 9]), "annotation 1: its box .* covers nothing"),
        (
            lambda d: d["annotations"][1].update(image_id=77),
            "annotation 1: KeyError: 77; expected .* the id of an image",
        ),
        (
            lambda d: d["annotations"][1].update(bbox=[], area=0),
            "annotation 1: ValueError: a box of 0 numbers; expected id, bbox, 5 times",
        ),
        (
            lambda d: d["annotations"][1].update(category_id=9),
            r"annotation 1: unknown category_id 9; expected 1 \(person\)$",
        ),
        (
            lambda d: d["annotations"][1]["keypoints"].__setitem__(slice(3), [99, 3, 2]),
            r"annotation 1: its joint at 99\.5, 3\.5 is far outside an image of 32x32; correct it$",
        ),
        (lambda d: d["annotations"][1].update(id=0), "annotation 0: another has the same id"),
        (lambda d: d["annotations"][1].pop("id"), "annotation number 2 of the list: KeyError: 'id'"),
        (lambda d: d["annotations"].__setitem__(1, None), "annotation number 2 of the list: TypeError"),
    ]


@pytest.mark.parametrize(("change", "message"), _bad_annotations())
def test_reader_refuses_too_many_bad_annotations_and_names_the_first(tmp_path, change, message):
    folder = write_coco(tmp_path)
    _edit(folder, change)
    with pytest.raises(DataError, match=r"person_keypoints_val\.json: " + message.rstrip("$") + TOO_MANY):
        read_coco_keypoints(folder, "val")


@pytest.mark.parametrize(("change", "message"), _bad_annotations())
def test_reader_counts_few_bad_annotations_and_leaves_them_out(tmp_path, change, message):
    folder = write_coco(tmp_path, people=24)
    _edit(folder, change)
    split = read_coco_keypoints(folder, "val")
    assert len(split.samples) == 23
    assert len(split.problems) == 1
    assert re.search(r"person_keypoints_val\.json: " + message, split.problems[0])


def test_reader_counts_every_person_of_a_bad_image(tmp_path):
    folder = write_coco(tmp_path, people=40)
    _edit(folder, lambda d: d["images"][2].update(file_name="gone.png"))
    split = read_coco_keypoints(folder, "val")
    assert [problem.rpartition(": ")[2] for problem in split.problems] == [
        f"no image {folder / 'val' / 'gone.png'}; expected the images of the file there"
    ] * 2
    assert [problem.split(": ")[1] for problem in split.problems] == ["annotation 20", "annotation 21"]
    _edit(folder, lambda d: d["images"][2].pop("width"))
    with pytest.raises(
        DataError, match=r"image 2: KeyError: 'width'; expected id, file_name, width and height \(and 2 mo"
    ):
        read_coco_keypoints(folder, "val")


def test_reader_counts_bad_images(tmp_path):
    folder = write_coco(tmp_path, people=60)
    _edit(folder, lambda d: d["images"].append({**d["images"][0], "file_name": "other.png"}))
    _edit(folder, lambda d: d["images"].append({**d["images"][0], "id": 99, "width": 0}))
    first, second = read_coco_keypoints(folder, "val").problems
    assert first.endswith("image 0: another has the same id; expected one per image")
    assert second.endswith("image 99: it is 0 wide and 32 high; expected pixels")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["categories"][0].pop("keypoints"),
            "not keypoint annotations, no category names its keypoints; exp",
        ),
        (lambda d: d.pop("images"), "not in COCO's format, it has no list 'images'; expected the COCO layout"),
        (lambda d: d.update(annotations=7), "not in COCO's format, it has no list 'annotations'"),
        (lambda d: d["annotations"].clear(), "no person with a labelled joint"),
    ],
)
def test_reader_refuses_another_format(tmp_path, change, message):
    folder = write_coco(tmp_path)
    _edit(folder, change)
    with pytest.raises(DataError, match=message):
        read_coco_keypoints(folder, "val")


def test_area_is_half_the_box_where_it_is_not_annotated(tmp_path):
    folder = write_coco(tmp_path)
    _edit(folder, lambda d: (d["annotations"][0].pop("area"), d["annotations"][1].update(area=0)))
    split = read_coco_keypoints(folder, "val")
    box = SIZE[1] * (SIZE[0] + 1)
    assert [sample.target.area for sample in split.samples[:3]] == pytest.approx([0.53 * box, 0.53 * box, box / 2 - 8])


def test_images_may_lie_one_folder_deeper(tmp_path):
    folder = write_coco(tmp_path, year="2017")
    (folder / "images").mkdir()
    (folder / "val2017").rename(folder / "images" / "val2017")
    assert read_coco_keypoints(folder, "val").samples[0].image.parent == folder / "images" / "val2017"


def test_reader_says_which_files_it_wants(tmp_path):
    folder = write_coco(tmp_path)
    (folder / "val").rename(folder / "images")
    with pytest.raises(DataError, match=r"val: missing; expected the COCO layout: annotations/person_keypoints_val"):
        read_coco_keypoints(folder, "val")
    (folder / "annotations" / "person_keypoints_val.json").write_text("[" * 100_000)
    (folder / "images").rename(folder / "val")
    with pytest.raises(DataError, match=r"not JSON \(RecursionError.*expected the COCO layout"):
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


def test_pckh_by_hand():
    # Heads are 10 and 20 pixels, so joints within 5 and 10 are found; pelvis and thorax do not count.
    truth = np.zeros((3, 16, 2))
    people = [
        Pose(i, i, truth[i].astype(np.float32), np.arange(16) < 10, 1.0, head_size=size)
        for i, size in enumerate((10.0, 20.0, NAN))
    ]
    predicted = truth.astype(np.float32).copy()
    predicted[:, [0, 1], 0] = 5, 5.01
    predicted[:, [6, 7, 12]] = 99
    predicted[2] = 99  # of an unknown head: not counted
    assert pckh(predicted, people, MPII_JOINTS) == pytest.approx((7 + 8) / 16)
    assert pckh(predicted, people, MPII_JOINTS, ratio=0.1) == pytest.approx((6 + 6) / 16)
    metrics = pose_metrics(predicted, np.ones(3), pose_split(people, MPII_JOINTS, "mpii"))
    assert list(metrics) == ["PCKh@0.5", "PCKh@0.1", "PCK@0.2"]
    assert metrics["PCKh@0.5"] == pytest.approx(15 / 16)
    assert math.isnan(metrics["PCK@0.2"])  # nobody's left shoulder is labelled
    assert math.isnan(pckh(predicted[2:], people[2:], MPII_JOINTS))


def test_metrics_of_own_joints():
    joints = [[0, 0], [0, 10]]
    people = [_pose(joints, [1, 1])]
    found = np.array([joints], np.float32)
    metrics = pose_metrics(found, np.ones(1), pose_split(people, ("left_shoulder", "right_hip"), "coco"))
    assert metrics == pytest.approx(dict.fromkeys(["OKS_AP", "OKS_AP50", "OKS_AP75", "OKS_AR", "PCK@0.2"], 1.0))
    with pytest.raises(DataError, match=r"no metric is defined for the joints tail, fin: OKS AP needs COCO's names"):
        pose_metrics(found, np.ones(1), pose_split(people, ("tail", "fin"), "coco"))


def test_deviations_are_those_of_coco_and_crowdpose():
    coco = [26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]
    np.testing.assert_allclose(oks_sigmas(COCO_JOINTS) * 1000, coco)
    np.testing.assert_allclose(oks_sigmas(("neck", "head_top")), 0.079)
    with pytest.raises(DataError, match="no OKS deviation is known for the joint 'tail'"):
        oks_sigmas(("left_hip", "tail"))
    crowdpose = [79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89, 79, 79]
    np.testing.assert_allclose(oks_sigmas(CROWDPOSE_JOINTS, "crowdpose") * 1000, crowdpose)
    assert oks_sigmas(("left_wrist", "right_wrist"), "aic").tolist() == [0.01402144, 0.01057665]
    with pytest.raises(DataError, match="no OKS deviation is known for the joint 'nose'"):
        oks_sigmas(("nose",), "aic")


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


# What pycocotools 2.0.11 gives on the same people, with the same deviations of annotators.
REFERENCE = {
    "coco": (0.2577969153728021, 0.4317776090165098, 0.2503754585295049, 0.2775),
    "aic": (0.5623791608686374, 0.8988813715741792, 0.5115746797260611, 0.589),
    "crowdpose": (0.38893589195226225, 0.6386944590691354, 0.346633195619096, 0.415),
}
CROWDS = {"easy": 0.39250825082508245, "medium": 0.40252703905936693, "hard": 0.35636865168663173}


@pytest.mark.parametrize(
    ("protocol", "names"), [("coco", COCO_JOINTS), ("aic", AIC_JOINTS), ("crowdpose", CROWDPOSE_JOINTS)]
)
def test_oks_metrics_are_those_of_pycocotools(protocol, names):
    found, scores, people = random_people(len(names))
    if protocol == "aic":  # far stricter
        truth = np.stack([person.joints for person in people])
        found = (truth + 0.15 * (found - truth)).astype(np.float32)
    metrics = pose_metrics(found, scores, pose_split(people, names, protocol))
    names = ("OKS_AP", "OKS_AP50", "OKS_AP75", "OKS_AR")
    assert [metrics.pop(name) for name in names] == pytest.approx(REFERENCE[protocol])
    assert 0 < metrics.pop("PCK@0.2") < 1
    assert metrics == pytest.approx({f"OKS_AP_{k}": v for k, v in CROWDS.items()} if protocol == "crowdpose" else {})


def test_crowds_without_images_have_no_precision():
    found, scores, people = random_people(14, count=8)
    people = [replace(person, crowd_index=index) for person, index in zip(people, [0.1] * 4 + [0.8] * 4, strict=True)]
    metrics = pose_metrics(found, scores, pose_split(people, CROWDPOSE_JOINTS, "crowdpose"))
    assert math.isnan(metrics["OKS_AP_easy"])
    assert metrics["OKS_AP_medium"] == pytest.approx(oks_ap(found[:4], scores[:4], people[:4], CROWDPOSE_JOINTS)["AP"])


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
