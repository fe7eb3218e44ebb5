"""Layouts are recognised, bad annotations counted, missing files named."""

import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.sample import Layout, Problems, Sample, Split, read_layout, read_rows, read_text, require


def _layout(name, *markers, expected="a file"):
    return Layout(name, markers, lambda folder, split: Split((Sample(folder / name, split),)), expected)


LAYOUTS = (
    _layout("first", "{split}_*.json", expected="{split}_labels.json"),
    _layout("second", "images/*", expected="images/"),
    _layout("refused", "*.pkl", expected=""),
)


def test_the_first_layout_whose_marker_is_there_is_read(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    assert read_layout(tmp_path, "val", LAYOUTS).samples == (Sample(tmp_path / "second", "val"),)
    (tmp_path / "val_labels.json").touch()
    assert read_layout(tmp_path, "val", LAYOUTS).samples == (Sample(tmp_path / "first", "val"),)
    assert read_layout(tmp_path, "train", LAYOUTS).samples == (Sample(tmp_path / "second", "train"),)
    (tmp_path / "images" / "x.pkl").touch()
    assert read_layout(tmp_path / "images", "val", LAYOUTS).samples[0].image.name == "refused"


def test_an_unknown_layout_is_told_what_is_expected(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder; expected a data set"):
        read_layout(tmp_path / "nowhere", "val", LAYOUTS)
    known = "'val' is in none of the layouts known here. first: val_labels.json; second: images/"
    with pytest.raises(DataError, match=f"{known}$"):
        read_layout(tmp_path, "val", LAYOUTS)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "val_labels.json").touch()
    with pytest.raises(DataError, match=rf"{known}\. Did you mean {tmp_path / 'inner'}\?$"):
        read_layout(tmp_path, "val", LAYOUTS)


def test_few_problems_are_told_and_many_stop(tmp_path):
    problems = Problems(tmp_path / "list.txt")
    assert problems.finish(0) == ()
    problems.add("line 3", "no image")
    assert problems.finish(19) == (f"{tmp_path / 'list.txt'}: line 3: no image",)
    with pytest.raises(DataError, match=r"list\.txt: line 3: no image; more than 5 % are bad, so nothing is read"):
        problems.finish(18)
    problems.add("line 4", "no image")
    with pytest.raises(DataError, match=r"line 3: no image \(and 1 more of 20\); more than 5 %"):
        problems.finish(18)


def test_files_are_read_or_named(tmp_path):
    path = tmp_path / "list.txt"
    with pytest.raises(DataError, match=r"list\.txt: missing; expected one id per line"):
        require(path, "one id per line")
    path.write_text("\ufeffa\n \n b \n", encoding="utf-8")
    assert read_rows(path, "ids") == [(1, "a"), (3, "b")]
    path.write_text("\n")
    with pytest.raises(DataError, match=r"list\.txt: names no images; expected ids"):
        read_rows(path, "ids")
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"list\.txt: cannot be read as text"):
        read_text(path, "ids")
    with pytest.raises(DataError, match="cannot be read as text"):
        read_text(tmp_path, "ids")
