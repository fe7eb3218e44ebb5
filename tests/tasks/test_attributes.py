"""The table of attributes and its scores."""

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.attributes import attribute_metrics, read_attributes
from tests.tasks.layouts import ATTRIBUTES, write_attributes


@pytest.fixture
def table(tmp_path):
    return write_attributes(tmp_path / "people")


def test_reader(table):
    split = read_attributes(table, "val")
    assert split.labels == ATTRIBUTES
    assert len(split.samples) == 16
    assert split.samples[3].image == table / "images" / "019.png"
    assert split.samples[3].target.tolist() == [True, True, False]


def test_reader_needs_no_image_of_another_split(table):
    (table / "images" / "000.png").unlink()
    assert len(read_attributes(table, "val").samples) == 16
    with pytest.raises(DataError, match=r"attributes\.csv, line 2: no image .*000\.png"):
        read_attributes(table, "train")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("image,split", "file,split", "its columns are file, split, red, bright, never; expected attributes.csv with"),
        ("red,bright", "red,red", "its columns are image, split, red, red, never"),
        ("000.png,train,0", "000.png,train,2", "line 2: '.*000.png,train,2,0,0'; expected image, split and 3 values"),
        ("000.png,train,0", "000.png,train", "line 2: .*expected image, split and 3 values"),
        (",val,", ",test,", "no row has the split 'val'; there are: test, train"),
    ],
)
def test_reader_names_what_is_wrong(table, old, new, message):
    path = table / "attributes.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        read_attributes(table, "val")


def test_reader_needs_a_table(table):
    path = table / "attributes.csv"
    path.write_text("")
    with pytest.raises(DataError, match="its columns are none"):
        read_attributes(table, "val")
    path.write_text("image,split,red\n" + "x" * 200_000)
    with pytest.raises(DataError, match="not a table"):
        read_attributes(table, "val")
    path.unlink()
    with pytest.raises(DataError, match=r"attributes\.csv: missing; expected"):
        read_attributes(table, "val")


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
    assert len(read_attributes(folder, "train").samples) == 1679
    val = read_attributes(folder, "val")
    assert (len(val.samples), len(val.labels)) == (210, 16)
