"""Person attributes: a table of binary labels, mean accuracy and instance scores."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.tasks.sample import Problems, Sample, Split, read_text

Flags = NDArray[np.bool_]
TABLE = "attributes.csv"
TABLE_LAYOUT = f"{TABLE} with the columns image, split and one of 0 and 1 per attribute"
_COLUMNS = ["image", "split"]


def read_attribute_table(folder: Path, split: str) -> Split[Flags]:
    """Read the rows of ``attributes.csv`` whose column ``split`` is this one; a target is (A,) bool.

    Rows with other values, without an image, or of an image that an earlier row has are problems.

    Raises:
        DataError: the table is missing, its columns are wrong, no row is of this split, or too many rows are bad.
    """
    path = folder / TABLE
    header, rows = _parse(path)
    problems, samples = Problems(path), list[Sample[Flags]]()
    seen: dict[str, int] = {}
    for number, row in rows:
        image, part = row[:2] if len(row) > 1 else ("", split)  # a row of no split may have been of this one
        first = seen.setdefault(image, number)
        if part != split:
            continue
        if len(row) != len(header) or not set(row[2:]) <= {"0", "1"}:
            wanted = f"image, split and {len(header) - 2} values of 0 or 1"
            problems.add(f"line {number}", f"{','.join(row)!r}; expected {wanted}")
        elif first != number:
            problems.add(f"line {number}", f"{image} is in line {first} already; expected one row per image")
        elif not (folder / image).is_file():
            problems.add(f"line {number}", f"no image {folder / image}; paths are relative to {folder}")
        else:
            samples.append(Sample(folder / image, np.array(row[2:]) == "1"))
    found = problems.finish(len(samples))
    if not samples:
        splits = ", ".join(sorted({row[1] for _, row in rows})) or "no rows"
        raise DataError(f"{path}: no row has the split {split!r}; there are: {splits}")
    return Split(tuple(samples), tuple(header[2:]), problems=found)


def _parse(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header and the rows that are not blank, each with the number of its (last) line."""
    reader = csv.reader(read_text(path, TABLE_LAYOUT).splitlines(keepends=True))
    try:
        header = next(reader, [])
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path}: not a table ({error}); expected {TABLE_LAYOUT}") from error
    if header[:2] != _COLUMNS or len(header) < 3 or len(set(header)) < len(header):
        raise DataError(f"{path}: its columns are {', '.join(header) or 'none'}; expected {TABLE_LAYOUT}")
    return header, rows


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
