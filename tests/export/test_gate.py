"""Agreement with float32, by hand; and the gate on labels."""

import numpy as np
import pytest

from dpal_edge.evaluate.predictor import HeadInfo
from dpal_edge.export.gate import Labelled, judge_agreement
from dpal_edge.manifest import HeadSpec
from tests.tasks import layouts

SIZE = (64, 32)


def head(name, shape, labels=(), kind=""):
    return HeadSpec(name=name, task=name, shape=shape, labels=labels, kind=kind)


def judged(spec, reference, found):
    verdicts = judge_agreement([spec], SIZE, {spec.name: reference}, {spec.name: found})
    return {verdict.measure: (verdict.found, verdict.passed) for verdict in verdicts}


def test_equal_outputs_agree():
    rng = np.random.default_rng(0)
    specs = [
        head("embedding", (8,)), head("pose", (3, 192), ("a", "b", "c"), "simcc"),
        head("parsing", (2, 8, 4), ("x", "y")), head("attributes", (4,), ("p", "q", "r", "s")),
        head("detection", (5, 5)),
    ]  # fmt: skip
    outputs = {spec.name: rng.normal(size=(6, *spec.shape)).astype(np.float32) for spec in specs}
    outputs["detection"][..., 2:4] = outputs["detection"][..., :2] + 9  # boxes have a width and a height
    verdicts = judge_agreement(specs, SIZE, outputs, outputs)
    assert {verdict.head for verdict in verdicts} == set(outputs)
    assert all(verdict.passed and verdict.found == pytest.approx(1) for verdict in verdicts)


def test_embeddings_by_hand():
    spec = head("embedding", (2,))
    reference = np.array([[1, 0], [0, 2], [1, 1], [-1, 3]], np.float32)
    turned = np.array([[0.6, 0.8], [-1.6, 1.2], [-0.2, 1.4], [-3, 1]], np.float32)  # by the same angle, cosine 0.6
    found = judged(spec, reference, turned)
    assert found["cosine"] == (pytest.approx((0.6 * 3 + 6 / 10) / 4), False)
    assert found["CKA"][0] > found["cosine"][0]


def test_rank_correlation_by_hand():
    """The first of three changes its nearest, and so the last has another one; the second sees the same order."""
    spec = head("embedding", (2,))
    unit = [np.stack([np.cos(a), np.sin(a)], 1).astype(np.float32) for a in np.deg2rad([[0, 20, 60], [42, 20, 60]])]
    # Two ranks of three are exchanged in two rows: 1 - 6 * 2 / (3 * 8) is a half.
    assert judged(spec, *unit)["rank correlation"] == (pytest.approx((0.5 + 1 + 0.5) / 3), False)


def test_joints_count_where_they_are_seen():
    spec = head("pose", (2, 192), ("a", "b"), "simcc")

    def at(*places):
        raw = np.zeros((1, 2, 192), np.float32)
        for joint, (x, y, height) in enumerate(places):
            raw[0, joint, 2 * x] = raw[0, joint, 64 + 2 * y] = height
        return raw

    reference = at((10, 20, 12), (5, 5, 0.1))  # the second is hardly seen
    assert judged(spec, reference, at((11, 20, 12), (25, 50, 12)))["joints that stay"] == (1.0, True)
    assert judged(spec, reference, at((12, 20, 12), (5, 5, 0.1)))["joints that stay"] == (0.0, False)  # 2 % of 64: 1.28


def test_classes_and_decisions_by_hand():
    spec = head("parsing", (2, 1, 4), ("x", "y"))
    reference = np.zeros((1, 2, 1, 4), np.float32)
    reference[0, 1] = [[1, 1, -1, -1]]
    found = reference.copy()
    found[0, 1, 0, 0] = -1
    assert judged(spec, reference, found)["pixels of the same class"] == (0.75, False)
    spec = head("attributes", (4,), ("p", "q", "r", "s"))
    assert judged(spec, np.array([[1, -1, 2, 0.1]], np.float32), np.array([[1, 1, 2, 0.1]], np.float32)) == {
        "same decisions": (0.75, False)
    }


def test_people_by_hand():
    spec = head("detection", (3, 5))
    people = np.array([[[0, 0, 10, 30, 5], [20, 0, 30, 30, 5], [0, 40, 5, 60, -5]]], np.float32)
    other = people.copy()
    other[0, 1, :4] += 9  # elsewhere
    assert judged(spec, people, other)["people found again, F1"] == (0.5, False)
    other[0, 1, 4] = -5  # not found at all: one of one, of two
    assert judged(spec, people, other)["people found again, F1"][0] == pytest.approx(2 / 3)
    nobody = np.full_like(people, -5)
    assert judged(spec, nobody, nobody)["people found again, F1"] == (1.0, True)


class Says:
    """A predictor of attributes that knows how the images were painted, and says the contrary of the first few."""

    size = (32, 16)

    def __init__(self, wrong=0):
        self.heads = {"attributes": HeadInfo("attributes", "linear", layouts.ATTRIBUTES)}
        self.description = {"model": "says"}
        self._wrong = wrong

    def __call__(self, images, task):
        red, blue = images[..., 0].mean((1, 2)), images[..., 2].mean((1, 2))
        raw = np.stack([red - blue, np.maximum(red, blue) - 120, np.full(len(images), -1)], 1).astype(np.float32)
        raw[:, : self._wrong] *= -1
        return raw


def test_labels_decide(tmp_path):
    folder = layouts.write_attributes(tmp_path)
    labelled = Labelled.measure([f"attributes={folder}"], Says(), 0.5, None)
    metric, value = labelled.reference["attributes"]
    assert metric == "mA"
    [same] = labelled.judge(Says())
    assert (same.head, same.measure, same.passed) == ("attributes", "mA", True)
    assert same.least == pytest.approx(value - 0.005)
    assert value == 1
    [half] = labelled.judge(Says(wrong=1))  # one of the two attributes that vary
    assert (half.found, half.passed) == (0.5, False)
