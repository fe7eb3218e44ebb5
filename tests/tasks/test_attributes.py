"""The table of attributes and its scores."""

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.attributes import attribute_metrics, read_attribute_table
from tests.tasks.layouts import ATTRIBUTES, write_attributes


@pytest.fixture
def table(tmp_path):
    return write_attributes(tmp_path / "people")


def test_reader(table):
    split = read_attribute_table(table, "val")
    assert split.labels == ATTRIBUTES
    assert len(split.samples) == 16
    assert split.samples[3].image == table / "images" / "019.png"
    assert split.samples[3].target.tolist() == [True, True, False]


def test_reader_needs_no_image_of_another_split(table):
    (table / "images" / "000.png").unlink()
    assert len(read_attribute_table(table, "val").samples) == 16
    with pytest.raises(DataError, match=r"attributes\.csv: line 2: no image .*000\.png"):
        read_attribute_table(table, "train")


def test_reader_leaves_out_bad_rows_and_stops_at_many(tmp_path):
    path = write_attributes(tmp_path, images=40) / "attributes.csv"
    rows = path.read_text().splitlines()
    rows[5] += ",1"  # one value too many
    rows[7] = rows[7].replace(",train,", ",trial,")  # of another split
    path.write_text("\n".join([*rows[:10], "", *rows[10:], rows[12]]) + "\n")
    split = read_attribute_table(tmp_path, "train")
    assert len(split.samples) == 38
    assert split.problems == (
        f"{path}: line 6: '{rows[5]}'; expected image, split and 3 values of 0 or 1",
        f"{path}: line 83: images/011.png is in line 14 already; expected one row per image",
    )
    assert read_attribute_table(tmp_path, "val").problems == ()
    path.write_text(path.read_text().replace(rows[20], "images/020.png"))  # of no split: of any
    with pytest.raises(DataError, match=r"line 6: .* \(and 2 more of 40\); more than 5 % are bad"):
        read_attribute_table(tmp_path, "train")


def test_an_image_of_two_splits_belongs_to_the_first(table):
    path = table / "attributes.csv"
    path.write_text(path.read_text().replace("images/020.png", "images/003.png"))
    with pytest.raises(DataError, match=r"line 22: images/003\.png is in line 5 already"):
        read_attribute_table(table, "val")


@pytest.mark.parametrize(
    ("old", "new", "split", "message"),
    [
        (
            "image,split",
            "file,split",
            "val",
            "its columns are file, split, red, bright, never; expected attributes.csv with",
        ),
        ("red,bright", "red,red", "val", "its columns are image, split, red, red, never"),
        (
            "000.png,train,0",
            "000.png,train,2",
            "train",
            "line 2: '.*000.png,train,2,0,0'; expected image, split and 3 values",
        ),
        ("000.png,train,0", "000.png,train", "train", "line 2: .*expected image, split and 3 values"),
        (",val,", ",test,", "val", "no row has the split 'val'; there are: test, train"),
    ],
)
def test_reader_names_what_is_wrong(table, old, new, split, message):
    path = table / "attributes.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        read_attribute_table(table, split)


def test_reader_needs_a_table(table):
    path = table / "attributes.csv"
    path.write_text("")
    with pytest.raises(DataError, match="its columns are none"):
        read_attribute_table(table, "val")
    path.write_text("image,split,red\n" + "x" * 200_000)
    with pytest.raises(DataError, match="not a table"):
        read_attribute_table(table, "val")
    path.unlink()
    with pytest.raises(DataError, match=r"attributes\.csv: missing; expected"):
        read_attribute_table(table, "val")


def test_scores_by_hand():
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
    predicted = np.array([[1, 0, 0], [1, 0, 1], [1, 1, 0], [0, 0, 0]], bool)
    scores = attribute_metrics(predicted, truth)
    # First attribute: 2 of 2 found, 1 of 2 refused. Second: 1 of 2, 2 of 2. Nobody has the third: it is left out.
    assert scores["mA"] == pytest.approx(((1 + 0.5) / 2 + (0.5 + 1) / 2) / 2)
    # Per person: 1/1, 1/3, 1/2, and 0/0 counts as 0.
    assert scores["accuracy"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 4)
    assert scores["precision"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 4)
    assert scores["recall"] == pytest.approx((1 + 1 / 2 + 1) / 4)
    assert scores["F1"] == pytest.approx(2 * 0.5 * 0.625 / 1.125)


def test_scores_agree_with_a_second_implementation():
    from sklearn.metrics import balanced_accuracy_score, jaccard_score, precision_score, recall_score

    rng = np.random.default_rng(0)
    truth = rng.random((200, 6)) < 0.4
    predicted = truth ^ (rng.random(truth.shape) < 0.3)
    scores = attribute_metrics(predicted, truth)
    balanced = [balanced_accuracy_score(truth[:, i], predicted[:, i]) for i in range(6)]
    assert scores["mA"] == pytest.approx(np.mean(balanced))
    for name, score in (("accuracy", jaccard_score), ("precision", precision_score), ("recall", recall_score)):
        assert scores[name] == pytest.approx(score(truth, predicted, average="samples", zero_division=0))


def test_extremes():
    truth = np.array([[1, 0], [0, 1]], bool)
    assert set(attribute_metrics(truth, truth).values()) == {1.0}
    nothing = attribute_metrics(np.zeros_like(truth), truth)
    assert nothing == {"mA": 0.5, "accuracy": 0.0, "precision": 0.0, "recall": 0.0, "F1": 0.0}
    with pytest.raises(DataError, match="no attribute of 2 that some of 1 people have and others lack"):
        attribute_metrics(truth[:1], truth[:1])


def test_reader_on_real_data(shared):
    folder = shared / "data" / "ccp"
    assert len(read_attribute_table(folder, "train").samples) == 1679
    val = read_attribute_table(folder, "val")
    assert (len(val.samples), len(val.labels)) == (210, 16)
