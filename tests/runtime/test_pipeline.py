import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from test_person import ATTRIBUTES, EMBEDDING, OUTPUTS
from tiny_bundle import SIZE, ColourDetector, people_frame, reference, write_bundle, write_heads_bundle

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.runtime import Frame, Pipeline

pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")


@pytest.fixture
def pipeline(bundle):
    with Pipeline.open(bundle, detector=ColourDetector()) as opened:
        yield opened


def test_people_of_a_frame(pipeline):
    red, green = pipeline(people_frame({"r": (10, 20), "g": (100, 50)}))
    assert red.box == (10, 20, 22, 50)
    assert green.box == (100, 50, 112, 80)
    assert (red.score, red.track_id, green.track_id) == (0.75, 1, 2)
    colours = np.broadcast_to(np.array([[255, 0, 0], [0, 255, 0]], np.uint8)[:, None, None], (2, *SIZE, 3))
    expected = reference(colours)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose([red.embedding, green.embedding], expected, rtol=1e-5)
    assert pipeline.timing_ms.keys() == {"detect", "crop", "model", "decode", "track"}


def test_tracks_follow_people_who_cross(pipeline):
    for step in range(0, 100, 4):
        red, green = pipeline(people_frame({"r": (10 + step, 20), "g": (120 - step, 22)}))
        assert (red.track_id, green.track_id) == (1, 2)


def test_an_empty_frame_has_nobody(pipeline):
    assert pipeline(people_frame({})) == []


def test_without_tracker_or_embedding(tmp_path):
    bundle = write_bundle(tmp_path / "attributes", task="attributes", labels=tuple("abcde"))
    with Pipeline.open(bundle, detector=ColourDetector(), tracker=None) as pipeline:
        (person,) = pipeline(people_frame({"b": (10, 20)}))
        assert person.track_id is None
        assert person.embedding is None
        with pytest.raises(ModelFileError, match="no embedding head, only: attributes"):
            pipeline.embed(np.zeros((1, *SIZE, 3), np.uint8))


def test_a_person_as_json(pipeline):
    (person,) = pipeline(people_frame({"r": (10, 20)}))
    assert json.loads(json.dumps(person.to_dict())) == {"box": [10, 20, 22, 50], "score": 0.75, "track_id": 1}
    np.testing.assert_allclose(person.to_dict(embedding=True)["embedding"], person.embedding, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 70])
def test_embed_splits_batches(pipeline, count):
    crops = np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3), np.uint8)
    expected = reference(crops)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(pipeline.embed(crops), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (
            None,
            r"a frame of shape \(\) and type NoneType, expected uint8 \(H, W, 3\) BGR, \(H, W\) grey or",
        ),
        (np.zeros((4, 4, 3)), r"a frame of shape \(4, 4, 3\) and type float64"),
        (np.zeros((4, 4, 2), np.uint8), r"a frame of shape \(4, 4, 2\)"),
        (np.zeros((4, 0, 3), np.uint8), r"a frame of shape \(4, 0, 3\)"),
        (np.zeros((0, 4), np.uint8), r"a frame of shape \(0, 4\)"),
    ],
)
def test_bad_frames(pipeline, frame, text):
    with pytest.raises(ValueError, match=text):
        pipeline(frame)


def test_grey_frames_and_those_with_alpha_are_converted(pipeline):
    colour = people_frame({"r": (10, 20)})
    alpha = np.dstack([colour, np.full(colour.shape[:2], 9, np.uint8)])
    grey = np.zeros(colour.shape[:2], np.uint8)
    people = pipeline.look({"colour": colour, "alpha": Frame(alpha, 0, 0.0, 0.0), "grey": grey, "one": grey[..., None]})
    assert {camera: len(found) for camera, found in people.items()} == {"colour": 1, "alpha": 1, "grey": 0, "one": 0}
    np.testing.assert_array_equal(people["alpha"][0].embedding, people["colour"][0].embedding)


def test_bad_crops(pipeline):
    with pytest.raises(ValueError, match=r"crops has shape \(1, 4, 4, 3\), expected \(n, 16, 8, 3\)"):
        pipeline.embed(np.zeros((1, 4, 4, 3), np.uint8))


def test_a_closed_pipeline_says_so(pipeline):
    pipeline.close()
    with pytest.raises(ValueError, match="the model is closed; open it again"):
        pipeline.embed(np.zeros((1, *SIZE, 3), np.uint8))


@pytest.mark.parametrize(
    ("manifest", "text"),
    [
        ({"size": (32, 16)}, r"the model takes .*16, 8.* its manifest says .*32, 16"),
        ({"name": "pixels"}, r"the model takes .*images.* its manifest says .*pixels"),
        ({"shape": (7,)}, r"the model gives \(5, 5\) as 'embedding', its manifest says \(5, 7\)"),
    ],
)
def test_a_model_that_breaks_its_manifest(tmp_path, manifest, text):
    with pytest.raises(ModelFileError, match=text):
        Pipeline.open(write_bundle(tmp_path / "bundle", **manifest), detector=ColourDetector())


