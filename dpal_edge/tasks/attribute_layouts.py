"""Person attributes in the layouts they are published in.

The published sets have three parts. As is usual, the training and validation parts together are trained on and the test
part is scored on; where a set comes in several partitions, the first counts. Attributes keep the order of the file.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.tasks.attributes import TABLE, TABLE_LAYOUT, Flags, read_attribute_table
from dpal_edge.tasks.matlab import read_mat
from dpal_edge.tasks.sample import Layout, Problems, Sample, Split, read_layout, require

_PARTS = {"train": (0, 1), "val": (2,)}  # of training, validation and test, in the order of the files
_PA100K_LAYOUT = (
    "the PA-100K layout: annotation.mat with attributes, train_images_name, train_label and the same of val and test, "
    "images in data/ or release_data/"
)
_PETA_LAYOUT = (
    "the PETA layout: PETA.mat with the struct peta of annotations (n, 109), names of attributes, a third field and "
    "partitions, images in images/ as 00001.png"
)
_RAP_LAYOUT = (
    "the RAPv2 layout: RAP_annotation/RAP_annotation.mat with the struct RAP_annotation of name, data, attribute, "
    "selected_attribute and partition_attribute, images in RAP_dataset/"
)
_PETA_IDS = 4  # columns before those of the attributes: image, person, source, person in the source
_PETA_SELECTED = 35  # the first attributes, which benchmarks score; the others are too rare, or colours
_RAP_UNSURE = 2  # what RAPv2 holds besides 0 and 1; benchmarks count it as 0


def read_attributes(folder: Path, split: str) -> Split[Flags]:
    """Read ``split`` (train or val) of PA-100K, PETA, RAPv2, or own data with a table ``attributes.csv``.

    A target is (A,) bool. Of the published sets "train" is the training and validation part together, "val" the test
    part, and the attributes are those that are scored: all 26 of PA-100K, 35 of PETA, 54 of RAPv2.

    Raises:
        DataError: no such layout, a part of it is missing, too many annotations are bad, or there is only a pickle.
        BackendUnavailable: a .mat file, and SciPy is not installed.
    """
    return read_layout(folder, split, _LAYOUTS)


def _read_pa100k(folder: Path, split: str) -> Split[Flags]:
    path = _first(folder, "annotation.mat", "annotation/annotation.mat")
    images = require(_first(folder, "data", "release_data/release_data", "release_data"), _PA100K_LAYOUT)
    parts = [("train", "val", "test")[i] for i in _PARTS[split]]
    variables = read_mat(path, _PA100K_LAYOUT)
    with _structure(path, _PA100K_LAYOUT):
        labels = _texts(variables["attributes"])
        names = [name for part in parts for name in _texts(variables[f"{part}_images_name"])]
        values = np.concatenate([np.reshape(variables[f"{part}_label"], (-1, len(labels))) for part in parts])
        return _collect(path, [images / name for name in names], values, labels, range(len(names)), "pa100k")


def _read_peta(folder: Path, split: str) -> Split[Flags]:
    path = folder / "PETA.mat"
    images = require(folder / "images", _PETA_LAYOUT)
    variables = read_mat(path, _PETA_LAYOUT)
    with _structure(path, _PETA_LAYOUT):
        data, labels, _, partitions = list(variables["peta"].values())[:4]  # read by place everywhere, not by name
        values = data[:, _PETA_IDS : _PETA_IDS + _PETA_SELECTED]
        paths = [images / f"{number:05d}.png" for number in range(1, len(values) + 1)]
        rows = _rows(partitions[0], split)
        return _collect(path, paths, values, _texts(labels)[:_PETA_SELECTED], rows, "peta")


def _read_rap(folder: Path, split: str) -> Split[Flags]:
    path = _first(folder, "RAP_annotation/RAP_annotation.mat", "RAP_annotation.mat")
    images = require(folder / "RAP_dataset", _RAP_LAYOUT)
    variables = read_mat(path, _RAP_LAYOUT)
    with _structure(path, _RAP_LAYOUT):
        found = variables["RAP_annotation"]
        selected = np.atleast_1d(found["selected_attribute"]).astype(np.int64) - 1
        values = found["data"][:, selected]
        values = np.where(values == _RAP_UNSURE, 0, values)
        labels = np.array(_texts(found["attribute"]))[selected].tolist()
        paths = [images / name for name in _texts(found["name"])]
        return _collect(path, paths, values, labels, _rows(found["partition_attribute"][0], split), "rapv2")


def _refuse_pickle(folder: Path, split: str) -> NoReturn:
    path = min(folder.glob("dataset*.pkl"))
    raise DataError(
        f"{path}: a pickle, which can run programs and is never opened; put the data set's own annotations beside it: "
        f"annotation.mat of PA-100K, PETA.mat, or RAP_annotation/RAP_annotation.mat of RAPv2"
    )


def _collect(
    path: Path, images: Sequence[Path], values: NDArray[Any], labels: Sequence[str], rows: Sequence[int], protocol: str
) -> Split[Flags]:
    """Make samples of ``rows`` of ``values`` (n, A), which the file ``path`` annotates ``images`` (n,) with.

    Raises:
        ValueError: there are values for other numbers of images or attributes.
        DataError: too many of the rows are bad.
    """
    if values.shape != (len(images), len(labels)):
        raise ValueError(f"values {values.shape} for {len(images)} images and {len(labels)} attributes")
    binary = np.logical_or(values == 0, values == 1).all(axis=1)
    problems, samples = Problems(path), dict[Path, Sample[Flags]]()
    for row in rows:
        if not 0 <= row < len(images):
            problems.add(f"row {row + 1}", f"is in the partition; expected 1 to {len(images)}")
            continue
        image = images[row]
        where = f"row {row + 1}, {image.name}"
        if image in samples:
            problems.add(where, "is in the partition before; expected each image once")
        elif not binary[row]:
            problems.add(where, f"values {np.unique(values[row]).tolist()}; expected 0 or 1")
        elif not image.is_file():
            problems.add(where, f"no image {image}")
        else:
            samples[image] = Sample(image, values[row] == 1)
    found = problems.finish(len(samples))
    if not samples:
        raise ValueError("no image in this part")
    return Split(tuple(samples.values()), tuple(labels), protocol, found)


@contextmanager
def _structure(path: Path, layout: str) -> Iterator[None]:
    """Turn what comes of annotations of another structure into a DataError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path}: holds something else ({reason}); expected {layout}") from error


def _first(folder: Path, *names: str) -> Path:
    """Return the first of ``names`` that is there, or would have to be."""
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def _texts(cell: Any) -> list[str]:
    return [str(text).strip() for text in np.atleast_1d(cell)]


def _rows(partition: dict[str, Any], split: str) -> list[int]:
    """Return the rows of ``split``, 0 the first, of a struct that lists those of training, validation and test."""
    parts = list(partition.values())
    rows = np.concatenate([np.atleast_1d(parts[part]) for part in _PARTS[split]]).astype(np.int64) - 1
    numbers: list[int] = rows.tolist()
    return numbers


_LAYOUTS = (
    Layout(f"a table {TABLE}", (TABLE,), read_attribute_table, TABLE_LAYOUT),
    Layout("RAPv2", ("RAP_annotation.mat", "RAP_annotation/RAP_annotation.mat"), _read_rap, _RAP_LAYOUT),
    Layout("PETA", ("PETA.mat",), _read_peta, _PETA_LAYOUT),
    Layout("PA-100K", ("annotation.mat", "annotation/annotation.mat"), _read_pa100k, _PA100K_LAYOUT),
    Layout("pickle", ("dataset*.pkl",), _refuse_pickle),
)
