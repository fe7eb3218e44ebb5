"""Scores of models that are known to be right, or wrong in a known way."""

import json
import math

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.evaluate.bench import Bench
from dpal_edge.evaluate.command import read_splits
from dpal_edge.evaluate.predictor import HeadInfo
from dpal_edge.evaluate.scorers import SCORERS
from dpal_edge.tasks.decoding import SIMCC_SPLIT
from dpal_edge.tasks.detected_pose import read_detected_people
from dpal_edge.tasks.image import read_crop
from dpal_edge.tasks.reid import retrieval_metrics
from tests.evaluate.known import Known
from tests.tasks.layouts import (
    ATTRIBUTES,
    CLASSES,
    JOINTS,
    SIZE,
    save_image,
    write_attributes,
    write_coco,
    write_lip,
    write_market,
)
from tests.tasks.pose_fixtures import DETECTED


def score(task, folder, kind, labels, function, **options):
    [splits] = read_splits({task: folder}).values()
    bench = Bench(Known(HeadInfo(task, kind, labels), function, options.pop("size", SIZE)), task, folder, **options)
    return SCORERS[task](splits, bench), bench


def see_attributes(images):
    """Logits of "never", "bright" and "red", right but for dark red people, who seem blue."""
    colour = images[:, 4:28, 4:12].astype(np.float32).mean((1, 2))
    bright = colour.sum(1) > 300
    return np.stack([np.full(len(images), -1.0), bright - 0.5, ((colour[:, 0] > colour[:, 2]) & bright) - 0.5], axis=1)


def test_attributes_by_hand(folders):
    found, _ = score("attributes", folders["attributes"], "linear", ATTRIBUTES[::-1], see_attributes)
    # 16 people, 4 of each kind: half of the red ones are found and no other, all of the bright ones.
    assert found.metrics["mA"] == pytest.approx(np.mean([(0.5 + 1) / 2, 1]))
    assert found.metrics["accuracy"] == pytest.approx(np.mean([1, 0, 1, 0]))  # bright red, dark red, bright, dark
    assert found.images == {"val": 16}
    assert next(iter(found.metrics)) == "mA"
    assert 0 < found.errors["mA"] < 0.2


def see_classes(images):
    """Scores of the classes by their colours, and of one that the data do not have; pixels of green legs seem red."""
    colours = np.array([[0, 0, 255], [120, 120, 120], [200, 30, 30], [205, 30, 30]])
    gap = abs(images[:, None].astype(np.float32) - colours[:, None, None]).sum(-1)
    return -gap


def test_parsing_by_hand(tmp_path):
    folder = write_lip(tmp_path / "lip")
    found, _ = score("parsing", folder, "linear", ("sky", *CLASSES), see_classes)
    # Green legs (30, 200, 30) are nearer to grey (320) than to red (340): all of them seem background.
    assert found.metrics["mIoU"] < 1
    reds, greens, rest = np.zeros(3)
    for mask in _masks(folder):
        reds, greens, rest = reds + (mask == 1).sum(), greens + (mask == 2).sum(), rest + (mask == 0).sum()
    assert found.metrics["mIoU"] == pytest.approx((rest / (rest + greens) + 1 + 0) / 3)
    assert found.metrics["pixel_accuracy"] == pytest.approx((rest + reds) / (rest + reds + greens))
    assert found.images == {"val": 10}
    assert set(found.errors) == set(found.metrics)


def _masks(folder):
    from PIL import Image

    return [np.asarray(Image.open(path)) for path in sorted((folder / "val_segmentations").iterdir())]


def test_parsing_is_scored_at_the_resolution_of_the_masks(tmp_path):
    folder = write_lip(tmp_path / "lip")
    small, _ = score("parsing", folder, "linear", ("sky", *CLASSES), lambda x: see_classes(x)[..., ::2, ::2])
    large, _ = score("parsing", folder, "linear", ("sky", *CLASSES), see_classes, size=(64, 32))
    exact, _ = score("parsing", folder, "linear", ("sky", *CLASSES), see_classes)
    for found in (small, large):
        assert found.metrics == pytest.approx(exact.metrics, abs=0.1)


def test_a_mask_with_an_unknown_class_is_left_out(tmp_path):
    folder = write_lip(tmp_path / "lip", images=30)
    mask = np.full(SIZE, 9, np.uint8)
    save_image(folder / "val_segmentations" / "val_4.png", mask)
    found, bench = score("parsing", folder, "linear", ("sky", *CLASSES), see_classes)
    assert found.images == {"val": 29}
    [problem] = bench.problems
    assert problem.startswith(f"{folder}: val_images/val_4.png: ")
    assert "class 9 in it" in problem


def see_colour(images):
    return images[:, 4:28, 4:12].astype(np.float32).mean((1, 2))


def test_reid_is_what_ranking_all_at_once_gives(tmp_path):
    folder = write_market(tmp_path / "market", people=50)
    for name in ("0007_c2s1_000007_00.png", "0008_c2s1_000008_00.png"):
        (folder / "bounding_box_test" / name).unlink()  # two queries without a match
    [splits] = read_splits({"reid": folder}).values()
    crops = {name: np.stack([read_crop(s, SIZE) for s in part.samples]) for name, part in splits.items()}

    def embed(images):
        return see_colour(images) // 90 + 1  # so coarse that some people are mistaken for others

    expected = retrieval_metrics(
        embed(crops["query"]),
        embed(crops["gallery"]),
        *([s.target for s in part.samples] for part in splits.values()),
    )
    found, _ = score("reid", folder, "bnneck", (), embed)
    assert found.metrics == pytest.approx(expected, abs=1e-12)
    assert list(found.metrics) == list(expected)
    assert 0 < expected["rank-1"] < 1
    # One query per person: rank-1 is a share of 48 independent ones.
    exact = math.sqrt(expected["rank-1"] * (1 - expected["rank-1"]) / 47)
    assert found.errors["rank-1"] == pytest.approx(exact, rel=0.4)
    assert found.images == {"query": 50, "gallery": len(splits["gallery"].samples)}


