"""Embeddings of someone else's model, and a student that learns to point where they point."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.files import read_lines
from dpal_edge.finetune.augment import Augmentation
from dpal_edge.finetune.config import build_config
from dpal_edge.finetune.embedding_teacher import EmbeddingTeacher
from dpal_edge.finetune.objectives.reid import EmbeddingObjective
from dpal_edge.finetune.run import run_finetuning
from dpal_edge.models.human import load_human
from dpal_edge.models.vit import normalize

SIZE = (32, 16)
WEIGHT = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def write_teacher(path, *, batch="n", shape=(3, *SIZE)):
    """The mean colour of a crop, times a matrix."""
    nodes = [
        helper.make_node("ReduceMean", ["crops", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("crops", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [batch, 4])],
        [numpy_helper.from_array(np.array([2, 3]), "axes"), numpy_helper.from_array(WEIGHT, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def crops(count=5, size=SIZE):
    return np.random.default_rng(1).integers(0, 255, (count, *size, 3), dtype=np.uint8)


@pytest.mark.parametrize("batch", ["n", 1])
def test_embeddings_by_hand(tmp_path, batch):
    teacher = EmbeddingTeacher.open(str(write_teacher(tmp_path / "t.onnx", batch=batch)))
    assert (teacher.size, teacher.channels) == (SIZE, 4)
    np.testing.assert_allclose(teacher(crops()), crops().mean((1, 2)) @ WEIGHT, rtol=1e-4)


def test_channels_are_turned_for_bgr(tmp_path):
    teacher = EmbeddingTeacher.open(f"{write_teacher(tmp_path / 't.onnx')}?color=bgr")
    np.testing.assert_allclose(teacher(crops()), crops()[..., ::-1].mean((1, 2)) @ WEIGHT, rtol=1e-4)


def test_crops_of_another_size_are_resized(tmp_path):
    teacher = EmbeddingTeacher.open(str(write_teacher(tmp_path / "t.onnx")))
    flat = np.full((2, 64, 48, 3), 100, np.uint8)
    np.testing.assert_allclose(teacher(flat), np.full((2, 3), 100.0) @ WEIGHT, rtol=1e-4)


def test_a_student_that_agrees_has_no_loss(tmp_path):
    class Knows(nn.Module):
        def forward(self, tokens):
            return torch.from_numpy(7 * crops().mean((1, 2)) @ WEIGHT).float()

    teacher = EmbeddingTeacher.open(str(write_teacher(tmp_path / "t.onnx")))
    objective = EmbeddingObjective([tmp_path / "x.png"], SIZE, Augmentation(), teacher, kind="strips", mix=0.0)
    loss = objective(Knows(), torch.empty(5, 3, 8), {"image": torch.from_numpy(crops())})
    assert loss["loss"].item() == pytest.approx(0, abs=1e-6)


def test_a_student_learns_it_without_labels(settings, folders, tmp_path):
    teacher = write_teacher(tmp_path / "t.onnx")
    changes = {"task": [f"reid={folders['reid'] / 'bounding_box_train'}"], "share": [], "reid_teacher": str(teacher)}
    changes |= {"steps": 60, "batch": 6, "log_every": 10, "save_every": 60, "drop_path": 0.0, "layer_decay": 1.0}
    run_finetuning(build_config({**settings, **changes}), tmp_path / "run")
    course = [line["reid/cosine"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert course[-1] < 0.6 * course[0]
    model, metadata = load_human(tmp_path / "run", weights="backbone")
    assert model.configs["reid"].channels == 4
    pixels = torch.from_numpy(crops(8))
    with torch.no_grad():
        found = model(normalize(pixels.permute(0, 3, 1, 2), metadata["mean"], metadata["std"]))["reid"]
    assert found.shape == (8, 4)
    assert F.normalize(found, dim=1).isfinite().all()


def test_wrong_teachers(tmp_path):
    file = write_teacher(tmp_path / "t.onnx")
    with pytest.raises(ConfigError, match="unknown size; expected FILE or FILE"):
        EmbeddingTeacher.open(f"{file}?size=3")
    with pytest.raises(ConfigError, match="color is 'hsv', expected rgb or bgr"):
        EmbeddingTeacher.open(f"{file}?color=hsv")
    with pytest.raises(ModelFileError, match=r"its input has shape \(None, 3, None, None\), expected \(B, 3, H, W\)"):
        EmbeddingTeacher.open(str(write_teacher(tmp_path / "two.onnx", shape=(3, "h", "w"))))
