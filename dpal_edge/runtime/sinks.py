"""Where results go: annotated videos, whole or not at all, and JSON lines, of live sources as they come."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, DataError, DpalEdgeError
from dpal_edge.files import atomic_path
from dpal_edge.runtime.annotate import draw
from dpal_edge.runtime.opencv import load_opencv
from dpal_edge.runtime.person import Person
from dpal_edge.runtime.sources import Frame, Source

_LONGEST_GAP_S = 5.0  # without frames, of a live source, that its video shows: a night without a camera is no film
CODECS = {".mp4": "mp4v", ".webm": "VP80", ".avi": "MJPG"}  # what OpenCV's own FFmpeg can encode everywhere

Sink = Callable[[str, Frame, Sequence[Person]], None]  # takes the name of the source


@contextmanager
def open_sinks(
    sources: Sequence[Source], *, out: Path | None, jsonl: Path | None, embeddings: bool
) -> Iterator[list[Sink]]:
    """Open what is to be written.

    Videos get their names on leaving, each by itself; lines of files as well, but those of live sources are appended
    and can be read as they come, since nobody knows when they end.

    Args:
        sources: what frames come from; of several, each that gives a frame gets a video of its own, ``out`` with its
            name at the end.
        out: .mp4, .webm (plays in browsers) or .avi.
        jsonl: one line per frame, {"source", "frame", "time_s", "persons"}.
        embeddings: put embeddings into the lines too.

    Raises:
        DataError: an output cannot be written.
    """
    with ExitStack() as stack:
        sinks: list[Sink] = []
        if out is not None:
            sinks.append(stack.enter_context(_videos(out, sources)))
        if jsonl is not None:
            live = any(source.live for source in sources)
            sinks.append(stack.enter_context(_lines(jsonl, embeddings=embeddings, at_once=live)))
        yield sinks


@contextmanager
def _videos(out: Path, sources: Sequence[Source]) -> Iterator[Sink]:
    """Open an annotated video for each source."""
    videos = {source.name: _VideoFile(name_video(out, source.name, len(sources)), source) for source in sources}
    try:
        yield lambda source, frame, people: videos[source].write(frame, people)
    except BaseException as error:
        for video in videos.values():
            video.discard(error)
        raise
    problems = []
    for video in videos.values():  # what is wrong with one must not take the others along
        try:
            video.finish()
        except DpalEdgeError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def name_video(out: Path, source: str, count: int) -> Path:
    """Return where the annotated video of one of ``count`` sources goes."""
    return out if count == 1 else out.with_name(f"{out.stem}-{re.sub(r'[^a-zA-Z0-9-]', '_', source)}{out.suffix}")


@contextmanager
def _lines(path: Path, *, embeddings: bool, at_once: bool) -> Iterator[Sink]:
    """Open the file of lines; ``at_once``: each is appended, can be read then, and stays whatever happens."""
    with ExitStack() as stack:
        if at_once:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                # A service that is started again must not lose what it wrote before.
                file = stack.enter_context(path.open("a", encoding="utf-8", buffering=1))
            except OSError as error:
                raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
        else:
            temporary = stack.enter_context(atomic_path(path))
            file = stack.enter_context(temporary.open("w", encoding="utf-8"))

        def write(source: str, frame: Frame, people: Sequence[Person]) -> None:
            file.write(json.dumps(to_line(source, frame, people, embeddings=embeddings)) + "\n")

        yield write


def to_line(source: str, frame: Frame, people: Sequence[Person], *, embeddings: bool = False) -> dict[str, Any]:
    """Return a frame's results as JSON holds them."""
    persons = [person.to_dict(embedding=embeddings) for person in people]
    return {"source": source, "frame": frame.number, "time_s": round(frame.time_s, 3), "persons": persons}


class _VideoFile:
    """An annotated video in the writing; its first frame tells its size, without one there is no file."""

    def __init__(self, path: Path, source: Source) -> None:
        self._cv2 = load_opencv()
        self._path, self._source = path, source
        self._stack, self._temporary = ExitStack(), path  # the file in the making, until it gets its name
        self._writer: Any = None
        self._fps, self._size = 0.0, (0, 0)  # frames per second; width, height
        self._origin = 0.0  # time of the video's first frame, moved on by what is left out of long gaps
        self._written = 0

    def write(self, frame: Frame, people: Sequence[Person]) -> None:
        """Draw people on their frame and append it."""
        image = draw(frame.image, people)
        if self._writer is None:
            self._open(image)
            self._origin = frame.time_s
        if image.shape[1::-1] != self._size:  # a camera may change its mind, a video file may not
            image = self._cv2.resize(image, self._size, interpolation=self._cv2.INTER_AREA)
        for _ in range(self._repeats(frame.time_s) if self._source.live else 1):
            self._writer.write(image)
            self._written += 1

    def _repeats(self, time_s: float) -> int:
        """Return how often a frame must be written so that the video of a live source plays at the speed of life."""
        missing = round((time_s - self._origin) * self._fps) + 1 - self._written
        if (too_many := missing - round(_LONGEST_GAP_S * self._fps)) > 0:
            self._origin += too_many / self._fps
            missing -= too_many
        return max(0, missing)

    def _open(self, image: NDArray[np.uint8]) -> None:
        codec = CODECS[self._path.suffix.lower()]
        self._temporary = self._stack.enter_context(atomic_path(self._path))
        self._fps, self._size = self._source.fps, (image.shape[1], image.shape[0])
        fourcc = self._cv2.VideoWriter.fourcc(*codec)
        self._writer = self._cv2.VideoWriter(str(self._temporary), fourcc, self._fps, self._size)
        if not self._writer.isOpened():
            raise BackendUnavailable(
                f"{self._path}: this OpenCV cannot encode {codec}; choose another of: {', '.join(CODECS)}"
            )

    def finish(self) -> None:
        """Give the file its name.

        Raises:
            DataError: the disk is full.
        """
        if self._writer is None:
            return
        self._writer.release()
        with self._stack:
            # OpenCV does not tell when the disk is full: the file must show that it holds every frame.
            if (found := _count_frames(self._temporary, self._written)) != self._written:
                raise DataError(f"{self._path}: {found} of {self._written} frames could be written; is the disk full?")

    def discard(self, error: BaseException) -> None:
        """Remove what was written."""
        if self._writer is not None:
            self._writer.release()
            with suppress(DpalEdgeError):  # what went wrong is raised already
                self._stack.__exit__(type(error), error, error.__traceback__)


def _count_frames(path: Path, expected: int) -> int:
    """Count what can be read back; where the file itself tells the number that is expected, that will do."""
    cv2 = load_opencv()
    capture = cv2.VideoCapture(str(path))
    count = 0
    if capture.isOpened() and capture.get(cv2.CAP_PROP_FRAME_COUNT) == expected:
        count = expected
    else:
        while capture.grab():
            count += 1
    capture.release()
    return count
