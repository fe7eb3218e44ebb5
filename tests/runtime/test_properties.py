"""What must hold for any input: decoding, cropping, the pipeline, and the formats that leave the process."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_person import ATTRIBUTES, EMBEDDING, OUTPUTS, PARSING, POSE
from tiny_bundle import SIZE, write_heads_bundle

from dpal_edge.runtime import Detections, Frame, Pipeline, PushSource
from dpal_edge.runtime.annotate import draw
from dpal_edge.runtime.monitor import Monitor
from dpal_edge.runtime.person import Person, decode_heads
from dpal_edge.runtime.preprocess import as_bgr, crop_people, letterbox_frame, pixel_boxes
from dpal_edge.runtime.sinks import to_line
from dpal_edge.runtime.sources import name_url

pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")

HEADS = (POSE, PARSING, ATTRIBUTES, EMBEDDING)
settings.register_profile("project", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("project")

frames = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(lambda side: arrays.arrays(np.uint8, (*side, 3)))
edges = st.one_of(st.floats(-1e6, 1e6, width=32), st.floats(-3, 45, width=32))
some_boxes = st.integers(0, 100).flatmap(lambda n: arrays.arrays(np.float32, (n, 4), elements=edges))


@given(frames, some_boxes)
def test_a_crop_shows_what_is_in_the_frame(frame, boxes):
    crops = crop_people(frame, boxes, (6, 4))
    assert (crops.shape, crops.dtype) == ((len(boxes), 6, 4, 3), np.uint8)
    if len(boxes):
        assert crops.min() >= frame.min()
        assert crops.max() <= frame.max()
    whole = pixel_boxes(boxes, frame.shape)
    assert (whole[:, :2] < whole[:, 2:]).all()
    assert (whole >= 0).all()
    assert (whole[:, [0, 2]] <= frame.shape[1]).all()
    assert (whole[:, [1, 3]] <= frame.shape[0]).all()


@given(frames, st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_a_letterbox_has_its_size(frame, size):
    assert letterbox_frame(frame, size).shape == (*size, 3)


@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.float32, np.int64]), arrays.array_shapes(min_dims=1, max_dims=4, min_side=0)
    )
)
def test_whatever_a_camera_gives_is_a_picture_or_refused(array):
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype == np.uint8 and array.size and array.ndim in (2, 3) and channels in (1, 3, 4):
        picture = as_bgr(array)
        assert (picture.dtype, picture.shape) == (np.uint8, (*array.shape[:2], 3))
    else:
        with pytest.raises(ValueError, match="expected uint8"):
            as_bgr(array)


raw = st.one_of(st.floats(-1e4, 1e4, width=32), st.floats(-5, 5, width=32))


@st.composite
def outputs_of_people(draw_value):
    count = draw_value(st.integers(0, 6))
    outputs = {head.name: draw_value(arrays.arrays(np.float32, (count, *head.shape), elements=raw)) for head in HEADS}
    boxes = draw_value(arrays.arrays(np.int64, (count, 2), elements=st.integers(0, 30)))
    sides = draw_value(arrays.arrays(np.int64, (count, 2), elements=st.integers(1, 30)))
    return outputs, np.concatenate([boxes, boxes + sides], axis=1)


@given(outputs_of_people())
def test_people_are_decoded_into_what_json_holds(given_outputs):
    outputs, boxes = given_outputs
    decoded = decode_heads(HEADS, outputs, SIZE, boxes)
    for fields, box, embedding in zip(decoded, boxes.tolist(), outputs["embedding"], strict=True):
        person = Person(tuple(map(float, box)), 0.5, 1, **fields)
        joints = person.keypoints
        assert (joints[:, :2] >= np.array(box[:2])).all()
        assert (joints[:, :2] <= np.array(box[2:])).all()
        assert ((joints[:, 2] >= 0) & (joints[:, 2] <= 1)).all()
        assert all(0 <= share <= 1 for share in person.attributes.values())
        assert sum(person.parsing_areas.values()) == pytest.approx(1)
        told = json.loads(json.dumps(person.to_dict(embedding=True, parsing=True), allow_nan=False))
        pixels = [key for key, length in told["parsing"]["runs"] for _ in range(length)]
        assert np.array_equal(np.array(pixels).reshape(person.parsing.shape), person.parsing)
        assert np.linalg.norm(told["embedding"]) == pytest.approx(1, abs=1e-4) or np.abs(embedding).max() < 1e-30


class Given:
    """A detector that finds what it is told to."""

    boxes = np.empty((0, 4), np.float32)

    def __call__(self, frame):
        return Detections(self.boxes, np.linspace(1, 0, len(self.boxes), dtype=np.float32))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    bundle = write_heads_bundle(tmp_path_factory.mktemp("heads") / "bundle", OUTPUTS)
    with Pipeline.open(bundle, detector=Given()) as opened:
        yield opened


@given(frame=frames, boxes=some_boxes)
def test_a_pipeline_takes_any_frame_and_any_boxes(pipeline, frame, boxes):
    Given.boxes = boxes
    people = pipeline(frame)
    assert len(people) == len(boxes)
    ids = [person.track_id for person in people]
    assert len(set(ids)) == len(ids)
    shown = draw(frame, people)
    assert shown.shape == frame.shape
    json.dumps(to_line("camera", Frame(frame, 0, 0.0, 0.0), people, embeddings=True), allow_nan=False)


@given(st.text(), st.text())
def test_metrics_keep_their_format_whatever_names_are(name, engine):
    serve = pytest.importorskip("dpal_edge.runtime.serve")
    text = serve.to_prometheus(Monitor([PushSource(name)], engine))
    label = r'\w+="(?:[^"\\\n]|\\\\|\\")*"'
    for row in text.removesuffix("\n").split("\n"):
        assert re.fullmatch(
            rf"# TYPE \w+ (?:gauge|counter|summary)|\w+(?:\{{{label}(?:,{label})*\}})? [-+.e\d]+", row
        ), row


@given(st.from_regex(r"[a-z]{1,8}:[^@/\s]{4,12}@", fullmatch=True))
def test_no_name_holds_a_password(login):
    secret = login.partition(":")[2].removesuffix("@")
    name = name_url(f"rtsp://{login}camera.local/door")
    assert secret not in name or secret in "camera.local-door"
