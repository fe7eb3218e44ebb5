"""Make the models that the package ships, from the data beside the repository to the files in ``dpal_edge/assets``.

    python scripts/default_models/make.py --shared ../shared --work build/default_models [STEP...]

Steps: footage, teacher, athletes, distil, student, detector, pack, compare, score; all by default. Each
continues where it was interrupted, and what is finished is not done again. Settings lie beside this file; hours on two
CPU cores. ``student`` needs the package ai-edge-litert.
"""

import csv
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import torch
from base_teacher import LICENCE, write_teacher
from numpy.typing import NDArray
from PIL import Image
from torch.optim.swa_utils import update_bn

from dpal_edge import __version__
from dpal_edge.export.bundle import ExportSettings
from dpal_edge.export.linked import link
from dpal_edge.files import read_lines, sha256_of, write_text
from dpal_edge.finetune.augment import Augmentation, change_colours, draw_warp
from dpal_edge.models.checkpoint import list_checkpoints, read_checkpoint, read_newest, write_checkpoint
from dpal_edge.models.human import HumanModel, load_human
from dpal_edge.models.vit import normalize
from dpal_edge.runtime.detector import DefaultDetector, ModelDetector
from dpal_edge.tasks.crowd_metrics import find_people
from dpal_edge.tasks.detection import People
from dpal_edge.tasks.detection_decoding import suppress
from dpal_edge.tasks.image import open_image, open_sample
from dpal_edge.tasks.letterbox import letterbox
from dpal_edge.tasks.parsing import read_lip
from dpal_edge.tasks.sample import Sample
from dpal_edge.tasks.table import read_detection

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "dpal_edge" / "assets"
RESULTS = HERE.parents[1] / "bench" / "results" / "default_models.json"
STEPS = ("footage", "teacher", "athletes", "distil", "student", "detector", "pack", "compare", "score")
SEEDS = (0, 1, 2)  # of the comparison of starts
# Every second frame after those with labels, and every fourth of the clips at 12 frames per second or more.
VIDEOS = ("vtest.avi:80:2", "one-by-one-person-detection.mp4:0:4", "people-detection.264:0:4")
RUNS = ("teacher", "distil", "student-small", "student", "detector-teacher", "detector-small", "detector")
PUBLIC = ("one-by-one-person-detection", "people-detection")  # clips under CC BY 4.0
REPEATS = {"coco_person": 40, "footage": 3, "photographs": 1}  # of the 61, 856 and 3,190 frames for the detector
MOVENET = "movenet_single_pose_lightning_ptq.tflite"
TARGETS = ("onnx", "onnx-int8", "trt-fp16", "trt-int8")  # of the models that run from the package itself
WIDE = (240, 416)  # input of the detector for frames of 16:9
CROWDS = "coco_person"
STATED = 25  # every so many of the frames that a detector learned on give its BatchNorm's statistics
WHITENED = 10  # every tenth of the crops that the embedding is learned on tells what cameras change about it
CAMERAS = Augmentation(scale=0.2, rotate=8.0, colour=0.6, grey=0.0, low_resolution=0.3)  # how they differ
CHOOSING_FRAMES = 125  # of each set, that the detector's threshold and overlap are chosen by
PEDESTRIANS = {"athletes": 6000, "walkers": 9000}  # made of those who stand or walk
CUTOUTS = 3  # how often each of the 804 people of fashion photographs counts among some thousand athletes
THRESHOLDS, OVERLAPS = (0.45, 0.5, 0.55, 0.6, 0.65), (0.4, 0.45, 0.5, 0.6)
PACKED = {"teacher": "human_teacher_vit_small", "student": "dpal_vit_tiny", "detector": "person_detector"}
LIMITS = (
    "Trained on photographs of identifiable people (Leeds Sports Pose Extended: research use with citation; Clothing "
    "Co-Parsing; COCO samples) and on video (PETS 2009; Intel's sample clips, CC BY 4.0): for research and evaluation."
)


