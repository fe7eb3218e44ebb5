"""The demo's steps: teacher, crops, train, export, run, page; each says what it did and took."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dpal_edge.demo.footage import ASSETS, NEW_PEOPLE, ROOM_CLIP, TABLE_CLIP, EmptyRoomDetector, cut_people, empty_room
from dpal_edge.demo.page import Agreement, Story, write_page
from dpal_edge.errors import ConfigError, DataError
from dpal_edge.export.bundle import ExportSettings, export
from dpal_edge.export.crops import read_crops
from dpal_edge.files import write_text
from dpal_edge.models.human import load_human
from dpal_edge.models.students import build_student, init_student_weights, student_config
from dpal_edge.models.teacher import load_teachers
from dpal_edge.models.vit import normalize
from dpal_edge.runtime.loop import RunSummary, run
from dpal_edge.runtime.opencv import load_opencv
from dpal_edge.runtime.pipeline import Pipeline
from dpal_edge.runtime.sources import open_sources
from dpal_edge.train.config import TrainConfig, build_config
from dpal_edge.train.panel import Panel
from dpal_edge.train.run import Summary, run_training

TEACHER, STUDENT = ASSETS / "human_teacher_vit_small.safetensors", ASSETS / "dpal_vit_tiny.safetensors"
MARKER = "dpal-edge-demo.json"  # tells a folder of an earlier demo, which may be replaced, from any other
_SIZE = (128, 64)  # height, width: a quarter of the product's pixels, so that two cores manage in minutes
_COMPARED = 64  # crops of unseen people on which student and teacher are compared

Say = Callable[[str], None]


class _Steps:
    """Announce numbered steps and keep what each took."""

    def __init__(self, say: Say, total: int) -> None:
        self._say, self._total = say, total
        self.took: list[tuple[str, str, float]] = []  # name, what it did, seconds
        self._name, self._start = "", 0.0

    def begin(self, name: str, what: str) -> None:
        self._name, self._start = name, time.perf_counter()
        self._say(f"[{len(self.took) + 1}/{self._total}] {name}: {what}")

    def end(self, did: str) -> None:
        seconds = time.perf_counter() - self._start
        self.took.append((self._name, did, seconds))
        self._say(f"      {did} ({seconds:.0f} s)")


def run_demo(out: Path, *, updates: int, say: Say) -> Path:
    """Distil, export, verify and run a student on the two clips; return the path of the page that shows it.

    Args:
        out: folder to write; an earlier demo in it is replaced, anything else is refused.
        updates: optimizer updates of 16 crops.

    Raises:
        DpalEdgeError: as the steps do.
    """
    started = time.perf_counter()
    _clear(out)
    steps = _Steps(say, 6)

    steps.begin("teacher", "the ViT-S/14 that comes with dpal-edge, which has learned several human tasks")
    model, facts = load_human(TEACHER)
    values = sum(parameter.numel() for parameter in model.backbone.parameters())
    steps.end(f"{values / 1e6:.1f} M parameters, heads for {', '.join(facts['heads'])}")

    steps.begin("crops", "people cut out of two clips, without labels or a detector model")
    seen = _cut_crops(out)
    steps.end(f"{seen} crops to learn from in {out / 'crops'}")

    steps.begin(
        "train", f"DPAL distils the teacher into a ViT-Ti, {updates} updates of 16 crops at {_SIZE[0]}x{_SIZE[1]}"
    )
    config = _settings(out, updates)
    with Panel() as panel:
        summary = run_training(config, out / "run", watcher=panel)
    if summary.interrupted:
        raise DataError(f"stopped at update {summary.step}; the demo starts from nothing each time: run it again")
    steps.end(_trained(summary))

    steps.begin("export", "decoder and teacher go, the rest becomes an ONNX bundle that is checked against torch")
    manifest = export(out / "run", out / "bundle", ExportSettings())
    parity = manifest.artifacts[0].parity
    steps.end(
        f"{manifest.stripped.parameters_before / 1e6:.1f} M parameters became "
        f"{manifest.stripped.parameters_after / 1e6:.2f} M; error {parity.max_rel_error:.1e} of the largest output"
    )

    steps.begin("compare", "teacher, untrained student and the distilled one, run by the runtime, on unseen people")
    agreement = _compare(out, config)
    steps.end(f"agreement with the teacher {agreement.distilled:.2f}, untrained {agreement.untrained:.2f}")

    steps.begin("run", f"the student that comes with dpal-edge, with all its heads, on {ROOM_CLIP.name}, without torch")
    shipped = export(STUDENT, out / "people", ExportSettings(calibration=(str(out / "crops"),)))
    ran = _run_clip(out)
    steps.end(
        f"{', '.join(head.task for head in shipped.heads)}: {ran.frames} frames, {ran.persons} boxes, {ran.tracks} "
        f"tracks, {ran.fps:.0f} frames/s"
    )

    story = Story(out, manifest, shipped, summary, ran, agreement, tuple(steps.took), time.perf_counter() - started)
    return write_page(out / "demo.html", story)


def _clear(out: Path) -> None:
    """Empty ``out`` if an earlier demo wrote it, and mark it as a demo's.

    Raises:
        ConfigError: something else lies there.
    """
    foreign = out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).exists()))
    if out.is_symlink() or foreign:
        raise ConfigError(f"{out}: exists and is no earlier demo, it would be replaced; choose another --out")
    if out.exists():
        shutil.rmtree(out)
    write_text(out / MARKER, "{}\n")


def _cut_crops(out: Path) -> int:
    """Cut crops of seen and unseen people, and save the two empty rooms as backgrounds for crowds."""
    cv2 = load_opencv()
    seen = cut_people(TABLE_CLIP, out / "crops", first=0, last=None, every=4)
    seen += cut_people(ROOM_CLIP, out / "crops", first=0, last=NEW_PEOPLE, every=1)
    cut_people(ROOM_CLIP, out / "unseen", first=NEW_PEOPLE, last=None, every=1)
    (out / "rooms").mkdir()
    for clip in (TABLE_CLIP, ROOM_CLIP):
        path = out / "rooms" / f"{clip.stem}.png"
        if not cv2.imwrite(str(path), empty_room(clip)):
            raise DataError(f"{path}: cannot be written; is the disk full?")
    return seen


def _settings(out: Path, updates: int) -> TrainConfig:
    return build_config(
        {
            "teacher": str(TEACHER),
            "data": str(out / "crops"),
            "backgrounds": str(out / "rooms"),
            "size": _SIZE,
            "local_size": (64, 48),
            "crowd_size": (128, 128),
            "batch": 16,
            "steps": updates,
            "base_lr": 0.016,  # 1e-3 for a batch of 16: a short run takes larger steps than the published 200 epochs
            "warmup": 0.1,
            "log_every": 5,
            "save_every": updates,
            "validation_images": 32,
        }
    )


def _trained(summary: Summary) -> str:
    loss = f"; loss {summary.last.values['loss']:.2f}" if summary.last else ""
    return f"{summary.images_per_s:.1f} images/s, {100 * summary.data_wait:.0f} % of the time waiting for data{loss}"


def _run_clip(out: Path) -> RunSummary:
    detector = EmptyRoomDetector(empty_room(ROOM_CLIP))
    with open_sources([str(ROOM_CLIP)]) as clips, Pipeline.open(out / "people", detector=detector) as pipeline:
        return run(pipeline, clips, out=out / "annotated.webm", jsonl=out / "people.jsonl")


def _compare(out: Path, config: TrainConfig) -> Agreement:
    """Compare teacher, untrained student and exported student on crops of people that training has not seen."""
    crops = read_crops((str(out / "unseen"),), config.size, _COMPARED)
    with torch.no_grad():
        images = normalize(torch.from_numpy(crops).permute(0, 3, 1, 2))
        teacher = load_teachers(config.teacher, size=config.size)(images, ("global",))["global"][:, 0].numpy()
    untrained = build_student(student_config(config.student, config.size))
    init_student_weights(untrained, torch.Generator().manual_seed(config.seed))
    with torch.no_grad():
        before = untrained(images)[:, 0].numpy()
    with Pipeline.open(out / "bundle", detector=EmptyRoomDetector(empty_room(ROOM_CLIP))) as pipeline:
        after = pipeline.embed(crops)
    return Agreement(len(crops), rank_agreement(before, teacher), rank_agreement(after, teacher))


def rank_agreement(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Spearman correlation, -1..1, of the pairwise cosine similarities of two sets of (n, D) features, mean removed."""
    ranks = []
    for features in (a, b):
        centred = features - features.mean(0)
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        pairs = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
        ranks.append(pairs.argsort().argsort().astype(float))
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
