"""Where frames come from: cameras, streams, video files, folders of images, and the app itself."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import ConfigError, DataError, DpalEdgeError
from dpal_edge.files import IMAGE_SUFFIXES
from dpal_edge.runtime.capture import Capture, open_camera, open_csi, open_url, without_secrets
from dpal_edge.runtime.opencv import load_opencv
from dpal_edge.runtime.preprocess import as_bgr
from dpal_edge.runtime.video import Video

_URLS = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp")
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0  # between attempts to reach a camera; each doubles the one before
_STALLED_S = 5.0  # without a frame a live source counts as stalled
_JOIN_S = 1.0  # that closing waits for a thread; one that hangs in a driver is left behind


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of one source."""

    image: NDArray[np.uint8]  # (H, W, 3) BGR; H and W may change in the middle of a stream
    number: int  # from 0, of the frames that the source gave; what is missing in between was dropped
    time_s: float  # since the source began: of the file's clock, or of this machine's for a live source
    captured: float  # time.monotonic() when it was decoded, or when it was taken from a file, which is decoded ahead


@dataclass
class Counters:
    """What happened at a source so far."""

    frames: int = 0  # decoded
    dropped: int = 0  # decoded, and replaced by a newer one before anybody took it
    bad: int = 0  # that were no pictures
    reconnects: int = 0  # attempts to open it again
    problem: str = ""  # the last one, in words


class Source(Protocol):
    """Gives frames; used from one thread, whatever threads it has itself."""

    name: str
    path: Path | None  # what it reads, which no output may replace
    live: bool  # frames that nobody takes in time are dropped
    fps: float  # nominal frames per second
    counters: Counters

    @property
    def ended(self) -> bool:
        """Whether no frame will come any more."""
        ...

    @property
    def stalled(self) -> bool:
        """Whether it should give frames and does not."""
        ...

    def poll(self) -> Frame | None:
        """Return the next frame of a file, or the newest one of a live source if it is new."""
        ...

    def listen(self, news: threading.Event) -> None:
        """Set ``news`` whenever a frame arrives or the source ends."""
        ...

    def close(self) -> None:
        """Let go of the device; may be called more than once."""
        ...


class FileSource:
    """A video file: every frame, in order, as fast as they are taken; the next is decoded while one is looked at."""

    live = stalled = False

    def __init__(self, path: Path | str, *, name: str | None = None) -> None:
        """Open it.

        Raises:
            DataError: it is missing or cannot be decoded.
        """
        self.video = Video(path)
        self.path: Path | None = self.video.path
        self.name = name or self.video.path.name
        self.fps, self.counters = self.video.fps, Counters()
        self._frames = iter(self.video)
        self._decoder = ThreadPoolExecutor(1, f"decoder {self.name}")
        self._next = self._decoder.submit(next, self._frames, None)
        self.ended = False

    def poll(self) -> Frame | None:
        """Return the next frame; None at the end."""
        image = None if self.ended else self._next.result()
        if image is None:
            self.ended = True
            return None
        self._next = self._decoder.submit(next, self._frames, None)
        self.counters.frames += 1
        number = self.counters.frames - 1
        return Frame(image, number, number / self.fps, time.monotonic())

    def listen(self, news: threading.Event) -> None:
        """Do nothing: a file is always ready."""

    def close(self) -> None:
        """Close the file."""
        self.ended = True
        self._decoder.shutdown()
        self.video.close()


class ImageSource:
    """Images, each a frame; what cannot be read is counted and passed over."""

    live = stalled = False
    fps = 1.0

    def __init__(self, path: Path | str, *, name: str | None = None) -> None:
        """List the image, or those of a folder in the order of their names.

        Raises:
            DataError: there is none.
        """
        self.path: Path | None = (place := Path(path))
        found = [place] if place.is_file() else sorted(place.iterdir()) if place.is_dir() else []
        self.images = [image for image in found if image.suffix.lower() in IMAGE_SUFFIXES]
        if not self.images:
            raise DataError(f"{path}: no image, expected a file or a folder with {', '.join(sorted(IMAGE_SUFFIXES))}")
        self.name, self.counters = name or place.name, Counters()
        self._next = 0

    @property
    def ended(self) -> bool:
        """Whether all were given."""
        return self._next == len(self.images)

    def poll(self) -> Frame | None:
        """Read the next image that can be read."""
        cv2 = load_opencv()
        while not self.ended:
            path = self.images[self._next]
            self._next += 1
            try:
                image = cv2.imread(str(path), cv2.IMREAD_COLOR)
            except cv2.error:  # a header that declares more pixels than OpenCV reads
                image = None
            if image is not None:
                self.counters.frames += 1
                return Frame(image, self._next - 1, float(self._next - 1), time.monotonic())
            self.counters.bad += 1
            self.counters.problem = f"{path} is no image that OpenCV can decode"
        return None

    def listen(self, news: threading.Event) -> None:
        """Do nothing: files are always ready."""

    def close(self) -> None:
        """Give no more."""
        self._next = len(self.images)