class Maker:
    """Folders of one making."""

    def __init__(self, shared: Path, work: Path, soups: Mapping[str, Sequence[Path]] | None = None) -> None:
        self.data, self.work, self.soups = shared / "data", work, soups or {}
        self.omz = self.data / "peers" / "omz"

    def footage(self) -> None:
        """Make what is learned from out of clips and photographs: crops, pedestrians, and frames with boxes."""
        videos = [str(self.data / "videos" / video) for video in VIDEOS]
        _python(HERE / "footage.py", "--detector", self._peer(), "--out", self.work / "footage", *videos)
        people, places = self.data / "ccp", self.data / "backgrounds"
        _python(
            HERE / "pedestrians.py", "--people", people, "--backgrounds", places, "--out", self.work / "pedestrians"
        )
        athletes, fashion = self.data / "lspet" / "train", self.data / "ccp" / "train_images"
        for source in (athletes, fashion, self.work / "footage" / "crops"):
            link_images(source, self.work / "unlabelled" / f"{source.parent.name}_{source.name}")
        for source in (athletes, fashion, self.work / "footage" / "crops", self.work / "pedestrians"):
            link_images(source, self.work / "embedded" / f"{source.parent.name}_{source.name}")

    def teacher(self) -> None:
        """Train the teacher."""
        self._finetune("teacher", self._base(), "teacher.yaml")

    def athletes(self) -> None:
        """Have the teacher cut athletes out; with the people whose masks are known they are what a detector learns.

        Those who stand or walk, and the people of the clips, are more pedestrians for the student's embedding.
        """
        teacher = self._newest("teacher")
        athletes, people, walkers = self.work / "athletes", self.data / "ccp", self.work / "walkers"
        _python(HERE / "athletes.py", "--teacher", teacher, "--joints", self.data / "lspet", "--out", athletes)
        _python(HERE / "photographs.py", "--masks", people, "--masks", athletes, "--detector", self._peer(),
                "--finder", ASSETS / f"{PACKED['detector']}.json", "--out", self.work / "photographs")  # fmt: skip
        join_masks({people: CUTOUTS, athletes: 1}, self.work / "cutouts")
        clips, places = self.work / "footage" / "crops", self.data / "backgrounds"
        _python(HERE / "athletes.py", "--teacher", teacher, "--crops", clips, "--out", walkers)
        more = [self.work / f"pedestrians_{source}" for source in PEDESTRIANS]
        for made, (source, count) in zip(more, PEDESTRIANS.items(), strict=True):
            _python(HERE / "pedestrians.py", "--people", self.work / source, "--backgrounds", places,
                    "--out", made, "--count", count)  # fmt: skip
        for folder in (*sorted((self.work / "embedded").iterdir()), *more):
            link_images(folder, self.work / "student-embedded" / folder.name)

    def distil(self) -> None:
        """Distil the student from the teacher, with DPAL."""
        self._distil("distil", list_checkpoints(self.work / "teacher")[-1], "distil.yaml")

    def student(self) -> None:
        """Put the heads on the student: at fewer pixels first, then with joints that it helped to correct.

        The teacher tells the attributes of photographs whose labels, seen for hours, would be known by heart.
        """
        told = ("--set", f"attribute_teacher={self._newest('teacher')}")
        folders = {
            "attributes": self.work / "embedded" / "ccp_train_images",
            "reid": self.work / "student-embedded",
        }
        self._finetune("student-small", self.work / "distil", "student-small.yaml", *told, folders=folders)
        joints, peer = self.work / "joints", self.data / "peers" / "pose_models" / MOVENET
        if not (joints / "annotations" / "person_keypoints_train.json").exists():
            _python(HERE / "joints.py", "--judge", list_checkpoints(self.work / "student-small")[-1], "--peer", peer,
                    "--joints", self.data / "lspet", "--out", joints)  # fmt: skip
        folders["pose"] = joints
        self._finetune("student", self.work / "student-small", "student.yaml", *told, folders=folders)

    def detector(self) -> None:
        """Train the detector on the student's backbone, at fewer pixels first; a larger detector is its teacher."""
        self._detect("detector-teacher", self._base(), "detector-teacher.yaml")
        told = ("--set", f"detection_teacher={self.work / 'detector-teacher'}")
        self._detect("detector-small", self._newest("student"), "detector-small.yaml", *told)
        self._detect("detector", self.work / "detector-small", "detector.yaml", *told)

    def pack(self) -> None:
        """Write the better weights of each run in float16 to the assets; link graphs to what runs without torch.

        INT8 and FP16 are held to the metric of each task, as an export with ``--gate`` holds them.
        """
        # Goldens travel with the package, and of the people in these data only those of Intel's clips may.
        sources = {"student": self.work / "footage" / "crops", "detector": self.work / "footage" / "train"}
        images = {
            run: link_images(folder, self.work / "public" / run, prefixes=PUBLIC) for run, folder in sources.items()
        }
        tasks = {"student": self._people(), "detector": {"detection": self.data / CROWDS}}
        for run, name in PACKED.items():
            path = ASSETS / f"{name}.safetensors"
            trained = self._newest(run)
            if trained == path and self.soups.get(run):
                raise click.UsageError(f"--soup {run}=FILE: {self.work} has no {run} to average; train it first")
            if trained != path:  # what ships is a mean, and whitened, already
                crops = sorted(self.work.glob("student-embedded/*/*"))[::WHITENED] if run == "student" else ()
                frames = read_detection(self._frames(), "train").samples[::STATED] if run == "detector" else ()
                pack(trained, path, soup=self.soups.get(run, ()), crops=crops, frames=frames)
            if run in images:
                gate = tuple(f"{task}={folder}" for task, folder in tasks[run].items())
                settings = ExportSettings(targets=TARGETS, calibration=(str(images[run]),), gate=gate)
                link(path, settings)
                if run == "detector":
                    link(path, replace(settings, size=WIDE), f"{name}_wide")

    def compare(self) -> None:
        """Fine-tune a distilled student and a random one alike, several times, and score what comes of each.

        Detectors begin from the student that ships, too: theirs is the backbone that the one that ships began from.
        """
        distilled = self.work / "compare" / "distilled"
        self._distil("compare/distilled", ASSETS / f"{PACKED['teacher']}.safetensors", "compare-distil.yaml")
        path = self.work / "compare.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        starts = {
            "distilled": distilled,
            "random": "random:vit_tiny",
            "student": ASSETS / f"{PACKED['student']}.safetensors",
        }
        for part, seed, start in itertools.product(("people", "crowds"), SEEDS, starts):
            if start == "student" and part == "people":  # it has seen their labels for hours
                continue
            if any((result["part"], result["start"], result["seed"]) == (part, start, seed) for result in results):
                continue
            name, settings = f"compare/{part}-{start}-{seed}", ("--set", f"seed={seed}")
            if part == "people":
                self._finetune(name, starts[start], "compare.yaml", *settings)
                sets = (self._people(),)
            else:
                self._detect(name, starts[start], "compare-detector.yaml", *settings)
                sets = self._crowds()
            scores = [self._evaluate(self.work / name, tasks) for tasks in sets]
            results.append({"part": part, "start": start, "seed": seed, "scores": scores})
            write_text(path, json.dumps(results))

    def score(self) -> None:
        """Score the packed models on the validation parts; write bench/results/default_models.json.

        What is written there already stays: scores of the same weights, and the courses of runs that this folder lacks.
        """
        earlier = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        results = []
        for run, sets in (("teacher", (self._people(),)), ("student", (self._people(),)),
                          ("detector", self._crowds())):  # fmt: skip
            path = ASSETS / f"{PACKED[run]}.safetensors"
            scored = [one for one in earlier.get("scores", ()) if one["model"]["sha256"] == sha256_of(path)]
            scored = scored or [{"name": path.stem, **self._evaluate(path, tasks)} for tasks in sets]
            if run == "detector":
                for result, tasks in zip(scored, sets, strict=True):
                    result["at_default_threshold"] = operating_point(path.with_suffix(".json"), tasks["detection"])
            results += scored
        training = {run: curve(self.work / run) for run in RUNS if (self.work / run).exists()}
        path = self.work / "compare.json"
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else earlier.get("starts", [])
        points = earlier.get("operating_points", {})
        if (self.work / "footage").exists():
            points = {folder.name: operating_points(folder) for folder in (self.work / "footage", self.data / CROWDS)}
        document = {"scores": results, "operating_points": points, "starts": starts,
                    "training": {**earlier.get("training", {}), **training}}  # fmt: skip
        write_text(RESULTS, json.dumps(document, indent=2) + "\n")
        click.echo(f"wrote {RESULTS}")

    def _peer(self) -> Path:
        """Return the detector of people that comes with the data."""
        name = "pedestrian-detection-adas-0002"
        return self.omz / name / "FP16" / f"{name}.xml"

    def _base(self) -> Path:
        """Return the ViT-S that knows images, which is what teachers begin as."""
        base = self.work / "vit_small.safetensors"
        if not base.exists():
            write_teacher(base)
        return base

    def _newest(self, run: str) -> Path:
        """Return the newest checkpoint of a run, or what ships of it where this folder has none."""
        checkpoints = list_checkpoints(self.work / run)
        return checkpoints[-1] if checkpoints else ASSETS / f"{PACKED[run]}.safetensors"

    def _people(self) -> dict[str, Path]:
        """Return the folder of each task on person crops that is scored."""
        return {"pose": self.data / "lspet", "parsing": self.data / "ccp", "attributes": self.data / "ccp",
                "reid": self.data / "cuhk01"}  # fmt: skip

    def _crowds(self) -> tuple[dict[str, Path], dict[str, Path]]:
        """Return the folders that detectors are scored on."""
        frames = write_labelled_frames(self.data / "videos", self.work / "vtest")
        return {"detection": self.data / "coco_person"}, {"detection": frames}

    def _evaluate(self, model: Path, tasks: dict[str, Path]) -> dict[str, Any]:
        command = [sys.executable, "-m", "dpal_edge", "evaluate", str(model), *_tasks(tasks), "--json"]
        return _without_folders(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))

    def _distil(self, name: str, teacher: Path, config: str) -> None:
        run, places = self.work / name, self.data / "backgrounds"
        _command("train", "--teacher", teacher, "--data", self.work / "unlabelled", "--out", run,
                 "--config", HERE / config, "--set", f"backgrounds={places}", *_resume(run))  # fmt: skip

    def _finetune(
        self, name: str, init: object, config: str, *settings: str, folders: Mapping[str, Path] | None = None
    ) -> None:
        embedder = "person-reidentification-retail-0277"
        teacher = self.omz / embedder / "FP16" / f"{embedder}.xml"
        folders = {**self._people(), "reid": self.work / "embedded", **(folders or {})}
        run = self.work / name
        _command("finetune", "--init", init, *_tasks(folders), "--out", run, "--config", HERE / config,
                 "--set", f"reid_teacher={teacher}?color=bgr", *settings, *_resume(run))  # fmt: skip

    def _frames(self) -> Path:
        """Join what detectors learn from."""
        sources = {self.data / "coco_person": "train2017"}
        sources |= {self.work / name: "train" for name in ("footage", "photographs")}
        parts = {source: (part, REPEATS[source.name]) for source, part in sources.items()}
        return join_frames(parts, self.work / "frames")

    def _detect(self, name: str, init: object, config: str, *settings: str) -> None:
        frames = self._frames()
        paste = ("--set", f"paste={self.work / 'cutouts'}", "--set", f"backgrounds={self.data / 'backgrounds'}")
        run = self.work / name
        _command("finetune", "--init", init, "--task", f"detection={frames}", "--out", run,
                 "--config", HERE / config, *paste, *settings, *_resume(run))  # fmt: skip


