from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpal_edge.models.checkpoint import write_checkpoint
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.models.human import HumanModel
from dpal_edge.models.students import Student, StudentConfig, build_student, config_to_dict, init_student_weights
from dpal_edge.models.swin import SwinConfig
from dpal_edge.models.vit import ViTConfig

CONFIG = ViTConfig(size=(64, 32), width=24, depth=2, heads=2, last_heads=4)
SWIN = SwinConfig(size=(96, 64), width=32, depths=(1, 1, 2, 1), heads=(1, 1, 2, 2), window=3)  # an odd map of 3x2
HEADS = {
    "pose": HeadConfig(task="pose", kind="simcc", labels=("nose", "left_knee", "right_knee"), channels=16),
    "parsing": HeadConfig(task="parsing", kind="upsample", labels=("background", "skin"), channels=8),
    "attributes": HeadConfig(task="attributes", kind="query", labels=("bag", "hat", "coat", "dress")),
    "reid": HeadConfig(task="reid", kind="bnneck", channels=12),
}
DETECTION = {"detection": HeadConfig(task="detection", kind="pyramid", channels=8)}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]  # unlike any that code could have by default


def tiny_student(seed: int, config: StudentConfig = CONFIG) -> Student:
    student = build_student(config)
    generator = torch.Generator().manual_seed(seed)
    init_student_weights(student, generator)
    with torch.no_grad():
        for parameter in student.parameters():  # norms and biases as well, as training leaves none of them alike
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return student.eval()


def tiny_human(seed: int, heads: dict[str, HeadConfig], config: StudentConfig = CONFIG) -> HumanModel:
    """A model whose batch norms have seen data, and whose detector, if any, is not sure of the same box everywhere."""
    torch.manual_seed(seed)
    model = HumanModel(tiny_student(seed, config), heads)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.heads.state_dict().items():
        if tensor.is_floating_point():
            spread = 0.5 if name.endswith("running_var") else 0.1
            tensor += spread * torch.rand(tensor.shape, generator=generator)
    return model.eval()


def write_human(
    path: Path, parts: dict[str, HumanModel], *, dtype: torch.dtype = torch.float32, **facts: object
) -> Path:
    """Write a checkpoint as fine-tuning does: ``parts`` are the weights, "backbone" or "ema", that it holds."""
    tensors = {}
    for part, model in parts.items():
        heads = "heads" if part == "backbone" else f"{part}_heads"
        for name, module in ((part, model.backbone), (heads, model.heads)):
            for key, value in module.state_dict().items():
                tensors[f"{name}.{key}"] = value.to(dtype) if value.is_floating_point() else value
    model = next(iter(parts.values()))
    metadata = {
        "student": "vit_tiny",
        "architecture": config_to_dict(model.backbone.config),
        "heads": {task: head.to_dict() for task, head in model.configs.items()},
        "mean": MEAN,
        "std": STD,
        "teachers": [],
        **facts,
    }
    write_checkpoint(path, tensors, metadata)
    return path


@pytest.fixture(scope="session")
def crops(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "crops"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (80, 40, 3)).astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, crops) -> Path:
    """A run folder with a checkpoint of a tiny student, its running mean, a decoder and a mask."""
    run = tmp_path_factory.mktemp("export") / "run"
    tensors = {f"backbone.{key}": value for key, value in tiny_student(0).state_dict().items()}
    tensors |= {f"ema.{key}": value for key, value in tiny_student(1).state_dict().items()}
    tensors |= {"decoder.expert.weight": torch.ones(30, 24), "mask.direction": torch.ones(8)}
    tensors |= {"optimizer.decoder.expert.weight.exp_avg": torch.ones(30, 24)}
    metadata = {
        "student": "vit_tiny",
        "architecture": config_to_dict(CONFIG),
        "mean": MEAN,
        "std": STD,
        "step": 7,
        "best": "ema",
        "config": {"data": [str(crops)]},
        "teachers": [
            {"spec": "vit.pth", "sha256": "0" * 64, "parameters": 700},
            {"spec": "reid.pth", "sha256": "1" * 64, "parameters": 300},
        ],
    }
    write_checkpoint(run / "checkpoints" / "step-00000007.safetensors", tensors, metadata)
    return run
