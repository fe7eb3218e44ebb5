"""Human parsing: the LIP layout, and intersection over union of a whole set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.files import IMAGE_SUFFIXES
from dpal_edge.tasks.image import Pixels, read_ids
from dpal_edge.tasks.sample import Sample, Split, read_text, require

IGNORE = 255  # pixels that nobody labelled
LIP_CLASSES = (
    "background", "hat", "hair", "glove", "sunglasses", "upper-clothes", "dress", "coat", "socks", "pants", "jumpsuits",
    "scarf", "skirt", "face", "left-arm", "right-arm", "left-leg", "right-leg", "left-shoe", "right-shoe",
)  # fmt: skip


def read_lip(folder: Path, split: str) -> Split[Path]:
    """Read ``split`` (train or val) of a folder in the layout of LIP; a target is the path of a mask.

    The classes are the lines of ``classes.txt``, or LIP's own where there is no such file.

    Raises:
        DataError: a list, folder, image or mask is missing, or the list is empty.
    """
    layout = f"the LIP layout: {split}_id.txt, {split}_images/ID.jpg, {split}_segmentations/ID.png"
    ids = read_text(folder / f"{split}_id.txt", layout).split()
    if not ids:
        raise DataError(f"{folder / f'{split}_id.txt'}: names no images; expected {layout}")
    images = _stems(require(folder / f"{split}_images", layout))
    masks = _stems(require(folder / f"{split}_segmentations", layout))
    for name, found in (("images", images), ("segmentations", masks)):
        if missing := [i for i in ids if i not in found]:
            raise DataError(
                f"{folder}: {split}_id.txt names {missing[0]!r}, which is not in {split}_{name} ({len(missing)} of "
                f"{len(ids)} are missing); expected {layout}"
            )
    return Split(tuple(Sample(images[i], masks[i]) for i in ids), _read_classes(folder))


def read_mask(path: Path, classes: Sequence[str]) -> Pixels:
    """Read class ids (H, W) of 0 to ``len(classes) - 1``, and IGNORE.

    Raises:
        DataError: not a mask, or another id in it.
    """
    mask = read_ids(path)
    unknown = np.unique(mask[(mask >= len(classes)) & (mask != IGNORE)])
    if len(unknown):
        raise DataError(
            f"{path}: class {unknown[0]} in it, expected 0 to {len(classes) - 1} ({classes[-1]}), or {IGNORE} for "
            f"pixels to ignore; do the classes fit?"
        )
    return mask


def confusion_matrix(predicted: NDArray[np.integer], truth: Pixels, classes: int) -> NDArray[np.int64]:
    """Count pixels by true class (row) and predicted class (column); those whose truth is IGNORE are left out.

    Args:
        predicted: class ids of the shape of ``truth``, below ``classes``.
    """
    known = truth != IGNORE
    pairs = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def class_iou(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the intersection over union of each class, 0..1; NaN for one that is neither there nor predicted."""
    hits = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    iou: NDArray[np.float64] = np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
    return iou


def parsing_metrics(confusion: NDArray[np.int64]) -> dict[str, float]:
    """Score the confusion matrix of a whole set: per-image scores are never averaged.

    Returns:
        ``mIoU`` over the classes that are there or predicted, background included; ``pixel_accuracy``;
        ``mean_accuracy`` over the classes that are there. All 0..1.

    Raises:
        DataError: no pixel was labelled.
    """
    hits, there = np.diag(confusion), confusion.sum(1)
    if not there.any():
        raise DataError(f"no labelled pixel in any mask: all are {IGNORE}; are these the right masks?")
    return {
        "mIoU": float(np.nanmean(class_iou(confusion))),
        "pixel_accuracy": float(hits.sum() / there.sum()),
        "mean_accuracy": float((hits[there > 0] / there[there > 0]).mean()),
    }


def _stems(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}


def _read_classes(folder: Path) -> tuple[str, ...]:
    path = folder / "classes.txt"
    if not path.exists():
        return LIP_CLASSES
    classes = tuple(read_text(path, "one class name per line").split("\n"))
    classes = tuple(name.strip() for name in classes if name.strip())
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise DataError(f"{path}: {len(classes)} names, {len(set(classes))} different; expected one class per line")
    return classes
