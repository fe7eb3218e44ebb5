"""Detection data in the layouts it is published in."""

import json
import math
import re

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.detection_layouts import read_detection
from tests.tasks.detection_fixtures import FRAME, write_citypersons, write_coco_boxes, write_crowdhuman
from tests.tasks.pose_fixtures import edit_json

HEIGHT, WIDTH = FRAME


def _line(folder, number, change):
    """Change a line, from 1, of CrowdHuman's list."""
    path = folder / "annotation_val.odgt"
    lines = path.read_text().splitlines()
    lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("year", ["", "2017"])
def test_coco_by_hand(tmp_path, year):
    split = read_detection(write_coco_boxes(tmp_path, year=year), "val")
    assert (split.protocol, split.labels, split.problems) == ("coco", ("person",), ())
    assert [sample.image.name for sample in split.samples] == [f"{number:012d}.png" for number in range(4)]
    assert all(sample.box is None and sample.image.is_file() for sample in split.samples)
    first = split.samples[0].target
    assert first.boxes.dtype == np.float32
    assert first.boxes.tolist() == [[4, 4, 14, 34], [50, 10, WIDTH, 40], [20, 0, 40, 20]]  # clipped; without the dog
    assert first.ignore.tolist() == [False, False, True]
    assert first.visible.tolist() == first.boxes.tolist()
    empty = split.samples[3].target  # a negative
    assert (empty.boxes.shape, empty.ignore.shape, empty.visible.shape) == ((0, 4), (0,), (0, 4))


def test_crowdhuman_by_hand(tmp_path):
    split = read_detection(write_crowdhuman(tmp_path), "val")
    assert (split.protocol, split.labels, split.problems) == ("crowdhuman", ("person",), ())
    assert [sample.image.name for sample in split.samples] == [f"{number},val.jpg" for number in range(4)]
    people = split.samples[1].target
    assert people.boxes.tolist() == [[0, 8, 15, 38], [30, 5, 40, 45], [45, 5, 55, 25], [50, 30, WIDTH, HEIGHT]]
    assert people.ignore.tolist() == [False, False, True, True]  # marked so, and a mask
    assert people.visibility.tolist() == [1, 0.5, 1, 1]
    assert len(split.samples[3].target.boxes) == 0


def test_citypersons_by_hand(tmp_path):
    split = read_detection(write_citypersons(tmp_path), "val")
    assert (split.protocol, split.labels, split.problems) == ("citypersons", ("person",), ())
    assert [sample.image.parent.name for sample in split.samples] == ["aachen", "aachen", "bochum", "bochum"]
    assert all(sample.image.is_file() for sample in split.samples)
    people = split.samples[0].target
    assert people.boxes.tolist() == [[-4, 8, 12, 47], [20, 8, 30, 32], [40, 8, 50, 32], [50, 8, 60, 18]]
    assert people.ignore.tolist() == [False, False, True, True]
    assert people.visibility.tolist() == [0.75, 0, 1, 1]  # of the whole person, also what is outside
    assert len(split.samples[3].target.boxes) == 0