def test_a_changed_model_is_refused(bundle):
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelFileError, match=r"model\.onnx: damaged or replaced"):
        Pipeline.open(bundle, detector=ColourDetector())


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(ModelFileError, match="not a bundle"):
        Pipeline.open(tmp_path)


def test_no_engine_for_any_artifact(tmp_path):
    bundle = write_bundle(tmp_path / "other", target="model.plan")
    with pytest.raises(
        BackendUnavailable,
        match="cannot run any target with any engine here; it holds onnx, engines are onnxruntime",
    ):
        Pipeline.open(bundle, detector=ColourDetector())


def test_embedding_needs_no_opencv(bundle):
    code = f"""
import sys
sys.modules["cv2"] = None  # as if it were not installed
import numpy as np
from dpal_edge.errors import BackendUnavailable
from dpal_edge.runtime import HogDetector, Pipeline
pipeline = Pipeline.open({str(bundle)!r}, detector=lambda frame: None)
assert pipeline.embed(np.zeros((2, 16, 8, 3), np.uint8)).shape == (2, 5)
try:
    HogDetector()
except BackendUnavailable as error:
    assert "dpal-edge[camera]" in str(error) and "--system-site-packages" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_several_cameras_in_one_pass(bundle):
    frames = {"door": people_frame({"r": (10, 20), "g": (120, 50)}), "yard": people_frame({"b": (40, 30)}, (60, 120))}
    with Pipeline.open(bundle, detector=ColourDetector()) as pipeline:
        passes = []
        run = pipeline._model.run
        pipeline._model.run = lambda crops, heads: passes.append(len(crops)) or run(crops, heads)
        found = pipeline.look({**frames, "cellar": np.zeros((8, 8, 3), np.uint8)})
        assert passes == [3]
        assert pipeline.look({}) == {}
    assert {camera: [person.track_id for person in people] for camera, people in found.items()} == {
        "door": [1, 2],
        "yard": [1],  # tracks are each camera's own
        "cellar": [],
    }
    for camera, frame in frames.items():
        with Pipeline.open(bundle, detector=ColourDetector()) as alone:
            for one, other in zip(found[camera], alone(frame), strict=True):
                assert one.box == other.box
                np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-6)


def test_a_detector_that_can_takes_all_cameras_at_once(bundle):
    passes = []

    class Together(ColourDetector):
        def detect(self, frames):
            passes.append(len(frames))
            return [self(frame) for frame in frames]

    frames = {"door": people_frame({"r": (10, 20)}), "yard": people_frame({"b": (40, 30)}, (60, 120))}
    with Pipeline.open(bundle, detector=Together()) as pipeline:
        found = pipeline.look(frames)
        assert (passes, pipeline.look({})) == ([2], {})
    for camera, frame in frames.items():
        with Pipeline.open(bundle, detector=ColourDetector()) as alone:
            assert [person.box for person in found[camera]] == [person.box for person in alone(frame)]


def test_two_pipelines_in_two_threads(bundle):
    frame = people_frame({"r": (10, 20), "g": (120, 50)})
    results = {}

    def work(name):
        with Pipeline.open(bundle, detector=ColourDetector()) as pipeline:
            results[name] = [[person.track_id for person in pipeline(frame)] for _ in range(20)]

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"a": [[1, 2]] * 20, "b": [[1, 2]] * 20}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_heads_that_are_not_wanted(tmp_path, engine):
    pytest.importorskip(engine)
    bundle = write_heads_bundle(tmp_path / "heads", {EMBEDDING: OUTPUTS[EMBEDDING], ATTRIBUTES: OUTPUTS[ATTRIBUTES]})
    frame = people_frame({"r": (10, 20)})
    with Pipeline.open(bundle, detector=ColourDetector(), engine=engine) as pipeline:
        [person] = pipeline.look({"": frame}, tasks=("attributes",))[""]
        assert person.attributes["bag"] == pytest.approx(0.75)
        assert person.embedding is None
        [person] = pipeline.look({"": frame}, tasks=())[""]
        assert (person.attributes, person.embedding, person.track_id) == (None, None, 1)
        with pytest.raises(ValueError, match="no head for pose, expected embedding, attributes"):
            pipeline.look({"": frame}, tasks=("pose",))


def test_what_is_known_of_a_track_is_a_mean_over_it(bundle):
    frames = [people_frame({"r": (10 + i, 20)}) for i in range(2)]
    with (
        Pipeline.open(bundle, detector=ColourDetector()) as tracked,
        Pipeline.open(bundle, detector=ColourDetector(), tracker=None) as alone,
    ):
        [[first], [second]] = [alone(frame) for frame in frames]
        [[_], [mean]] = [tracked(Frame(frame, i, 0.1 * i, 0.0)) for i, frame in enumerate(frames)]
    expected = 0.9 * first.embedding + 0.1 * second.embedding
    np.testing.assert_allclose(mean.embedding, expected / np.linalg.norm(expected), atol=1e-5)
