"""What can be exported to: which file, in which precision, for which engine."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """One kind of artifact."""

    precision: Literal["float32", "float16", "int8"]
    form: Literal["onnx", "openvino", "tensorrt-rtx"]  # of the file
    file: str  # in the bundle; targets that share one differ in who will read it


# A trt target is the ONNX file that TensorRT compiles on the device it will run on; onnx-int8 is the same file for ONNX
# Runtime. A trt-rtx target is compiled here, for all RTX cards.
TARGETS = {
    "onnx": Target("float32", "onnx", "model.onnx"),
    "onnx-fp16": Target("float16", "onnx", "model.fp16.onnx"),
    "onnx-int8": Target("int8", "onnx", "model.int8.onnx"),
    "openvino-fp16": Target("float16", "openvino", "model.fp16.xml"),
    "openvino-int8": Target("int8", "openvino", "model.int8.xml"),
    "trt-fp16": Target("float16", "onnx", "model.fp16.onnx"),
    "trt-int8": Target("int8", "onnx", "model.int8.onnx"),
    "trt-rtx-fp16": Target("float16", "tensorrt-rtx", "model.fp16.rtx"),
    "trt-rtx-int8": Target("int8", "tensorrt-rtx", "model.int8.rtx"),
}
