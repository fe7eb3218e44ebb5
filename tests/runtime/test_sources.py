import http.server
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest

from dpal_edge.errors import BackendUnavailable, ConfigError, DataError
from dpal_edge.runtime import PushSource, open_sources
from dpal_edge.runtime import sources as module
from dpal_edge.runtime.capture import csi_pipeline, has_gstreamer, open_url, url_pipeline, without_secrets
from dpal_edge.runtime.sources import LiveSource, gather, name_url, open_source, parse_csi

cv2 = pytest.importorskip("cv2")
WAIT_S = 20.0


def picture(value=0, shape=(8, 6, 3)):
    return np.full(shape, value, np.uint8)


def until(condition):
    """Wait for another thread."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


class ScriptedCamera:
    """A device that gives what a list says: pictures, None for its end, or an error to raise."""

    fps = 20.0

    def __init__(self, script, opened=()):
        self._script, self.released = iter(script), False
        opened.append(self) if isinstance(opened, list) else None

    def read(self):
        step = next(self._script, None)
        if isinstance(step, Exception):
            raise step
        return step

    def release(self):
        self.released = True


@pytest.fixture
def hurried(monkeypatch):
    """Do not wait between attempts to reach a camera."""
    monkeypatch.setattr(module, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(module, "_LONGEST_WAIT_S", 0.004)


def huge_png():
    """Return a file whose header declares more pixels than OpenCV reads."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1 << 17, 1 << 17, 8, 2, 0, 0, 0)  # width, height, bits, RGB
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_video_gives_every_frame(clip):
    with open_sources([str(clip(7))]) as [source]:
        frames = [found["clip.avi"] for found in gather([source])]
        assert (source.live, source.fps, source.ended, source.counters.frames) == (False, 5.0, True, 7)
    assert [(frame.number, round(frame.time_s, 1)) for frame in frames] == [(i, i / 5) for i in range(7)]


def test_a_folder_of_images_passes_over_what_is_none(tmp_path):
    for name, value in (("b.png", 2), ("a.png", 1)):
        cv2.imwrite(str(tmp_path / name), picture(value))
    (tmp_path / "aa.jpg").write_bytes(b"no image")
    (tmp_path / "ab.png").write_bytes(huge_png())
    (tmp_path / "notes.txt").write_text("no image either")
    with open_sources([str(tmp_path)]) as [source]:
        frames = [found[tmp_path.name] for found in gather([source])]
        assert (source.counters.frames, source.counters.bad) == (2, 2)
        assert "ab.png is no image" in source.counters.problem
    assert [int(frame.image[0, 0, 0]) for frame in frames] == [1, 2]


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("absent.mp4", DataError, "absent.mp4: no such file, expected a video"),
        ("ftp://host/x", ConfigError, "unknown kind of source 'ftp', expected csi, rtsp"),
        ("csi://0?speed=3", ConfigError, r"unknown speed, expected csi://N\?width=W&height=H&fps=F"),
        ("csi://front", ConfigError, "'front' is no number"),
        ("rtsp://user:secret@127.0.0.1:1/door", DataError, r"rtsp://127\.0\.0\.1:1/door cannot be opened: nobody"),
    ],
)
def test_a_source_that_cannot_be(text, error, words):
    with pytest.raises(error, match=words) as raised:
        open_source(text)
    assert "secret" not in str(raised.value)


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"no image, expected a file or a folder with \.bmp"):
        open_source(str(tmp_path))


def test_a_camera_that_is_not_there():
    with pytest.raises(
        DataError, match=r"camera 63 cannot be opened; (here are .*is it in use|this machine has no /dev/video)"
    ):
        open_source("63")


def test_csi_needs_gstreamer():
    if has_gstreamer():
        pytest.skip("this OpenCV has GStreamer")
    with pytest.raises(BackendUnavailable, match="csi:// needs an OpenCV with GStreamer"):
        open_source("csi://0")


def test_pipelines_for_a_jetson():
    assert parse_csi("csi://1?width=640&height=480&fps=60") == (1, {"width": 640, "height": 480, "fps": 60})
    text = csi_pipeline(1, 640, 480, 60)
    assert text.startswith(
        "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM),width=640,height=480,framerate=60/1"
    )
    assert text.endswith("video/x-raw,format=BGR ! appsink drop=1 max-buffers=1 sync=false")
    assert url_pipeline("rtsp://host/door").startswith(
        'rtspsrc location="rtsp://host/door" latency=200 protocols=tcp ! application/x-rtp,media=video ! decodebin ! nv'
    )
    assert url_pipeline("http://host/door").startswith('uridecodebin uri="http://host/door" ! nvvidconv ! ')
    assert url_pipeline('rtsp://host/" ! filesink location="/etc/passwd') is None  # it would leave its quotes


