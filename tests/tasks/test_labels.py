"""Which labels a mirrored view exchanges."""

import pytest

from dpal_edge.tasks.labels import flip_pairs


@pytest.mark.parametrize(
    "names",
    [
        ("nose", "left_knee", "right_knee"),
        ("nose", "l_knee", "r_knee"),
        ("Nose", "knee.L", "knee.R"),
        ("nose", "LKnee", "RKnee"),
        ("nose", "Knee-Left", "Knee-Right"),
    ],
)
def test_sides_in_several_spellings(names):
    assert flip_pairs(names) == ((1, 2),)


def test_letters_within_words_are_no_sides():
    assert flip_pairs(("ball", "barr", "hat-l", "hair", "LIP", "RIP")) == ()