def link_images(folder: Path, out: Path, *, prefixes: tuple[str, ...] = ("",)) -> Path:
    """Link the images of ``folder`` whose names begin so into ``out``, and return it."""
    out.mkdir(parents=True, exist_ok=True)
    for image in sorted(image for image in folder.iterdir() if image.name.startswith(prefixes)):
        (out / image.name).unlink(missing_ok=True)
        (out / image.name).symlink_to(image.resolve())
    return out


def join_masks(sources: dict[Path, int], out: Path) -> Path:
    """Link the training parts of data sets in LIP's layout (folder: how often each image counts) into one."""
    names = []
    for folder in ("train_images", "train_segmentations"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for source, repeats in sources.items():
        for sample, i in itertools.product(read_lip(source, "train").samples, range(repeats)):
            names.append(f"{source.name}_{i}_{sample.image.stem}")
            for folder, file in (("train_images", sample.image), ("train_segmentations", sample.target)):
                link = out / folder / f"{names[-1]}{file.suffix}"
                link.unlink(missing_ok=True)
                link.symlink_to(file.resolve())
    write_text(out / "train_id.txt", "\n".join(names) + "\n")
    return out


def join_frames(sources: dict[Path, tuple[str, int]], out: Path) -> Path:
    """Join training parts of data sets in COCO's layout (folder: part, how often each frame counts); link images."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (out / "train").mkdir(parents=True, exist_ok=True)
    for source, (part, repeats) in sources.items():
        data = json.loads((source / "annotations" / f"instances_{part}.json").read_text(encoding="utf-8"))
        for image in data["images"]:
            link = out / "train" / image["file_name"]
            link.unlink(missing_ok=True)
            link.symlink_to((source / part / image["file_name"]).resolve())
        for _ in range(repeats):
            number = {image["id"]: len(images) + i for i, image in enumerate(data["images"])}
            images += [{**image, "id": number[image["id"]]} for image in data["images"]]
            for annotation in data["annotations"]:
                image_id = number[annotation["image_id"]]
                annotations.append({**annotation, "id": len(annotations), "image_id": image_id})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    write_text(out / "annotations" / "instances_train.json", json.dumps(document))
    return out


def operating_point(bundle: Path, folder: Path) -> dict[str, float]:
    """Return recall and precision, at an IoU of .5, of a detector as it is used, on the frames of ``val``."""
    samples = read_detection(folder, "val").samples
    with closing(ModelDetector.open(bundle)) as detector:
        found = [detector(cv2.imread(str(sample.image))) for sample in samples]
    return recall_and_precision([(f.boxes, f.scores) for f in found], samples)


def operating_points(folder: Path) -> list[dict[str, float]]:
    """Return the same of the package's detector on some frames of ``train``, by its threshold and its overlap.

    Its defaults are chosen by these, so that nothing is chosen on frames that it is scored on.
    """
    samples = read_detection(folder, "train").samples
    samples = samples[:: -(-len(samples) // CHOOSING_FRAMES)]
    open_detector = partial(ModelDetector.open, threshold=min(THRESHOLDS), iou=1.0)
    with closing(DefaultDetector(open_detector)) as detector:
        found = [detector(cv2.imread(str(sample.image))) for sample in samples]
    points = []
    for threshold, overlap in itertools.product(THRESHOLDS, OVERLAPS):
        kept = []
        for boxes, scores in ((f.boxes[f.scores >= threshold], f.scores[f.scores >= threshold]) for f in found):
            best = suppress(boxes, overlap)
            kept.append((boxes[best], scores[best]))
        points.append({"threshold": threshold, "iou": overlap, **recall_and_precision(kept, samples)})
    return points


def recall_and_precision(found: Sequence[tuple[Any, Any]], samples: Sequence[Any]) -> dict[str, float]:
    """Return recall and precision, at an IoU of .5, of boxes and scores on samples, and the F1 of both."""
    matched = find_people(found, [(sample.target.boxes, sample.target.ignore) for sample in samples])
    hits = int(matched.hits.sum())
    recall, precision = hits / matched.people, hits / max(len(matched.hits), 1)
    return {"recall": recall, "precision": precision, "F1": 2 * recall * precision / max(recall + precision, 1e-9)}


def curve(run: Path, points: int = 20) -> dict[str, Any]:
    """Return how a run went: its device and precision, and the means of ``points`` stretches of its metrics."""
    written = read_newest(run)[1].metadata["written"]
    lines = read_lines(run / "metrics.jsonl")
    stretches = [lines[i * len(lines) // points : (i + 1) * len(lines) // points] for i in range(points)]
    names = [name for name in lines[-1] if name not in ("step", "lr") and not name.startswith("usage/")]
    means = [
        {"step": part[-1]["step"], **{name: round(sum(line[name] for line in part) / len(part), 4) for name in names}}
        for part in stretches
        if part
    ]
    return {"device": written["device"], "precision": written["precision"], "curve": means}


def write_labelled_frames(videos: Path, out: Path) -> Path:
    """Write the labelled frames of vtest.avi as the val part of a data set in COCO's layout, and return its folder."""
    with (videos / "vtest_pets09_s2l1_gt_7frames.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = sorted({int(row["frame"]) for row in rows})  # from 1
    images, annotations = [], []
    (out / "val").mkdir(parents=True, exist_ok=True)
    capture = cv2.VideoCapture(str(videos / "vtest.avi"))
    for number in range(1, numbers[-1] + 1):
        _, frame = capture.read()
        if number in numbers:
            name = f"{number:05d}.png"
            cv2.imwrite(str(out / "val" / name), frame)
            images.append({"id": number, "file_name": name, "height": frame.shape[0], "width": frame.shape[1]})
    for i, row in enumerate(rows):
        box = [float(row[side]) for side in ("left", "top", "width", "height")]
        annotations.append({"id": i, "image_id": int(row["frame"]), "category_id": 1, "bbox": box, "iscrowd": 0,
                            "area": box[2] * box[3]})  # fmt: skip
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    write_text(out / "annotations" / "instances_val.json", json.dumps(document))
    return out


def _without_folders(result: dict[str, Any]) -> dict[str, Any]:
    """Keep of paths their last part: the rest is this machine's."""
    tasks = {task: {**told, "data": Path(told["data"]).name} for task, told in result["tasks"].items()}
    model = {n: Path(v).name if n in ("model", "file") else v for n, v in result["model"].items()}
    return {**result, "model": model, "tasks": tasks}


def pack(
    run: Path,
    path: Path,
    *,
    soup: Sequence[Path] = (),
    crops: Sequence[Path] = (),
    frames: Sequence[Sample[People]] = (),
) -> None:
    """Write the model of a run without what only training needs, in float16; BatchNorm's counters keep their type.

    With ``soup`` the weights are the mean of the run's and of those checkpoints': ends of stretches of one training lie
    in one basin, and their middle generalises better (Wortsman et al., 2022). The embedding is whitened by ``crops``,
    if there are any. A mean of weights has not the mean of statistics (Izmailov et al., 2018): those of a detector's
    BatchNorm are taken anew from ``frames``, as they are when it runs.
    """
    model, metadata = load_human(run)
    if soup:
        states = [model.state_dict(), *(load_human(other)[0].state_dict() for other in soup)]
        whole = {n: value for n, value in states[0].items() if not value.is_floating_point()}  # counters
        mean = {n: torch.stack([one[n] for one in states]).mean(0) for n in states[0].keys() - whole.keys()}
        model.load_state_dict(mean | whole)
    if crops:
        whiten(model, crops, metadata)
    if frames:
        size = model.backbone.config.size
        views = torch.from_numpy(np.stack([letterbox(np.asarray(open_sample(one)), size) for one in frames]))
        pixels = normalize(views.permute(0, 3, 1, 2), metadata["mean"], metadata["std"])
        update_bn(list(pixels.split(16)), model)
    tensors = {n: value.half() if value.is_floating_point() else value for n, value in model.state_dict().items()}
    kept = ("student", "architecture", "heads", "mean", "std", "step", "validation", "written")
    facts: dict[str, Any] = {name: metadata[name] for name in kept}
    facts |= {"teachers": [_brief(passport) for passport in metadata["teachers"]], "best": "backbone"}
    facts |= {"soup": sorted(map(sha256_of, soup))} if soup else {}
    facts |= {"licence": "Apache-2.0 for the weights' own part", "base": LICENCE, "limits": LIMITS}
    write_checkpoint(path, tensors, facts)
    found = read_checkpoint(path)
    worst = max(float((found.tensors[n].float() - model.state_dict()[n].float()).abs().max()) for n in tensors)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB, largest change of a weight {worst:.1e} ({__version__})")


def camera_views(crop: Path, size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return two views (2, H, W, 3) of an RGB crop, of ``size`` (height, width), as two cameras might show it."""
    image: Image.Image = open_image(crop, "RGB")
    box = (0.0, 0.0, float(image.width), float(image.height))
    return np.stack([change_colours(draw_warp(box, size, CAMERAS, rng).image(image), CAMERAS, rng) for _ in range(2)])


@torch.no_grad()
def whiten(model: HumanModel, crops: Sequence[Path], metadata: Mapping[str, Any]) -> None:
    """Change the linear map that gives the embedding so that what a camera changes about ``crops`` counts less.

    Two views of a crop show one person under other light, from nearer or farther, mirrored, less sharp. By the square
    root of the variance between such views, plus the mean of all directions', each direction is divided: in which
    cameras differ people are told apart less, and those that hardly change are not blown up. The mean of all views
    becomes 0, the axes stay the teacher's.

    Source: within-class covariance normalisation, Hatch et al., 2006. Differs: a class is a crop, of which two views
    are all that is seen; ridge as Jegou and Chum, 2012, whiten by what all people differ in (bench/whitening.py).
    """
    head, size = model.heads["reid"], model.backbone.config.size
    model.eval()
    rng, pairs = np.random.default_rng(0), []
    for path in crops:
        pixels = torch.from_numpy(camera_views(path, size, rng)).permute(0, 3, 1, 2)
        pairs.append(head(model.backbone(normalize(pixels, metadata["mean"], metadata["std"]))).double())
    first, second = torch.stack(pairs).unbind(1)
    change, centre = (first - second) / 2**0.5, (first + second).mean(0) / 2
    variances, axes = torch.linalg.eigh(change.T @ change / len(change))
    even = axes @ torch.diag((variances + variances.mean()).rsqrt()) @ axes.T
    scale = variances.mean().sqrt()  # keeps the size of values about what it was
    weight, bias = head.project.weight, head.project.bias
    bias.copy_(scale * even @ (bias.double() - centre))
    weight.copy_(scale * even @ weight.double())


def _brief(passport: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a passport what is only true where it was made."""
    return {**passport, "spec": Path(str(passport["spec"]).partition("?")[0]).name}


def _tasks(folders: Mapping[str, Path]) -> list[str]:
    return [part for task, folder in folders.items() for part in ("--task", f"{task}={folder}")]


def _resume(run: Path) -> tuple[str, ...]:
    return ("--resume",) if list_checkpoints(run) else ()


def _command(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "dpal_edge", *map(str, arguments)], check=True)


def _python(script: Path, *arguments: object) -> None:
    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True)


@click.command()
@click.option("--shared", default="../shared", show_default=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", default="build/default_models", show_default=True, type=click.Path(path_type=Path))
@click.option("--soup", multiple=True, metavar="RUN=FILE", help="Checkpoint to average a run's end with; repeat it.")
@click.argument("steps", nargs=-1, type=click.Choice(STEPS))
def main(shared: Path, work: Path, soup: tuple[str, ...], steps: tuple[str, ...]) -> None:
    """Make the default models."""
    work.mkdir(parents=True, exist_ok=True)
    soups: dict[str, list[Path]] = {run: [] for run in PACKED}
    for one in soup:
        run, _, file = one.partition("=")
        if run not in soups or not Path(file).is_file():
            raise click.UsageError(
                f"--soup {one}: expected RUN=FILE, RUN one of {', '.join(PACKED)}, FILE a checkpoint"
            )
        soups[run].append(Path(file))
    maker = Maker(shared.resolve(), work.resolve(), soups)
    for step in steps or STEPS:
        click.echo(f"--- {step}")
        getattr(maker, step)()


if __name__ == "__main__":
    main()
