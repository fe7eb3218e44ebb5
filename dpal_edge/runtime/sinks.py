"""Where results go: JSON lines and annotated videos, each written whole or not at all."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, ConfigError, DataError
from dpal_edge.files import atomic_path
from dpal_edge.runtime.annotate import draw
from dpal_edge.runtime.opencv import load_opencv
from dpal_edge.runtime.person import Person
from dpal_edge.runtime.sources import Frame, Source

_CODECS = {".mp4": "mp4v", ".webm": "VP80", ".avi": "MJPG"}  # what OpenCV's own FFmpeg can encode everywhere

Sink = Callable[[str, Frame, Sequence[Person]], None]  # takes the name of the source


@contextmanager
def open_sinks(
    sources: Sequence[Source], *, out: Path | None, jsonl: Path | None, embeddings: bool
) -> Iterator[list[Sink]]:
    """Open what is to be written; on leaving, videos and lines get their names.

    Args:
        sources: what frames come from; of several, each gets a video of its own, ``out`` with its name at the end.
        out: .mp4, .webm (plays in browsers) or .avi.
        jsonl: one line per frame, {"source", "frame", "time_s", "persons"}.
        embeddings: put embeddings into the lines too.

    Raises:
        ConfigError: ``out`` has another suffix.
        DataError: an output cannot be written.
    """
    with ExitStack() as stack:
        sinks: list[Sink] = []
        if out is not None:
            if (suffix := out.suffix.lower()) not in _CODECS:
                raise ConfigError(f"{out}: cannot write {suffix!r} video, expected one of: {', '.join(_CODECS)}")
            paths = {source.name: video_path(out, source.name, len(sources)) for source in sources}
            writers = {source.name: stack.enter_context(_video(paths[source.name], source)) for source in sources}
            sinks.append(lambda name, frame, people: writers[name].write(frame, people))
        if jsonl is not None:
            sinks.append(stack.enter_context(_lines(jsonl, embeddings)))
        yield sinks


def video_path(out: Path, source: str, count: int) -> Path:
    """Return where the annotated video of one of ``count`` sources goes."""
    return out if count == 1 else out.with_name(f"{out.stem}-{Path(source).stem}{out.suffix}")


@contextmanager
def _lines(path: Path, embeddings: bool) -> Iterator[Sink]:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:

        def write(source: str, frame: Frame, people: Sequence[Person]) -> None:
            file.write(json.dumps(line(source, frame, people, embeddings=embeddings)) + "\n")

        yield write


def line(source: str, frame: Frame, people: Sequence[Person], *, embeddings: bool = False) -> Mapping[str, Any]:
    """Return a frame's results as JSON holds them."""
    persons = [person.to_dict(embedding=embeddings) for person in people]
    return {"source": source, "frame": frame.number, "time_s": round(frame.time_s, 3), "persons": persons}


class _VideoFile:
    """An annotated video in the writing; the first frame tells its size."""

    def __init__(self, path: Path, temporary: Path, source: Source) -> None:
        self._cv2 = load_opencv()
        self._path, self._temporary, self._source = path, temporary, source
        self._writer: Any = None
        self._size = (0, 0)  # width, height
        self.written = 0

    def write(self, frame: Frame, people: Sequence[Person]) -> None:
        """Draw people on their frame and append it."""
        image = draw(frame.image, people)
        if self._writer is None:
            self._open(image)
        if image.shape[1::-1] != self._size:  # a camera may change its mind, a video file may not
            image = self._cv2.resize(image, self._size, interpolation=self._cv2.INTER_AREA)
        # Of a live source frames are missing; without repeats the video would play too fast.
        repeats = round(frame.time_s * self._source.fps) + 1 - self.written if self._source.live else 1
        for _ in range(max(1, repeats)):
            self._writer.write(image)
            self.written += 1

    def _open(self, image: NDArray[np.uint8]) -> None:
        codec = _CODECS[self._path.suffix.lower()]
        self._size = (image.shape[1], image.shape[0])
        fourcc = self._cv2.VideoWriter.fourcc(*codec)
        self._writer = self._cv2.VideoWriter(str(self._temporary), fourcc, self._source.fps, self._size)
        if not self._writer.isOpened():
            raise BackendUnavailable(
                f"{self._path}: this OpenCV cannot encode {codec}; choose another of: {', '.join(_CODECS)}"
            )

    def release(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()


@contextmanager
def _video(path: Path, source: Source) -> Iterator[_VideoFile]:
    with atomic_path(path) as temporary:
        file = _VideoFile(path, temporary, source)
        try:
            yield file
        finally:
            file.release()
        if not file.written:
            raise DataError(f"{path}: no frame came, so there is no video to write")
        # OpenCV does not tell when the disk is full: the file must show that it holds every frame.
        if (found := _count_frames(temporary)) != file.written:
            raise DataError(f"{path}: {found} of {file.written} frames could be written; is the disk full?")


def _count_frames(path: Path) -> int:
    """Count what can be read back, without decoding pictures; 0 for a file that is not whole."""
    capture = load_opencv().VideoCapture(str(path))
    count = 0
    while capture.grab():
        count += 1
    capture.release()
    return count
