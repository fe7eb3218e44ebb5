"""A tiny real setup: generated people on generated backgrounds, and a ViT of two blocks as their teacher."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dpal_edge.models.vit import VisionTransformer, ViTConfig, init_student
from dpal_edge.train.config import build_config

SIZES = {"size": [64, 32], "local_size": [32, 16], "crowd_size": [64, 48]}


def draw_person(path: Path, seed: int, size=(96, 48)) -> None:
    """Draw a head, a body and legs in random colours on a noisy background."""
    rng = np.random.default_rng(seed)
    rows, columns = size
    image = rng.integers(0, 120, 3) + rng.integers(0, 40, (rows, columns, 3))
    y, x = np.mgrid[:rows, :columns] / np.array([rows, columns]).reshape(2, 1, 1)
    head = ((y - 0.15) / 0.1) ** 2 + ((x - 0.5) / 0.15) ** 2 < 1
    body = (abs(y - 0.42) < 0.18) & (abs(x - 0.5) < 0.22)
    legs = (abs(y - 0.78) < 0.18) & (abs(abs(x - 0.5) - 0.12) < 0.08)
    for part in (head, body, legs):
        image[part] = rng.integers(100, 255, 3)
    Image.fromarray(image.astype(np.uint8)).save(path, quality=90)


def write_people(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        draw_person(folder / f"{i:03d}.jpg", seed=i)
    return folder


def write_teacher(path: Path, seed: int = 0, width: int = 16) -> Path:
    vit = VisionTransformer(ViTConfig(size=(64, 32), width=width, depth=2, heads=1, last_heads=1))
    init_student(vit, torch.Generator().manual_seed(seed))
    save_file(vit.state_dict(), path)
    return path


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Models this small gain nothing from more, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def people(tmp_path_factory) -> Path:
    return write_people(tmp_path_factory.mktemp("people") / "crops", 24)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


# A run that takes a second.
SHORT_RUN = {
    **SIZES,
    "batch": 2,
    "steps": 4,
    "log_every": 1,
    "save_every": 2,
    "workers": 0,
    "device": "cpu",
    "precision": "float32",
    "validation_images": 0,
}


@pytest.fixture
def settings(people, teacher_file):
    return {**SHORT_RUN, "teacher": str(teacher_file), "data": [str(people)]}


@pytest.fixture
def config(settings):
    return build_config(settings)