@pytest.mark.parametrize("decodes", [True, False])
def test_on_a_jetson_ffmpeg_follows_a_decoder_that_gives_nothing(tmp_path, monkeypatch, decodes):
    opened = []

    class Capture:
        def __init__(self, address, api, options=()):
            self.api, self.released = api, False
            opened.append(self)

        def isOpened(self):  # noqa: N802, OpenCV's name
            return True

        def get(self, what):
            return 20.0

        def read(self):
            gives = decodes or self.api == cv2.CAP_FFMPEG
            return gives, picture(1) if gives else None

        def release(self):
            self.released = True

    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "GStreamer: YES (1.20.3)")
    monkeypatch.setattr("dpal_edge.runtime.capture._JETSON", tmp_path)
    assert open_url("rtsp://host/door").read() is not None
    expected = [cv2.CAP_GSTREAMER] if decodes else [cv2.CAP_GSTREAMER, cv2.CAP_FFMPEG]
    assert [capture.api for capture in opened] == expected
    assert [capture.released for capture in opened] == [not decodes, False][: len(opened)]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("rtsp://user:secret@camera.local:554/door/1", "camera.local-door-1"),
        ("rtsp://user:pa/secret@camera.local/door", "camera.local-door"),
        ("rtsp://user:[secret@camera.local/door", "camera.local-door"),
        ("http://camera.local/video.mjpg?user=a&pwd=secret", "camera.local-video.mjpg"),
        ("rtsp://camera.local/user=a_password=secret_channel=1.sdp", "camera.local-user-..._password-..._channel-..."),
    ],
)
def test_a_name_tells_no_password(url, name):
    assert name_url(url) == name
    assert "secret" not in without_secrets(url)
    with pytest.raises(ConfigError) as raised:
        open_source(url.replace("rtsp", "srt").replace("http", "srt"))
    assert "secret" not in str(raised.value)


def test_enough_frames_are_enough(clip):
    source, silent = PushSource("cam"), PushSource("silent")
    with open_sources([str(clip(7))]) as [video]:
        rounds = gather([video, source, silent], wait_s=0.0, limit=2)
        assert [sorted(next(rounds)) for _ in range(2)] == [["clip.avi"]] * 2
        source.push(picture(1))
        assert sorted(next(rounds)) == ["cam"]
        silent.close()
        source.push(picture(2))
        assert [sorted(found) for found in rounds] == [["cam"]]
        assert video.counters.frames == 2  # what nobody wants is not decoded


def test_equal_names_are_numbered(clip):
    path = str(clip(2))
    with open_sources([path, path, path]) as sources:
        assert [source.name for source in sources] == ["clip.avi", "clip.avi-2", "clip.avi-3"]
        assert [sorted(found) for found in gather(sources)] == [["clip.avi", "clip.avi-2", "clip.avi-3"]] * 2


def test_what_an_app_pushes():
    source = PushSource("door")
    for value in (1, 2, 3):
        source.push(picture(value))
    frame = source.poll()
    assert (int(frame.image[0, 0, 0]), frame.number, source.counters.dropped) == (3, 2, 2)
    assert source.poll() is None
    source.push(picture(7, (8, 6)))
    assert source.poll().image.shape == (8, 6, 3)
    source.push(picture(7, (8, 6, 4)))
    assert source.poll().image.shape == (8, 6, 3)
    for garbage in (None, picture(shape=(8, 6, 2)), picture(shape=(0, 6, 3)), np.zeros((8, 6, 3)), b"abc"):
        source.push(garbage)
    assert (source.poll(), source.counters.bad) == (None, 5)
    assert source.counters.problem.startswith("a frame of shape () and type bytes, expected uint8 (H, W, 3) BGR")


