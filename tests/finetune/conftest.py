"""Tiny data sets of several tasks and a run on them that takes a second or two."""

import pytest
import torch

from tests.tasks import layouts


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Models this small gain nothing from more, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Data of every task on person crops, by task."""
    root = tmp_path_factory.mktemp("tasks")
    return {
        "pose": layouts.write_coco(root / "coco"),
        "parsing": layouts.write_lip(root / "lip"),
        "attributes": layouts.write_attributes(root / "attributes"),
        "reid": layouts.write_market(root / "market"),
    }


@pytest.fixture
def settings(folders):
    return {
        "init": "random:vit_tiny",
        "task": [f"{task}={folder}" for task, folder in folders.items()],
        "size": [32, 16],
        "batch": 14,
        "share": ["reid=8", "pose=2", "parsing=2", "attributes=2"],
        "steps": 4,
        "lr": 1e-3,
        "log_every": 1,
        "save_every": 2,
        "workers": 0,
        "device": "cpu",
        "precision": "float32",
        "drop_path": 0.1,
        "trackers": [],
    }