class NewestFrame:
    """What all live sources share: a place for one frame, where a newer one replaces it."""

    live = True
    fps = 25.0
    path: Path | None = None

    def __init__(self, name: str) -> None:
        self.name, self.counters, self.ended = name, Counters(), False
        self._began = self._last = time.monotonic()
        self._newest: Frame | None = None
        self._lock, self._news = threading.Lock(), threading.Event()

    @property
    def stalled(self) -> bool:
        """Whether it was not closed and gave no frame for five seconds."""
        return not self.ended and time.monotonic() - self._last > _STALLED_S

    def poll(self) -> Frame | None:
        """Return the newest frame if nobody took it yet."""
        with self._lock:
            frame, self._newest = self._newest, None
            return frame

    def listen(self, news: threading.Event) -> None:
        """Set ``news`` whenever a frame arrives or the source ends."""
        self._news = news
        news.set()

    def close(self) -> None:
        """End it."""
        self.ended = True
        self._news.set()

    def _put(self, image: NDArray[np.uint8]) -> None:
        try:
            picture = as_bgr(image)
        except ValueError as error:
            with self._lock:
                self.counters.bad += 1
                self.counters.problem = str(error)
            return
        with self._lock:
            now = self._last = time.monotonic()
            self.counters.dropped += self._newest is not None
            self._newest = Frame(picture, self.counters.frames, now - self._began, now)
            self.counters.frames += 1
        self._news.set()


class PushSource(NewestFrame):
    """Frames that the app gives itself, from any thread; only the newest is kept."""

    def __init__(self, name: str = "app") -> None:
        super().__init__(name)

    def push(self, image: NDArray[np.uint8]) -> None:
        """Take a picture (H, W, 3) BGR, (H, W) grey or (H, W, 4) BGRA uint8; it is not copied, so leave it alone.

        One of another shape or type is counted as bad and dropped: a camera's garbage must not stop the app.
        """
        self._put(image)


