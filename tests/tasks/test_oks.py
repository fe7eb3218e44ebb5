"""Object keypoint similarity, and what is done with people who are found twice."""

import math

import numpy as np
import pytest

from dpal_edge.tasks.oks import oks, oks_precision, rescore, suppress_poses

SIGMAS = np.array([0.05, 0.1])


def test_similarity_by_hand():
    here = np.zeros((2, 2))
    # Off by 3 and 4 pixels, and by none: exp(-9 / (8 x 0.0025 x 100)), exp(-16 / (8 x 0.01 x 100)).
    others = np.array([[[3, 0], [0, 4]], [[0, 0], [0, 0]]], float)
    found = oks(here, others, np.array([100.0, 5.0]), SIGMAS)
    assert found.tolist() == pytest.approx([(math.exp(-4.5) + math.exp(-2)) / 2, 1])


def test_same_people_are_suppressed():
    # A shift of both joints by d pixels has similarity (exp(-d^2 / 4) + exp(-d^2 / 16)) / 2 at area 200.
    joints = np.array([[[0, 0], [9, 9]]] * 4, float)
    joints[:, :, 0] += np.array([0.0, 0.5, 1.0, 50.0])[:, None]  # similarities to the first: 0.96, 0.86, 0
    areas = np.full(4, 200.0)
    assert suppress_poses(joints, np.array([0.9, 0.5, 0.6, 0.7]), areas, SIGMAS).tolist() == [0, 3, 2]
    assert suppress_poses(joints, np.array([0.9, 0.5, 0.6, 0.7]), areas, SIGMAS, 0.8).tolist() == [0, 3]
    # The second is as near to the third as to the first: which one is better decides.
    assert suppress_poses(joints, np.array([0.5, 0.6, 0.9, 0.1]), areas, SIGMAS).tolist() == [2, 0, 3]
    mixed = np.array([200.0, 1e-9, 200.0, 200.0])  # areas count by their mean
    assert suppress_poses(joints[:2], np.array([0.9, 0.5]), mixed[:2], SIGMAS, 0.93).tolist() == [0, 1]
    assert suppress_poses(joints[:0], np.zeros(0), areas[:0], SIGMAS).tolist() == []


def test_rescoring_by_hand():
    confidence = np.array([[0.5, 0.9, 0.2], [0.1, 0.2, 0.0]])  # above 0.2 are two, and none
    assert rescore(np.array([0.5, 0.9]), confidence).tolist() == pytest.approx([0.5 * 0.7, 0])


def test_precision_of_nobody_is_undefined():
    truth = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "person"}], "annotations": []}
    found = {"image_id": 1, "category_id": 1, "keypoints": [1, 1, 1, 2, 2, 1], "score": 1.0}
    assert all(math.isnan(value) for value in oks_precision(truth, [found], SIGMAS).values())
