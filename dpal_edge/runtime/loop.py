"""Run a pipeline over its sources until they end or somebody stops it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.runtime.monitor import Latency, Monitor
from dpal_edge.runtime.pipeline import Pipeline
from dpal_edge.runtime.sinks import CODECS, name_video, open_sinks
from dpal_edge.runtime.sources import WAIT_S, FileSource, Source, gather


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What one run did."""

    engine: str  # that ran the model, with its version, device and precision
    frames: int  # of all sources
    missing_frames: int  # that files declare and do not hold: they were cut short
    persons: int  # over all frames
    tracks: int  # different tracks, of all sources
    interrupted: bool  # by Ctrl-C; what came before is complete
    fps: float  # frames per second of wall time, with decoding, drawing and writing
    latency_ms: dict[str, Latency]  # of each stage of the pipeline, of the last few hundred passes
    sources: dict[str, dict[str, object]]  # by name: frames, dropped, bad, reconnects, age_ms and more (Monitor)


def run(
    pipeline: Pipeline,
    sources: Sequence[Source],
    *,
    out: Path | None = None,
    jsonl: Path | None = None,
    embeddings: bool = False,
    limit: int | None = None,
    wait_s: float = WAIT_S,
    monitor: Monitor | None = None,
    progress: Callable[[int], object] = lambda frames: None,
) -> RunSummary:
    """Call ``pipeline`` on every frame; Ctrl-C ends the run early and keeps what was processed.

    Args:
        sources: with names that differ; frames that come together are looked at together. The caller closes them.
        out, jsonl, embeddings: as ``open_sinks``.
        limit: stop after so many frames of each source.
        wait_s: how long the first live frame may wait for those of other cameras.
        monitor: is told about every pass.
        progress: called with the number of frames after every pass.

    Raises:
        ConfigError: ``out`` has an unknown suffix, or an output would replace a source.
        DataError: an output cannot be written, or there is no frame for the video.
    """
    check_outputs(sources, out, jsonl)
    monitor = monitor or Monitor(sources, pipeline.name)
    frames, persons, tracks, interrupted = dict.fromkeys((source.name for source in sources), 0), 0, set(), False
    start = time.perf_counter()
    with open_sinks(sources, out=out, jsonl=jsonl, embeddings=embeddings) as sinks:
        try:
            for found in gather(sources, wait_s=wait_s, limit=limit):
                people = pipeline.look(found)
                monitor.add(found, people, pipeline.timing_ms)
                for name, frame in found.items():
                    for sink in sinks:
                        sink(name, frame, people[name])
                    frames[name] += 1
                    persons += len(people[name])
                    tracks |= {(name, person.track_id) for person in people[name] if person.track_id is not None}
                progress(len(found))
        except KeyboardInterrupt:
            interrupted = True
    if out is not None and not interrupted and not any(frames.values()):
        raise DataError(f"{out}: no frame came, so there is no video to write")
    return RunSummary(
        engine=pipeline.name,
        frames=sum(frames.values()),
        missing_frames=0 if interrupted else sum(_missing(source, frames[source.name], limit) for source in sources),
        persons=persons,
        tracks=len(tracks),
        interrupted=interrupted,
        fps=round(sum(frames.values()) / (time.perf_counter() - start), 2),
        latency_ms=monitor.latency_ms(),
        sources=monitor.describe()["sources"],
    )


def describe(summary: RunSummary) -> str:
    """Return a few lines for a person to read."""
    end = "interrupted after" if summary.interrupted else "done:"
    found = f"{summary.frames} frames, {summary.persons} boxes in {summary.tracks} tracks, {summary.fps:.1f} frames/s"
    lines = [f"{end} {found}, with {summary.engine}"]
    if summary.frames and not summary.persons:
        lines.append("nobody was found; where there are people, try a lower --threshold or another --detector")
    if summary.missing_frames:
        lines.append(
            f"warning: the file declares {summary.missing_frames} more frames than could be decoded; was it cut short?"
        )
    for stage, latency in summary.latency_ms.items():
        lines.append(f"{stage:>6} {latency.mean:8.2f} ms/pass, p50 {latency.p50:.2f}, p95 {latency.p95:.2f}")
    for name, told in summary.sources.items():
        faults = [f"{told[what]} {what}" for what in ("dropped", "bad", "reconnects") if told[what]]
        if faults:
            lines.append(f"{name}: {', '.join(faults)}" + (f"; {told['problem']}" if told["problem"] else ""))
    return "\n".join(lines)


def check_outputs(sources: Sequence[Source], out: Path | None, jsonl: Path | None) -> None:
    """Refuse outputs that cannot be, before anything slow begins.

    Raises:
        ConfigError: ``out`` has an unknown suffix, or an output would replace a source or the other output.
    """
    if out is not None and out.suffix.lower() not in CODECS:
        raise ConfigError(f"{out}: cannot write {out.suffix!r} video, expected one of: {', '.join(CODECS)}")
    read = [source.path.resolve() for source in sources if source.path is not None]
    videos = [name_video(out, source.name, len(sources)).resolve() for source in sources] if out else []
    written = videos + ([jsonl.resolve()] if jsonl else [])
    if len(set(written)) < len(written) or set(written) & set(read):
        raise ConfigError(f"{out or jsonl}: sources and outputs must be different files; choose another output")


def count_frames(sources: Sequence[Source]) -> int | None:
    """Return how many frames video files declare; None where one of the sources does not tell."""
    declared = [source.video.declared_frames if isinstance(source, FileSource) else None for source in sources]
    return None if None in declared else sum(count or 0 for count in declared)


def _missing(source: Source, frames: int, limit: int | None) -> int:
    if not isinstance(source, FileSource):
        return 0
    return max(0, int(min(source.video.declared_frames or 0, limit or math.inf)) - frames)