@pytest.mark.parametrize("write", [write_coco_boxes, write_crowdhuman, write_citypersons])
def test_only_the_part_asked_for_is_read(tmp_path, write):
    folder = write(tmp_path, "train")
    assert len(read_detection(folder, "train").samples) == 4
    with pytest.raises(DataError, match=r"val.*: missing; expected the (COCO|CrowdHuman|CityPersons) layout: .*val"):
        read_detection(folder, "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [70, 0, 9, 9]}, r"annotation 1: its box \[70, 0, 9, 9\] covers nothing of an image of 64x48"),
        ({"bbox": [0, 0, math.nan, 9]}, r"annotation 1: its box \[0, 0, nan, 9\] covers nothing"),
        (
            {"bbox": [1, 2, 3]},
            "annotation 1: ValueError: a box of 3 numbers; expected id, category_id, bbox and the id",
        ),
        ({"image_id": 7}, "annotation 1: KeyError: 7; expected"),
        ({"category_id": 9}, r"annotation 1: unknown category_id 9; expected \d+ \(\w+\), \d+ \(\w+\)$"),
        ({"category_id": [1]}, "annotation 1: TypeError"),
        ({"id": 0}, "annotation 0: another has the same id; expected one per person"),
        ({"bbox": None}, "annotation 1: TypeError"),
    ],
)
def test_coco_names_bad_boxes(tmp_path, change, message):
    folder = write_coco_boxes(tmp_path)
    path = folder / "annotations" / "instances_val2017.json"
    edit_json(path, lambda d: d["annotations"][1].update(change))
    with pytest.raises(DataError, match=r"instances_val2017\.json: " + message.rstrip("$") + ".*more than 5 % are bad"):
        read_detection(folder, "val")
    more = {"image_id": 103, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 5, 5]}
    edit_json(path, lambda d: d["annotations"].extend({**more, "id": 500 + number} for number in range(15)))
    split = read_detection(folder, "val")
    assert [len(sample.target.boxes) for sample in split.samples] == [2, 2, 2, 15]
    assert len(split.problems) == 1
    assert re.search(message, split.problems[0])


def test_coco_names_missing_images(tmp_path):
    folder = write_coco_boxes(tmp_path)
    (folder / "val2017" / "000000000001.png").unlink()
    with pytest.raises(DataError, match=r"image 101: no image .*000000000001\.png.*more than 5 % are bad"):
        read_detection(folder, "val")
    folder = write_coco_boxes(tmp_path / "larger", frames=20)
    (folder / "val2017" / "000000000001.png").unlink()
    split = read_detection(folder, "val")
    assert len(split.samples) == 19
    assert len(split.problems) == 1  # and nothing of the people in it


def test_coco_without_people(tmp_path):
    folder = write_coco_boxes(tmp_path)
    path = folder / "annotations" / "instances_val2017.json"
    edit_json(path, lambda d: d.update(images=[], annotations=[]))
    with pytest.raises(DataError, match=r"instances_val2017\.json: no frames"):
        read_detection(folder, "val")
    edit_json(path, lambda d: d["categories"].pop())
    edit_json(path, lambda d: d["categories"].append({"id": [1], "name": "person"}))
    with pytest.raises(DataError, match="no category 'person' among dog; expected the COCO layout"):
        read_detection(folder, "val")
    path.write_text("{")
    with pytest.raises(DataError, match=r"not JSON \(JSONDecodeError.*expected the COCO layout"):
        read_detection(folder, "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line[:-9], "line 2: JSONDecodeError.*expected a JSON object with ID and gtboxes"),
        (lambda line: "[]", "line 2: TypeError"),
        (lambda line: '{"ID": "1,val"}', "line 2: KeyError: 'gtboxes'; expected a JSON object with ID and gtboxes"),
        (lambda line: line.replace("1,val", "0,val"), "line 2: 0,val is in an earlier line already"),
        (lambda line: line.replace("1,val", "gone"), r"line 2: no image .*Images/gone\.jpg"),
        (lambda line: line.replace("1,val", "text"), r"line 2: .*Images/text\.jpg cannot be read as an image"),
    ],
)
def test_crowdhuman_names_bad_lines(tmp_path, change, message):
    folder = write_crowdhuman(tmp_path)
    (folder / "Images" / "text.jpg").write_text("no image")
    _line(folder, 2, change)
    with pytest.raises(DataError, match=r"annotation_val\.odgt: " + message + ".*more than 5 % are bad"):
        read_detection(folder, "val")
    write_crowdhuman(tmp_path, frames=20)
    _line(folder, 2, change)
    split = read_detection(folder, "val")
    assert (len(split.samples), len(split.problems)) == (19, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fbox": [99, 8, 20, 30]}, r"line 2, box 1: its box \[99, 8, 20, 30\] covers nothing of an image of 64x48"),
        ({"vbox": [0, 8, math.nan, 30]}, "line 2, box 1: its visible box is not finite"),
        ({"tag": "pedestrian"}, "line 2, box 1: unknown tag 'pedestrian'; expected person or mask"),
        ({"tag": None, "fbox": "none"}, "line 2, box 1: ValueError.*expected tag and fbox"),
    ],
)
def test_crowdhuman_names_bad_boxes(tmp_path, change, message):
    folder = write_crowdhuman(tmp_path)

    def edit(line):
        record = json.loads(line)
        record["gtboxes"][0].update(change)
        return json.dumps(record)

    _line(folder, 2, edit)
    with pytest.raises(DataError, match=r"annotation_val\.odgt: " + message + ".*more than 5 % are bad"):
        read_detection(folder, "val")
    write_crowdhuman(tmp_path, frames=20)
    _line(folder, 2, edit)
    split = read_detection(folder, "val")
    assert len(split.samples[1].target.boxes) == 3
    assert len(split.problems) == 1


