"""Embeddings of someone else's model, and a student that learns to point where they point."""

from pathlib import Path

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
from dpal_edge.models.checkpoint import read_newest
from dpal_edge.models.human import load_human
from dpal_edge.models.vit import normalize

SIZE = (32, 16)
WEIGHT = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def write_teacher(path, *, batch="n", shape=(3, *SIZE), cell=None):
    """The mean colour of a crop, times a matrix; ``cell`` pixels a side are averaged first, which makes a map."""
    pooled = {"kernel_shape": [cell, cell], "strides": [cell, cell]}
    nodes = [
        *([helper.make_node("AveragePool", ["crops"], ["map"], **pooled)] if cell else ()),
        helper.make_node("ReduceMean", ["map" if cell else "crops", "axes"], ["mean"], keepdims=0),
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


@pytest.mark.parametrize("batch", ["n", 1, 4])
def test_embeddings_by_hand(tmp_path, batch):
    teacher = EmbeddingTeacher.open(str(write_teacher(tmp_path / "t.onnx", batch=batch)), precision="f32")
    assert (teacher.size, teacher.channels) == (SIZE, 4)
    np.testing.assert_allclose(teacher(crops()).embeddings, crops().mean((1, 2)) @ WEIGHT, rtol=1e-4)


def test_channels_are_turned_for_bgr(tmp_path):
    teacher = EmbeddingTeacher.open(f"{write_teacher(tmp_path / 't.onnx')}?color=bgr", precision="f32")
    np.testing.assert_allclose(teacher(crops()).embeddings, crops()[..., ::-1].mean((1, 2)) @ WEIGHT, rtol=1e-4)


def test_crops_of_another_size_are_resized(tmp_path):
    teacher = EmbeddingTeacher.open(str(write_teacher(tmp_path / "t.onnx")), precision="f32")
    flat = np.full((2, 64, 48, 3), 100, np.uint8)
    np.testing.assert_allclose(teacher(flat).embeddings, np.full((2, 3), 100.0) @ WEIGHT, rtol=1e-4)


class Knows(nn.Module):
    """A head that gives the embeddings of ``crops()``."""

    def forward(self, tokens):
        return torch.from_numpy(7 * crops().mean((1, 2)) @ WEIGHT).float()


def objective_of(teacher, width=8):
    teacher = EmbeddingTeacher.open(str(teacher), precision="f32")
    return EmbeddingObjective([Path("x.png")], SIZE, Augmentation(), teacher, kind="strips", mix=0.0, width=width)


def test_a_student_that_agrees_has_no_loss(tmp_path):
    objective = objective_of(write_teacher(tmp_path / "t.onnx"))
    loss = objective(Knows(), torch.empty(5, 3, 8), {"image": torch.from_numpy(crops())})
    assert loss["loss"].item() == pytest.approx(0, abs=1e-6)


def test_the_map_that_a_teacher_pools(tmp_path):
    teacher = EmbeddingTeacher.open(str(write_teacher(tmp_path / "t.onnx", cell=4)), precision="f32")
    seen = teacher(crops())
    assert teacher.map_channels == 3
    by_hand = crops().reshape(5, 8, 4, 4, 4, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(seen.maps, by_hand, rtol=1e-4)
    np.testing.assert_allclose(seen.embeddings, crops().mean((1, 2)) @ WEIGHT, rtol=1e-4)
    without = EmbeddingTeacher.open(str(write_teacher(tmp_path / "u.onnx")))
    assert (without.map_channels, without(crops()).maps) == (0, None)  # the input itself is not a map


def test_patches_that_agree_with_the_map_have_no_loss(tmp_path):
    """Patches (4 x 2) cover four cells of the teacher's map (8 x 4) each, in row order."""
    objective = objective_of(write_teacher(tmp_path / "t.onnx", cell=4), width=3)
    objective.locate = nn.Identity()
    patches = torch.from_numpy(crops().reshape(5, 4, 8, 2, 8, 3).mean((2, 4)).reshape(5, 8, 3)).float()
    tokens = torch.cat([torch.zeros(5, 1, 3), patches], dim=1)
    batch = {"image": torch.from_numpy(crops())}
    assert objective(Knows(), tokens, batch)["map"].item() == pytest.approx(0, abs=1e-6)
    assert objective(Knows(), torch.zeros_like(tokens), batch)["map"].item() == pytest.approx(1)
    values = objective(Knows(), tokens.flip(1), batch)
    assert values["map"].item() > 0.01
    assert values["loss"].item() == pytest.approx(values["map"].item(), abs=1e-5)


def test_bfloat16_hardly_turns_an_embedding(tmp_path):
    file = str(write_teacher(tmp_path / "t.onnx", cell=4))
    exact, fast = (EmbeddingTeacher.open(file, precision=precision)(crops()) for precision in ("f32", "bf16"))
    cosine = F.cosine_similarity(torch.from_numpy(exact.embeddings), torch.from_numpy(fast.embeddings))
    assert cosine.min() > 0.999


@pytest.mark.parametrize("cell", [None, 4])
def test_a_student_learns_it_without_labels(settings, folders, tmp_path, cell):
    teacher = write_teacher(tmp_path / "t.onnx", cell=cell)
    changes = {"task": [f"reid={folders['reid'] / 'bounding_box_train'}"], "share": [], "reid_teacher": str(teacher)}
    changes |= {"steps": 60, "batch": 6, "log_every": 10, "save_every": 60, "drop_path": 0.0, "layer_decay": 1.0}
    run_finetuning(build_config({**settings, **changes}), tmp_path / "run")
    course = [line["reid/cosine"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert course[-1] < 0.6 * course[0]
    saved = read_newest(tmp_path / "run")[1].part("objectives")
    assert set(saved) == ({"reid.locate.weight", "reid.locate.bias"} if cell else set())
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
    with pytest.raises(ModelFileError, match=r"none\.xml: no such file; expected a model that OpenVINO reads"):
        EmbeddingTeacher.open(str(tmp_path / "none.xml"))
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ModelFileError, match=r"text\.onnx: OpenVINO cannot read it"):
        EmbeddingTeacher.open(str(tmp_path / "text.onnx"))
