import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_bundle import ColourDetector, people_frame, write_detector_bundle

from dpal_edge.cli import main
from dpal_edge.errors import ConfigError, DataError
from dpal_edge.runtime import Frame, Person, Pipeline, PushSource, open_sources
from dpal_edge.runtime.annotate import draw, track_color
from dpal_edge.runtime.loop import run
from dpal_edge.runtime.sinks import name_video, open_sinks
from dpal_edge.runtime.video import Video

cv2 = pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")


@pytest.fixture
def pipeline(bundle):
    with Pipeline.open(bundle, detector=ColourDetector()) as opened:
        yield opened


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi"])
def test_run_writes_a_playable_video_and_lines(pipeline, clip, tmp_path, suffix):
    out, jsonl, seen = tmp_path / f"out{suffix}", tmp_path / "out.jsonl", []
    with open_sources([str(clip(12))]) as [video]:
        assert (video.video.size, video.fps, video.video.declared_frames) == ((96, 160), 5.0, 12)
        summary = run(pipeline, [video], out=out, jsonl=jsonl, progress=seen.append)
    assert (summary.frames, summary.persons, summary.tracks) == (12, 24, 2)
    assert (summary.missing_frames, summary.interrupted, sum(seen)) == (0, False, 12)
    assert summary.latency_ms.keys() == {"detect", "crop", "model", "decode", "track"}
    with Video(out) as written:
        assert (len(list(written)), written.size, written.fps) == (12, (96, 160), 5.0)
    lines = lines_of(jsonl)
    assert [line["frame"] for line in lines] == list(range(12))
    assert lines[3]["time_s"] == 0.6
    assert [person["track_id"] for person in lines[11]["persons"]] == [1, 2]
    assert "embedding" not in lines[0]["persons"][0]
    assert not list(tmp_path.glob("*.partial*"))


def test_embeddings_and_limit(pipeline, clip, tmp_path):
    with open_sources([str(clip(6))]) as [video]:
        summary = run(pipeline, [video], jsonl=tmp_path / "out.jsonl", embeddings=True, limit=2)
    assert (summary.frames, summary.missing_frames) == (2, 0)
    assert len(lines_of(tmp_path / "out.jsonl")[1]["persons"][0]["embedding"]) == 5


class _Impatient(ColourDetector):
    """A user who presses Ctrl-C while the fourth frame is being processed."""

    calls = 0

    def __call__(self, frame):
        _Impatient.calls += 1
        if _Impatient.calls == 4:
            raise KeyboardInterrupt
        return super().__call__(frame)


def test_ctrl_c_keeps_what_was_done(bundle, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(_Impatient, "calls", 0)
    out, jsonl = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    with open_sources([str(clip(8))]) as [video], Pipeline.open(bundle, detector=_Impatient()) as pipeline:
        summary = run(pipeline, [video], out=out, jsonl=jsonl)
    assert (summary.frames, summary.interrupted, summary.missing_frames) == (3, True, 0)
    with Video(out) as written:
        assert len(list(written)) == 3
    assert len(lines_of(jsonl)) == 3


def test_a_failure_leaves_no_output(bundle, clip, tmp_path):
    def broken(frame):
        raise ValueError("broken detector")

    out, jsonl = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    pipeline = Pipeline.open(bundle, detector=broken)
    with open_sources([str(clip(3))]) as [video], pytest.raises(ValueError, match="broken detector"):
        run(pipeline, [video], out=out, jsonl=jsonl)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "clip.avi"]


def test_a_truncated_video_ends_with_a_count(pipeline, clip):
    path = clip(20)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with open_sources([str(path)]) as [video]:
        declared = video.video.declared_frames
        summary = run(pipeline, [video])
    assert 0 < summary.frames < 20
    assert summary.frames + summary.missing_frames == (declared or summary.frames)


def test_sources_that_are_no_video(tmp_path):
    with pytest.raises(DataError, match=r"absent\.mp4: no such file, expected a video"):
        Video(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(DataError, match=r"text\.mp4: not a video that OpenCV can decode"):
        Video(tmp_path / "text.mp4")


def test_outputs_that_cannot_be(pipeline, clip, tmp_path):
    path = clip(2)
    with open_sources([str(path)]) as [video]:
        with pytest.raises(ConfigError, match=r"cannot write '\.gif' video, expected one of: \.mp4, \.webm, \.avi"):
            run(pipeline, [video], out=tmp_path / "out.gif")
        with pytest.raises(ConfigError, match=r"clip\.avi: sources and outputs must be different files"):
            run(pipeline, [video], out=path)
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="cannot be written"):
            run(pipeline, [video], jsonl=tmp_path / "file" / "out.jsonl")


