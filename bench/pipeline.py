"""The whole way from a video to people on a CPU: this project's one pass for all heads against a network per task.

    python bench/pipeline.py BUNDLE --shared ../shared [--frames 300] [--soak 2000] [--out bench/results/pipeline.json]

BUNDLE has ``onnx``, ``openvino-int8`` or both. Every frame is decoded once, then each form takes its turn on it, and
another one begins at the next frame; a form's frames/s are those it would reach with that decoding. Then each form
runs alone through each clip, as an application does. The forms:

* ours: detector, model with all heads and tracker through ``Pipeline``, for each target in each precision;
* peers: a detector, a pose and a re-identification network of others, and our tracker. They get what ours get: uint8
  images whose conversion is compiled into the network, no output that nobody reads, fixed sizes, the same threads,
  people as requests side by side (``open_backend``), and of f32 and bf16, and of the vendor's files, what is fastest.

OpenVINO takes bfloat16 by itself where a CPU has it, so every form states its precision. This tells speeds only, not
what a precision costs in accuracy. No form computes what nobody asked for: our class of each pixel is lazy, and peers
have no parsing and no attributes at all. The detectors differ in whom they find: compare people per frame too, or
``heads_for_n_people``, where all get the same number. ``--soak 20000`` is the full soak.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino_speed import in_turns

from dpal_edge.manifest import Manifest
from dpal_edge.runtime.backend import Backend, open_backend, physical_cores
from dpal_edge.runtime.detector import DefaultDetector, ModelDetector
from dpal_edge.runtime.device import cpu_features
from dpal_edge.runtime.model import Model, choose_artifact
from dpal_edge.runtime.opencv import load_opencv
from dpal_edge.runtime.person import Person
from dpal_edge.runtime.pipeline import Pipeline
from dpal_edge.runtime.preprocess import crop_people
from dpal_edge.runtime.sources import FileSource
from dpal_edge.runtime.tracker import Tracker, unit_rows
from dpal_edge.runtime.video import Video

ROOT = Path(__file__).parents[1]
CLIPS = ("one-by-one-person-detection.mp4", "people-detection.264", "vtest.avi")
START_CLIP = "vtest.avi"  # has people from its first frame to its last
SOAK_CLIP = "one-by-one-person-detection.mp4"  # they come and go
STAGES = ("detect", "crop", "model", "decode", "track")
TARGETS = ("openvino-int8", "onnx")
PEOPLE = (1, 2, 4, 8)
STARTS = 3
SAMPLE_EVERY = 100  # frames

DETECTOR, DETECTOR_SIZE = "pedestrian-detection-adas-0002", (384, 672)  # height, width
DETECTOR_THRESHOLD = 0.5  # as its vendor's demos have it
REID, REID_SIZE = "person-reidentification-retail-0277", (256, 128)
BLAZEPOSE, BLAZEPOSE_SIDE = "pose_landmark_lite.tflite", 256
BLAZEPOSE_JOINTS, BLAZEPOSE_ROWS = 33, 39  # the last 6 are for its own tracking
BLAZEPOSE_OUTPUTS = ("Identity", "Identity_1")  # landmarks and presence; not the mask, heatmaps and world landmarks
MOVENET, MOVENET_SIDE = "movenet_single_pose_lightning_ptq.tflite", 192
POSE_MARGIN = 1.25  # of the square around a person, as BlazePose's own pipeline has it


class TimedBackend:
    """A backend that adds up the milliseconds of its calls, ``ms``: the time inside a network."""

    def __init__(self, backend: Backend) -> None:
        self.name, self.inputs = backend.name, backend.inputs
        self.ms = 0.0
        self._backend = backend

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run the backend."""
        start = time.perf_counter()
        found = self._backend.run(feeds, outputs)
        self.ms += 1e3 * (time.perf_counter() - start)
        return found

    def on(self, images: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """Run on the one input there is; return the outputs in the model's order."""
        return list(self.run({next(iter(self.inputs)): images}).values())


class LiteRtBackend:
    """A tflite file in LiteRT, its own engine: one image at a time."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=str(path), num_threads=physical_cores())
        self._interpreter.allocate_tensors()
        [taken] = self._interpreter.get_input_details()
        self._in, self._out = taken["index"], [given["index"] for given in self._interpreter.get_output_details()]
        self._type = taken["dtype"]
        self.name = "ai_edge_litert cpu, as in the file"
        self.inputs = {taken["name"]: (None, *map(int, taken["shape"][1:]))}

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run the images one after the other; all outputs are given, whatever is wanted."""
        rows = []
        for image in next(iter(feeds.values())):
            self._interpreter.set_tensor(self._in, image[None].astype(self._type))
            self._interpreter.invoke()
            rows.append([self._interpreter.get_tensor(index) for index in self._out])
        return {str(i): np.concatenate(column) for i, column in enumerate(zip(*rows, strict=True))}


@dataclass(frozen=True)
class Form:
    """A way from frames to people."""

    start: Callable[[], Any]  # returns what is called with a clip's frames and has ``timing_ms``
    networks: dict[str, TimedBackend]
    described: dict[str, str]  # file, engine and precision of each network

    def networks_ms(self) -> float:
        """Return the time inside networks until now."""
        return sum(network.ms for network in self.networks.values())


@dataclass(frozen=True)
class PosePeer:
    """A network for the joints of one person in a square."""

    network: TimedBackend
    side: int  # pixels
    decode: Callable[[list[NDArray[Any]]], NDArray[np.float32]]  # to (n, K, 3): x, y in pixels of the square, 0..1


class PeerPipeline:
    """What ``Pipeline`` does, with a network per task."""

    def __init__(self, detector: TimedBackend, pose: PosePeer, reid: TimedBackend) -> None:
        self.timing_ms: dict[str, float] = {}
        self._detector, self._pose, self._reid = detector, pose, reid
        self._tracker = Tracker()

    def __call__(self, frame: NDArray[np.uint8]) -> list[Person]:
        """Detect, describe and track the people of a BGR frame."""
        pose = self._pose
        self.timing_ms = dict.fromkeys(STAGES, 0.0)
        with self._timed("detect"):
            boxes, scores = self._detect(frame)
        if not len(boxes):
            with self._timed("track"):
                self._tracker.update(boxes)
            return []
        with self._timed("crop"):
            squares, corners, scales = crop_squares(frame, boxes, pose.side)
            crops = crop_people(frame, boxes, REID_SIZE)
        with self._timed("model"):
            raw = pose.network.on(squares)
            rows = self._reid.on(crops)[0]
        with self._timed("decode"):
            embeddings = unit_rows(rows.reshape(len(boxes), -1))
            keypoints = pose.decode(raw)
            keypoints[..., :2] = keypoints[..., :2] / scales[:, None, None] + corners[:, None]
        with self._timed("track"):
            ids = self._tracker.update(boxes, embeddings)
        return [
            Person(tuple(box.tolist()), float(score), track_id, embedding=embedding, keypoints=joints)
            for box, score, track_id, embedding, joints in zip(boxes, scores, ids, embeddings, keypoints, strict=True)
        ]

    def _detect(self, frame: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return boxes (n, 4) in pixels and scores (n,)."""
        cv2 = load_opencv()
        height, width = DETECTOR_SIZE
        smooth = cv2.INTER_AREA if height * width < frame.shape[0] * frame.shape[1] else cv2.INTER_LINEAR
        [rows] = self._detector.on(cv2.resize(frame, (width, height), interpolation=smooth)[None])
        rows = rows.reshape(-1, 7)  # image, label, score, left, top, right, bottom in 0..1
        rows = rows[(rows[:, 0] >= 0) & (rows[:, 2] >= DETECTOR_THRESHOLD)]
        limit = np.array([frame.shape[1], frame.shape[0]] * 2, np.float32)
        return (np.clip(rows[:, 3:], 0, 1) * limit).astype(np.float32), rows[:, 2].astype(np.float32)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timing_ms[stage] = 1e3 * (time.perf_counter() - start)


def crop_squares(
    frame: NDArray[np.uint8], boxes: NDArray[np.float32], side: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Cut a square around each person and resize it; what lies outside the frame is black.

    Returns:
        (n, side, side, 3) BGR, the squares' top left corners (n, 2) in pixels of the frame, and squares' pixels per
        frame pixel (n,).
    """
    cv2 = load_opencv()
    edges = POSE_MARGIN * np.maximum((boxes[:, 2:] - boxes[:, :2]).max(1, initial=1), 1)
    corners = (boxes[:, :2] + boxes[:, 2:] - edges[:, None]) / 2
    scales = side / edges
    squares = np.empty((len(boxes), side, side, 3), np.uint8)
    for square, (x, y), scale in zip(squares, corners, scales, strict=True):
        matrix = np.array([[scale, 0, -scale * x], [0, scale, -scale * y]], np.float64)
        cv2.warpAffine(frame, matrix, (side, side), dst=square, flags=cv2.INTER_LINEAR)
    return squares, corners, scales


def decode_blazepose(raw: list[NDArray[Any]]) -> NDArray[np.float32]:
    """Return x, y and visibility of BlazePose's joints."""
    rows = raw[0].reshape(-1, BLAZEPOSE_ROWS, 5)[:, :BLAZEPOSE_JOINTS, [0, 1, 3]].astype(np.float32)
    rows[..., 2] = 1 / (1 + np.exp(-rows[..., 2]))
    return rows


def decode_movenet(raw: list[NDArray[Any]]) -> NDArray[np.float32]:
    """Return x, y and score of MoveNet's joints, which are y, x, score in 0..1."""
    rows = raw[0].reshape(-1, 17, 3)[..., [1, 0, 2]]
    return (rows * np.array([MOVENET_SIDE, MOVENET_SIDE, 1])).astype(np.float32)


def prepare(source: Path, folder: Path, *, taken: str, given: str, scale: float = 1.0, people: bool = True) -> Path:
    """Write a network that takes uint8 images (n, H, W, 3) to ``folder``, without outputs that nobody reads.

    Args:
        taken: the model's own layout and color, as "NCHW BGR".
        given: color of the images.
        scale: that the model's values are divided by.
        people: any number of images; otherwise one.
    """
    model = ov.Core().read_model(source)
    if source.name == BLAZEPOSE:
        read = [model.output(name).get_node().input_value(0) for name in BLAZEPOSE_OUTPUTS]
        model = ov.Model(read, model.get_parameters(), source.stem)
    if people:
        model.reshape({model.input(0): [-1, *list(model.input(0).partial_shape)[1:]]})
    layout, color = taken.split()
    steps = ov.preprocess.PrePostProcessor(model)
    colors = {"BGR": ov.preprocess.ColorFormat.BGR, "RGB": ov.preprocess.ColorFormat.RGB}
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC")).set_color_format(colors[given])
    steps.input().model().set_layout(ov.Layout(layout))
    steps.input().preprocess().convert_element_type(ov.Type.f32).convert_color(colors[color])
    if scale != 1:
        steps.input().preprocess().scale(scale)
    file = folder / f"{source.parent.name}-{source.stem}.xml"
    ov.save_model(steps.build(), file, compress_to_fp16=False)
    return file


def random_images(*shape: int) -> NDArray[np.uint8]:
    """Return (n, H, W, 3): a network takes the same time whatever it sees."""
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def precisions() -> tuple[str, ...]:
    """Return the precisions worth a try on this CPU."""
    return ("f32", "bf16") if cpu_features().fast_bf16 else ("f32",)


def fastest(files: Mapping[str, Path], images: NDArray[np.uint8]) -> tuple[str, TimedBackend, dict[str, float]]:
    """Return the name and backend of the fastest of some files in f32 and bf16, and the milliseconds of all."""
    backends = {
        f"{name} {precision}": TimedBackend(open_backend(file, engine="openvino", precision=precision))
        for name, file in files.items()
        for precision in precisions()
    }
    found = in_turns({name: partial(backend.on, images) for name, backend in backends.items()})
    best = min(found, key=found.__getitem__)
    return best, backends[best], found


def open_peers(peers: Path, folder: Path) -> tuple[Form, dict[str, PosePeer], dict[str, Any]]:
    """Return the peers' pipeline, with the faster pose network for four people, all pose networks and the trials."""
    kinds = [kind for kind in ("FP16", "FP16-INT8") if (peers / "omz" / DETECTOR / kind).is_dir()]
    detectors = {f"{DETECTOR} {kind}": peers / "omz" / DETECTOR / kind / f"{DETECTOR}.xml" for kind in kinds}
    detectors = {n: prepare(p, folder, taken="NCHW BGR", given="BGR", people=False) for n, p in detectors.items()}
    reid_file = prepare(peers / "omz" / REID / "FP16" / f"{REID}.xml", folder, taken="NCHW BGR", given="RGB")
    pose_file = peers / "pose_models" / BLAZEPOSE
    pose_file = prepare(pose_file, folder, taken="NHWC RGB", given="BGR", scale=255)
    trials: dict[str, Any] = {}
    detector_name, detector, trials["detector"] = fastest(detectors, random_images(1, *DETECTOR_SIZE))
    reid_name, reid, trials["reid_4_people"] = fastest({REID: reid_file}, random_images(4, *REID_SIZE))
    squares = random_images(4, BLAZEPOSE_SIDE, BLAZEPOSE_SIDE)
    pose_name, pose, trials["pose_4_people"] = fastest({BLAZEPOSE: pose_file}, squares)
    poses = {pose_name: PosePeer(pose, BLAZEPOSE_SIDE, decode_blazepose)}
    if find_spec("ai_edge_litert"):
        name, network = f"{MOVENET} int8", TimedBackend(LiteRtBackend(peers / "pose_models" / MOVENET))
        poses[name] = PosePeer(network, MOVENET_SIDE, decode_movenet)
        trials["pose_4_people"] |= in_turns({name: partial(network.on, random_images(4, MOVENET_SIDE, MOVENET_SIDE))})
        pose_name = min(poses, key=trials["pose_4_people"].__getitem__)
    networks = {"detector": detector, "pose": poses[pose_name].network, "reid": reid}
    names = {"detector": detector_name, "pose": pose_name, "reid": reid_name}
    described = {task: f"{names[task]}, {network.name}" for task, network in networks.items()}
    return Form(partial(PeerPipeline, detector, poses[pose_name], reid), networks, described), poses, trials


def open_ours(bundle: Path, name: str) -> Form:
    """Open the form ``name``, such as "openvino-int8 f32"; where there is no such target, ONNX of its precision.

    The detector of the package is one of 4:3 and one of 16:9, each loaded when a frame needs it.
    """
    target, precision = name.split()
    networks: dict[str, TimedBackend] = {}
    described: dict[str, str] = {}

    def load(task: str, file: Path) -> Model:
        manifest = Manifest.read(file)
        held = [artifact.target for artifact in manifest.artifacts]
        wanted = next((one for one in (target, target.replace("openvino", "onnx")) if one in held), None)
        artifact = choose_artifact(file, manifest, engine="openvino", target=wanted)
        path = manifest.open_artifact(file, artifact)
        networks[task] = TimedBackend(open_backend(path, engine="openvino", precision=precision))
        described[task] = f"{artifact.target}, {networks[task].name}"
        return Model(networks[task], manifest)

    model = load("model", bundle)
    # One for all clips, because the times of its networks are summed.
    find = DefaultDetector(lambda file: ModelDetector(load(file.stem, file)))

    def start() -> Pipeline:
        return Pipeline(model, find)

    return Form(start, networks, described)


def measure_clip(path: Path, forms: Mapping[str, Form], frames: int) -> dict[str, Any]:
    """Return what each form takes for the frames of a clip."""
    names = list(forms)
    pipelines = {name: form.start() for name, form in forms.items()}
    video_ms: list[float] = []
    sums = {name: dict.fromkeys((*STAGES, "whole", "networks"), 0.0) for name in names}
    seen: dict[str, list[int | None]] = {name: [] for name in names}  # track ids: people themselves are large
    with Video(path) as video:
        size, images = video.size, islice(video, frames)
        while (start := time.perf_counter()) and (frame := next(images, None)) is not None:
            video_ms.append(1e3 * (time.perf_counter() - start))
            first = len(video_ms) % len(names)
            for name in (*names[first:], *names[:first]):
                before, start = forms[name].networks_ms(), time.perf_counter()
                people = pipelines[name](frame)
                sums[name]["whole"] += 1e3 * (time.perf_counter() - start)
                sums[name]["networks"] += forms[name].networks_ms() - before
                for stage in STAGES:
                    sums[name][stage] += pipelines[name].timing_ms[stage]
                seen[name] += [person.track_id for person in people]
    # ``Video`` decodes the first frame as it opens
    count, video_mean = len(video_ms), statistics.fmean(video_ms[1:] or video_ms)
    means = {name: {part: total / count for part, total in parts.items()} for name, parts in sums.items()}
    return {
        "size": size,
        "frames": count,
        "forms": {name: summarize(means[name], video_mean, seen[name], count) for name in names},
    }


def summarize(mean: dict[str, float], video_ms: float, seen: list[int | None], frames: int) -> dict[str, Any]:
    """Return the results of a form on a clip; shares are of all time and of that without the video's decoding."""
    whole = mean["whole"] + video_ms
    return {
        "frames_per_s": round(1e3 / whole, 2),
        "ms_per_frame": {"video": round(video_ms, 3), **{stage: round(mean[stage], 3) for stage in STAGES}},
        "networks_ms_per_frame": round(mean["networks"], 3),
        "share_outside_networks": round(1 - mean["networks"] / whole, 4),
        "share_outside_networks_without_video": round(1 - mean["networks"] / mean["whole"], 4),
        "people_per_frame": round(len(seen) / frames, 3),
        "tracks": len({*seen} - {None}),
    }


def measure_runs(path: Path, forms: Mapping[str, Form], frames: int) -> dict[str, Any]:
    """Return frames/s of whole runs and the share of their time outside the networks, video decoding and all.

    ``ahead`` is ``FileSource``, which decodes a frame while the one before it is looked at; ``in turn`` does not.
    """
    ways: dict[str, Callable[[], Iterator[NDArray[np.uint8]]]] = {"ahead": partial(frames_ahead, path),
                                                                  "in turn": partial(frames_in_turn, path)}  # fmt: skip
    found: dict[str, Any] = {}
    for (name, form), way in product(forms.items(), ways):
        pipeline = form.start()
        images = islice(ways[way](), frames)
        pipeline(next(images))
        before, start, count = form.networks_ms(), time.perf_counter(), 0
        for image in images:
            pipeline(image)
            count += 1
        whole = 1e3 * (time.perf_counter() - start)
        share = 1 - (form.networks_ms() - before) / whole
        found.setdefault(name, {})[way] = {"frames_per_s": round(1e3 * count / whole, 2),
                                           "share_outside_networks": round(share, 4)}  # fmt: skip
    return found


def frames_ahead(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Yield a video's frames as ``dpal-edge run`` gets them."""
    with closing(FileSource(path)) as source:
        while frame := source.poll():
            yield frame.image


def frames_in_turn(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Yield a video's frames, each decoded when it is asked for."""
    with Video(path) as video:
        yield from video


def one_by_one(network: TimedBackend, images: NDArray[np.uint8]) -> None:
    """Run each image by itself."""
    for i in range(len(images)):
        network.on(images[i : i + 1])


def heads_for_people(ours: Mapping[str, Form], peers: Form, poses: Mapping[str, PosePeer], n: int) -> dict[str, Any]:
    """Return the milliseconds for n crops: of one pass with all heads, and of a pose and an embedding for each.

    Peers run people one by one, and all together, as the pipelines do; ratios are peers over ours, of their faster
    pose network.
    """
    calls: dict[str, Callable[[], object]] = {}
    for name, form in ours.items():
        network = form.networks["model"]
        [(_, *shape, _)] = network.inputs.values()
        calls[f"ours {name}"] = partial(network.on, random_images(n, *shape))
    ways: dict[str, Callable[..., object]] = {"one by one": one_by_one, "together": TimedBackend.on}
    crops = random_images(n, *REID_SIZE)
    for way, run in ways.items():
        calls[f"reid {way}"] = partial(run, peers.networks["reid"], crops)
        for name, pose in poses.items():
            calls[f"pose {name} {way}"] = partial(run, pose.network, random_images(n, pose.side, pose.side))
    found = in_turns(calls)
    both = {way: found[f"reid {way}"] + min(found[f"pose {name} {way}"] for name in poses) for way in ways}
    return {
        "ms": found,
        "peers_ms": {way: round(ms, 3) for way, ms in both.items()},
        "ratio": {name: {way: round(ms / found[f"ours {name}"], 2) for way, ms in both.items()} for name in ours},
    }


def resident_mb() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def start_up(options: argparse.Namespace) -> dict[str, float]:
    """Run in a child: open the pipeline and call it once; return moments on the clock that all processes share."""
    moments = {"imported": time.monotonic()}
    pipeline = open_ours(options.bundle, options.form).start()
    moments["opened"] = time.monotonic()
    with Video(options.shared / "data" / "videos" / START_CLIP) as video:
        people = pipeline(next(iter(video)))
    return {**moments, "done": time.monotonic(), "people": len(people)}


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Run in a child: loop over a clip; return the resident memory, in MB, after the first and each hundredth frame."""
    pipeline = open_ours(options.bundle, options.form).start()
    frames, samples = 0, []
    while frames < options.soak:
        with Video(options.shared / "data" / "videos" / SOAK_CLIP) as video:
            for frame in islice(video, options.soak - frames):
                pipeline(frame)
                frames += 1
                if frames == 1 or frames % SAMPLE_EVERY == 0 or frames == options.soak:
                    samples.append((frames, round(resident_mb(), 2)))
    return {"samples": samples}


CHILDREN: dict[str, Callable[[argparse.Namespace], Any]] = {"start-up": start_up, "soak": soak}


def in_child(task: str, options: argparse.Namespace) -> Any:
    """Return what a child process finds."""
    named = ("shared", "form", "soak")
    settings = chain.from_iterable((f"--{name}", str(getattr(options, name))) for name in named)
    command = [sys.executable, __file__, str(options.bundle), "--child", task, *settings]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure_start_up(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds from a process's start to its first result, the median of a few, files being cached."""
    runs = []
    for _ in range(STARTS):
        start = time.monotonic()
        at = in_child("start-up", options)
        runs.append({"imports_s": at["imported"] - start, "open_s": at["opened"] - at["imported"],
                     "first_frame_s": at["done"] - at["opened"], "total_s": at["done"] - start})  # fmt: skip
    median = sorted(runs, key=lambda run: run["total_s"])[STARTS // 2]
    return {
        "form": options.form,
        "people": at["people"],
        **{part: round(seconds, 3) for part, seconds in median.items()},
        "total_s_of_each": [round(run["total_s"], 3) for run in runs],
    }


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Return how resident memory grows, in MB of 1e6 bytes.

    The slope is that of a line through the second half, when all sizes are compiled.
    """
    samples = in_child("soak", options)["samples"]
    half = [(frame, mb) for frame, mb in samples if frame >= options.soak / 2]
    slope = 1e3 * float(np.polyfit(*np.array(half, float).T, 1)[0]) if len(half) > 1 else None
    return {
        "form": options.form,
        "clip": SOAK_CLIP,
        "frames": options.soak,
        "first_mb": samples[0][1],
        "last_mb": samples[-1][1],
        "max_mb": max(mb for _, mb in samples),
        "slope_mb_per_1000_frames": None if slope is None else round(slope, 3),
        "samples": samples,
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return all results; ``folder`` is for networks that are prepared."""
    targets = {artifact.target for artifact in Manifest.read(options.bundle).artifacts}
    names = [f"{target} {precision}" for target in TARGETS if target in targets for precision in precisions()]
    options.form = options.form or names[0]
    cpu = cpu_features()
    results: dict[str, Any] = {
        "model": Manifest.read(options.bundle).model,
        "device": cpu.model,
        "flags": list(cpu.flags),
        "threads": physical_cores(),
        "openvino": ov.__version__,
        "start_up": measure_start_up(options),  # before this process fills the memory
        "memory": measure_memory(options),
    }
    ours = {name: open_ours(options.bundle, name) for name in names}
    peers, poses, trials = open_peers(options.shared / "data" / "peers", folder)
    forms = {**{f"ours {name}": form for name, form in ours.items()}, "peers": peers}
    results |= {
        "forms": {name: form.described for name, form in forms.items()},
        "peers_ms_in_trials": trials,
        "movenet": "measured" if len(poses) > 1 else "not measured: ai_edge_litert is not installed",
        # first of all, because it is the first call with so many people that compiles for them
        "heads_for_n_people": {str(n): heads_for_people(ours, peers, poses, n) for n in PEOPLE},
    }
    videos = options.shared / "data" / "videos"
    results["clips"] = {clip: measure_clip(videos / clip, forms, options.frames) for clip in CLIPS}
    results["runs"] = {clip: measure_runs(videos / clip, forms, options.frames) for clip in CLIPS}
    return results


def main() -> None:
    """Measure, and file what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="has data/videos and data/peers")
    parser.add_argument("--form", help="target and precision of start-up and soak, by default 'openvino-int8 f32'")
    parser.add_argument("--frames", type=int, default=300, help="of each clip, at most")
    parser.add_argument("--soak", type=int, default=2000, help="frames; 20000 is the full soak")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "pipeline.json")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
