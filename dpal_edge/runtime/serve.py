"""A page that shows a running app live, its numbers for Prometheus, and whether it is well."""

import asyncio
import ipaddress
import json
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from hmac import compare_digest
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from dpal_edge import __version__
from dpal_edge.errors import ConfigError, DataError
from dpal_edge.runtime.annotate import LAYERS, draw
from dpal_edge.runtime.monitor import Monitor
from dpal_edge.runtime.opencv import load_opencv

_PAGE = Path(__file__).resolve().parents[1] / "assets" / "live.html"
_COOKIE = "dpal_edge_token"  # and the port: cookies know none
_QUALITY = 80  # of JPEG
_EVENTS_S = 0.25  # between the numbers that the page is sent
_LOOK_S, _LONGEST_LOOK_S = 0.01, 1.0  # between looks for a newer picture, and until the old one is sent again
_SLOW_S = 10.0  # that a viewer may take for what it is sent before it is let go
_START_S = 10.0

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Serves a ``Monitor`` from a thread of its own; the app never waits for a viewer.

    Pictures are drawn and compressed when somebody asks for one, once for all who see the same. A viewer who does not
    take what it is sent is let go, and counted in ``Monitor.slow_viewers``.
    Where the address is not this machine's own, everything but ``/healthz`` asks for a token, once as ``?token=``,
    which leaves a cookie, or as ``Authorization: Bearer``. On this machine's own the name must be local too, so that
    no web page elsewhere can look through the browser.
    """

    def __init__(self, monitor: Monitor, address: str, *, token: str | None = None) -> None:
        """Prepare to listen at ``[HOST:]PORT``; port 0 takes a free one.

        Raises:
            ConfigError: the address is none.
        """
        self.monitor = monitor
        self.host, self.port = parse_address(address)
        self.local = _is_local(self.host)
        self.token = token or (None if self.local else secrets.token_urlsafe(16))
        self._loop = asyncio.new_event_loop()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="serve", daemon=True)
        self._drawn: dict[tuple[str, frozenset[str]], tuple[int, asyncio.Future[bytes]]] = {}
        self._event, self._event_ends = b"", 0.0  # when the next one is made, by the loop's clock

    @property
    def url(self) -> str:
        """The page, with its token; where all of the machine's addresses are listened at, by its name."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}/" + (f"?token={self.token}" if self.token else "")

    def __enter__(self) -> "Server":
        """Start.

        Raises:
            DataError: the port is taken, or not allowed.
        """
        self._thread.start()
        ready = self._ready.wait(_START_S)
        if self._problem is not None or not ready:
            reason = getattr(self._problem, "strerror", None) or self._problem or "it did not start"
            raise DataError(f"{self.host}:{self.port} cannot be served: {reason}; choose another address")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_START_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())  # a picture may be drawn just now
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        app = web.Application(middlewares=[self._bound, self._guard])
        app.router.add_get("/", self._page)
        app.router.add_get("/picture/{source}", self._picture)
        app.router.add_get("/events", self._events)
        app.router.add_get("/state.json", self._state)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._health)
        # Who has left must not be waited for.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5, handler_cancellation=True)
        await runner.setup()
        try:
            site = web.TCPSite(runner, self.host, self.port)
            try:
                await site.start()
                self.port = runner.addresses[0][1]
            except (OSError, UnicodeError) as error:
                self._problem = error
                return
            finally:
                self._ready.set()
            await self._stop.wait()
        finally:
            await runner.cleanup()

    @web.middleware
    async def _bound(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Write what a handler returns, in bounded time: aiohttp itself would wait for ever."""
        if request.transport is not None:
            request.transport.set_write_buffer_limits(0)  # written is what the system has taken
        response = await handler(request)
        with suppress(ConnectionError):
            await response.prepare(request)
            await self._written(request, response.write_eof())
        return response

    async def _written(self, request: web.Request, writing: Awaitable[None]) -> None:
        """Wait for what is written to a viewer.

        Raises:
            ConnectionError: it has left, or was let go because it was too slow.
        """
        try:
            await asyncio.wait_for(writing, _SLOW_S)
        except asyncio.TimeoutError:
            self.monitor.slow_viewers += 1
            if request.transport is not None:
                request.transport.abort()  # what was not taken must not wait for ever
            raise ConnectionResetError from None

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Let in who may look."""
        if request.path == "/healthz":
            return await handler(request)
        if self.local and not _is_local(urlsplit(f"//{request.headers.get('Host', '')}").hostname or ""):
            raise web.HTTPForbidden(text=f"{request.host} is not a name of this machine\n")
        if self.token is None:
            return await handler(request)
        if _same(request.query.get("token"), self.token):
            there = web.HTTPFound(request.rel_url.without_query_params("token"))
            there.set_cookie(f"{_COOKIE}_{self.port}", self.token, httponly=True, samesite="Strict")
            raise there
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not (_same(request.cookies.get(f"{_COOKIE}_{self.port}"), self.token) or _same(bearer, self.token)):
            raise web.HTTPUnauthorized(text="a token is needed: open the address that dpal-edge run printed\n")
        return await handler(request)

    async def _page(self, request: web.Request) -> web.Response:
        policy = "default-src 'self'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        return web.Response(
            text=_PAGE.read_text(encoding="utf-8"),
            content_type="text/html",
            headers={"Content-Security-Policy": policy, "Cache-Control": "no-store"},
        )

    async def _picture(self, request: web.Request) -> web.Response:
        """Send a picture of one source that is newer than the frame ``after``, or in the end the newest there is."""
        source = request.match_info["source"]
        if source not in {one.name for one in self.monitor.sources}:
            raise web.HTTPNotFound(text=f"no source {source!r}\n")
        shown = frozenset(request.query.get("show", ",".join(LAYERS)).split(",")) & set(LAYERS)
        after, until = request.query.get("after", ""), self._loop.time() + _LONGEST_LOOK_S
        while (newest := self.monitor.newest.get(source)) is None or str(newest.frame.number) == after:
            if self._loop.time() > until or self._stop.is_set():
                break
            await asyncio.sleep(_LOOK_S)
        if newest is None:
            raise web.HTTPServiceUnavailable(text=f"{source} has given no frame yet\n")
        number, drawn = self._drawn.get((source, shown), (-1, None))
        if drawn is None or number != newest.frame.number:
            drawn = self._loop.run_in_executor(None, _compress, newest.frame.image, newest.people, shown)
            self._drawn[source, shown] = newest.frame.number, drawn
        headers = {
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",  # no page elsewhere may show it
            "X-Frame-Number": str(newest.frame.number),
        }
        return web.Response(body=await asyncio.shield(drawn), content_type="image/jpeg", headers=headers)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Send the numbers and the people, four times a second."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        with suppress(ConnectionError):
            while not self._stop.is_set():
                if self._loop.time() >= self._event_ends:  # one for all who look
                    self._event_ends = self._loop.time() + _EVENTS_S
                    self._event = f"data: {json.dumps(self._told())}\n\n".encode()
                await self._written(request, response.write(self._event))
                await asyncio.sleep(_EVENTS_S)
        return response

    async def _state(self, request: web.Request) -> web.Response:
        return web.json_response(self._told())

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=to_prometheus(self.monitor), content_type="text/plain", charset="utf-8")

    async def _health(self, request: web.Request) -> web.Response:
        healthy = self.monitor.healthy
        return web.Response(
            text="ok\n" if healthy else "a source or the app has stalled\n", status=200 if healthy else 503
        )

    def _told(self) -> dict[str, Any]:
        """Return the monitor's numbers and the people of the newest frames, without embeddings and pixels."""
        told = self.monitor.describe()
        for name, source in told["sources"].items():
            newest = self.monitor.newest.get(name)
            source["persons"] = [person.to_dict() for person in newest.people] if newest else []
        return told


