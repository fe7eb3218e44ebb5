import numpy as np
import pytest

from dpal_edge.runtime import Person
from dpal_edge.runtime.annotate import draw, limbs

pytest.importorskip("cv2")

LSP = (
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "right_wrist", "right_elbow",
    "right_shoulder", "left_shoulder", "left_elbow", "left_wrist", "neck", "head_top",
)  # fmt: skip
COCO = ("nose", *(f"{side}_{part}" for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
                  for side in ("left", "right")))  # fmt: skip
FRAME = np.full((432, 768, 3), 90, np.uint8)
BOX = (300.0, 100.0, 400.0, 400.0)


def person(**known):
    return Person(BOX, 0.9, 7, crop_box=(300, 100, 400, 400), **known)


@pytest.mark.parametrize(("names", "count"), [(LSP, 15), (COCO, 18), (("nose", "chin"), 0)])
def test_limbs_join_the_joints_of_a_skeleton(names, count):
    pairs = limbs(names)
    assert len(pairs) == len(set(pairs)) == count
    reached = {0}
    for _ in names:
        reached |= {b for a, b in pairs if a in reached} | {a for a, b in pairs if b in reached}
    assert len(reached) == (len(names) if count else 1)


def test_limbs_have_the_colour_of_their_side_where_joints_are_seen():
    places = {
        "left_shoulder": (320, 150),
        "left_elbow": (320, 250),
        "right_shoulder": (380, 150),
        "right_elbow": (380, 250),
    }
    joints = np.array([(x, y, 0.9) for x, y in places.values()], np.float32)
    drawn = draw(FRAME, [person(keypoints=joints, keypoint_names=tuple(places))])
    left, right, middle = drawn[200, 320], drawn[200, 380], drawn[150, 350]
    assert left[2] > 200 > left[0]  # amber
    assert right[0] > 200 > right[2]  # blue
    assert middle.min() > 200  # white
    joints[1, 2] = 0.1  # the left elbow is not seen: its limb goes
    drawn = draw(FRAME, [person(keypoints=joints, keypoint_names=tuple(places))])
    assert drawn[200, 320].tolist() == [90, 90, 90]
    assert drawn[200, 380].tolist() == right.tolist()


def test_joints_far_outside_do_no_harm():
    joints = np.array([[-900, 5000, 1], [10, 10, 1]], np.float32)
    draw(FRAME, [person(keypoints=joints, keypoint_names=("left_hip", "left_knee"))])


def test_parsing_tints_all_but_the_background():
    logits = np.zeros((2, 3, 2), np.float32)
    logits[1, :, 0], logits[0, :, 1] = 9, 9  # skin on the left
    drawn = draw(FRAME, [person(parsing_logits=logits, parsing_names=("background", "skin"))])
    tinted, plain = drawn[250, 320], drawn[250, 380]
    assert plain.tolist() == [90, 90, 90]
    assert tinted.tolist() != [90, 90, 90]
    # 55 % of the picture is left: black would be darker by 0.55 * 90.
    black = draw(np.zeros_like(FRAME), [person(parsing_logits=logits, parsing_names=("background", "skin"))])
    assert np.abs(tinted.astype(int) - black[250, 320] - 0.55 * 90).max() <= 1


def test_likely_attributes_are_written_below():
    quiet = draw(FRAME, [person(attributes={"bag": 0.2})])
    told = draw(FRAME, [person(attributes={"bag": 0.2, "long_hair": 0.8})])
    np.testing.assert_array_equal(quiet, draw(FRAME, [person()]))
    rows, columns = np.nonzero((told != quiet).any(-1))
    assert rows.min() >= 400  # under the box
    assert columns.min() >= 300
    assert np.ptp(columns) > 40
    few = draw(FRAME, [person(attributes=dict.fromkeys("abc", 0.9))])
    many = draw(FRAME, [person(attributes={**dict.fromkeys("abc", 0.9), "d": 0.6})])
    np.testing.assert_array_equal(few, many)  # three at most


def captions(*people):
    """Return the rows that captions change."""
    bare = [Person(p.box, p.score, p.track_id) for p in people]
    return np.flatnonzero((draw(FRAME, people) != draw(FRAME, bare)).any((1, 2)))


def test_captions_stay_inside_and_apart():
    box = (300.0, 100.0, 400.0, 300.0)
    hat, bag = (Person(box, 0.9, 1, attributes={name: 0.9}) for name in ("hat", "bag"))
    one, two = captions(hat), captions(hat, bag)
    assert one.min() > 300
    assert len(two) >= 2 * len(one)  # the second stands below the first
    low = Person((700.0, 300.0, 768.0, 432.0), 0.9, 1, attributes={"sunglasses": 0.9})
    assert 400 < captions(low).min() < captions(low).max() == 431  # no room below: inside the box


@pytest.mark.parametrize("size", [(1, 1), (40, 30), (2160, 3840)])
def test_any_size_of_frame(size):
    frame = np.zeros((*size, 3), np.uint8)
    everything = person(
        keypoints=np.array([[5, 5, 1], [20, 20, 1]], np.float32),
        keypoint_names=("left_hip", "left_knee"),
        attributes={"hat": 0.9},
    )
    assert draw(frame, [everything]).shape == frame.shape
