"""Tiny data sets of every task, and checkpoints of a tiny model for people and of a tiny detector."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpal_edge.models.checkpoint import write_checkpoint
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.models.human import HumanModel
from dpal_edge.models.students import build_student, config_to_dict, init_student_weights
from dpal_edge.models.vit import ViTConfig
from tests.tasks import layouts

CROPS = ViTConfig(size=(64, 32), width=24, depth=2, heads=2, last_heads=4)
FRAMES = ViTConfig(size=(64, 96), width=24, depth=2, heads=2, last_heads=4)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)  # unlike any that code could have by default
PEOPLE = ("reid", "parsing", "pose", "attributes")
HEADS = {
    # A neck is what the data lack.
    "pose": HeadConfig(task="pose", kind="simcc", labels=("neck", *layouts.JOINTS), channels=16),
    "parsing": HeadConfig(task="parsing", kind="upsample", labels=layouts.CLASSES, channels=16),
    "attributes": HeadConfig(task="attributes", kind="query", labels=layouts.ATTRIBUTES[::-1]),
    "reid": HeadConfig(task="reid", kind="bnneck", channels=16),
}
DETECTOR = {"detection": HeadConfig(task="detection", kind="pyramid", labels=("person",), channels=16)}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Models this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    return {
        "reid": layouts.write_market(root / "reid"),
        "parsing": layouts.write_lip(root / "parsing"),
        "pose": layouts.write_coco(root / "pose"),
        "attributes": layouts.write_attributes(root / "attributes"),
        "detection": write_frames(root / "detection"),
    }


def write_frames(folder: Path, frames: int = 6) -> Path:
    """Noise of 96x144 with one to three red people, boxes of COCO; the evaluation part alone."""
    rng = np.random.default_rng(5)
    images, annotations = [], []
    for number in range(frames):
        pixels = rng.integers(100, 140, (96, 144, 3))
        for place in range(1 + number % 3):
            left, top = 8 + 45 * place, int(rng.integers(4, 40))
            pixels[top : top + 48, left : left + 18] = (220, 30, 30)
            box = {"bbox": [left, top, 18, 48], "area": 18 * 48, "iscrowd": 0, "category_id": 1}
            annotations.append({"id": len(annotations), "image_id": number, **box})
        name = f"{number:012d}.png"
        layouts.save_image(folder / "val2017" / name, pixels)
        images.append({"id": number, "file_name": name, "width": 144, "height": 96})
    path = folder / "annotations" / "instances_val2017.json"
    path.parent.mkdir(parents=True)
    categories = [{"id": 1, "name": "person"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return folder


def tiny_model(config: ViTConfig, heads: dict[str, HeadConfig], seed: int = 0) -> HumanModel:
    """A model whose outputs differ from image to image, its batch norms not as they begin."""
    generator = torch.Generator().manual_seed(seed)
    backbone = build_student(config)
    init_student_weights(backbone, generator)
    torch.manual_seed(seed)
    model = HumanModel(backbone, heads)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.2 * torch.rand(buffer.shape, generator=generator)
    return model.eval()


def save_run(folder: Path, model: HumanModel, data: dict[str, Path]) -> Path:
    """Write a run folder whose weights are better than their running mean, which is another model."""
    config = model.backbone.config
    other = tiny_model(config, model.configs, seed=1)
    tensors = dict(model.state_dict())
    for name, value in other.state_dict().items():
        part, _, rest = name.partition(".")
        tensors[f"{'ema' if part == 'backbone' else 'ema_heads'}.{rest}"] = value
    metadata = {
        "student": "vit_tiny",
        "architecture": config_to_dict(config),
        "heads": {task: head.to_dict() for task, head in model.configs.items()},
        "mean": MEAN,
        "std": STD,
        "step": 7,
        "best": "backbone",
        "teachers": [],
        "config": {"task": [f"{task}={folder}" for task, folder in data.items()]},
    }
    write_checkpoint(folder / "checkpoints" / "step-00000007.safetensors", tensors, metadata)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, folders) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "people", tiny_model(CROPS, HEADS), {"pose": folders["pose"]})


@pytest.fixture(scope="session")
def detector_run(tmp_path_factory, folders) -> Path:
    data = {"detection": folders["detection"]}
    return save_run(tmp_path_factory.mktemp("runs") / "detector", tiny_model(FRAMES, DETECTOR), data)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, run, folders) -> Path:
    return export_run(run, tmp_path_factory.mktemp("bundles") / "people", folders["pose"] / "val")


@pytest.fixture(scope="session")
def detector_bundle(tmp_path_factory, detector_run, folders) -> Path:
    return export_run(detector_run, tmp_path_factory.mktemp("bundles") / "detector", folders["detection"] / "val2017")


def export_run(run: Path, out: Path, images: Path) -> Path:
    from dpal_edge.export.bundle import ExportSettings, export  # the exporter is slow to import

    export(run, out, ExportSettings(calibration=(str(images),), images=4))
    return out