def test_crowdhuman_without_visible_boxes(tmp_path):
    folder = write_crowdhuman(tmp_path)
    _line(folder, 1, lambda line: line.replace("vbox", "other"))
    people = read_detection(folder, "val").samples[0].target
    assert people.visible.tolist() == people.boxes.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "cat"}, "object 1: unknown label 'cat'; expected pedestrian, ignore, person"),
        ({"bbox": [70, 8, 9, 9]}, r"object 1: its box \[70, 8, 9, 9\] covers nothing"),
        ({"bboxVis": [1, 2]}, "object 1: ValueError: a box of 2 numbers; expected label, bbox and bboxVis"),
        ({"bboxVis": [math.inf, 0, 1, 1]}, "object 1: its visible box is not finite"),
    ],
)
def test_citypersons_names_bad_boxes(tmp_path, change, message):
    folder = write_citypersons(tmp_path)
    path = folder / "gtBboxCityPersons" / "val" / "bochum" / "bochum_000001_000019_gtBboxCityPersons.json"
    edit_json(path, lambda d: d["objects"][0].update(change))
    with pytest.raises(DataError, match=rf"bochum/{path.name}, {message}.*more than 5 % are bad"):
        read_detection(folder, "val")
    write_citypersons(tmp_path, frames=20)
    edit_json(path, lambda d: d["objects"][0].update(change))
    split = read_detection(folder, "val")
    assert (len(split.samples), len(split.problems)) == (20, 1)


def test_citypersons_names_bad_files(tmp_path):
    folder = write_citypersons(tmp_path)
    root = folder / "gtBboxCityPersons" / "val"
    (root / "aachen" / "aachen_000000_000019_gtBboxCityPersons.json").write_text("{")
    with pytest.raises(DataError, match=r"val: aachen/aachen_000000_.*: .*not JSON .*more than 5 % are bad"):
        read_detection(folder, "val")
    write_citypersons(tmp_path, frames=20)
    (folder / "leftImg8bit" / "val" / "bochum" / "bochum_000001_000019_leftImg8bit.png").unlink()
    split = read_detection(folder, "val")
    assert len(split.samples) == 19
    assert re.search(r"bochum_000001_.*: no image .*bochum_000001_000019_leftImg8bit\.png", split.problems[0])
    for path in root.rglob("*.json"):
        path.unlink()
    with pytest.raises(DataError, match="val: no frames"):
        read_detection(folder, "val")


def test_no_layout(tmp_path):
    known = r"CrowdHuman: annotation_val\.odgt.*CityPersons: gtBboxCityPersons/val/.*COCO: annotations/instances_val"
    with pytest.raises(DataError, match=f"'val' is in none of the layouts known here. {known}"):
        read_detection(tmp_path, "val")


def test_real_data(shared):
    folder = shared / "data" / "coco_person"
    counts = {"train": (61, 254), "val": (73, 350)}
    for name, (frames, people) in counts.items():
        split = read_detection(folder, name)
        assert (len(split.samples), split.problems) == (frames, ())
        assert sum(len(sample.target.boxes) for sample in split.samples) == people
