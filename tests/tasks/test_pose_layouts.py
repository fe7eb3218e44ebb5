"""Pose data in the layouts it is published in."""

import math
from pathlib import Path

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.aic import AIC_JOINTS
from dpal_edge.tasks.labels import flip_pairs
from dpal_edge.tasks.mpii import MPII_JOINTS
from dpal_edge.tasks.pose_layouts import COCO_JOINTS, CROWDPOSE_JOINTS, read_pose
from tests.tasks.layouts import write_coco
from tests.tasks.pose_fixtures import (
    AIC_FOLDERS,
    BOX,
    PEOPLE,
    edit_json,
    joints_of,
    write_aic,
    write_aic_original,
    write_crowdpose,
    write_humanart,
    write_mpii,
    write_ochuman,
)

LEFT, TOP, WIDTH, HEIGHT = BOX


@pytest.mark.parametrize(
    ("write", "protocol", "names", "area"),
    [
        (write_aic, "aic", AIC_JOINTS, 0.53 * WIDTH * HEIGHT),
        (write_aic_original, "aic", AIC_JOINTS, 0.53 * WIDTH * HEIGHT),
        (write_crowdpose, "crowdpose", CROWDPOSE_JOINTS, 0.53 * WIDTH * HEIGHT),
        (write_ochuman, "ochuman", COCO_JOINTS, 300),
        (write_humanart, "humanart", COCO_JOINTS, 300),
    ],
)
def test_people_of_coco_like_layouts(tmp_path, write, protocol, names, area):
    folder = write(tmp_path / "HumanArt")
    split = read_pose(folder, "val")
    assert (split.protocol, split.labels, split.problems) == (protocol, names, ())
    assert len(flip_pairs(names)) == (len(names) - 1) // 2 if protocol in ("ochuman", "humanart") else 6
    assert len(split.samples) == PEOPLE
    for number, sample in enumerate(split.samples):
        assert sample.image.is_file()
        assert sample.box == (LEFT, TOP, LEFT + WIDTH, TOP + HEIGHT)
        np.testing.assert_allclose(sample.target.joints, joints_of(number, len(names)) + 0.5)
        assert sample.target.area == pytest.approx(area)
    assert [sample.target.labelled[0] for sample in split.samples] == [True, True, False, True]


def test_aic_train_has_its_own_folder_of_images(tmp_path):
    folder = write_aic(tmp_path, "train")
    assert read_pose(folder, "train").samples[0].image.parts[-3] == "ai_challenger_keypoint_train_20170902"
    with pytest.raises(
        DataError, match=r"no folder keypoint_validation_images_\* in it; expected the AI Challenger lay"
    ):
        read_pose(folder, "val")
    (folder / "val" / "keypoint_validation_images_20170911").mkdir(parents=True)
    with pytest.raises(DataError, match=r"annotations/aic_val\.json: missing; expected the AI Challenger layout"):
        read_pose(folder, "val")


def test_aic_is_read_in_the_folder_of_a_part_too_and_a_conversion_first(tmp_path):
    folder = write_aic_original(write_aic_original(tmp_path), "train")
    for split in ("train", "val"):
        inside, both = read_pose(folder / Path(AIC_FOLDERS[split]).parent, split), read_pose(folder, split)
        images = [sample.image for sample in both.samples]
        assert [sample.image for sample in inside.samples] == images
        assert len(images) == PEOPLE
    (folder / "keypoint_validation_images_20170911.zip").touch()  # what was unpacked
    (folder / "keypoint_validation_annotations_20170911.json").mkdir()
    assert [sample.image for sample in read_pose(folder, "val").samples] == images
    edit_json(write_aic(folder) / "annotations" / "aic_val.json", lambda d: d["annotations"].pop())
    assert len(read_pose(folder, "val").samples) == PEOPLE - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d[0].pop("keypoint_annotations"),
            "image number 1 of the list: KeyError: 'keypoint_annotations'; ex",
        ),
        (lambda d: d.__setitem__(0, None), "image number 1 of the list: TypeError: .*; expected image_id, human_annot"),
        (lambda d: d[1].update(image_id="0" * 40), "image number 2 of the list: 0{40} is listed before; expected each"),
        (lambda d: d[0].update(image_id="gone"), r"image number 1 of the list: no image .*gone\.jpg"),
        (lambda d: d[0]["human_annotations"].pop("human1"), "image 0{40}, human1: KeyError: 'human1'; expected a box"),
        (lambda d: d[0]["human_annotations"].update(human1=[9, 9, 9]), "image 0{40}, human1: ValueError"),
        (lambda d: d[0]["human_annotations"].update(human1=[9, 9, 9, 20]), "image 0{40}, human1: its box .*covers not"),
        (lambda d: d[0]["keypoint_annotations"]["human1"].pop(), "image 0{40}, human1: ValueError: cannot reshape"),
        (lambda d: d.clear(), "no person with a labelled joint; expected the AI Challenger layout"),
    ],
)
def test_aic_names_what_is_bad(tmp_path, change, message):
    folder = write_aic_original(tmp_path)
    [path] = folder.glob("*/*.json")
    edit_json(path, change)
    with pytest.raises(DataError, match=rf"keypoint_validation_annotations_20170911\.json: {message}"):
        read_pose(folder, "val")
    path.write_text("{}")
    with pytest.raises(DataError, match="not a list of images; expected the AI Challenger layout"):
        read_pose(folder, "val")