def test_a_camera_that_dies_is_opened_again(hurried):
    opened = []
    scripts = iter(
        [
            [picture(1), picture(2)],  # ends
            [picture(3, (8, 6)), np.zeros(3), picture(4, (4, 4, 3)), RuntimeError("driver")],  # changes, dies
            DataError("gone"),  # cannot be opened for a while
            [picture(5)],
        ]
    )

    def reopen():
        script = next(scripts, DataError("gone for good"))
        if isinstance(script, Exception):
            raise script
        return ScriptedCamera(script, opened)

    source = LiveSource("cam", reopen)
    try:
        assert source.fps == 20.0
        until(lambda: source.counters.problem == "gone for good")
        counters = source.counters
        assert (counters.frames, counters.bad) == (5, 1)
        assert counters.dropped == 4  # nobody took any
        assert counters.reconnects >= 4
        assert int(source.poll().image[0, 0, 0]) == 5
        assert all(camera.released for camera in opened)
    finally:
        source.close()
    assert source.ended
    until(lambda: not source._thread.is_alive())


def test_the_first_attempt_counts_unless_patient(hurried):
    answers = iter([DataError("not yet"), ScriptedCamera([picture(9)])])

    def open_camera():
        answer = next(answers, DataError("no more"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(DataError, match="never"):
        LiveSource("cam", lambda: (_ for _ in ()).throw(DataError("never")))
    source = LiveSource("cam", open_camera, patient=True)
    try:
        until(lambda: source.counters.frames == 1)
    finally:
        source.close()


def test_a_camera_without_frames_has_stalled(monkeypatch):
    blocked = threading.Event()

    class Silent(ScriptedCamera):
        def read(self):
            blocked.wait()

    source = LiveSource("cam", lambda: Silent([]))
    assert not source.stalled
    monkeypatch.setattr(module, "_STALLED_S", 0.0)
    assert source.stalled
    monkeypatch.setattr(module, "_JOIN_S", 0.01)
    source.close()  # does not wait for a thread that hangs in a driver
    blocked.set()


def test_cameras_wait_for_each_other_but_not_for_long():
    one, other = PushSource("one"), PushSource("other")
    rounds = gather([one, other], wait_s=0.05)
    one.push(picture(1))
    threading.Timer(0.01, other.push, [picture(2)]).start()
    assert sorted(next(rounds)) == ["one", "other"]
    one.push(picture(3))
    assert sorted(next(rounds)) == ["one"]  # the other was not waited for in vain
    other.push(picture(4))
    other.close()
    one.close()
    assert [sorted(found) for found in rounds] == []


def test_a_camera_that_has_stalled_is_not_waited_for():
    one, dead = PushSource("one"), PushSource("dead")
    dead._last -= module._STALLED_S
    rounds = gather([one, dead], wait_s=WAIT_S)
    one.push(picture(1))
    began = time.monotonic()
    assert sorted(next(rounds)) == ["one"]
    assert time.monotonic() - began < WAIT_S / 2
    dead.push(picture(2))
    one.push(picture(2))
    assert sorted(next(rounds)) == ["dead", "one"]
    one.push(picture(3))
    threading.Timer(0.01, dead.push, [picture(3)]).start()
    assert sorted(next(rounds)) == ["dead", "one"]  # since it gives frames again


class _Mjpeg(http.server.BaseHTTPRequestHandler):
    """Ten pictures a second for as long as the server lives."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        number = 0
        while not self.server.gone.wait(0.03):
            data = cv2.imencode(".jpg", picture(number % 200, (48, 64, 3)))[1].tobytes()
            head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data)
            self.wfile.write(head + data + b"\r\n")
            number += 1

    def log_message(self, *arguments):
        pass


def _serve(port):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _Mjpeg)
    server.daemon_threads, server.gone = True, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_stream_over_the_network_comes_back(hurried):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = _serve(port)
    source = LiveSource("cam", lambda: open_url(f"http://127.0.0.1:{port}/cam.mjpg"))
    try:
        until(lambda: source.counters.frames > 2)
        assert source.poll().image.shape == (48, 64, 3)
        server.gone.set()
        server.shutdown()
        server.server_close()
        until(lambda: source.counters.reconnects > 1)
        before = source.counters.frames
        server = _serve(port)
        until(lambda: source.counters.frames > before)
    finally:
        source.close()
        server.gone.set()
        server.shutdown()
        server.server_close()


def test_a_file_plays_as_a_camera(clip, hurried):
    with open_sources([str(clip(3))], as_camera=True) as [source]:
        began = time.monotonic()
        until(lambda: source.counters.frames >= 4)  # it begins anew
        assert time.monotonic() - began >= 0.4  # 5 frames/s; it may not be faster
        assert (source.live, source.fps) == (True, 5.0)
