"""Person detection data in the layouts it is published in; a sample is one whole frame, be somebody in it or not."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpal_edge.errors import DataError
from dpal_edge.tasks.coco import (
    Record,
    clip_box,
    entries,
    find_coco,
    index_images,
    noted,
    read_box,
    read_coco,
    read_json,
)
from dpal_edge.tasks.detection import People
from dpal_edge.tasks.image import read_size
from dpal_edge.tasks.image_files import ImageFiles
from dpal_edge.tasks.sample import Box, Layout, Problems, Sample, Split, read_layout, read_rows, require

Person = tuple[Box, bool, Box]  # the box, whether to ignore it, and what of it can be seen

_LABELS = ("person",)
_COCO = "annotations/instances_{split}[2017].json with a category 'person', and the images in {split}[2017]/"
_CROWDHUMAN = "annotation_{split}.odgt and the images in Images/ID.jpg"
_CITYPERSONS = (
    "gtBboxCityPersons/{split}/CITY/*_gtBboxCityPersons.json and Cityscapes' images in "
    "leftImg8bit/{split}/CITY/*_leftImg8bit.png"
)
_TAGS = ("person", "mask")  # of CrowdHuman; a mask is a crowd, a reflection, a poster
_PEDESTRIAN = "pedestrian"
_IGNORED_LABELS = frozenset({"rider", "sitting person", "person (other)", "person group", "ignore"})
_CITY_SUFFIX = "_gtBboxCityPersons.json"


def read_detection(folder: Path, split: str) -> Split[People]:
    """Read ``split`` (train or val) of COCO, CrowdHuman or CityPersons, or own data laid out as COCO's.

    A sample is one frame; frames without people are among them. Only what holds this split must be there. ``protocol``
    says which layout it is: coco, crowdhuman or citypersons. Boxes are clipped to the frame, in CityPersons not, whose
    parts are chosen by the height of the whole person. To be ignored are crowds in COCO; masks and what is marked so in
    CrowdHuman; in CityPersons all but pedestrians, as its benchmark does.

    Raises:
        DataError: no such layout, a part of it is missing, or too many frames or boxes are bad.
        BackendUnavailable: Pillow, to read the images' sizes for CrowdHuman, is not installed.
    """
    return read_layout(folder, split, _LAYOUTS)


def _read_coco(folder: Path, split: str) -> Split[People]:
    expected = f"the COCO layout: {_COCO.format(split=split)}"
    path, parent = find_coco(folder, split, "instances", expected)
    file = read_coco(path, expected)
    person = {number for number, name in file.names.items() if name.lower() == "person"}
    if not person:
        raise DataError(
            f"{path}: no category 'person' among {', '.join(file.names.values()) or 'none'}; expected {expected}"
        )
    bad_frames, bad_boxes = Problems(path), Problems(path)
    images = index_images(file, parent.joinpath, bad_frames)
    people: dict[int, list[Person]] = {}
    for number, image in images.items():
        if image.there:
            people[number] = []
        else:
            bad_frames.add(f"image {number}", f"no image {image.path}")
    seen = set[int]()
    for where, record in entries("annotation", file.annotations):
        with noted(bad_boxes, where, "id, category_id, bbox and the id of an image"):
            if file.category(record) not in person:
                continue
            image = images[int(record["image_id"])]
            if int(record["id"]) in seen:
                raise DataError("another has the same id; expected one per person")
            seen.add(int(record["id"]))
            box = clip_box(read_box(record["bbox"]), image.width, image.height)
            if image.there:
                people[int(record["image_id"])].append((box, bool(record.get("iscrowd") or record.get("ignore")), box))
    samples = tuple(
        Sample(images[number].path, _gather(found), size=images[number].size) for number, found in people.items()
    )
    return _finish(path, samples, "coco", bad_frames, bad_boxes)


def _read_crowdhuman(folder: Path, split: str) -> Split[People]:
    expected = f"the CrowdHuman layout: {_CROWDHUMAN.format(split=split)}"
    path = folder / f"annotation_{split}.odgt"
    rows = read_rows(path, expected)
    images, files = require(folder / "Images", expected), ImageFiles()
    bad_frames, bad_boxes = Problems(path), Problems(path)
    samples: dict[str, Sample[People]] = {}
    for number, row in rows:
        with noted(bad_frames, f"line {number}", "a JSON object with ID and gtboxes"):
            record = json.loads(row)
            name, boxes = str(record["ID"]), list(record["gtboxes"])
            if name in samples:
                raise DataError(f"{name} is in an earlier line already; expected one line per image")
            if (image := images / f"{name}.jpg") not in files:
                raise DataError(f"no image {image}")
            size = read_size(image)
            people: list[Person] = []
            for place, box in enumerate(boxes, start=1):
                with noted(bad_boxes, f"line {number}, box {place}", "tag and fbox"):
                    people.append(_read_crowdhuman_box(box, size))
            samples[name] = Sample(image, _gather(people))
    return _finish(path, tuple(samples.values()), "crowdhuman", bad_frames, bad_boxes)


def _read_crowdhuman_box(record: Record, size: tuple[int, int]) -> Person:
    """Return the whole person, clipped to the image of that height and width as its toolkit does before it scores."""
    box, tag = clip_box(read_box(record["fbox"]), size[1], size[0]), record["tag"]
    if tag not in _TAGS:
        raise DataError(f"unknown tag {tag!r}; expected {' or '.join(_TAGS)}")
    if tag != _TAGS[0] or record.get("extra", {}).get("ignore", 0):
        return box, True, box
    return box, False, _clip_visible(read_box(record["vbox"]), size) if "vbox" in record else box


def _read_citypersons(folder: Path, split: str) -> Split[People]:
    expected = f"the CityPersons layout: {_CITYPERSONS.format(split=split)}"
    root = require(folder / "gtBboxCityPersons" / split, expected)
    images, files = require(folder / "leftImg8bit" / split, expected), ImageFiles()
    bad_frames, bad_boxes = Problems(root), Problems(root)
    samples = []
    for path in sorted(root.glob(f"*/*{_CITY_SUFFIX}")):
        where = f"{path.parent.name}/{path.name}"
        with noted(bad_frames, where, "imgHeight, imgWidth and objects"):
            document = read_json(path, expected)
            size = int(document["imgHeight"]), int(document["imgWidth"])
            image = images / path.parent.name / f"{path.name.removesuffix(_CITY_SUFFIX)}_leftImg8bit.png"
            if image not in files:
                raise DataError(f"no image {image}")
            people: list[Person] = []
            for place, box in enumerate(document["objects"], start=1):
                with noted(bad_boxes, f"{where}, object {place}", "label, bbox and bboxVis"):
                    people.append(_read_city_box(box, size))
            samples.append(Sample(image, _gather(people), size=size))
    return _finish(root, tuple(samples), "citypersons", bad_frames, bad_boxes)


def _read_city_box(record: Record, size: tuple[int, int]) -> Person:
    values, label = read_box(record["bbox"]), record["label"]
    clip_box(values, size[1], size[0])  # whether it covers anything
    left, top, width, height = values
    box = left, top, left + width, top + height
    if label == _PEDESTRIAN:
        return box, False, _clip_visible(read_box(record["bboxVis"]), size)
    if label not in _IGNORED_LABELS:
        raise DataError(f"unknown label {label!r}; expected {_PEDESTRIAN}, {', '.join(sorted(_IGNORED_LABELS))}")
    return box, True, box  # what of a group can be seen is not annotated


def _clip_visible(values: Sequence[float], size: tuple[int, int]) -> Box:
    """Return the edges of a visible box, clipped to the image of that height and width; it may cover nothing.

    Raises:
        DataError: it is not finite.
    """
    if not all(map(math.isfinite, values)):
        raise DataError("its visible box is not finite; correct it or leave it out")
    left, top, width, height = values
    left, top = min(max(left, 0.0), size[1]), min(max(top, 0.0), size[0])
    right, bottom = min(values[0] + width, size[1]), min(values[1] + height, size[0])
    return left, top, max(left, right), max(top, bottom)


def _gather(people: Sequence[Person]) -> People:
    boxes = np.array([box for box, _, _ in people], np.float32).reshape(-1, 4)
    visible = np.array([seen for _, _, seen in people], np.float32).reshape(-1, 4)
    return People(boxes, np.array([ignore for _, ignore, _ in people], bool), visible)


def _finish(
    source: Path, samples: tuple[Sample[People], ...], protocol: str, frames: Problems, boxes: Problems
) -> Split[People]:
    """Return the split, unless too many frames, or too many boxes, are bad."""
    problems = frames.finish(len(samples)) + boxes.finish(sum(len(sample.target.boxes) for sample in samples))
    if not samples:
        raise DataError(f"{source}: no frames; expected one entry or file for each image")
    return Split(samples, _LABELS, protocol, problems)


_LAYOUTS = (
    Layout("CrowdHuman", ("annotation_*.odgt",), _read_crowdhuman, _CROWDHUMAN),
    Layout("CityPersons", ("gtBboxCityPersons",), _read_citypersons, _CITYPERSONS),
    Layout("COCO", ("annotations/instances_*.json",), _read_coco, _COCO),
)
