import json

import numpy as np
import pytest
from tiny_bundle import SIZE, ColourDetector, people_frame, write_bundle, write_detector_bundle, write_heads_bundle

from dpal_edge.errors import ModelFileError
from dpal_edge.manifest import HeadSpec
from dpal_edge.runtime import ModelDetector, Person, Pipeline
from dpal_edge.runtime.person import check_heads, decode_heads

POSE = HeadSpec(name="pose", task="pose", shape=(2, 48), labels=("nose", "left_knee"), kind="simcc")
PARSING = HeadSpec(name="parsing", task="parsing", shape=(2, 4, 2), labels=("background", "skin"), kind="upsample")
ATTRIBUTES = HeadSpec(name="attributes", task="attributes", shape=(2,), labels=("bag", "hat"), kind="query")
EMBEDDING = HeadSpec(name="embedding", task="embedding", shape=(2,), kind="bnneck")


def peaks(x_bin, y_bin):
    """Logits of a joint that is certainly in these bins of half a pixel, of an input of 16 x 8 pixels."""
    logits = np.zeros(16 + 32, np.float32)
    logits[[x_bin, 16 + y_bin]] = 50
    return logits


def left_is_skin():
    logits = np.zeros((2, 4, 2), np.float32)
    logits[1, :, 0], logits[0, :, 1] = 9, 9
    return logits


OUTPUTS = {
    POSE: np.stack([peaks(5, 20), peaks(0, 31)]),
    PARSING: left_is_skin(),
    ATTRIBUTES: np.log(np.array([3, 1 / 3], np.float32)),
    EMBEDDING: np.array([3, 4], np.float32),
}


def test_heads_are_decoded_by_hand():
    boxes = np.array([[10, 20, 26, 52], [0, 0, 8, 16]])  # twice the input's size, and exactly its size
    outputs = {head.name: np.stack([values] * 2) for head, values in OUTPUTS.items()}
    one, two = decode_heads(tuple(OUTPUTS), outputs, SIZE, boxes)
    # Bin 5 of x is centred at (5 + 0.5) / 2 = 2.75 of 8 pixels; twice that is 5.5 from the left edge.
    np.testing.assert_allclose(one["keypoints"], [[15.5, 40.5, 1], [10.5, 51.5, 1]], rtol=1e-5)
    np.testing.assert_allclose(two["keypoints"], [[2.75, 10.25, 1], [0.25, 15.75, 1]], rtol=1e-5)
    assert one["keypoint_names"] == ("nose", "left_knee")
    assert one["attributes"] == pytest.approx({"bag": 0.75, "hat": 0.25})
    assert one["embedding"].tolist() == pytest.approx([0.6, 0.8])
    assert (one["crop_box"], two["crop_box"]) == ((10, 20, 26, 52), (0, 0, 8, 16))


def test_nobody_is_decoded_to_nothing():
    empty = {head.name: np.empty((0, *head.shape), np.float32) for head in OUTPUTS}
    assert decode_heads(tuple(OUTPUTS), empty, SIZE, np.empty((0, 4), np.int64)) == []


def test_a_pipeline_gives_all_of_it_in_one_pass(tmp_path):
    bundle = write_heads_bundle(tmp_path / "heads", OUTPUTS)
    with Pipeline.open(bundle, detector=ColourDetector()) as pipeline:
        red, green = pipeline(people_frame({"r": (10, 20), "g": (100, 50)}))  # 12 wide, 30 high
        assert pipeline(people_frame({})) == []
    np.testing.assert_allclose(red.keypoints[0], [10 + 2.75 * 12 / 8, 20 + 10.25 * 30 / 16, 1], rtol=1e-5)
    np.testing.assert_allclose(green.keypoints[:, 0] - red.keypoints[:, 0], 90, rtol=1e-5)
    assert green.crop_box == (100, 50, 112, 80)
    assert red.parsing.shape == (30, 12)
    assert red.parsing.dtype == np.uint8
    assert (red.parsing[:, :6] == 1).all()
    assert (red.parsing[:, 6:] == 0).all()
    assert red.parsing_areas == {"background": 0.5, "skin": 0.5}
    assert red.embedding.tolist() == pytest.approx([0.6, 0.8])