@pytest.mark.parametrize(
    "pattern",
    [
        "crowdpose_{}.json",
        "annotations/crowdpose_{}.json",
        "json/crowdpose_{}.json",
        "annotations/mmpose_crowdpose_{}.json",
    ],
)
def test_crowdpose_is_scored_on_test_and_trained_on_the_rest(tmp_path, pattern):
    for part in ("train", "val"):
        write_crowdpose(tmp_path, part, pattern)
    assert read_pose(tmp_path, "val").samples[0].image.name == "val0.jpg"  # the only part to score on
    write_crowdpose(tmp_path, "trainval", pattern)
    assert read_pose(tmp_path, "train").samples[0].image.name == "train0.jpg"  # val is scored on
    write_crowdpose(tmp_path, "test", pattern)
    assert read_pose(tmp_path, "val").samples[0].image.name == "test0.jpg"
    assert read_pose(tmp_path, "train").samples[0].image.name == "trainval0.jpg"
    (tmp_path / pattern.format("trainval")).unlink()
    assert read_pose(tmp_path, "train").samples[0].image.name == "train0.jpg"
    assert [sample.target.crowd_index for sample in read_pose(tmp_path, "val").samples] == [0, 0.1, 0.5, 0.8]


def test_ochuman_is_for_scoring(tmp_path):
    folder = write_ochuman(tmp_path, "val")
    assert read_pose(folder, "val").samples[0].image.name == "val000000.jpg"
    write_ochuman(tmp_path, "test")
    assert read_pose(folder, "val").samples[0].image.name == "test000000.jpg"
    (folder / "annotations").mkdir()
    for path in folder.glob("*.json"):
        path.rename(folder / "annotations" / path.name)
    assert read_pose(folder, "val").samples[0].image.name == "test000000.jpg"
    with pytest.raises(DataError, match="OCHuman has no part to train on; train on COCO"):
        read_pose(folder, "train")


def test_humanart_trains_with_coco_where_that_is_beside_it(tmp_path):
    folder = write_humanart(tmp_path / "HumanArt", "train")
    assert len(read_pose(folder, "train").samples) == PEOPLE
    write_humanart(folder, "train", with_coco=True)
    split = read_pose(folder, "train")
    assert len(split.samples) == 2 * PEOPLE
    assert split.samples[PEOPLE].image == tmp_path / "coco" / "train2017" / "0.jpg"
    folder.rename(tmp_path / "art")
    assert (
        read_pose(tmp_path / "art", "train").samples[0].image == tmp_path / "art" / "images" / "cartoon" / "train0.jpg"
    )


@pytest.mark.parametrize("name", ["annotations/mpii_{}.json", "annot/mpii_{}.json"])
def test_mpii_by_hand(tmp_path, name):
    split = read_pose(write_mpii(tmp_path, name=name), "val")
    assert (split.protocol, split.labels, split.problems) == ("mpii", MPII_JOINTS, ())
    assert len(split.samples) == PEOPLE - 1  # nothing of the last is visible
    # Scale 0.2 is 40 pixels; the middle is the centre, from 0, and 15 x 0.2 = 3 below: 16, 24; 4 are left of the image.
    assert split.samples[0].box == pytest.approx((0, 4, 36, 44))
    pose = split.samples[1].target
    np.testing.assert_allclose(pose.joints, joints_of(1, 16) + 0.5)
    assert pose.head_size == pytest.approx(0.6 * 10)  # of 6 x 8
    assert pose.area == pytest.approx(0.53 * 1600)
    assert [sample.target.image_id for sample in split.samples] == [0, 0, 1]


def test_mpii_named_as_hrnet_does(tmp_path):
    folder = write_mpii(tmp_path, name="annot/mpii_{}.json")
    (folder / "annot" / "mpii_val.json").rename(folder / "annot" / "valid.json")
    (folder / "annot" / "mpii_gt_val.mat").rename(folder / "annot" / "gt_valid.mat")
    assert read_pose(folder, "val").samples[0].target.head_size == pytest.approx(6)
    write_mpii(tmp_path, "train", name="annot/mpii_{}.json", heads=False)
    (folder / "annot" / "mpii_train.json").rename(folder / "annot" / "train.json")
    assert math.isnan(read_pose(folder, "train").samples[0].target.head_size)


def test_mpii_heads_are_optional_and_may_be_in_the_json(tmp_path):
    folder = write_mpii(tmp_path, heads=False)
    edit_json(folder / "annotations" / "mpii_val.json", lambda people: people[1].update(headbox=[0, 0, 30, 40]))
    sizes = [sample.target.head_size for sample in read_pose(folder, "val").samples]
    assert sizes == pytest.approx([math.nan, 30, math.nan], nan_ok=True)


