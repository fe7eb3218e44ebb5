from itertools import permutations

import numpy as np
import pytest

from dpal_edge.errors import ConfigError
from dpal_edge.runtime import Tracker
from dpal_edge.runtime.assignment import assign

# A large common part, as the embeddings of a vision transformer have: A and B have cosine 1 / 1.09 = 0.917.
A = np.array([10, 3, 0, 0], np.float32)
B = np.array([10, 0, 3, 0], np.float32)
C = np.array([10, 0, 0, 3], np.float32)


def at(*lefts):
    """Boxes of 20 x 40 pixels."""
    return np.array([(left, 0, left + 20, 40) for left in lefts], np.float32).reshape(-1, 4)


def test_crossing_people_keep_their_ids():
    tracker = Tracker()
    assert tracker.update(at(0, 40), np.stack([A, B])) == [1, 2]
    for step in range(4, 44, 4):  # they meet at 20 and leave on the other's side
        assert tracker.update(at(step, 40 - step), np.stack([A, B])) == [1, 2]


def test_place_alone_confuses_people_who_swap():
    # The same two boxes with swapped looks: only appearance can tell.
    tracker = Tracker()
    tracker.update(at(0, 8), np.stack([A, B]))
    assert tracker.update(at(0, 8), np.stack([B, A])) == [2, 1]
    place_only = Tracker()
    place_only.update(at(0, 8))
    assert place_only.update(at(0, 8)) == [1, 2]


def test_place_keeps_a_person_whose_looks_change():
    tracker = Tracker()
    assert tracker.update(at(0), A[None]) == [1]
    assert tracker.update(at(2), B[None]) == [1]


def test_a_lost_person_is_found_elsewhere_by_looks():
    tracker = Tracker()
    tracker.update(at(0, 100), np.stack([A, B]))
    for _ in range(10):
        assert tracker.update(at(100), B[None]) == [2]
    assert tracker.update(at(100, 300), np.stack([B, 2 * A])) == [2, 1]  # the length does not matter


def test_a_new_person_gets_a_new_id_despite_a_high_cosine():
    tracker = Tracker()
    tracker.update(at(0, 100), np.stack([A, B]))
    for _ in range(10):
        tracker.update(at(100), B[None])
    # C has cosine 0.917 with both A (lost) and B: above the threshold, but it stands out for neither.
    assert tracker.update(at(100, 300), np.stack([B, C])) == [2, 3]


def test_a_lone_stranger_is_not_taken_for_someone_lost():
    tracker = Tracker()
    for _ in range(5):
        tracker.update(at(0), A[None])
    for _ in range(10):
        tracker.update(at())
    # Nobody else is known to compare with, and cosine 0.917 is above the threshold; but A never varied that much.
    assert tracker.update(at(0), B[None]) == [2]
    assert tracker.update(at(0, 300), np.stack([B, A])) == [2, 1]


def test_a_person_who_varies_may_vary_when_found_again():
    tracker = Tracker()
    looks = [A + np.array([0, 0, 1.5 * (-1) ** i, 0], np.float32) for i in range(40)]
    for look in looks:
        tracker.update(at(0), look[None])
    for _ in range(10):
        tracker.update(at())
    assert tracker.update(at(300), looks[0][None]) == [1]


def test_nobody_inherits_the_place_of_someone_long_gone():
    tracker = Tracker(similarity=0.95)
    tracker.update(at(0), A[None])
    for _ in range(4):
        assert tracker.update(at()) == []
    assert tracker.update(at(0), B[None]) == [1]  # four frames without a detection: bridged by place
    for _ in range(5):
        tracker.update(at())
    assert tracker.update(at(0), C[None]) == [2]


def test_tracks_end_after_max_age():
    tracker = Tracker(max_age=6)
    tracker.update(at(0), A[None])
    for _ in range(6):
        tracker.update(at())
    assert tracker.update(at(0), A[None]) == [1]
    for _ in range(7):
        tracker.update(at())
    assert tracker.update(at(0), A[None]) == [2]


def test_the_embedding_is_a_running_mean():
    tracker = Tracker()
    for unit in ([1, 0], [0, 1]):
        tracker.update(at(0), np.array([unit], np.float32))
    np.testing.assert_allclose(tracker._tracks[0].embedding, np.array([0.9, 0.1]) / np.hypot(0.9, 0.1), rtol=1e-6)


def test_walkers_who_cross_keep_their_ids_by_velocity():
    tracker = Tracker()
    for step in range(0, 84, 6):  # they meet at 39, in the middle between two frames
        assert tracker.update(at(step, 78 - step)) == [1, 2]


def test_a_fast_walker_who_was_missed_is_where_the_velocity_leads():
    tracker = Tracker()
    for step in range(10):
        assert tracker.update(at(8 * step)) == [1]
    for _ in range(4):
        assert tracker.update(at()) == []
    # The last box, at 72, is 40 pixels away: twice its width.
    assert tracker.update(at(8 * 14, 72)) == [1, 2]


