"""COCO's json of annotations, which many data sets share: its images, its people's boxes, and what is wrong in it."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dpal_edge.errors import DataError
from dpal_edge.tasks.image_files import ImageFiles
from dpal_edge.tasks.sample import Box, Problems, read_text, require

Record = dict[str, Any]
_SHOWN = 5  # categories in an error


@dataclass(frozen=True)
class CocoFile:
    """The lists of a file in COCO's format, their entries not yet checked."""

    path: Path
    images: list[Any]
    annotations: list[Any]
    categories: list[Any]

    @cached_property
    def names(self) -> dict[int, str]:
        """Names of the categories, by id; what is none is left out."""
        found = (c for c in self.categories if isinstance(c, dict) and isinstance(c.get("id"), int | float))
        return {category["id"]: str(category.get("name")) for category in found}

    def category(self, record: Record) -> int:
        """Return the id of the category of an annotation.

        Raises:
            DataError: the file has no such category. Others: the annotation is not of the format.
        """
        number: int = record["category_id"]
        if number not in self.names:
            known = [f"{number} ({name})" for number, name in self.names.items()]
            more = ["..."] if len(known) > _SHOWN else []
            raise DataError(f"unknown category_id {number!r}; expected {', '.join(known[:_SHOWN] + more)}")
        return number


@dataclass(frozen=True)
class CocoImage:
    """An image that annotations may refer to."""

    path: Path
    width: float
    height: float
    there: bool  # whether the file exists
    record: Record  # as it stands in the file, with what a data set adds

    @property
    def size(self) -> tuple[int, int]:
        """Its height and width."""
        return round(self.height), round(self.width)


def find_coco(folder: Path, split: str, kind: str, expected: str) -> tuple[Path, Path]:
    """Return where the annotations ``annotations/KIND_SPLIT.json`` and the images ``SPLIT/`` of a split are.

    Both may have COCO's year, as in ``val2017``, and the images may be in ``images/SPLIT/``.

    Raises:
        DataError: one is missing.
    """
    year = "2017" if (folder / "annotations" / f"{kind}_{split}2017.json").exists() else ""
    path = require(folder / "annotations" / f"{kind}_{split}{year}.json", expected)
    nested = folder / "images" / f"{split}{year}"
    return path, nested if nested.is_dir() else require(folder / f"{split}{year}", expected)


def read_json(path: Path, expected: str) -> Any:
    """Return the document in ``path``.

    Raises:
        DataError: missing, or not JSON; ``expected`` says what should be there.
    """
    text = read_text(path, expected)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({reason(error)}); expected {expected}") from error


def read_coco(path: Path, expected: str) -> CocoFile:
    """Read a file in COCO's format.

    Raises:
        DataError: missing, not JSON, or without one of the lists.
    """
    document = read_json(path, expected)
    lists: dict[str, list[Any]] = {}
    for name in ("images", "annotations", "categories"):
        found = document.get(name) if isinstance(document, dict) else None
        if not isinstance(found, list):
            raise DataError(f"{path}: not in COCO's format, it has no list {name!r}; expected {expected}")
        lists[name] = found
    return CocoFile(path, **lists)


def index_images(file: CocoFile, locate: Callable[[str], Path], problems: Problems) -> dict[int, CocoImage]:
    """Return the images by id.

    Args:
        locate: where an image lies, by its ``file_name``.
        problems: gets records that are not images, and ids that occur before.
    """
    images: dict[int, CocoImage] = {}
    files = ImageFiles()
    for where, record in entries("image", file.images):
        with noted(problems, where, "id, file_name, width and height"):
            number, width, height = int(record["id"]), float(record["width"]), float(record["height"])
            if number in images:
                raise DataError("another has the same id; expected one per image")
            if not (0 < width < math.inf and 0 < height < math.inf):
                raise DataError(f"it is {width:g} wide and {height:g} high; expected pixels")
            path = locate(str(record["file_name"]))
            images[number] = CocoImage(path, width, height, path in files, record)
    return images


def entries(kind: str, records: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield each record after what it is called: ``kind`` and its id, or its place in the list where it has none."""
    for number, record in enumerate(records, start=1):
        known = isinstance(record, dict) and "id" in record
        yield f"{kind} {record['id']}" if known else f"{kind} number {number} of the list", record


@contextmanager
def noted(problems: Problems, where: str, expected: str) -> Iterator[None]:
    """Note what is wrong with the annotation that is read within, instead of raising it.

    Args:
        where: how the annotation is called.
        expected: what it should have held, for what is not of the format at all.
    """
    try:
        yield
    except DataError as error:
        problems.add(where, str(error))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        problems.add(where, f"{reason(error)}; expected {expected}")


def read_box(values: Iterable[float]) -> list[float]:
    """Return left, top, width and height.

    Raises:
        ValueError, TypeError: they are not four numbers.
    """
    numbers = [float(value) for value in values]
    if len(numbers) != 4:
        raise ValueError(f"a box of {len(numbers)} numbers")
    return numbers


def clip_box(box: Sequence[float], width: float, height: float) -> Box:
    """Return left, top, right, bottom of a box (left, top, width, height), clipped to the image of that size.

    Raises:
        DataError: it covers nothing of the image, or is not finite.
    """
    left, top, across, down = box
    edges = max(left, 0.0), max(top, 0.0), min(left + across, width), min(top + down, height)
    if not (edges[0] < edges[2] and edges[1] < edges[3]):  # also where an edge is NaN
        text = ", ".join(f"{value:g}" for value in box)
        raise DataError(f"its box [{text}] covers nothing of an image of {width:g}x{height:g}")
    return edges


def reason(error: Exception) -> str:
    """Return what went wrong in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