def test_mpii_heads_of_other_people(tmp_path):
    folder = write_mpii(tmp_path)
    edit_json(folder / "annotations" / "mpii_val.json", lambda people: people.pop())
    with pytest.raises(
        DataError, match=r"mpii_gt_val\.mat: not the boxes of heads \(ValueError.*2 x 2 x 3 for the peo"
    ):
        read_pose(folder, "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"joints": [[1, 2]] * 15},
            "person number 2 of the list: ValueError.*expected image, center, scale, 16 joints",
        ),
        ({"joints": [[math.nan, 2]] * 16}, "person number 2 of the list: a joint is not finite"),
        (
            {"joints": [[9e4, 2]] * 16},
            r"person number 2 of the list: its joint at 89999\.5, 1\.5 is far outside an image",
        ),
        ({"scale": -1}, "person number 2 of the list: its scale is -1; expected its height over 200 pixels"),
        ({"center": [500, 20]}, r"person number 2 of the list: its box \[479, 2, 40, 40\] covers nothing of an image"),
        ({"center": 3}, "person number 2 of the list: TypeError"),
        ({"image": "gone.jpg"}, r"person number 2 of the list: no image .*images/gone\.jpg"),
        ({"image": "text.jpg"}, r"person number 2 of the list: .*images/text\.jpg cannot be read as an image"),
    ],
)
def test_mpii_names_bad_people(tmp_path, change, message):
    folder = write_mpii(tmp_path, heads=False)
    (folder / "images" / "text.jpg").write_text("no image")
    edit_json(folder / "annotations" / "mpii_val.json", lambda people: people[1].update(change))
    with pytest.raises(DataError, match=r"mpii_val\.json: " + message + ".*more than 5 % are bad"):
        read_pose(folder, "val")
    edit_json(folder / "annotations" / "mpii_val.json", lambda people: people.extend(20 * [people[0]]))
    split = read_pose(folder, "val")
    assert len(split.samples) == 22
    assert len(split.problems) == 1


@pytest.mark.parametrize(
    ("write", "remove", "message"),
    [
        (write_mpii, "images", "images: missing; expected the MPII layout: annotations/mpii_val.json"),
        (write_crowdpose, "images", "images: missing; expected the CrowdPose layout: crowdpose_trainval.json to train"),
        (write_ochuman, "images", "images: missing; expected the OCHuman layout: ochuman_coco_format_test_range"),
        (write_humanart, "images", "annotation 10: no image .*more than 5 % are bad"),
    ],
)
def test_layouts_without_images(tmp_path, write, remove, message):
    folder = write(tmp_path / "HumanArt")
    (folder / remove).rename(folder / "elsewhere")
    with pytest.raises(DataError, match=message):
        read_pose(folder, "val")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_mpii, r"mpii_train\.json: missing; expected the MPII layout: annotations/mpii_train\.json"),
        (write_crowdpose, r"crowdpose_trainval\.json: missing; expected the CrowdPose layout"),
        (write_humanart, r"training_humanart\.json: missing; expected the Human-Art layout"),
        (
            write_coco,
            r"person_keypoints_train\.json: missing; expected the COCO layout: .*person_keypoints_train\[2017\]",
        ),
    ],
)
def test_layouts_without_the_part_asked_for(tmp_path, write, message):
    folder = write(tmp_path / "HumanArt")
    (folder / "annotations" / "person_keypoints_train.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match=message):
        read_pose(folder, "train")


def test_another_number_of_joints(tmp_path):
    folder = write_aic(tmp_path)
    edit_json(
        folder / "annotations" / "aic_val.json",
        lambda d: [a.update(keypoints=[1, 1, 2] * 17) for a in d["annotations"]],
    )
    with pytest.raises(
        DataError, match=r"aic_val\.json: annotation 10: ValueError.*expected id, bbox, 14 times x, y and"
    ):
        read_pose(folder, "val")


def test_mpii_of_another_format(tmp_path):
    folder = write_mpii(tmp_path)
    (folder / "annotations" / "mpii_val.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="not a list of people; expected the MPII layout"):
        read_pose(folder, "val")
    (folder / "annotations" / "mpii_val.json").write_text("[]")
    (folder / "annotations" / "mpii_gt_val.mat").unlink()
    with pytest.raises(DataError, match="no person with a labelled joint; expected the MPII layout"):
        read_pose(folder, "val")


def test_coco_and_no_layout(tmp_path):
    assert read_pose(write_coco(tmp_path / "coco"), "val").protocol == "coco"
    known = "Human-Art: .*AI Challenger: .*aic_val.json.*CrowdPose: .*OCHuman: .*MPII: .*COCO: .*person_keypoints_val"
    with pytest.raises(DataError, match=f"'val' is in none of the layouts known here. {known}.*Did you mean .*coco.?"):
        read_pose(tmp_path, "val")