def test_keypoints_follow_what_is_cut_off_by_the_frame(tmp_path):
    bundle = write_heads_bundle(tmp_path / "heads", {POSE: OUTPUTS[POSE]})

    class Beyond(ColourDetector):
        def __call__(self, frame):
            found = super().__call__(frame)
            found.boxes[:, 0] = -50  # far outside on the left: the crop begins at the frame's edge
            return found

    with Pipeline.open(bundle, detector=Beyond()) as pipeline:
        (person,) = pipeline(people_frame({"r": (10, 20)}))
    assert person.crop_box == (0, 20, 22, 50)
    assert person.keypoints[0, 0] == pytest.approx(2.75 * 22 / 8)
    assert person.embedding is None
    assert person.parsing is None
    assert person.parsing_areas is None
    assert person.attributes is None


def test_as_json():
    box = (0.0, 0.0, 4.0, 2.0)
    person = Person(
        box,
        0.5,
        1,
        keypoints=np.array([[1.234, 5.678, 0.91119]], np.float32),
        keypoint_names=("nose",),
        attributes={"bag": 0.123456},
        crop_box=(0, 0, 4, 2),
        parsing_logits=left_is_skin(),
        parsing_names=("background", "skin"),
    )
    document = json.loads(json.dumps(person.to_dict()))
    assert document["keypoints"] == {"nose": [1.23, 5.68, 0.9112]}
    assert document["attributes"] == {"bag": 0.1235}
    assert document["parsing_areas"] == {"background": 0.5, "skin": 0.5}
    assert document.keys() == {"box", "score", "track_id", "keypoints", "attributes", "parsing_areas"}
    whole = json.loads(json.dumps(person.to_dict(parsing=True)))["parsing"]
    assert whole == {"box": [0, 0, 4, 2], "names": ["background", "skin"], "runs": [[1, 2], [0, 2], [1, 2], [0, 2]]}
    assert person.parsing is person.parsing  # computed once


@pytest.mark.parametrize(
    ("head", "text"),
    [
        (HeadSpec(name="pose", task="pose", shape=(2, 47), labels=("a", "b"), kind="simcc"), r"ask for \(2, 48\)"),
        (HeadSpec(name="pose", task="pose", shape=(3, 8, 4), labels=("a", "b")), r"ask for \(2, any, any\)"),
        (HeadSpec(name="x", task="parsing", shape=(2, 8), labels=("a", "b")), r"'x' for parsing has shape \(2, 8\)"),
        (HeadSpec(name="x", task="attributes", shape=(2,), labels=("a",)), r"ask for \(1\)"),
        (HeadSpec(name="x", task="embedding", shape=(2, 2)), r"ask for \(any\)"),
        (
            HeadSpec(name="x", task="gait", shape=(2,)),
            "a head for 'gait', expected embedding, pose, parsing, attributes",
        ),
    ],
)
def test_heads_that_cannot_be_decoded(head, text):
    with pytest.raises(ModelFileError, match=text):
        check_heads([head], SIZE)


def test_a_detector_is_no_model_of_people(tmp_path):
    with pytest.raises(ModelFileError, match=r"has a head for 'detection', .* a detector is given as detector="):
        Pipeline.open(write_detector_bundle(tmp_path / "detector"), detector=ColourDetector())


def test_detectors_by_path_and_by_default(tmp_path, monkeypatch):
    bundle, detector = write_bundle(tmp_path / "bundle"), write_detector_bundle(tmp_path / "detector")
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:, :32] = 255
    for given in (detector, str(detector)):
        with Pipeline.open(bundle, detector=given) as pipeline:
            (person,) = pipeline(frame)
        assert person.box == (4, 4, 28, 28)
        with pytest.raises(ValueError, match="the model is closed"):
            pipeline(frame)
    mine = ModelDetector.open(detector)
    Pipeline.open(bundle, detector=mine).close()
    assert len(mine(frame).boxes) == 1  # the caller's own stays open
    monkeypatch.setattr("dpal_edge.runtime.detector.DEFAULT_DETECTORS", (detector,))
    assert len(Pipeline.open(bundle)(frame)) == 1