def test_reid_without_any_match(tmp_path):
    folder = write_market(tmp_path / "market", people=2)
    for path in (folder / "bounding_box_test").glob("000[12]*"):
        path.unlink()
    with pytest.raises(DataError, match="none of 2 query images has its person in the gallery"):
        score("reid", folder, "bnneck", (), see_colour)


def at(places, size):
    """Logits of SimCC with their peak at ``places`` (K, 2), in pixels of the input."""
    raw = np.zeros((len(places), SIMCC_SPLIT * sum(size)), np.float32)
    for row, (x, y) in zip(raw, places, strict=True):
        row[round(x * SIMCC_SPLIT - 0.5)] = row[SIMCC_SPLIT * size[1] + round(y * SIMCC_SPLIT - 0.5)] = 20
    return raw


@pytest.mark.parametrize("flip", [False, True])
def test_pose_in_the_annotated_box(folders, flip):
    """Joints where the layout's people have them on average: at most two pixels off, of a torso of 11."""
    size = (64, 32)
    middle = np.array([[8, 4], [11, 10], [5, 10], [10, 20], [6, 20]]) * 2 + 0.5

    def see(images):
        return np.tile(at(middle, size), (len(images), 1, 1))

    labels = JOINTS
    found, _ = score("pose", folders["pose"], "simcc", labels, see, size=size, flip=flip)
    assert found.images == {"val": 12}
    if flip:  # mirrored, half of the evidence lies elsewhere: the first of two equal peaks wins
        assert found.metrics["PCK@0.2"] < 1
        return
    assert found.metrics["PCK@0.2"] > 0.4
    assert set(found.errors) <= set(found.metrics)
    shifted, _ = score("pose", folders["pose"], "simcc", labels, lambda x: np.roll(see(x), 24, axis=-1), size=size)
    assert shifted.metrics["PCK@0.2"] < found.metrics["PCK@0.2"]


def test_pose_in_detected_boxes(tmp_path):
    """The boxes of the annotations, and a worse one of each person: with these all that is found is found twice."""
    folder = write_coco(tmp_path, year="2017")
    people = read_splits({"pose": folder})["pose"]["val"].samples
    boxes = []
    for sample in people:
        left, top, right, bottom = sample.box
        one = {"image_id": sample.target.image_id, "category_id": 1, "bbox": [left, top, right - left, bottom - top]}
        boxes += [{**one, "score": 0.9}, {**one, "score": 0.5}]
    (tmp_path / DETECTED).parent.mkdir()
    (tmp_path / DETECTED).write_text(json.dumps(boxes))
    joints = np.mean([sample.target.joints - np.array(sample.box)[:2] for sample in people], axis=0)

    def see(images):
        return np.tile(at(joints, SIZE), (len(images), 1, 1))

    splits = read_splits({"pose": folder})["pose"] | {"detected": read_detected_people(folder)}
    bench = Bench(Known(HeadInfo("pose", "simcc", JOINTS), see, SIZE), "pose", folder, errors=False)
    found = SCORERS["pose"](splits, bench)
    assert found.images == {"val": 12, "detected": 24}
    # The same people and joints, and the second box of each left out: the one difference is the crowds that count here.
    assert found.metrics["OKS_AP50_detected"] == pytest.approx(found.metrics["OKS_AP50"], abs=0.1)
    assert found.metrics["OKS_AP50"] > 0


def see_red(images):
    """One location per block of 2x2 pixels says the box around all red pixels; frames hold one to three people."""
    rows = []
    for image in images.astype(int):
        red = (image[..., 0] > 180) & (image[..., 1] < 80)
        [columns] = np.nonzero(red.any(0))
        people = np.split(columns, np.flatnonzero(np.diff(columns) > 3) + 1)
        boxes = []
        for part in people:
            [down] = np.nonzero(red[:, part].any(1))
            boxes.append([part[0], down[0], part[-1] + 1, down[-1] + 1, 3.0])
        rows.append(boxes + [[0, 0, 1, 1, -9.0]] * (4 - len(boxes)))
    return np.array(rows, np.float32)


def test_detection_in_whole_frames(folders):
    found, _ = score("detection", folders["detection"], "pyramid", (), see_red, size=(64, 128))
    assert found.images == {"val": 6}
    assert found.metrics["AP50"] == pytest.approx(1.0)
    assert found.metrics["recall50"] == pytest.approx(1.0)


def test_attribute_errors_shrink_with_the_data(tmp_path):
    few, many = (
        score("attributes", write_attributes(tmp_path / str(n), images=n), "linear", ATTRIBUTES[::-1], see_attributes)[
            0
        ]
        for n in (16, 256)
    )
    assert many.metrics["mA"] == pytest.approx(few.metrics["mA"])
    assert few.errors["accuracy"] / many.errors["accuracy"] == pytest.approx(4, rel=0.5)
    quick, _ = score("attributes", tmp_path / "16", "linear", ATTRIBUTES[::-1], see_attributes, errors=False)
    assert quick.errors == {}
    assert quick.metrics == few.metrics
