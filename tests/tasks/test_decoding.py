"""Raw outputs to joints, classes and probabilities."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpal_edge.tasks.decoding import decode_classes, decode_joints, place_in_box, probabilities, resize_scores

SIZE = (64, 32)


def simcc(places, size=SIZE, sigma=3.0):
    """Logits of Gaussians around places (n, K, 2) in pixels."""
    parts = []
    for axis, side in ((0, size[1]), (1, size[0])):
        bins = (np.arange(2 * side) + 0.5) / 2
        parts.append(-((bins - places[..., axis, None]) ** 2) / (2 * sigma**2))
    return np.concatenate(parts, -1).astype(np.float32)


def heat(places, cells=(16, 8), size=SIZE, sigma=2.0):
    """Gaussians of height 1 around places, in cells."""
    y, x = (np.arange(n) + 0.5 for n in cells)
    px, py = places[..., 0, None, None] * cells[1] / size[1], places[..., 1, None, None] * cells[0] / size[0]
    return np.exp(-((x - px) ** 2 + (y[:, None] - py) ** 2) / (2 * sigma**2)).astype(np.float32)


def test_simcc_finds_the_middle_of_a_peak():
    places = np.array([[[10.25, 40.75], [3.25, 12.5], [20.1, 33.3]]])
    found, confidence = decode_joints(simcc(places, sigma=0.5), "simcc", SIZE)
    np.testing.assert_allclose(found, places, atol=0.01)
    assert (confidence > 0.99).all()


def test_a_peak_at_the_border_is_found_within_its_width():
    places = np.array([[[0.25, 0.25], [31.75, 63.75]]])
    found, _ = decode_joints(simcc(places, sigma=0.5), "simcc", SIZE)
    np.testing.assert_allclose(found, places, atol=0.5)


def test_simcc_prefers_where_most_probability_lies_to_the_likeliest_bin():
    x, y = np.full(64, 1e-6), np.full(128, 1e-6)
    x[50], x[10:15] = 0.3, 0.14  # a lone bin, and more in five together
    y[60] = 1.0
    found, confidence = decode_joints(np.log(np.concatenate([x, y]))[None, None].astype(np.float32), "simcc", SIZE)
    np.testing.assert_allclose(found[0, 0], [12.5 / 2, 60.5 / 2], atol=0.01)
    assert confidence[0, 0] == pytest.approx(0.7, abs=0.01)


def test_a_sharper_answer_is_a_surer_one():
    place = np.array([[[16.25, 32.25]]])
    sharp, flat = (decode_joints(simcc(place, sigma=s), "simcc", SIZE)[1][0, 0] for s in (0.5, 12.0))
    assert sharp > 0.95
    assert flat < 0.4


def test_large_logits_do_not_overflow():
    found, confidence = decode_joints(simcc(np.array([[[16.25, 32.25]]])) * 1e4, "simcc", SIZE)
    assert np.isfinite(found).all()
    assert confidence[0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("place", [(16.0, 32.0), (10.3, 41.9), (20.9, 17.2)])
def test_heat_is_decoded_below_the_size_of_a_cell(place):
    """A Gaussian's log is a parabola, so its top is found exactly; cells have 4 pixels."""
    found, confidence = decode_joints(heat(np.array([[place]])), "heatmap", SIZE)
    np.testing.assert_allclose(found[0, 0], place, atol=1e-3)
    assert 0.9 < confidence[0, 0] <= 1


def test_heat_at_the_border_stays_there():
    found, _ = decode_joints(heat(np.array([[(0.0, 64.0)]])), "heatmap", SIZE)
    np.testing.assert_allclose(found[0, 0], (2, 62))


def test_no_heat_anywhere_is_no_confidence():
    found, confidence = decode_joints(np.full((1, 2, 16, 8), -1, np.float32), "heatmap", SIZE)
    assert np.isfinite(found).all()
    assert (confidence == 0).all()


def test_places_move_into_their_boxes():
    moved = place_in_box(np.array([[[0, 0], [32, 64], [16, 32]]], np.float32), SIZE, np.array([[100, 50, 200, 250]]))
    np.testing.assert_allclose(moved[0], [[100, 50], [200, 250], [150, 150]])


@pytest.mark.parametrize("size", [(64, 32), (7, 5), (8, 4), (3, 9)])
def test_resizing_is_bilinear_like_torch(size):
    scores = np.random.default_rng(0).normal(size=(3, 8, 4)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(scores)[None], size=size, mode="bilinear")[0].numpy()
    np.testing.assert_allclose(resize_scores(scores, size), expected, atol=1e-5)


def test_classes_are_the_greatest_score():
    scores = np.zeros((3, 2, 1), np.float32)
    scores[2, 0], scores[1, 1] = 1, 1
    np.testing.assert_array_equal(decode_classes(scores, (4, 2)), [[2, 2], [2, 2], [1, 1], [1, 1]])


def test_probabilities():
    found = probabilities(np.array([0, np.log(3), -1e4, 1e4], np.float32))
    np.testing.assert_allclose(found, [0.5, 0.75, 0, 1], atol=1e-6)
    assert found.dtype == np.float32
