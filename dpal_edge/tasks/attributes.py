"""Person attributes: a table of binary labels, mean accuracy and instance scores."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.tasks.sample import Sample, Split, read_text

Flags = NDArray[np.bool_]
_FILE = "attributes.csv"
_COLUMNS = ["image", "split"]
_LAYOUT = f"{_FILE} with the columns image, split and one of 0 and 1 per attribute"


def read_attributes(folder: Path, split: str) -> Split[Flags]:
    """Read the rows of ``attributes.csv`` whose column ``split`` is this one; a target is (A,) bool.

    Raises:
        DataError: the table or an image is missing, a column or value is wrong, or no row is of this split.
    """
    path = folder / _FILE
    lines = read_text(path, _LAYOUT).splitlines()
    try:
        header, *rows = csv.reader(lines or [""])
    except csv.Error as error:
        raise DataError(f"{path}: not a table ({error}); expected {_LAYOUT}") from error
    if header[:2] != _COLUMNS or len(header) < 3 or len(set(header)) < len(header):
        raise DataError(f"{path}: its columns are {', '.join(header) or 'none'}; expected {_LAYOUT}")
    samples, splits = [], set()
    for number, row in enumerate(rows, start=2):
        where = f"{path}, line {number}"
        if len(row) != len(header) or not set(row[2:]) <= {"0", "1"}:
            raise DataError(f"{where}: {','.join(row)!r}; expected image, split and {len(header) - 2} values of 0 or 1")
        splits.add(row[1])
        if row[1] == split:
            image = folder / row[0]
            if not image.is_file():
                raise DataError(f"{where}: no image {image}; paths are relative to {folder}")
            samples.append(Sample(image, np.array(row[2:]) == "1"))
    if not samples:
        raise DataError(f"{path}: no row has the split {split!r}; there are: {', '.join(sorted(splits)) or 'no rows'}")
    return Split(tuple(samples), tuple(header[2:]))


def attribute_metrics(predicted: Flags, truth: Flags) -> dict[str, float]:
    """Score predicted attributes (n, A) as pedestrian attribute benchmarks do.

    Returns:
        ``mA``: mean of (true positive rate + true negative rate) / 2 over the attributes that some have and some lack
        (of the others one rate is undefined); and means over people of ``accuracy`` (of union), ``precision`` and
        ``recall``, with ``F1`` of the two means. A person for whom such a ratio is 0 / 0 counts as 0. All 0..1.

    Raises:
        DataError: there is no attribute that some have and some lack.
    """
    hits = predicted & truth
    positives, negatives = truth.sum(0), (~truth).sum(0)
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        raise DataError(f"no attribute of {truth.shape[1]} that some of {len(truth)} people have and others lack")
    rates = hits.sum(0)[both] / positives[both], (~predicted & ~truth).sum(0)[both] / negatives[both]
    precision, recall = _mean_ratio(hits, predicted), _mean_ratio(hits, truth)
    return {
        "mA": float(np.mean(rates)),
        "accuracy": _mean_ratio(hits, predicted | truth),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / max(precision + recall, np.finfo(float).tiny),
    }


def _mean_ratio(part: Flags, whole: Flags) -> float:
    return float((part.sum(1) / np.maximum(whole.sum(1), 1)).mean())
