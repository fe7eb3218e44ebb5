import asyncio
import http.client
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress

import numpy as np
import pytest
from tiny_bundle import ColourDetector, people_frame

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.runtime import Pipeline, PushSource
from dpal_edge.runtime.loop import run
from dpal_edge.runtime.monitor import Monitor

cv2 = pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")
pytest.importorskip("aiohttp")
from dpal_edge.runtime.serve import Server, parse_address  # noqa: E402, needs aiohttp

WAIT_S = 30


class App:
    """A pipeline that runs over two cameras in a thread, and the means to give them frames."""

    def __init__(self, bundle):
        self.door, self.yard = PushSource("door"), PushSource("the yard")
        self.pipeline = Pipeline.open(bundle, detector=ColourDetector())
        self.monitor = Monitor([self.door, self.yard], self.pipeline.name)
        self.thread = threading.Thread(
            target=run, args=(self.pipeline, [self.door, self.yard]), kwargs={"monitor": self.monitor, "wait_s": 0.0}
        )
        self.thread.start()

    def push(self, x=10):
        self.door.push(people_frame({"r": (x, 20), "g": (90, 50)}))

    def close(self):
        self.door.close()
        self.yard.close()
        self.thread.join(WAIT_S)
        self.pipeline.close()


@pytest.fixture
def app(bundle):
    running = App(bundle)
    running.push()
    end = time.monotonic() + WAIT_S
    while "door" not in running.monitor.newest and time.monotonic() < end:
        time.sleep(0.005)
    yield running
    running.close()


def get(server, path, **headers):
    request = urllib.request.Request(f"http://{server.host}:{server.port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=WAIT_S) as response:
        return response.read().decode()


def status(server, path, **headers):
    connection = http.client.HTTPConnection(server.host, server.port, timeout=WAIT_S)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    connection.close()
    return response.status, dict(response.getheaders())


def picture(server, query="", source="door"):
    """Return a picture and the number of its frame."""
    address = f"http://{server.host}:{server.port}/picture/{source}{query}"
    with urllib.request.urlopen(address, timeout=WAIT_S) as response:
        image = cv2.imdecode(np.frombuffer(response.read(), np.uint8), cv2.IMREAD_COLOR)
        return image, int(response.headers["X-Frame-Number"])


def test_the_numbers_and_the_page(app):
    with Server(app.monitor, "0") as server:
        assert server.url == f"http://127.0.0.1:{server.port}/"
        told = json.loads(get(server, "/state.json"))
        door, yard = told["sources"]["door"], told["sources"]["the yard"]
        assert (door["frames"], door["processed"], door["people"], door["live"]) == (1, 1, 2, True)
        assert [person["track_id"] for person in door["persons"]] == [1, 2]
        assert (yard["processed"], yard["persons"]) == (0, [])
        assert told["stages_ms"].keys() == {"detect", "crop", "model", "decode", "track"}
        text = get(server, "/metrics")
        assert 'dpal_edge_frames_total{source="door"} 1\n' in text
        assert 'dpal_edge_people{source="the yard"} 0\n' in text
        assert 'dpal_edge_stage_seconds_count{stage="model"} 1\n' in text
        for line in text.splitlines():
            assert re.fullmatch(r"# TYPE \w+ (gauge|counter|summary)|\w+(\{[^{}]*\})? [-+.e\d]+", line), line
        page = get(server, "/")
        assert "dpal-edge live" in page
        assert not re.search(r"(src|href)=.https?:", page)  # it works without the internet


def test_live_pictures(app):
    with Server(app.monitor, "127.0.0.1:0") as server:
        plain, number = picture(server, "?show=")
        assert (plain.shape, number) == ((96, 160, 3), 0)
        assert status(server, "/picture/door")[1]["Cross-Origin-Resource-Policy"] == "same-origin"
        drawn, _ = picture(server)
        assert np.abs(drawn.astype(int) - plain).max() > 60  # boxes and labels
        threading.Timer(0.2, app.push, [60]).start()
        moved, number = picture(server, "?show=&after=0")  # waits for it
        assert number == 1
        assert np.abs(moved.astype(int) - plain).max() > 60
        assert picture(server, "?after=1")[1] == 1  # nothing newer comes: what there is, in the end
        assert status(server, "/picture/cellar")[0] == 404
        assert status(server, "/picture/the%20yard")[0] == 503


def test_viewers_share_a_picture(app, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "dpal_edge.runtime.serve._compress", lambda *given: calls.append(given) or time.sleep(0.2) or b"x"
    )
    with Server(app.monitor, "0") as server:
        viewers = [threading.Thread(target=get, args=(server, "/picture/door")) for _ in range(6)]
        for viewer in viewers:
            viewer.start()
        for viewer in viewers:
            viewer.join(WAIT_S)
    assert len(calls) == 1


def test_events(app):
    with Server(app.monitor, "0") as server:
        address = f"http://127.0.0.1:{server.port}/events"
        with urllib.request.urlopen(address, timeout=WAIT_S) as response:
            for _ in range(2):
                line = response.readline().decode()
                assert json.loads(line.removeprefix("data: "))["sources"]["door"]["people"] == 2
                response.readline()


@pytest.mark.parametrize("path", ["/events", "/picture/door"])
def test_a_viewer_who_never_reads_is_let_go(app, monkeypatch, path):
    monkeypatch.setattr("dpal_edge.runtime.serve._SLOW_S", 0.2)
    monkeypatch.setattr("dpal_edge.runtime.serve._EVENTS_S", 0.0)
    monkeypatch.setattr(Server, "_told", lambda self: {"much": "x" * 1_000_000})
    monkeypatch.setattr("dpal_edge.runtime.serve._compress", lambda *given: b"x" * 50_000_000)
    with Server(app.monitor, "0") as server, socket.create_connection(("127.0.0.1", server.port)) as lazy:
        lazy.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert get(server, "/healthz") == "ok\n"  # others are served meanwhile
        end = time.monotonic() + WAIT_S
        while "dpal_edge_slow_viewers_total 1\n" not in get(server, "/metrics"):
            assert time.monotonic() < end
            time.sleep(0.01)
        lazy.settimeout(WAIT_S)
        with suppress(ConnectionResetError):
            while lazy.recv(1 << 20):  # what lay in buffers, and then the end
                assert time.monotonic() < end


def test_an_event_is_made_once_for_all(app, monkeypatch):
    calls = []
    monkeypatch.setattr(Server, "_told", lambda self: calls.append(time.monotonic()) or {"number": len(calls)})
    with Server(app.monitor, "0") as server, ExitStack() as stack:
        address = f"http://127.0.0.1:{server.port}/events"
        viewers = [stack.enter_context(urllib.request.urlopen(address, timeout=WAIT_S)) for _ in range(5)]
        for viewer in viewers:
            for _ in range(4):  # each with an empty line between
                viewer.readline()
    assert len(calls) <= 1 + (calls[-1] - calls[0]) / 0.2  # a quarter of a second, less what clocks are off


def test_the_end_waits_for_a_picture_in_the_making(app, monkeypatch):
    begun = threading.Event()
    monkeypatch.setattr("dpal_edge.runtime.serve._compress", lambda *given: begun.set() or time.sleep(0.3) or b"x")
    with Server(app.monitor, "0") as server, socket.create_connection(("127.0.0.1", server.port)) as viewer:
        viewer.sendall(b"GET /picture/door HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert begun.wait(WAIT_S)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncio")]


