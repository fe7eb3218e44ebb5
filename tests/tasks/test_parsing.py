"""LIP's layout and the scores of parsing."""

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.image import read_crop
from dpal_edge.tasks.labels import flip_pairs
from dpal_edge.tasks.parsing import (
    IGNORE,
    LIP_CLASSES,
    class_iou,
    confusion_matrix,
    parsing_metrics,
    read_lip,
    read_mask,
)
from dpal_edge.tasks.sample import Sample
from tests.tasks.layouts import CLASSES, SIZE, save_image, write_lip


@pytest.fixture
def lip(tmp_path):
    return write_lip(tmp_path / "lip")


def test_reader_pairs_images_with_masks(lip):
    split = read_lip(lip, "val")
    assert split.labels == CLASSES
    assert len(split.samples) == 10
    image, mask = split.samples[3].image, read_mask(split.samples[3], CLASSES)
    assert (image.parent.name, image.stem) == ("val_images", "val_3")
    assert mask.shape == SIZE
    assert set(np.unique(mask)) == {0, 1, 2, IGNORE}


def test_without_a_list_the_classes_are_those_of_lip(tmp_path):
    labels = read_lip(write_lip(tmp_path, classes=False), "train").labels
    assert labels == LIP_CLASSES
    assert flip_pairs(labels) == ((14, 15), (16, 17), (18, 19))


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda lip: (lip / "val_id.txt").unlink(), r"val_id\.txt: missing; expected the LIP layout"),
        (lambda lip: (lip / "val_id.txt").write_text("\n"), r"val_id\.txt: names no images"),
        (lambda lip: (lip / "val_id.txt").write_bytes(b"\xff\xfe"), r"val_id\.txt: cannot be read as text"),
        (lambda lip: (lip / "val_images").rename(lip / "images"), "val_images: missing"),
        (
            lambda lip: (lip / "val_segmentations" / "val_3.png").unlink(),
            r"val_id\.txt: line 4: names 'val_3', which is not in .*val_segmentations; expected the LIP.* 5 % are bad",
        ),
        (
            lambda lip: (lip / "val_images" / "val_0.png").unlink(),
            "line 1: names 'val_0', which is not in .*val_images",
        ),
        (
            lambda lip: (lip / "val_id.txt").write_text("val_1.png\n"),
            "line 1: names 'val_1.png', which is not in .*val_images; expected names without suffix, the LIP layout",
        ),
        (lambda lip: (lip / "val_id.txt").write_text("val_1\n\nval_1\n"), "line 3: 'val_1' is listed before"),
        (lambda lip: (lip / "classes.txt").write_text("a\na\n"), r"classes\.txt: 2 names, 1 different"),
    ],
)
def test_reader_names_what_is_wrong(lip, breaking, message):
    breaking(lip)
    with pytest.raises(DataError, match=message):
        read_lip(lip, "val")


def test_reader_leaves_out_what_is_missing(tmp_path):
    listing = write_lip(tmp_path, images=30) / "train_id.txt"
    (tmp_path / "train_images" / "train_7.png").unlink()
    split = read_lip(tmp_path, "train")
    assert [sample.image.stem for sample in split.samples] == [f"train_{i}" for i in range(30) if i != 7]
    assert all(sample.image.stem == sample.target.stem for sample in split.samples)
    [problem] = split.problems
    assert problem.startswith(f"{listing}: line 8: names 'train_7', which is not in {tmp_path / 'train_images'}")


def test_masks_are_checked(lip, tmp_path):
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    save_image(image, np.zeros((4, 4, 3)))
    save_image(mask, np.full((4, 4), 3))
    with pytest.raises(DataError, match=r"class 3 in it, expected 0 to 2 \(right-leg\), or 255"):
        read_mask(Sample(image, mask), CLASSES)
    with pytest.raises(DataError, match="mode RGB, expected one channel"):
        read_mask(Sample(image, image), CLASSES)
    save_image(mask, np.zeros((8, 2)))
    with pytest.raises(DataError, match=r"mask.png: 2x8 pixels, expected 4x4 as its image has"):
        read_mask(Sample(image, mask), CLASSES)


