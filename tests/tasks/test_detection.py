"""Metrics of detection: average precision, recall, miss rate of crowds and of parts, Jaccard index."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from dpal_edge.tasks.crowd_metrics import find_people, jaccard_index, miss_rate, recall, recall_at_precision
from dpal_edge.tasks.detection import People, detection_metrics
from dpal_edge.tasks.sample import Sample, Split
from tests.tasks.detection_fixtures import crowd_split, random_crowds

PERSON = [0, 0, 10, 20]


def _boxes(*boxes):
    return np.array(boxes, np.float32).reshape(-1, 4)


def _at(*places, box=PERSON):
    """The person's box, moved to the right by each of these."""
    return _boxes(*[[box[0] + x, box[1], box[2] + x, box[3]] for x in places])


def _scores(*scores):
    return np.array(scores, np.float32)


def _split(protocol, *people):
    samples = (
        Sample(Path(f"{i}.jpg"), People(boxes, np.array(ignore, bool), boxes))
        for i, (boxes, ignore) in enumerate(people)
    )
    return Split(tuple(samples), ("person",), protocol)


def test_precision_and_recall_by_hand():
    # Two people and one to ignore; a third frame is empty. In order: a hit, one in what is ignored, an alarm, a hit,
    # and one that finds again whom the first found.
    split = _split("coco", (_at(0, 100), [0, 1]), (_at(0), [0]), (_boxes(), []))
    predictions = [
        (_at(0, 102, 1), _scores(0.9, 0.8, 0.4)),
        (_at(3), _scores(0.6)),  # IoU 7 / 13
        (_at(50), _scores(0.7)),
    ]
    metrics = detection_metrics(predictions, split)
    assert list(metrics) == ["AP50", "AP", "recall50", "recall50@precision0.9"]
    # Precision 1 up to recall 1/2, then 2/3: 51 and 50 of 101 recall points. From an IoU of .55 on only the first.
    assert metrics["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert metrics["AP"] == pytest.approx((metrics["AP50"] + 9 * 51 / 101) / 10)
    assert metrics["recall50"] == 1
    assert metrics["recall50@precision0.9"] == 0.5


def test_metrics_without_boxes_or_people():
    nothing = [(_boxes(), _scores())]
    metrics = detection_metrics(nothing, _split("crowdhuman", (_at(0), [0])))
    expected = {"MR^-2": 1, "AP50": 0, "AP": 0, "recall50": 0, "recall50@precision0.9": 0, "JI": 0}
    assert metrics == pytest.approx(expected)
    for predictions in (nothing, [(_at(0), _scores(0.5))]):
        metrics = detection_metrics(predictions, _split("citypersons", (_at(0), [1])))
        assert all(math.isnan(value) for value in metrics.values())
        assert list(metrics)[:2] == ["MR^-2_reasonable", "MR^-2_heavy"]
    assert math.isnan(jaccard_index(nothing, [(_boxes(), np.zeros(0, bool))]))


def test_best_box_takes_the_person_it_overlaps_most():
    people = _at(0, 4), np.zeros(2, bool)
    # The better box finds the first, whom it covers; the second box, nearest to the first too, is left with the second.
    found = find_people([(_at(0, 1), _scores(0.9, 0.8))], [people])
    assert found.hits.tolist() == [True, True]
    assert (found.people, found.frames) == (2, 1)
    assert find_people([(_at(0, 0, 0), _scores(0.9, 0.8, 0.7))], [people]).hits.tolist() == [True, False, False]
    assert find_people([(_at(5), _scores(0.9))], [(_at(0), np.zeros(1, bool))]).hits.tolist() == [False]  # IoU 1/3
    exactly = _boxes([0, 0, 10, 10])  # IoU 1/2
    assert find_people([(exactly, _scores(0.9))], [(_at(0), np.zeros(1, bool))]).hits.tolist() == [True]


def test_ignored_boxes_take_many_and_by_their_own_area():
    region = _boxes([0, 0, 100, 100], PERSON)
    inside = np.array([True, False])
    predictions = [(_at(0, 20, 40, 96), _scores(0.5, 0.6, 0.7, 0.8))]  # of the last, 4 of 10 columns are inside
    found = find_people(predictions, [(region, inside)])
    assert found.hits.tolist() == [False, True]  # the alarm outside, then the person
    assert found.people == 1


def test_miss_rate_by_hand():
    # Ten frames, four people. Found, alarm, found: at 0.01 to 0.0562 alarms per frame 3/4 are missed; from 0.1 on 2/4.
    people = [(_at(0), np.zeros(1, bool))] * 4 + [(_boxes(), np.zeros(0, bool))] * 6
    predictions = (
        [(_at(0), _scores(0.9)), (_at(0), _scores(0.7))] + [(_boxes(), _scores())] * 7 + [(_at(0), _scores(0.8))]
    )
    found = find_people(predictions, people)
    assert found.hits.tolist() == [True, False, True]
    assert miss_rate(found) == pytest.approx(0.75 ** (4 / 9) * 0.5 ** (5 / 9))
    assert recall(found) == 0.5
    assert recall_at_precision(found, 2 / 3) == 0.5
    assert recall_at_precision(found, 0.7) == 0.25


def test_miss_rate_has_a_floor():
    found = find_people([(_at(0), _scores(0.9))], [(_at(0), np.zeros(1, bool))])
    assert miss_rate(found) == pytest.approx(1e-10)
    # An alarm before everything else: everybody is missed up to 0.5623 per frame, nobody at 1.
    found = find_people([(_at(50, 0), _scores(0.9, 0.5))], [(_at(0), np.zeros(1, bool))])
    assert miss_rate(found) == pytest.approx(1e-10 ** (1 / 9))


def test_parts_of_citypersons_by_hand():
    def frame(height, visible):
        box, seen = _boxes([0, 0, 20, height]), _boxes([0, 0, 20, height * visible])
        return Sample(Path("x.png"), People(box, np.zeros(1, bool), seen))

    people = [frame(50, 0.65), frame(100, 0.5), frame(100, 0.1), frame(49, 1)]
    everybody = [(person.target.boxes, _scores(0.9)) for person in people]
    split = Split(tuple(people), ("person",), "citypersons")
    metrics = detection_metrics(everybody, split)
    assert metrics["MR^-2_reasonable"] == metrics["MR^-2_heavy"] == pytest.approx(1e-10)
    # The first, of whom just 65 % can be seen, is in both parts; the second in the heavy one, the others in none.
    metrics = detection_metrics([everybody[0], (_boxes(), _scores()), *everybody[2:]], split)
    assert metrics["MR^-2_heavy"] == pytest.approx(0.5)
    assert metrics["MR^-2_reasonable"] == pytest.approx(1e-10)
    # A false alarm in each frame, better than all: it counts from a height of 40 on.
    for height, expected in ((39, 1e-10), (41, 1e-10 ** (1 / 9))):
        alarm = _boxes([500, 0, 520, height])
        found = [(np.concatenate([alarm, boxes]), _scores(0.95, 0.9)) for boxes, _ in everybody]
        assert detection_metrics(found, split)["MR^-2_reasonable"] == pytest.approx(expected)


def test_jaccard_index_by_hand():
    # Above a score of .3: one pair, one alarm, one missed: 1/3. Below also an alarm: 1/4. In the other frame 1/1.
    people = [(_at(0, 50), np.zeros(2, bool)), (_at(0, 100), np.array([False, True])), (_boxes(), np.zeros(0, bool))]
    predictions = [
        (_at(0, 200, 300), _scores(0.9, 0.8, 0.3)),
        (_at(0, 101), _scores(0.9, 0.9)),  # the second lies in what is ignored
        (_boxes(), _scores()),  # does not count
    ]
    assert jaccard_index(predictions, people) == pytest.approx((1 / 3 + 1) / 2)


def test_jaccard_index_pairs_as_many_as_possible():
    # The better box overlaps both people and the first one more; the other box only the first: two pairs.
    people = [(_at(0, 4), np.zeros(2, bool))]
    assert jaccard_index([(_at(1, -2), _scores(0.9, 0.8))], people) == 1


def test_metrics_are_those_of_pycocotools_and_citypersons():
    predictions, truths, visible = random_crowds()
    metrics = detection_metrics(predictions, crowd_split("citypersons", truths, visible))
    # pycocotools 2.0.11, and the evaluation that CityPersons publishes, on the same boxes.
    assert metrics["AP50"] == pytest.approx(0.5520909783945451)
    assert metrics["AP"] == pytest.approx(0.22111959501938613)
    assert metrics["recall50"] == pytest.approx(0.7333333333333333)
    assert metrics["MR^-2_reasonable"] == pytest.approx(0.5445611051577616)
    assert metrics["MR^-2_heavy"] == pytest.approx(0.5764779954299267)


def test_crowd_metrics_are_nearly_those_of_crowdhuman():
    predictions, truths, visible = random_crowds()
    metrics = detection_metrics(predictions, crowd_split("crowdhuman", truths, visible))
    # CrowdHuman's toolkit on the same boxes, whose definitions differ as the docstrings say.
    assert metrics["MR^-2"] == pytest.approx(0.7329054289394719, abs=0.01)
    assert metrics["AP50"] == pytest.approx(0.5426799893811749, abs=0.011)
    assert metrics["JI"] == pytest.approx(0.39002453885210103, abs=0.002)


def _overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared), shared / areas[0]