def test_who_has_left_is_not_waited_for(app):
    with Server(app.monitor, "0") as server:
        before = len(asyncio.all_tasks(server._loop))
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.port)) as gone:
                gone.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
                gone.recv(100)
        end = time.monotonic() + WAIT_S
        while len(asyncio.all_tasks(server._loop)) > before:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_token_is_asked_for_beyond_this_machine(app):
    with Server(app.monitor, "0.0.0.0:0") as server:
        server.host = "127.0.0.1"  # where the test asks
        assert len(server.token) > 15
        for path in ("/", "/state.json", "/metrics", "/picture/door", "/events", "/state.json?token=wrong"):
            assert status(server, path)[0] == 401
        assert status(server, "/healthz")[0] == 200  # tells nothing about people
        assert status(server, "/metrics", Authorization=f"Bearer {server.token}")[0] == 200
        assert status(server, "/metrics", Authorization="Bearer \xff")[0] == 401
        code, headers = status(server, f"/?token={server.token}")
        assert (code, headers["Location"]) == (302, "/")
        cookie = headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert status(server, "/", Cookie=cookie.partition(";")[0])[0] == 200


def test_other_names_are_refused_on_this_machine(app):
    with Server(app.monitor, "0") as server:
        assert status(server, "/state.json", Host="evil.example")[0] == 403
        assert status(server, "/state.json", Host="")[0] == 403
        assert status(server, "/state.json", Host=f"localhost:{server.port}")[0] == 200
        assert status(server, "/state.json", Host="[::1]")[0] == 200


def test_health(app, monkeypatch):
    with Server(app.monitor, "0") as server:
        assert status(server, "/healthz")[0] == 200
        with monkeypatch.context() as hung:
            hung.setattr("dpal_edge.runtime.monitor._HUNG_S", 0.0)
            assert status(server, "/healthz")[0] == 503
        monkeypatch.setattr("dpal_edge.runtime.sources._STALLED_S", 0.0)
        assert status(server, "/healthz")[0] == 503
        assert json.loads(get(server, "/state.json"))["sources"]["door"]["stalled"]


def test_a_port_that_is_taken(app):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DataError, match=rf"127\.0\.0\.1:{port} cannot be served: .*choose another address"):
            Server(app.monitor, str(port)).__enter__()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8080", ("127.0.0.1", 8080)), ("0.0.0.0:80", ("0.0.0.0", 80)), ("[::1]:8080", ("::1", 8080))],
)
def test_addresses(text, expected):
    assert parse_address(text) == expected


def test_a_name_that_is_none(app):
    with pytest.raises(DataError, match=r"a\.\.b:8080 cannot be served"):
        Server(app.monitor, "a..b:8080").__enter__()


@pytest.mark.parametrize("text", ["door", "0.0.0.0", "1:99999", "", "²"])
def test_no_address(text):
    with pytest.raises(ConfigError, match="expected PORT or HOST:PORT, for example 8080"):
        parse_address(text)
