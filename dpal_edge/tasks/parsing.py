"""Human parsing: the LIP layout, and the scores of a whole set, as intersection over union."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.files import IMAGE_SUFFIXES
from dpal_edge.tasks.image import Pixels, read_ids, read_size
from dpal_edge.tasks.sample import Problems, Sample, Split, read_rows, read_text, require

IGNORE = 255  # pixels that nobody labelled
LIP_CLASSES = (
    "background", "hat", "hair", "glove", "sunglasses", "upper-clothes", "dress", "coat", "socks", "pants", "jumpsuits",
    "scarf", "skirt", "face", "left-arm", "right-arm", "left-leg", "right-leg", "left-shoe", "right-shoe",
)  # fmt: skip
LIP_LAYOUT = "the LIP layout: {split}_id.txt, {split}_images/ID.jpg, {split}_segmentations/ID.png"


def read_lip(folder: Path, split: str) -> Split[Path]:
    """Read ``split`` (train or val) of a folder in the layout of LIP; a target is the path of a mask.

    The classes are the lines of ``classes.txt``, or LIP's own where there is no such file.

    Raises:
        DataError: a list or folder is missing, the list is empty, or too many of its images are bad.
    """
    layout = LIP_LAYOUT.format(split=split)
    images, masks = folder / f"{split}_images", folder / f"{split}_segmentations"
    samples, problems = pair_masks(folder / f"{split}_id.txt", images, masks, layout)
    return Split(samples, _read_classes(folder), "lip", problems)


def pair_masks(
    listing: Path, images: Path, masks: Path, layout: str
) -> tuple[tuple[Sample[Path], ...], tuple[str, ...]]:
    """Pair the images and masks, files of any image suffix, that the lines of ``listing`` name.

    Lines without an image or mask, and those that repeat an earlier one, are problems.

    Returns:
        The samples in the order of the list, and the problems.

    Raises:
        DataError: a folder or the list is missing, the list is empty, or too many lines are bad.
    """
    rows = read_rows(listing, layout)
    found = {folder: _stems(require(folder, layout)) for folder in (images, masks)}
    problems, samples = Problems(listing), dict[str, Sample[Path]]()
    for number, name in rows:
        missing = [folder for folder, files in found.items() if name not in files]
        if name in samples:
            problems.add(f"line {number}", f"{name!r} is listed before; expected each image once")
        elif missing:
            hint = "names without suffix, " if Path(name).stem in found[missing[0]] else ""
            problems.add(f"line {number}", f"names {name!r}, which is not in {missing[0]}; expected {hint}{layout}")
        else:
            samples[name] = Sample(found[images][name], found[masks][name])
    return tuple(samples.values()), problems.finish(len(samples))


def read_mask(sample: Sample[Path], classes: Sequence[str]) -> Pixels:
    """Read class ids (H, W) of 0 to ``len(classes) - 1``, and IGNORE, of each pixel of a sample's image.

    Raises:
        DataError: not a mask, of another size than the image, or another id in it.
    """
    path = sample.target
    mask, size = read_ids(path), read_size(sample.image)
    if mask.shape != size:
        raise DataError(
            f"{path}: {mask.shape[1]}x{mask.shape[0]} pixels, expected {size[1]}x{size[0]} as its image has; are these "
            f"the masks of these images?"
        )
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


def parsing_metrics(confusion: NDArray[np.int64], protocol: str = "") -> dict[str, float]:
    """Score the confusion matrix of a whole set: per-image scores are never averaged.

    Args:
        protocol: "atr" adds what is reported for that set.

    Returns:
        ``mIoU`` over the classes that are there or predicted, background included; ``pixel_accuracy``;
        ``mean_accuracy`` over the classes that are there. For ATR also ``foreground_accuracy``, of the pixels that are
        not background (class 0), and ``F1``, the mean of the classes' own, background included. All 0..1.

    Raises:
        DataError: no pixel was labelled.
    """
    hits, there = np.diag(confusion), confusion.sum(1)
    if not there.any():
        raise DataError(f"no labelled pixel in any mask: all are {IGNORE}; are these the right masks?")
    iou = class_iou(confusion)
    scores = {
        "mIoU": float(np.nanmean(iou)),
        "pixel_accuracy": float(hits.sum() / there.sum()),
        "mean_accuracy": float((hits[there > 0] / there[there > 0]).mean()),
    }
    if protocol == "atr":
        scores["foreground_accuracy"] = float(hits[1:].sum() / max(there[1:].sum(), 1))
        scores["F1"] = float(np.nanmean(2 * iou / (1 + iou)))  # 2 TP / (2 TP + FP + FN) of each class
    return scores


def _stems(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}


def _read_classes(folder: Path) -> tuple[str, ...]:
    path = folder / "classes.txt"
    if not path.exists():
        return LIP_CLASSES
    classes = tuple(read_text(path, "one class name per line").split("\n"))
    classes = tuple(name.strip() for name in classes if name.strip())
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise DataError(f"{path}: {len(classes)} names, {len(set(classes))} different; expected one class per line")
    return classes