def test_miss_rate_and_jaccard_index_as_plain_loops_find_them():
    predictions, truths, _ = random_crowds(frames=30, seed=11)
    events, ratios = [], []
    for (boxes, scores), (people, ignore) in zip(predictions, truths, strict=True):
        real, regions = people[~ignore].astype(float), people[ignore].astype(float)
        left = list(range(len(real)))
        for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
            box = boxes[i].astype(float)
            best = max(left, key=lambda j: _overlap(box, real[j])[0], default=None)
            if best is not None and _overlap(box, real[best])[0] >= 0.5:
                left.remove(best)
                events.append((-scores[i], True))
            elif not any(_overlap(box, region)[1] >= 0.5 for region in regions):
                events.append((-scores[i], False))
        ratios.append([_ratio(boxes[scores > t / 10].astype(float), real, regions) for t in range(10)])
    total = sum(int((~ignore).sum()) for _, ignore in truths)
    missed = []
    for exponent in range(9):
        hits = alarms = 0
        for _, hit in sorted(events):
            alarms += not hit
            if alarms / len(truths) > 10 ** (exponent / 4 - 2):
                break
            hits += hit
        missed.append(1 - hits / total)
    assert miss_rate(find_people(predictions, truths)) == pytest.approx(float(np.exp(np.mean(np.log(missed)))))
    assert jaccard_index(predictions, truths) == pytest.approx(np.nanmean(np.array(ratios), axis=0).max())


def _ratio(boxes, real, regions):
    edges = np.array([[_overlap(box, person)[0] > 0.5 for person in real] for box in boxes]).reshape(
        len(boxes), len(real)
    )
    pairs = maximum_bipartite_matching(csr_matrix(edges), perm_type="column")
    counted = [i for i, box in enumerate(boxes) if pairs[i] >= 0 or not any(_overlap(box, r)[1] > 0.5 for r in regions)]
    wanted = [
        j for j, person in enumerate(real) if j in pairs or not any(_overlap(person, r)[1] > 0.5 for r in regions)
    ]
    count = int((pairs >= 0).sum())
    union = len(counted) + len(wanted) - count
    return count / union if union else math.nan
