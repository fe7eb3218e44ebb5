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


def test_ids_repeat_run_to_run():
    def ids():
        rng, tracker = np.random.default_rng(3), Tracker()
        return [tracker.update(at(*rng.uniform(0, 60, 4)), rng.normal(size=(4, 3))) for _ in range(20)]

    assert ids() == ids()


@pytest.mark.parametrize("bad", [{"max_age": 0}, {"similarity": 1.5}, {"margin": 0}])
def test_bad_parameters(bad):
    with pytest.raises(ConfigError, match=r"expected max_age of 1 or more, similarity in -1\.\.1 and margin above 0"):
        Tracker(**bad)


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
