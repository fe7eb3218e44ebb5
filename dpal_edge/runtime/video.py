"""Run a pipeline over a video file; write what was found as JSON lines and as an annotated video."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, ConfigError, DataError
from dpal_edge.files import atomic_path
from dpal_edge.runtime.annotate import draw
from dpal_edge.runtime.opencv import load_opencv
from dpal_edge.runtime.person import Person
from dpal_edge.runtime.pipeline import Pipeline

_CODECS = {".mp4": "mp4v", ".webm": "VP80", ".avi": "MJPG"}  # what OpenCV's own FFmpeg can encode everywhere
_DEFAULT_FPS = 25.0  # where a file does not tell

_Sink = Callable[[int, NDArray[np.uint8], Sequence[Person]], None]


class Video:
    """A video file; iterate over its frames, (H, W, 3) uint8 BGR, once.

    Raises:
        DataError: the file is missing or OpenCV cannot decode its first frame.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no such file, expected a video")
        cv2 = load_opencv()
        self._capture = cv2.VideoCapture(str(path))
        decoded, self._first = self._capture.read()
        if not decoded:
            self._capture.release()
            raise DataError(f"{path}: not a video that OpenCV can decode; convert it to H.264 in .mp4")
        self.size: tuple[int, int] = self._first.shape[:2]  # height, width
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps: float = fps if math.isfinite(fps) and fps > 0 else _DEFAULT_FPS
        declared = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.declared_frames: int | None = int(declared) if declared > 0 else None  # None: raw streams do not tell

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        decoded, frame = True, self._first
        while decoded:
            yield frame
            decoded, frame = self._capture.read()

    def __enter__(self) -> "Video":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.release()


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds per frame."""

    mean: float
    p50: float
    p95: float


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What one run over a video did."""

    engine: str  # that ran the model, with its version, device and precision
    frames: int
    missing_frames: int  # that the file declares and does not hold: it was cut short
    persons: int  # over all frames
    tracks: int  # different track ids
    interrupted: bool  # by Ctrl-C; what came before is complete
    fps: float  # frames per second of wall time, with decoding, drawing and writing
    latency_ms: dict[str, Latency]  # of each stage of the pipeline


def run_video(
    pipeline: Pipeline,
    video: Video,
    *,
    out: Path | None = None,
    jsonl: Path | None = None,
    embeddings: bool = False,
    limit: int | None = None,
    progress: Callable[[int], object] = lambda frames: None,
) -> RunSummary:
    """Call ``pipeline`` on every frame; Ctrl-C ends the run early and keeps what was processed.

    Args:
        out: annotated video, .mp4, .webm (plays in browsers) or .avi; written whole or not at all.
        jsonl: one line per frame, {"frame", "time_s", "persons"}; written whole or not at all.
        embeddings: put embeddings into the lines too.
        limit: stop after so many frames.
        progress: called with 1 after every frame.

    Raises:
        ConfigError: ``out`` has another suffix, or an output would replace the source.
        DataError: an output cannot be written.
    """
    paths = [path.resolve() for path in (video.path, out, jsonl) if path is not None]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"{out or jsonl}: source and outputs must be different files; choose another output")
    persons, tracks, timings, interrupted = 0, set(), [], False
    start = time.perf_counter()
    with ExitStack() as stack:
        sinks = _open_sinks(stack, video, out, jsonl, embeddings)
        try:
            for index, frame in enumerate(islice(video, limit)):
                people = pipeline(frame)
                for sink in sinks:
                    sink(index, frame, people)
                persons += len(people)
                tracks |= {person.track_id for person in people}
                timings.append(dict(pipeline.timing_ms))
                progress(1)
        except KeyboardInterrupt:
            interrupted = True
    expected = min(video.declared_frames or 0, limit or math.inf)
    return RunSummary(
        engine=pipeline.name,
        frames=len(timings),
        missing_frames=0 if interrupted else max(0, int(expected) - len(timings)),
        persons=persons,
        tracks=len(tracks - {None}),
        interrupted=interrupted,
        fps=round(len(timings) / (time.perf_counter() - start), 2),
        latency_ms={stage: _latency([timing[stage] for timing in timings]) for stage in pipeline.timing_ms},
    )


def describe(summary: RunSummary) -> str:
    """Return a few lines for a person to read."""
    end = "interrupted after" if summary.interrupted else "done:"
    found = f"{summary.frames} frames, {summary.persons} persons, {summary.tracks} tracks, {summary.fps:.1f} frames/s"
    lines = [f"{end} {found}, with {summary.engine}"]
    if summary.missing_frames:
        lines.append(
            f"warning: the file declares {summary.missing_frames} more frames than could be decoded; was it cut short?"
        )
    for stage, latency in summary.latency_ms.items():
        lines.append(f"{stage:>6} {latency.mean:8.2f} ms/frame, p50 {latency.p50:.2f}, p95 {latency.p95:.2f}")
    return "\n".join(lines)


def _latency(values: list[float]) -> Latency:
    p50, p95 = np.percentile(values, [50, 95]) if values else (0.0, 0.0)
    return Latency(mean=round(float(np.mean(values or [0])), 3), p50=round(float(p50), 3), p95=round(float(p95), 3))


def _open_sinks(stack: ExitStack, video: Video, out: Path | None, jsonl: Path | None, embeddings: bool) -> list[_Sink]:
    sinks = []
    if out is not None:
        sinks.append(stack.enter_context(_video_sink(out, video)))
    if jsonl is not None:
        sinks.append(stack.enter_context(_json_sink(jsonl, video.fps, embeddings)))
    return sinks


@contextmanager
def _json_sink(path: Path, fps: float, embeddings: bool) -> Iterator[_Sink]:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:

        def write(index: int, frame: NDArray[np.uint8], people: Sequence[Person]) -> None:
            persons = [person.to_dict(embedding=embeddings) for person in people]
            file.write(json.dumps({"frame": index, "time_s": round(index / fps, 3), "persons": persons}) + "\n")

        yield write


@contextmanager
def _video_sink(path: Path, video: Video) -> Iterator[_Sink]:
    if (suffix := path.suffix.lower()) not in _CODECS:
        raise ConfigError(f"{path}: cannot write {path.suffix!r} video, expected one of: {', '.join(_CODECS)}")
    cv2 = load_opencv()
    with atomic_path(path) as temporary:
        codec = cv2.VideoWriter.fourcc(*_CODECS[suffix])
        writer = cv2.VideoWriter(str(temporary), codec, video.fps, video.size[::-1])
        if not writer.isOpened():
            raise BackendUnavailable(
                f"{path}: this OpenCV cannot encode {_CODECS[suffix]}; choose another of: {', '.join(_CODECS)}"
            )
        written = 0

        def write(index: int, frame: NDArray[np.uint8], people: Sequence[Person]) -> None:
            nonlocal written
            writer.write(draw(frame, people))
            written += 1

        try:
            yield write
        finally:
            writer.release()
        # OpenCV does not tell when the disk is full: the file must show that it holds every frame.
        if (found := _count_frames(temporary)) != written:
            raise DataError(f"{path}: {found} of {written} frames could be written; is the disk full?")


def _count_frames(path: Path) -> int:
    """Count what can be read back, without decoding pictures; 0 for a file that is not whole."""
    capture = load_opencv().VideoCapture(str(path))
    count = 0
    while capture.grab():
        count += 1
    capture.release()
    return count