def test_a_box_that_grows_to_both_sides_does_not_move():
    tracker = Tracker()
    for step in range(10):
        box = np.float32([50 - 3 * step, 0, 70 + 3 * step, 40])
        assert tracker.update(box[None]) == [1]
    for _ in range(3):
        tracker.update(at())
    aside = np.float32([12, 0, 12, 0])
    assert tracker.update(np.stack([box - aside, box, box + aside])) == [2, 1, 3]


@pytest.mark.parametrize("seconds", [0.04, 0.5])
def test_a_prediction_scales_with_time(seconds):
    tracker = Tracker()
    for step in range(10):
        assert tracker.update(at(4 * step), seconds=0.04) == [1]  # 100 pixels per second
    away = 36 + 100 * seconds
    assert tracker.update(at(away, away - 21, away + 21), seconds=seconds) == [1, 2, 3]


def test_frames_that_come_in_a_burst_do_not_look_like_speed():
    tracker = Tracker()
    for step in range(5):
        assert tracker.update(at(4 * step), seconds=0.0) == [1]  # a stalled stream delivers all it had kept
    assert tracker.update(at(20), seconds=0.04) == [1]


def test_no_place_is_expected_after_a_long_pause():
    tracker = Tracker()
    tracker.update(at(0))
    assert tracker.update(at(0), seconds=2.0) == [1]
    assert tracker.update(at(0), seconds=2.1) == [2]


def test_someone_found_elsewhere_has_no_velocity():
    tracker = Tracker()
    tracker.update(at(0), A[None])
    assert tracker.update(at(200), A[None]) == [1]  # 5000 pixels per second, were it a walk
    assert tracker.update(at(200)) == [1]


@pytest.mark.parametrize("seconds", [-0.1, float("nan"), float("inf")])
def test_bad_seconds(seconds):
    with pytest.raises(ValueError, match=r"seconds is .*, expected 0 or more since the previous update"):
        Tracker().update(at(0), seconds=seconds)


def test_a_low_score_continues_a_track_but_starts_none():
    tracker = Tracker(high=0.5)
    low, high = np.float32([0.2]), np.float32([0.9])
    assert tracker.update(at(0), scores=low) == [None]
    assert tracker.update(at(0), scores=high) == [1]
    for left in range(2, 20, 2):
        assert tracker.update(at(left), scores=low) == [1]
    assert tracker.update(at(300), scores=low) == [None]
    assert tracker.update(at(300), scores=np.float32([0.5])) == [2]  # the limit itself is high


def test_low_scores_come_second_and_never_by_looks():
    tracker = Tracker(high=0.5)
    tracker.update(at(0), A[None], np.float32([0.9]))
    # The low score fits the place better, the high one is asked first.
    assert tracker.update(at(0, 6), np.stack([A, A]), np.float32([0.2, 0.9])) == [None, 1]
    assert tracker.update(at(300), A[None], np.float32([0.2])) == [None]
    assert tracker.update(at(300), A[None], np.float32([0.9])) == [1]


def test_a_low_score_needs_more_overlap():
    tracker = Tracker(high=0.5)
    tracker.update(at(0), scores=np.float32([0.9]))
    assert tracker.update(at(10), scores=np.float32([0.2])) == [None]  # IoU 1/3
    assert tracker.update(at(10), scores=np.float32([0.9])) == [1]


@pytest.mark.parametrize(("high", "scores"), [(None, np.float32([0.1, 0.9])), (0.5, None)])
def test_without_limit_or_scores_all_are_alike(high, scores):
    assert Tracker(high=high).update(at(0, 100), None, scores) == [1, 2]


def test_smoothed_embeddings():
    tracker = Tracker(high=0.5)
    x, y = np.eye(2, dtype=np.float32)
    ids = tracker.update(at(0), x[None], np.float32([0.9]))
    np.testing.assert_allclose(tracker.smooth_embeddings(ids, x[None]), [[1, 0]])
    seen = np.stack([2 * y, 3 * y])
    ids = tracker.update(at(0, 300), seen, np.float32([0.9, 0.2]))
    assert ids == [1, None]
    mean = np.array([0.9, 0.1]) / np.hypot(0.9, 0.1)
    np.testing.assert_allclose(tracker.smooth_embeddings(ids, seen), [mean, y], rtol=1e-6)
    ids = tracker.update(at(0), y[None], np.float32([0.2]))  # a low score says nothing about looks
    np.testing.assert_allclose(tracker.smooth_embeddings(ids, y[None]), [mean], rtol=1e-6)


def test_smoothing_by_hand():
    tracker = Tracker(high=0.5)
    frames = [  # scores of two people, their values, what is expected
        ([0.9, 0.2], [[1, 0], [1, 1]], [[1, 0], [1, 1]]),  # the second has no track
        ([0.9, 0.2], [[0, 1], [0, 0]], [[0.9, 0.1], [0, 0]]),
        ([0.2, 0.9], [[0, 0], [0, 1]], [[0.9, 0.1], [0, 1]]),  # a low score adds nothing; a track begins
        ([0.9, 0.9], [[0.9, 0.1], [1, 1]], [[0.9, 0.1], [0.1, 1]]),
    ]
    for scores, values, expected in frames:
        given = np.float32(values)
        ids = tracker.update(at(0, 100), scores=np.float32(scores))
        np.testing.assert_allclose(tracker.smooth(ids, {"attributes": given})["attributes"], expected, atol=1e-6)
        np.testing.assert_array_equal(given, np.float32(values))  # the caller's own array stays


