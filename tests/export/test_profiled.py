"""What the profiler counts in exported graphs, against PyTorch's own counter of operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpal_edge.export.onnx import ExportedModel, write_onnx
from dpal_edge.profile import graph_files
from tests.export.conftest import CONFIG, DETECTION, HEADS, MEAN, STD, SWIN, tiny_human

MODELS = {"vit": (HEADS, CONFIG), "swin": (HEADS, SWIN), "detector": (DETECTION, CONFIG)}


@pytest.mark.parametrize("name", MODELS)
def test_operations_of_each_block(tmp_path, name):
    heads, config = MODELS[name]
    model = ExportedModel(tiny_human(0, heads, config), tuple(MEAN), tuple(STD)).eval()
    file = tmp_path / "model.onnx"
    write_onnx(model, file, size=config.size, outputs=model.outputs)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(2, *config.size, 3, dtype=torch.uint8))
    by_reader = []
    for read in (graph_files._read_onnx, graph_files._read_openvino):
        graph = read(file, 2)
        by_reader.append({g: graph.work(g).operations for g in dict.fromkeys(graph.groups.values())})
    first, second = ({group: n for group, n in found.items() if n} for found in by_reader)
    assert first == second
    assert sum(first.values()) == counter.get_total_flops()
    assert {f"head {output}" for output in model.outputs} <= set(first)
    stage = "stage 2 " if name == "swin" else ""
    assert {"patch embedding", f"{stage}block 1 attention", f"{stage}block 1 MLP"} <= set(first)
    assert not {"other", "norms"} & set(first)
