"""Tiny data sets of every task, and a checkpoint of a tiny student."""

from pathlib import Path

import pytest
import torch

from dpal_edge.models.checkpoint import write_checkpoint
from dpal_edge.models.students import build_student, config_to_dict, init_student_weights
from dpal_edge.models.vit import ViTConfig
from tests.tasks import layouts

CONFIG = ViTConfig(size=(64, 32), width=24, depth=2, heads=2, last_heads=4)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Models this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tasks")
    return {
        "reid": layouts.write_market(root / "reid"),
        "parsing": layouts.write_lip(root / "parsing"),
        "pose": layouts.write_coco(root / "pose"),
        "attributes": layouts.write_attributes(root / "attributes"),
    }


def tiny_student(seed: int = 0):
    student = build_student(CONFIG)
    init_student_weights(student, torch.Generator().manual_seed(seed))
    return student.eval()


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run folder whose newest checkpoint holds the student of seed 0."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    metadata = {
        "student": "vit_tiny",
        "architecture": config_to_dict(CONFIG),
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "teachers": [],
    }
    for step, seed in ((3, 1), (7, 0)):
        tensors = {f"backbone.{key}": value for key, value in tiny_student(seed).state_dict().items()}
        write_checkpoint(folder / "checkpoints" / f"step-{step:08d}.safetensors", tensors, {**metadata, "step": step})
    return folder