def test_smoothing_converges_and_damps_a_flicker():
    tracker = Tracker()
    for frame in range(60):
        flicker = 0.8 if frame % 2 else 0.4
        values = {"steady": np.float32([[0.0 if frame == 0 else 1.0]]), "flicker": np.float32([[flicker]])}
        smoothed = tracker.smooth(tracker.update(at(frame)), values)
        assert smoothed.keys() == values.keys()
        if frame >= 50:
            assert smoothed["steady"].item() == pytest.approx(1, abs=0.01)
            assert smoothed["flicker"].item() == pytest.approx(0.6, abs=0.02)


def test_what_is_returned_and_given_is_not_what_tracks_keep():
    tracker = Tracker()
    boxes = at(0)
    ids = tracker.update(boxes, A[None])
    boxes += 500
    value = np.float32([[1]])
    tracker.smooth(ids, {"a": value})["a"][:] = 5
    tracker.smooth_embeddings(ids, A[None])[:] = 0
    assert tracker.update(at(0), B[None]) == [1]
    assert tracker.smooth(ids, {"a": value})["a"] == 1
    assert np.linalg.norm(tracker.smooth_embeddings(ids, B[None])) == pytest.approx(1)


@pytest.mark.parametrize("embedded", [False, True])
def test_random_frames(embedded):
    for seed in range(20):
        rng, tracker = np.random.default_rng(seed), Tracker(max_age=3, high=0.5)
        last_seen = {}  # of each id, the frame
        for frame in range(30):
            boxes = random_boxes(rng)
            values = {"a": rng.random((len(boxes), 3), np.float32)}
            scores = rng.random(len(boxes), np.float32) if rng.random() < 0.8 else None
            embeddings = rng.normal(size=(len(boxes), 4)).astype(np.float32) if embedded else None
            ids = tracker.update(boxes, embeddings, scores, seconds=rng.choice([0, 0.001, 0.04, 0.5, 3600]))
            assert len(ids) == len(boxes)
            named = [i for i in ids if i is not None]
            assert len(set(named)) == len(named)
            for i in named:
                assert i in last_seen or i > max(last_seen, default=0)
                assert frame - last_seen.get(i, frame) <= 3 + 1
            last_seen |= dict.fromkeys(named, frame)
            smoothed = tracker.smooth(ids, values)["a"]
            assert smoothed.shape == values["a"].shape
            assert ((smoothed >= 0) & (smoothed <= 1)).all()


def random_boxes(rng):
    """Up to 7 boxes, some the same as others, without area, inside out, or very large."""
    places, sides = rng.uniform(-50, 100, (rng.integers(8), 2)), rng.uniform(0, 60, 2)
    boxes = np.concatenate([places, places + sides], axis=1)
    for box, kind in zip(boxes, rng.integers(8, size=len(boxes)), strict=True):
        if kind == 0:
            box[2:] = box[:2]
        elif kind == 1:
            box[:] = box[[2, 3, 0, 1]]
        elif kind == 2:
            box[:] = [-1e8, -1e8, 1e8, 1e8]
        elif kind == 3:
            box[:] = boxes[0]
    return boxes.astype(np.float32)


def test_ids_repeat_run_to_run():
    def ids():
        rng, tracker = np.random.default_rng(3), Tracker()
        return [tracker.update(at(*rng.uniform(0, 60, 4)), rng.normal(size=(4, 3))) for _ in range(20)]

    assert ids() == ids()


@pytest.mark.parametrize("bad", [{"max_age": 0}, {"similarity": 1.5}, {"margin": 0}])
def test_bad_parameters(bad):
    with pytest.raises(ConfigError, match=r"expected max_age of 1 or more, similarity in -1\.\.1 and margin above 0"):
        Tracker(**bad)


@pytest.mark.parametrize("high", [-0.1, 1.1])
def test_bad_limit_of_scores(high):
    with pytest.raises(ConfigError, match=r"high is .*, expected a score in 0\.\.1, or None"):
        Tracker(high=high)


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 4), (5, 3), (5, 5), (0, 3)])
def test_assignment_is_the_best_of_all(shape):
    for seed in range(10):
        cost = np.random.default_rng(seed).normal(size=shape)
        pairs = assign(cost)
        small = cost if shape[0] <= shape[1] else cost.T
        every = (
            sum(small[i, j] for i, j in enumerate(order)) for order in permutations(range(small.shape[1]), len(small))
        )
        assert len(pairs) == min(shape) == len({row for row, _ in pairs}) == len({column for _, column in pairs})
        assert sum(cost[pair] for pair in pairs) == pytest.approx(min(every))