class LiveSource(NewestFrame):
    """A camera or a stream, read by a thread of its own; it is opened again, for ever, when it fails.

    Waits between attempts double from half a second to half a minute. Reading in a thread keeps the driver's queue
    empty: a frame is as old as it takes to decode it, however slow the app is.
    """

    def __init__(self, name: str, open_capture: Callable[[], Capture], *, patient: bool = False) -> None:
        """Open it once, so that a wrong address is an error now; with ``patient`` go on trying instead.

        Raises:
            DataError, BackendUnavailable: it cannot be opened.
        """
        super().__init__(name)
        self._open, self._stop = open_capture, threading.Event()
        first = None
        try:
            first = open_capture()
            self.fps = first.fps
        except DpalEdgeError as error:
            if not patient:
                raise
            self.counters.problem = str(error)
        self._thread = threading.Thread(target=self._follow, args=(first,), name=f"source {name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and let go of the device."""
        self._stop.set()
        super().close()
        self._thread.join(_JOIN_S)

    def _follow(self, capture: Capture | None) -> None:
        """Read until closed."""
        wait = _FIRST_WAIT_S
        while True:
            if capture is not None:
                before = self.counters.frames
                self._read(capture)
                wait = _FIRST_WAIT_S if self.counters.frames > before else wait
            if self._stop.wait(wait):
                return
            wait = min(2 * wait, _LONGEST_WAIT_S)
            self.counters.reconnects += 1
            try:
                capture = self._open()
                self.fps = capture.fps
            except Exception as error:  # noqa: BLE001, a driver's mistake of any kind must not end the thread
                capture, self.counters.problem = None, _in_words(error)

    def _read(self, capture: Capture) -> None:
        """Take frames until there are no more."""
        try:
            while not self._stop.is_set():
                image = capture.read()
                if image is None:
                    self.counters.problem = "the stream ended"
                    return
                self._put(image)
        except Exception as error:  # noqa: BLE001, as above
            self.counters.problem = _in_words(error)
        finally:
            capture.release()


class Paced:
    """A video file that plays at its own speed, over and over, as a camera would."""

    def __init__(self, path: Path | str) -> None:
        """Open it; errors as ``FileSource``."""
        self._video = Video(path)
        self.fps = self._video.fps
        self._frames, self._due = iter(self._video), time.monotonic()

    def read(self) -> NDArray[np.uint8] | None:
        """Wait until the next frame is due, and return it."""
        self._due = max(self._due + 1 / self.fps, time.monotonic())  # who is late does not hurry afterwards
        time.sleep(max(0.0, self._due - time.monotonic()))
        frame = next(self._frames, None)
        if frame is None:
            self._video.close()
            self._video = Video(self._video.path)
            self._frames = iter(self._video)
            frame = next(self._frames, None)
        return frame

    def release(self) -> None:
        """Close the file."""
        self._video.close()


def open_source(text: str, *, name: str | None = None, patient: bool = False, as_camera: bool = False) -> Source:
    """Open what ``text`` names.

    Args:
        text: a camera's number, ``csi://0?width=1280&height=720&fps=30`` (Jetson), ``rtsp://...`` or another URL that
            FFmpeg reads, a video file, an image, or a folder of images.
        name: by default the last part of ``text``, without user names and passwords.
        patient: go on trying where a camera or a stream does not answer yet.
        as_camera: play a video file at its own speed, over and over, dropping frames as a camera does.

    Raises:
        ConfigError: it is none of these.
        DataError, BackendUnavailable: it cannot be opened.
    """
    scheme = text.partition("://")[0].lower() if "://" in text else ""
    if text.isdecimal():
        return LiveSource(name or f"camera{text}", lambda: open_camera(int(text)), patient=patient)
    if scheme == "csi":
        number, options = parse_csi(text)
        return LiveSource(name or f"csi{number}", lambda: open_csi(number, **options), patient=patient)
    if scheme in _URLS:
        return LiveSource(name or name_url(text), lambda: open_url(text), patient=patient)
    if scheme:
        expected = f"expected csi, {', '.join(_URLS)} or a path"
        raise ConfigError(f"{without_secrets(text)}: unknown kind of source {scheme!r}, {expected}")
    path = Path(text)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageSource(path, name=name)
    if not as_camera:
        return FileSource(path, name=name)
    source = LiveSource(name or path.name, lambda: Paced(path))
    source.path = path
    return source


@contextmanager
def open_sources(texts: Sequence[str], *, patient: bool = False, as_camera: bool = False) -> Iterator[list[Source]]:
    """Open all of ``texts`` under names that differ; close them at the end."""
    with ExitStack() as stack:
        opened: list[Source] = []
        for text in texts:
            source = open_source(text, patient=patient, as_camera=as_camera)
            stack.callback(source.close)
            plain, taken = source.name, {other.name for other in opened}
            number = 2
            while source.name in taken:
                source.name, number = f"{plain}-{number}", number + 1
            opened.append(source)
        yield opened


WAIT_S = 0.01  # that a frame waits for those of other cameras, unless told otherwise


def gather(sources: Sequence[Source], *, wait_s: float = 0.0, limit: int | None = None) -> Iterator[dict[str, Frame]]:
    """Yield the next frames by source, never none, until all have ended or have given ``limit``.

    Args:
        sources: with names that differ.
        wait_s: how long the first live frame may wait for those of other cameras, so that one pass serves them all; not
            for a camera that has stalled.
        limit: frames of each; None is all.
    """
    news = threading.Event()
    for source in sources:
        source.listen(news)
    given: Counter[str] = Counter()
    while wanted := [one for one in sources if not one.ended and (limit is None or given[one.name] < limit)]:
        frames: dict[str, Frame] = {}
        until = None
        while _poll(wanted, frames, news) and (until is None or time.monotonic() < until):
            until = until or (time.monotonic() + wait_s if frames else None)
            news.wait(None if until is None else max(0.0, until - time.monotonic()))
        given.update(frames.keys())
        if frames:
            yield frames


def _poll(sources: Sequence[Source], frames: dict[str, Frame], news: threading.Event) -> bool:
    """Add to ``frames`` what is there; say whether one of a live source is still worth waiting for."""
    news.clear()  # before looking: what comes meanwhile sets it again
    running = [source for source in sources if not source.ended and source.name not in frames]
    for source in running:
        if frame := source.poll():
            frames[source.name] = frame
    missing = [source for source in running if source.live and not source.ended and source.name not in frames]
    return any(not frames or not source.stalled for source in missing)


def name_url(url: str) -> str:
    """Return a name for a stream: its host and its path, without what may be secret."""
    host, _, path = without_secrets(url).partition("://")[2].partition("/")
    return re.sub(r"[^\w.-]+", "-", f"{host.partition(':')[0]}/{path}").strip("-") or "stream"


def parse_csi(text: str) -> tuple[int, dict[str, int]]:
    """Return the sensor and the size of ``csi://N?width=W&height=H&fps=F``.

    Raises:
        ConfigError: a number or an option that it does not know.
    """
    expected = "expected csi://N?width=W&height=H&fps=F"
    sensor, _, query = text.partition("://")[2].partition("?")
    given = {"sensor": sensor or "0", **dict(parse_qsl(query))}
    if unknown := given.keys() - {"sensor", "width", "height", "fps"}:
        raise ConfigError(f"{text}: unknown {', '.join(unknown)}, {expected}")
    if bad := [value for value in given.values() if not value.isdecimal()]:
        raise ConfigError(f"{text}: {bad[0]!r} is no number, {expected}")
    numbers = {name: int(value) for name, value in given.items()}
    return numbers.pop("sensor"), numbers


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
