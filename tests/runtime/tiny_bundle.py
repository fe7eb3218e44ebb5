"""Real models of a few operators, bundles around them and a detector that fits them."""

from collections.abc import Mapping
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


def write_model(path: Path, name: str = "tiny") -> Path:
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
        name,
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", height, width, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def write_bundle(
    folder: Path, *, size=SIZE, name="images", task="embedding", shape=(5,), target="model.onnx", labels=()
) -> Path:
    """Write a real bundle; the options make its manifest disagree with its model."""
    folder.mkdir()
    model = write_model(folder / target)
    np.savez(folder / "golden.npz", images=np.zeros((1, *SIZE, 3), np.uint8), embedding=np.zeros((1, 5), np.float32))
    head = HeadSpec(name="embedding", task=task, shape=shape, labels=labels)
    write_manifest(folder, model, InputSpec(name=name, size=size, mean=(0.0,) * 3, std=(1.0,) * 3), (head,))
    return folder


def write_heads_bundle(folder: Path, heads: Mapping[HeadSpec, np.ndarray], size=SIZE) -> Path:
    """Write a bundle whose heads give the same values (each of its head's shape) for any image."""
    folder.mkdir()
    axes = {"axes": np.array([1, 2, 3]), "zero": np.array(0, np.float32)}
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),  # (n,): what the outputs take their number from
    ]
    outputs = []
    for head, values in heads.items():
        name = head.name
        axes |= {f"{name}.sides": np.array([-1] + [1] * values.ndim), f"{name}.values": values.astype(np.float32)[None]}
        nodes.append(helper.make_node("Reshape", ["nothing", f"{name}.sides"], [f"{name}.nothing"]))
        nodes.append(helper.make_node("Add", [f"{name}.values", f"{name}.nothing"], [name]))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *values.shape]))
    graph = helper.make_graph(
        nodes,
        "constant",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", *size, 3])],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in axes.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "golden.npz", images=np.zeros((1, *size, 3), np.uint8))
    expected = InputSpec(name="images", size=size, mean=(0.0,) * 3, std=(1.0,) * 3)
    write_manifest(folder, folder / "model.onnx", expected, tuple(heads))
    return folder


def write_detector_bundle(folder: Path, size: tuple[int, int] = (8, 16)) -> Path:
    """Write a detector: a box on each half, whose logit is how far its half is brighter than 128."""
    folder.mkdir()
    rows, columns = size
    middle = columns // 2
    boxes = np.array([[[1, 1, middle - 1, rows - 1], [middle + 1, 1, columns - 1, rows - 1]]], np.float32)
    constants = {
        "halves": np.array([-1, rows, 2, 3 * middle]),
        "axes": np.array([1, 3]),
        "grey": np.array(128, np.float32),
        "last": np.array([2]),
        "none": np.zeros((1, 1, 4), np.float32),
        "boxes": boxes,
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "halves"], ["split"]),
        helper.make_node("ReduceMean", ["split", "axes"], ["mean"], keepdims=0),
        helper.make_node("Sub", ["mean", "grey"], ["logits"]),
        helper.make_node("Unsqueeze", ["logits", "last"], ["column"]),
        helper.make_node("Mul", ["column", "none"], ["nothing"]),
        helper.make_node("Add", ["nothing", "boxes"], ["placed"]),
        helper.make_node("Concat", ["placed", "column"], ["detection"], axis=2),
    ]
    graph = helper.make_graph(
        nodes,
        "halves",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", *size, 3])],
        [helper.make_tensor_value_info("detection", TensorProto.FLOAT, ["n", 2, 5])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    dark = np.concatenate([boxes, np.full((1, 2, 1), -128, np.float32)], axis=2)
    np.savez(folder / "golden.npz", images=np.zeros((1, *size, 3), np.uint8), detection=dark)
    head = HeadSpec(name="detection", task="detection", shape=(2, 5), labels=("person",), kind="pyramid")
    expected = InputSpec(name="images", size=size, mean=(0.0,) * 3, std=(1.0,) * 3)
    write_manifest(folder, folder / "model.onnx", expected, (head,))
    return folder


def write_manifest(folder: Path, model: Path, expected: InputSpec, heads: tuple[HeadSpec, ...]) -> None:
    parity = Parity(
        backend="onnxruntime", images=1, max_abs_error=0.0, max_rel_error=0.0, min_cosine=1.0, tolerance=1e-3
    )
    Manifest(
        model="tiny",
        input=expected,
        heads=heads,
        artifacts=(Artifact(target="onnx", precision="float32", file=FileSpec.of(model), parity=parity),),
        golden=FileSpec.of(folder / "golden.npz"),
        stripped=Stripped(parameters_before=15, parameters_after=15, removed={}),
        provenance={},
    ).write(folder)


def people_frame(positions: dict[str, tuple[int, int]], size=(96, 160)) -> np.ndarray:
    """Draw people of 12 x 30 pixels at (left, top) on black, in pure BGR colours."""
    frame = np.zeros((*size, 3), np.uint8)
    for colour, (left, top) in positions.items():
        frame[top : top + 30, left : left + 12, "bgr".index(colour)] = 255
    return frame
