"""The demo's page: what was learned, what was stripped, how exact the export is, and what the runtime sees."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dpal_edge import __version__, html
from dpal_edge.demo.footage import NEW_PEOPLE
from dpal_edge.errors import DataError
from dpal_edge.files import write_text
from dpal_edge.manifest import Manifest
from dpal_edge.runtime.loop import RunSummary
from dpal_edge.runtime.opencv import load_opencv
from dpal_edge.runtime.video import Video
from dpal_edge.train.run import Summary

_CURVES = {
    "loss": "Total loss",
    "global": "Global alignment",
    "local": "Local alignment",
    "relation": "Relation alignment",
}
_CROPS_SHOWN = 30
_FRAMES_SHOWN = 4
_LASTING = 10  # frames


@dataclass(frozen=True)
class Agreement:
    """How far a student agrees with the teacher on who resembles whom, among crops of people never trained on.

    Rank correlation (Spearman, -1..1) of the cosine similarities of all pairs of crops.
    """

    crops: int
    untrained: float  # a student before its first update
    distilled: float  # the exported student, run by the runtime


@dataclass(frozen=True)
class Story:
    """All that the page tells."""

    out: Path
    manifest: Manifest  # of the student that the demo distilled
    shipped: Manifest  # of the student with heads that comes with the package
    training: Summary
    ran: RunSummary
    agreement: Agreement
    took: tuple[tuple[str, str, float], ...]  # step, what it did, seconds
    seconds: float


def write_page(path: Path, story: Story) -> Path:
    """Write the page, one self-contained file, to ``path`` and return it."""
    sections = [
        _summary(story),
        _crops(story.out),
        _curves(story),
        _agreement(story.agreement),
        _stripped(story.manifest),
        _parity(story.manifest),
        _frames(story),
        _steps(story),
        _sources(),
    ]
    write_text(path, html.page("A teacher, distilled for the edge", sections))
    return path


def _summary(story: Story) -> str:
    stripped, parity = story.manifest.stripped, story.manifest.artifacts[0].parity
    teacher = stripped.removed["teacher"] / 1e6
    return (
        f"<p>A {teacher:.0f} M-parameter vision transformer taught a {stripped.parameters_after / 1e6:.1f} M-parameter "
        f"ViT-Ti on unlabelled people, in {story.training.seconds:.0f} s on {story.training.device.upper()}. The "
        f"student was exported, <span class=good>verified against torch ({parity.max_rel_error:.0e} off)</span>, and "
        f"compared with its teacher on people it never saw. Below, the student that comes with dpal-edge, trained the "
        f"same way on more, runs all its heads on video, without torch.</p>"
        f"<p class=soft>dpal-edge {__version__}, {story.seconds:.0f} s in all. The distillation here shows every "
        f"stage; a few hundred crops from two clips teach little.</p>"
    )


def _crops(out: Path) -> str:
    paths = sorted((out / "crops").glob("*.jpg"))
    chosen = [paths[i * len(paths) // _CROPS_SHOWN] for i in range(_CROPS_SHOWN)]
    images = "".join(html.image(_thumbnail(path), ".jpg", "person crop") for path in chosen)
    return (
        f"<h2>What it learned from</h2><p>{len(paths)} crops, cut out of two clips by comparing each frame with the "
        f"empty room. No labels.</p><div class=strip>{images}</div>"
    )


def _curves(story: Story) -> str:
    lines = (story.out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record["step"] for record in records]
    charts = [
        f"<div class=card>{html.line_chart(title, steps, [r[name] for r in records], x_label='updates')}</div>"
        for name, title in _CURVES.items()
    ]
    return (
        "<h2>How it learned</h2><p>DPAL pulls the student's class token (global), its patches (local) and the "
        "relations between them in a crowd (relation) towards the teacher's, each through a decoder "
        "that exists in training only. Lower is closer to the teacher."
        f"</p><div class=grid>{''.join(charts)}</div>"
        f"<p class=soft>{story.training.images_per_s:.1f} images/s in {story.training.precision}; "
        f"{100 * story.training.data_wait:.1f} % of the time waiting for data.</p>"
    )


def _agreement(agreement: Agreement) -> str:
    rows = [
        ("before training", max(agreement.untrained, 0.0), f"{agreement.untrained:.2f}"),
        ("distilled", max(agreement.distilled, 0.0), f"{agreement.distilled:.2f}"),
        ("the teacher itself", 1.0, "1.00"),
    ]
    return (
        f"<h2>Does it see people as the teacher does?</h2><p>Agreement on which of {agreement.crops} crops of people "
        f"<em>in frames it was never trained on</em> look alike (rank correlation of all pairwise similarities).</p>"
        f"{html.bars(rows, accent='distilled')}"
    )


def _stripped(manifest: Manifest) -> str:
    stripped = manifest.stripped
    names = {"teacher": "teacher (stripped)", "decoder": "decoder (stripped)"}
    rows = [(names.get(part, part), count / 1e6, f"{count / 1e6:.2f} M") for part, count in stripped.removed.items()]
    rows.append(("student (shipped)", stripped.parameters_after / 1e6, f"{stripped.parameters_after / 1e6:.2f} M"))
    return (
        f"<h2>What was stripped</h2><p>{stripped.parameters_before / 1e6:.1f} M parameters computed in training; the "
        f"exported graph holds {stripped.parameters_after:,}, counted in the written file: the backbone's and no other."
        f"</p>{html.bars(rows, accent='student (shipped)')}"
    )


def _parity(manifest: Manifest) -> str:
    artifact = manifest.artifacts[0]
    parity = artifact.parity
    rows, columns = manifest.input.size
    facts = [
        ("file", f"{artifact.file.file}, {artifact.file.bytes / 1e6:.1f} MB, {artifact.precision}"),
        ("input", f"uint8 RGB crops, (B, {rows}, {columns}, 3); nothing to normalise"),
        ("run by", parity.backend),
        ("real crops compared with torch", str(parity.images)),
        ("largest error", f"{parity.max_abs_error:.1e}, or {parity.max_rel_error:.1e} of the largest output"),
        ("least cosine similarity", f"{parity.min_cosine:.7f}"),
        ("tolerance", f"{parity.tolerance:.0e} of the largest output"),
    ]
    return f"<h2>Is the export exact?</h2>{html.table(('', ''), facts)}"


def _frames(story: Story) -> str:
    lines = (story.out / "people.jsonl").read_text(encoding="utf-8").splitlines()
    frames = [json.loads(line) for line in lines]
    crowded = sorted(frames[NEW_PEOPLE:], key=lambda line: -len(line["persons"]))
    chosen: list[int] = []
    for line in crowded:
        if len(chosen) < _FRAMES_SHOWN and all(abs(line["frame"] - other) > 8 for other in chosen):
            chosen.append(line["frame"])
    video = story.out / "annotated.webm"
    stills = _stills(video, sorted(chosen))
    figures = "".join(
        f"<figure>{html.image(content, '.jpg', 'annotated frame')}<figcaption>frame {index}</figcaption></figure>"
        for index, content in stills
    )
    lengths = Counter(person["track_id"] for frame in frames for person in frame["persons"])
    lasting = sum(length >= _LASTING for length in lengths.values())
    latency = story.ran.latency_ms
    return (
        "<h2>What the runtime sees</h2><p>People are found by what differs from the empty room and cut out; the "
        f"student that comes with dpal-edge computes {_tasks(story.shipped)} for all of them in one batch, and tracks "
        "follow overlap and embedding: the number is the track. That student is young (its card in dpal_edge/assets "
        "has its scores), and crops of this clip were among the unlabelled ones it learned from.</p>"
        f"<div class=grid>{figures}</div><p>{html.video(video.read_bytes(), '.webm', poster=stills[0][1])}</p>"
        f"<p class=soft>{story.ran.frames} frames, {story.ran.persons} boxes, {story.ran.tracks} tracks, of which "
        f"{lasting} last {_LASTING} frames or more . 95 % of frames took less than: "
        f"{', '.join(f'{name} {value.p95:.1f} ms' for name, value in latency.items())}.</p>"
    )


def _tasks(manifest: Manifest) -> str:
    *most, last = (head.task for head in manifest.heads)
    return f"{', '.join(most)} and {last}" if most else last


def _steps(story: Story) -> str:
    rows = [(f"{name}: {did}", f"{seconds:.0f} s") for name, did, seconds in story.took]
    rows.append(("in all", f"{story.seconds:.0f} s"))
    return f"<h2>What each step took</h2>{html.table(('step', 'time'), rows)}"


def _sources() -> str:
    return (
        "<h2>Sources</h2><p class=soft>Clips: Intel Corporation, IoT DevKit sample videos, CC BY 4.0; crops and boxes "
        "are our changes. Teacher and student: see the model cards in dpal_edge/assets. Method: DPAL, arXiv 2508.07144."
        "</p>"
    )


def _thumbnail(path: Path) -> bytes:
    cv2 = load_opencv()
    small = cv2.resize(cv2.imread(str(path)), (64, 128), interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", small)[1])


def _stills(path: Path, indices: list[int]) -> list[tuple[int, bytes]]:
    """Return frames of a video as JPEG."""
    cv2 = load_opencv()
    with Video(path) as video:
        stills = [(i, bytes(cv2.imencode(".jpg", frame)[1])) for i, frame in enumerate(video) if i in indices]
    if len(stills) != len(indices):
        raise DataError(f"{path}: ends before frame {max(indices)}; was it cut short?")
    return stills