def test_scores_by_hand():
    truth = np.array([[0, 0, 0, 1], [1, 1, IGNORE, IGNORE]], np.uint8)
    predicted = np.array([[0, 0, 1, 1], [1, 0, 2, 0]])
    confusion = confusion_matrix(predicted, truth, 4)
    assert confusion[:2, :2].tolist() == [[2, 1], [1, 2]]
    assert confusion.sum() == 6
    np.testing.assert_array_equal(class_iou(confusion), [0.5, 0.5, np.nan, np.nan])
    scores = parsing_metrics(confusion)
    assert scores == {"mIoU": 0.5, "pixel_accuracy": pytest.approx(2 / 3), "mean_accuracy": pytest.approx(2 / 3)}


def test_a_class_that_is_only_predicted_counts():
    confusion = confusion_matrix(np.array([0, 1]), np.array([0, 0], np.uint8), 3)
    scores = parsing_metrics(confusion)
    assert scores == {"mIoU": 0.25, "pixel_accuracy": 0.5, "mean_accuracy": 0.5}  # 1/2 of class 0, nothing of class 1


def test_scores_agree_with_a_second_implementation():
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, (40, 50)).astype(np.uint8)
    predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 5, truth.shape))
    # A set's confusion is the sum of its images'.
    confusion = sum(confusion_matrix(p, t, 5) for p, t in zip(predicted, truth, strict=True))
    flat = truth.ravel(), predicted.ravel()
    assert parsing_metrics(confusion) == {
        "mIoU": pytest.approx(jaccard_score(*flat, average="macro")),
        "pixel_accuracy": pytest.approx(accuracy_score(*flat)),
        "mean_accuracy": pytest.approx(balanced_accuracy_score(*flat)),
    }


def test_scores_of_atr_by_hand():
    confusion = np.array([[6, 0, 2, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])  # the third is only predicted
    scores = parsing_metrics(confusion, "atr")
    assert scores["foreground_accuracy"] == 3 / 4
    assert scores["F1"] == pytest.approx((12 / 15 + 6 / 7 + 0) / 3)
    assert list(scores)[:3] == list(parsing_metrics(confusion))


def test_scores_of_atr_agree_with_a_second_implementation():
    from sklearn.metrics import accuracy_score, f1_score

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 2000).astype(np.uint8)
    predicted = np.where(rng.random(2000) < 0.6, truth, rng.integers(0, 5, 2000))
    scores = parsing_metrics(confusion_matrix(predicted, truth, 5), "atr")
    assert scores["F1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert scores["foreground_accuracy"] == pytest.approx(accuracy_score(truth[truth > 0], predicted[truth > 0]))


def test_nothing_labelled_is_an_error():
    with pytest.raises(DataError, match="no labelled pixel"):
        parsing_metrics(confusion_matrix(np.zeros(3, int), np.full(3, IGNORE, np.uint8), 2))


def test_crops_are_resized_and_stay_inside(tmp_path):
    pixels = np.zeros((10, 20, 3))
    pixels[:, 10:] = 255
    save_image(tmp_path / "half.png", pixels)
    assert (read_crop(Sample(tmp_path / "half.png", None), (10, 20)) == pixels).all()
    left, right = read_crop(Sample(tmp_path / "half.png", None), (4, 2))[2, :, 0]
    assert left < 30  # bicubic weights reach beyond the middle
    assert right > 225
    assert (read_crop(Sample(tmp_path / "half.png", None, (12, 0, 20, 10)), (4, 2)) == 255).all()
    with pytest.raises(DataError, match=r"the box \(12, 0, 21, 10\) .* is not inside 20x10 pixels"):
        read_crop(Sample(tmp_path / "half.png", None, (12, 0, 21, 10)), (4, 2))


def test_damaged_images_are_named(lip):
    path = read_lip(lip, "val").samples[0].image
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"val_0\.png: cannot be read as an image"):
        read_crop(Sample(path, None), (8, 8))


def test_reader_on_real_data(shared):
    folder = shared / "data" / "ccp"
    assert len(read_lip(folder, "train").samples) == 804
    val = read_lip(folder, "val")
    assert len(val.samples) == 100
    assert len(val.labels) == 10
    mask = read_mask(val.samples[0], val.labels)
    assert mask.shape == read_crop(val.samples[0], mask.shape).shape[:2]
