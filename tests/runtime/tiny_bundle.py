"""A real model of three operators, a bundle around it and a detector that fits it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dpal_edge.manifest import Artifact, FileSpec, HeadSpec, InputSpec, Manifest, Parity, Stripped
from dpal_edge.runtime import Detections

SIZE = (16, 8)  # height, width
WEIGHT = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


@dataclass(frozen=True)
class ColourDetector:
    """Finds what is not black: one box around each pure colour, in the order red, green, blue."""

    score: float = 0.75

    def __call__(self, frame):
        boxes = []
        for channel in (2, 1, 0):
            rows, columns = np.nonzero(frame[..., channel] > 128)
            if len(rows):
                boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.full(len(boxes), self.score, np.float32))


def reference(crops):
    """What the tiny model computes: mean colour in 0..1, times a matrix."""
    return crops.astype(np.float32).mean(axis=(1, 2)) / 255 @ WEIGHT


def write_model(path: Path) -> Path:
    height, width = SIZE
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "white"], ["colour"]),
        helper.make_node("MatMul", ["colour", "weight"], ["embedding"]),
    ]
    constants = {"axes": np.array([1, 2]), "white": np.array(255, np.float32), "weight": WEIGHT}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", height, width, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def write_bundle(folder: Path, *, size=SIZE, name="images", task="embedding", shape=(5,), target="model.onnx") -> Path:
    """Write a real bundle; the options make its manifest disagree with its model."""
    folder.mkdir()
    model = write_model(folder / target)
    np.savez(folder / "golden.npz", images=np.zeros((1, *SIZE, 3), np.uint8), embedding=np.zeros((1, 5), np.float32))
    parity = Parity(
        backend="onnxruntime", images=1, max_abs_error=0.0, max_rel_error=0.0, min_cosine=1.0, tolerance=1e-3
    )
    Manifest(
        model="tiny",
        input=InputSpec(name=name, size=size, mean=(0.0,) * 3, std=(1.0,) * 3),
        heads=(HeadSpec(name="embedding", task=task, shape=shape),),
        artifacts=(Artifact(target="onnx", precision="float32", file=FileSpec.of(model), parity=parity),),
        golden=FileSpec.of(folder / "golden.npz"),
        stripped=Stripped(parameters_before=15, parameters_after=15, removed={}),
        provenance={},
    ).write(folder)
    return folder


def people_frame(positions: dict[str, tuple[int, int]], size=(96, 160)) -> np.ndarray:
    """Draw people of 12 x 30 pixels at (left, top) on black, in pure BGR colours."""
    frame = np.zeros((*size, 3), np.uint8)
    for colour, (left, top) in positions.items():
        frame[top : top + 30, left : left + 12, "bgr".index(colour)] = 255
    return frame
