"""Re-identification sets as they are published."""

import re
import shutil

import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.reid import Identity
from dpal_edge.tasks.reid_layouts import read_reid
from tests.tasks.layouts import write_market
from tests.tasks.reid_fixtures import write_cuhk03_np, write_msmt


def test_market_needs_only_the_part_that_is_read(tmp_path):
    shutil.rmtree(write_market(tmp_path) / "bounding_box_train")
    assert len(read_reid(tmp_path, "query").samples) == 6
    assert len(read_reid(tmp_path, "gallery").samples) == 7
    assert read_reid(tmp_path, "query").protocol == "market1501"
    with pytest.raises(DataError, match="bounding_box_train: missing; expected the Market-1501 layout"):
        read_reid(tmp_path, "train")


@pytest.mark.parametrize("names", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt(tmp_path, names):
    train, test = names
    write_msmt(tmp_path, train=train, test=test)
    split = read_reid(tmp_path, "train")
    assert (len(split.samples), split.protocol, split.problems) == (18, "msmt17", ())  # list_train and list_val
    assert split.samples[1].image == tmp_path / train / "0000" / "0000_001_15_0303morning_0016_0.jpg"
    assert split.samples[1].target == Identity(person=0, camera=15)
    assert all(sample.image.is_file() for sample in split.samples)
    shutil.rmtree(tmp_path / train)
    assert [s.target for s in read_reid(tmp_path, "query").samples] == [Identity(i, 15) for i in range(6)]
    assert [s.target for s in read_reid(tmp_path, "gallery").samples] == [Identity(i, 1) for i in range(6)]
    with pytest.raises(DataError, match="/train: missing; expected the MSMT17 layout: list_train"):
        read_reid(tmp_path, "train")


def test_msmt_in_the_layout_of_market(tmp_path):
    market = write_market(tmp_path)
    for path in (market / "query").iterdir():
        path.rename(path.with_name(path.name.replace("_c1s1_", "_c12_")))
    assert read_reid(market, "query").samples[0].target == Identity(1, 12)


def test_msmt_needs_its_lists(tmp_path):
    write_msmt(tmp_path)
    (tmp_path / "list_val.txt").unlink()
    with pytest.raises(DataError, match=r"list_val\.txt: missing; expected the MSMT17 layout"):
        read_reid(tmp_path, "train")
    (tmp_path / "list_query.txt").write_text("\n")
    with pytest.raises(DataError, match=r"list_query\.txt: names no images"):
        read_reid(tmp_path, "query")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda row: row.rsplit(maxsplit=1)[0], "' tells no image, camera and person; expected the MSMT17 layout"),
        (lambda row: row.replace("_15_", "_x_"), "' tells no image, camera and person"),
        (lambda row: row.replace("morning", "evening"), "no image "),
        (
            lambda row: "0000/0000_003_15_0303morning_0018_0.jpg 0",
            "0018_0.jpg is listed before; expected each image once",
        ),
    ],
)
def test_msmt_leaves_out_bad_rows_and_stops_at_many(tmp_path, change, problem):
    path = write_msmt(tmp_path, people=20) / "list_query.txt"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:4], change(rows[4]), *rows[5:]]))
    split = read_reid(tmp_path, "query")
    assert len(split.samples) == 19
    assert len(split.problems) == 1
    assert re.search(f"{tmp_path}: list_query.txt, line 5: .*{problem}", split.problems[0])
    path.write_text("\n".join([*rows[:4], change(rows[4]), *rows[5:19]]))
    with pytest.raises(DataError, match=rf"list_query\.txt, line 5: .*{problem}.*more than 5 % are bad"):
        read_reid(tmp_path, "query")


def test_cuhk_asks_for_one_kind_of_boxes(tmp_path):
    write_cuhk03_np(tmp_path)
    labeled, detected = tmp_path / "labeled", tmp_path / "detected"
    wanted = rf"give the folder of one of them: {labeled} \(boxes drawn by hand\) or {detected} \(boxes of a detector\)"
    with pytest.raises(DataError, match=wanted):
        read_reid(tmp_path, "train")
    for kind in (labeled, detected):
        assert [s.target for s in read_reid(kind, "gallery").samples] == [Identity(i, 2) for i in (1, 2, 3)]
    shutil.rmtree(detected)
    with pytest.raises(DataError, match=rf"one of them: {labeled} \(boxes drawn by hand\)$"):
        read_reid(tmp_path, "train")


def test_other_layouts_are_told_what_is_expected(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"'query' is in none of the .*Market-1501: .*MSMT17: .*CUHK03-NP: labeled/ or"):
        read_reid(tmp_path, "query")
    write_market(tmp_path / "Market-1501-v15.09.15")
    with pytest.raises(DataError, match=r"Did you mean .*Market-1501-v15\.09\.15\?"):
        read_reid(tmp_path, "query")


def test_real_data(shared):
    split = read_reid(shared / "data" / "cuhk01", "gallery")
    assert (len(split.samples), split.problems) == (648, ())