def _compress(image: Any, people: Sequence[Any], shown: frozenset[str]) -> bytes:
    cv2 = load_opencv()
    _, encoded = cv2.imencode(".jpg", draw(image, people, layers=shown), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    picture: bytes = encoded.tobytes()
    return picture


def to_prometheus(monitor: Monitor) -> str:
    """Return the numbers in Prometheus' text format."""
    told = monitor.describe()
    lines = [
        "# TYPE dpal_edge_info gauge",
        f'dpal_edge_info{{version="{__version__}",engine="{_quoted(told["engine"])}"}} 1',
        "# TYPE dpal_edge_uptime_seconds gauge",
        f"dpal_edge_uptime_seconds {told['uptime_s']}",
        "# TYPE dpal_edge_slow_viewers_total counter",
        f"dpal_edge_slow_viewers_total {told['slow_viewers']}",
    ]
    for field, name, kind in _METRICS:
        lines.append(f"# TYPE {name} {kind}")
        for source, numbers in told["sources"].items():
            lines.append(f'{name}{{source="{_quoted(source)}"}} {float(numbers[field]):g}')
    lines.append("# TYPE dpal_edge_frame_age_seconds summary")
    for source, numbers in told["sources"].items():
        for quantile, share in (("p50", "0.5"), ("p95", "0.95")):
            label = f'source="{_quoted(source)}",quantile="{share}"'
            lines.append(f"dpal_edge_frame_age_seconds{{{label}}} {numbers['age_ms'][quantile] / 1000:g}")
    lines.append("# TYPE dpal_edge_stage_seconds summary")
    for stage, (seconds, passes) in dict(monitor.stages).items():
        lines.append(f'dpal_edge_stage_seconds_sum{{stage="{stage}"}} {seconds:g}')
        lines.append(f'dpal_edge_stage_seconds_count{{stage="{stage}"}} {passes}')
    return "\n".join(lines) + "\n"


_METRICS = (
    ("processed", "dpal_edge_frames_total", "counter"),
    ("dropped", "dpal_edge_dropped_frames_total", "counter"),
    ("bad", "dpal_edge_bad_frames_total", "counter"),
    ("reconnects", "dpal_edge_reconnects_total", "counter"),
    ("stalled", "dpal_edge_stalled", "gauge"),
    ("people", "dpal_edge_people", "gauge"),
    ("fps", "dpal_edge_frames_per_second", "gauge"),
)  # field of the monitor's description, name, kind


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``[HOST:]PORT``; the host is this machine alone by default.

    Raises:
        ConfigError: no port, or none that exists.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--serve {text}: expected PORT or HOST:PORT, for example 8080 or 0.0.0.0:8080")
    return host.strip("[]") or "127.0.0.1", int(port)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _same(given: str | None, token: str) -> bool:
    return given is not None and compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
