import math

import pytest
import torch
from torch import nn

from dpal_edge.models.detection import locations
from dpal_edge.models.head_config import HeadConfig, Place
from dpal_edge.models.heads import build_head
from dpal_edge.models.human import HumanModel
from dpal_edge.models.students import build_student
from dpal_edge.models.vit import ViTConfig, init_student

HEAD = HeadConfig(task="detection", kind="pyramid", labels=("person",), channels=16)
PLACE = Place(24, (3, 4), (48, 64))  # patches of 16 pixels; 48 + 12 + 4 locations


def test_locations_are_cell_centres_in_row_order():
    centres, strides = locations(((1, 2), (1, 1)), (8.0, 16.0))
    assert centres.tolist() == [[4, 4], [12, 4], [8, 8]]
    assert strides.flatten().tolist() == [8, 8, 16]


def test_first_boxes_are_tall_and_scores_are_low():
    head = build_head(HEAD, PLACE).eval()
    for tower in (head.box, head.score):
        nn.init.zeros_(tower.last.weight)
    found = head(torch.randn(2, 13, 24))
    assert found.shape == (2, 64, 5)
    torch.testing.assert_close(found[..., 4].sigmoid(), torch.full((2, 64), 0.01))
    torch.testing.assert_close(found[0, 0, :4], torch.tensor([4 - 12.0, 4 - 24, 4 + 12, 4 + 24]))  # stride 8
    torch.testing.assert_close(found[1, 48, :4], torch.tensor([8 - 24.0, 8 - 48, 8 + 24, 8 + 48]))  # stride 16
    torch.testing.assert_close(found[1, 60, :4], torch.tensor([16 - 48.0, 16 - 96, 16 + 48, 16 + 96]))  # stride 32


def test_sides_are_bounded_whatever_the_weights():
    head = build_head(HEAD, PLACE).eval()
    head.box.last.bias.data.fill_(1e4)
    width = head(torch.randn(1, 13, 24))[0, 0, 2] - 4
    torch.testing.assert_close(width, torch.tensor(8 * math.exp(5)))


def test_boxes_are_float32_under_autocast():
    head = build_head(HEAD, PLACE)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(2, 13, 24)).dtype == torch.float32


def test_every_weight_learns():
    head = build_head(HEAD, PLACE)
    head(torch.randn(4, 13, 24)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_head_for_a_tiny_vit_is_small():
    head = build_head(HeadConfig(task="detection", kind="pyramid", channels=128), Place(192, (24, 32), (384, 512)))
    assert sum(p.numel() for p in head.parameters()) < 1_200_000
    assert head(torch.zeros(1, 769, 192)).shape == (1, 48 * 64 + 24 * 32 + 12 * 16, 5)


@pytest.mark.parametrize("window", [None, (3, 2)])
def test_onnxruntime_equals_torch(window, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    config = ViTConfig(size=(48, 64), width=24, depth=3, heads=2, last_heads=2, window=window)
    backbone = build_student(config)
    init_student(backbone, torch.Generator().manual_seed(0))
    model = _Detector(HumanModel(backbone, {"detection": HEAD})).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, 48, 64),),
        tmp_path / "detector.onnx",
        input_names=["images"],
        output_names=["people"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        opset_version=20,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, 48, 64)
        [found] = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(images).detach(), rtol=1e-4, atol=1e-3)


class _Detector(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)["detection"]