def test_drawing_marks_people_and_leaves_the_frame_alone():
    frame = people_frame({"r": (40, 40)}, size=(432, 768))
    before = frame.copy()
    person = Person((40.0, 40.0, 52.0, 70.0), 0.87, 3, None)
    drawn = draw(frame, [person])
    np.testing.assert_array_equal(frame, before)
    assert tuple(drawn[60, 40]) == track_color(3)
    assert draw(frame, []).tolist() == frame.tolist()
    outside = Person((-50.0, -50.0, -40.0, -10.0), 0.5, None, None)
    assert draw(frame, [outside]).shape == frame.shape
    assert len({track_color(i) for i in range(1, 20)}) == 19


def run_cli(*arguments):
    return CliRunner().invoke(main, ["run", *map(str, arguments)])


@pytest.fixture
def detector(tmp_path):
    return write_detector_bundle(tmp_path / "detector")


def test_cli_run(bundle, detector, clip, tmp_path):
    jsonl = tmp_path / "out.jsonl"
    result = run_cli(bundle, "--source", clip(6), "--detector", detector, "--jsonl", jsonl, "--frames", 3, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["frames"] == 3
    assert document["engine"].startswith("onnxruntime ")
    assert "done: 3 frames" in result.stderr
    assert len(lines_of(jsonl)) == 3


@pytest.mark.parametrize(("threshold", "people"), [(0.0, True), (1.0, False)])
def test_cli_run_with_a_threshold(bundle, tmp_path, clip, threshold, people):
    finder = write_detector_bundle(tmp_path / "finder")
    jsonl = tmp_path / "out.jsonl"
    source = clip(2)
    result = run_cli(bundle, "--source", source, "--detector", finder, "--threshold", threshold, "--jsonl", jsonl)
    assert result.exit_code == 0, result.output
    assert any(line["persons"] for line in lines_of(jsonl)) == people


def test_cli_run_ctrl_c(bundle, clip, monkeypatch):
    monkeypatch.setattr(_Impatient, "calls", 0)
    monkeypatch.setattr("dpal_edge.runtime.detector.HogDetector", lambda min_height: _Impatient())
    result = run_cli(bundle, "--source", clip(8), "--detector", "hog")
    assert result.exit_code == 130
    assert "interrupted after 3 frames" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_service_or_a_session_keeps_the_video(bundle, clip, tmp_path, number):
    out, jsonl = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    options = ["--source", clip(9), "--as-camera", "--detector", "hog", "--out", out, "--jsonl", jsonl]
    code = (  # tests may run under nohup
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); from dpal_edge.cli import main; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "run", bundle, *options], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (jsonl.exists() and jsonl.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    assert "interrupted after" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    with Video(out) as video:
        assert list(video)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--source", "absent.mp4"], "absent.mp4: no such file, expected a video"),
        (["--engine", "tensorrt"], "cannot run any target with tensorrt; it holds onnx, engines are onnxruntime"),
        (["--detector", "hog", "--min-height", "0"], "min_height is 0, expected 32 or more pixels"),
        (["--detector", "hog", "--threshold", "0.5"], "--threshold is a choice of detectors' bundles"),
        (["--min-height", "64"], "--min-height is a choice of --detector hog"),
        (["--detector", "absent"], "absent: no manifest.json, so not a bundle"),
        (["--out", "x.gif"], "cannot write '.gif' video"),
    ],
)
def test_cli_run_errors_are_one_line(bundle, detector, clip, arguments, text):
    named = [] if "--detector" in arguments or "--min-height" in arguments else ["--detector", detector]
    result = run_cli(bundle, "--source", clip(1), *named, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert text in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_summary_is_json(pipeline, clip):
    with open_sources([str(clip(1))]) as [video]:
        summary = run(pipeline, [video])
    assert json.loads(json.dumps(dataclasses.asdict(summary)))["latency_ms"]["model"]["p95"] >= 0


def test_several_sources_have_a_video_each_and_share_the_lines(pipeline, clip, tmp_path):
    first = clip(4)
    second = first.with_name("second.avi")
    second.write_bytes(first.read_bytes())
    with open_sources([str(first), str(second)]) as sources:
        summary = run(pipeline, sources, out=tmp_path / "seen.mp4", jsonl=tmp_path / "seen.jsonl", limit=3)
    assert (summary.frames, summary.tracks, summary.missing_frames) == (6, 4, 0)
    assert summary.sources["second.avi"]["processed"] == 3
    for name in ("seen-clip_avi.mp4", "seen-second_avi.mp4"):
        with Video(tmp_path / name) as video:
            assert len(list(video)) == 3
    assert [(line["source"], line["frame"]) for line in lines_of(tmp_path / "seen.jsonl")] == [
        (name, number) for number in range(3) for name in ("clip.avi", "second.avi")
    ]


def test_a_live_video_plays_at_the_speed_of_life(tmp_path):
    source = PushSource("cam")  # 25 frames/s
    path = tmp_path / "live.mp4"
    with open_sinks([source], out=path, jsonl=None, embeddings=False) as [sink]:
        sink("cam", Frame(people_frame({"r": (10, 20)}), 0, 2.0, 0.0), [])
        sink("cam", Frame(np.zeros((40, 60, 3), np.uint8), 7, 2.4, 0.0), [])  # others were dropped; this one is smaller
        sink("cam", Frame(people_frame({"r": (10, 20)}), 8, 2.401, 0.0), [])  # too early to be seen
        sink("cam", Frame(people_frame({"r": (10, 20)}), 9, 3600.0, 0.0), [])  # after an hour without the camera
        sink("cam", Frame(people_frame({"r": (10, 20)}), 10, 3600.04, 0.0), [])
    with Video(path) as video:
        shapes = [frame.shape for frame in video]
    assert shapes == [(96, 160, 3)] * (1 + 10 + 5 * 25 + 1)


def test_a_camera_without_frames_takes_no_video_of_others_along(pipeline, clip, tmp_path):
    silent = PushSource("10.0.0.1-door")
    with open_sources([str(clip(3))]) as [video]:
        run(pipeline, [video, silent], out=tmp_path / "o.mp4", jsonl=tmp_path / "o.jsonl", limit=3, progress=lambda n: (
            video.counters.frames == 3 and silent.close()
        ))  # fmt: skip
    assert [path.name for path in tmp_path.glob("*o*.mp4")] == ["o-clip_avi.mp4"]
    assert len(lines_of(tmp_path / "o.jsonl")) == 3


def test_lines_of_live_sources_can_be_read_as_they_come(pipeline, tmp_path):
    source, seen = PushSource("cam"), []

    def follow(count):
        seen.append(len(lines_of(tmp_path / "live.jsonl")))
        source.push(people_frame({"r": (10, 20)})) if len(seen) < 3 else source.close()

    source.push(people_frame({"r": (10, 20)}))
    run(pipeline, [source], jsonl=tmp_path / "live.jsonl", progress=follow)
    assert seen == [1, 2, 3]
    source = PushSource("cam")
    source.push(people_frame({"r": (10, 20)}))
    run(pipeline, [source], jsonl=tmp_path / "live.jsonl", limit=1)  # as a service that is started again
    assert [line["frame"] for line in lines_of(tmp_path / "live.jsonl")] == [0, 1, 2, 0]


def test_names_of_videos_stay_apart(tmp_path):
    names = [name_video(tmp_path / "x.mp4", name, 2).name for name in ("10.0.0.1-door", "10.0.0.2-door", "a/../b.avi")]
    assert names == ["x-10_0_0_1-door.mp4", "x-10_0_0_2-door.mp4", "x-a____b_avi.mp4"]


def test_a_played_file_is_not_replaced(pipeline, clip):
    path = clip(3)
    with (
        open_sources([str(path)], as_camera=True) as sources,
        pytest.raises(ConfigError, match="must be different files"),
    ):
        run(pipeline, sources, out=path)


def test_run_needs_a_frame_for_a_video(pipeline, tmp_path):
    source = PushSource("cam")
    source.close()
    with pytest.raises(DataError, match=r"live\.mp4: no frame came"):
        run(pipeline, [source], out=tmp_path / "live.mp4")
    assert not list(tmp_path.glob("*.mp4"))


def test_the_command_serves_and_says_so(bundle, clip):
    pytest.importorskip("aiohttp")
    result = CliRunner().invoke(
        main, ["run", str(bundle), "--source", str(clip(3)), "--detector", "hog", "--serve", "0", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert "live on http://127.0.0.1:" in result.stderr
    assert json.loads(result.stdout)["sources"]["clip.avi"]["processed"] == 3
    command = ["run", str(bundle), "--detector", "hog", "--serve", "0.0.0.0:0"]
    source = {"DPAL_EDGE_SOURCE": str(clip(3))}
    made = CliRunner().invoke(main, command, env=source)
    assert "/?token=" in made.stderr
    given = CliRunner().invoke(main, command, env={**source, "DPAL_EDGE_TOKEN": "secret-of-somebody"})
    assert given.exit_code == 0, given.output
    assert "live on http://" in given.stderr
    assert "token" not in given.output  # neither one that was made nor the one that was given
