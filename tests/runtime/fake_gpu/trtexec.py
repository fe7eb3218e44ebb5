"""A trtexec over the fake TensorRT: the options that our code uses, files in the formats of the real one."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import tensorrt as trt

NEWER = trt.__version__.startswith("11")
KNOWN = {
    "onnx", "saveEngine", "loadEngine", "minShapes", "optShapes", "maxShapes", "shapes", "memPoolSize", "loadInputs",
    "builderOptimizationLevel", "timingCacheFile", "exportOutput", "exportTimes", "warmUp", "duration", "iterations",
    "skipInference", *(["includeDataTransfers"] if NEWER else ["stronglyTyped"]),
}  # fmt: skip


def say(line):
    sys.stdout.write(f"{line}\n")


def shapes(text):
    name, _, sides = text.partition(":")
    return name, [int(side) for side in sides.split("x")]


def main(arguments):
    major, minor, patch = trt.__version__.split(".")
    digits = f"{major}{minor.zfill(len(major))}{patch.zfill(2)}"  # 8602 or 100300
    say(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{digits}] # trtexec {' '.join(arguments)}")
    given = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    if "help" in given:
        for name in sorted(KNOWN):
            say(f"  --{name}=<spec>    explained")
        return 0
    if unknown := given.keys() - KNOWN:
        say(f"[E] Unknown option: --{unknown.pop()}")
        return 1
    if "onnx" in given:
        if os.environ.get("FAKE_REFUSE"):
            say("[01/01/2026-00:00:00] [E] Error Code 10: no implementation")
            return 1
        assert NEWER or "stronglyTyped" in given
        profile = {}
        for option in ("minShapes", "optShapes", "maxShapes"):
            name, sides = shapes(given[option])
            profile.setdefault(name, []).append(sides)
        header = {"version": trt.__version__, "profile": profile, "workspace": given["memPoolSize"]}
        engine = trt._MAGIC + json.dumps(header).encode() + b"\n" + Path(given["onnx"]).read_bytes()
        Path(given["saveEngine"]).write_bytes(engine)
        Path(given["timingCacheFile"]).write_bytes(b"measured\n")
        return 0
    return run(given)


def run(given):
    content = Path(given["loadEngine"]).read_bytes().split(b"\n", 2)[2]
    name, sides = shapes(given["shapes"])
    if "exportTimes" in given:
        if trt._FAILS in content and sides[0] == 8:
            say("[01/01/2026-00:00:00] [E] Error Code 1: Cuda Runtime (out of memory)")
            return 1
        Path(given["exportTimes"]).write_text(json.dumps([{"latencyMs": 1.5, "computeMs": 1.0}] * 10))
        assert "includeDataTransfers" in given or not NEWER
        return 0
    loaded, _, file = given["loadInputs"].partition(":")
    assert loaded == name
    images = np.fromfile(file, np.uint8).reshape(sides)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    outputs = [
        {"name": output.name, "dimensions": "x".join(map(str, values.shape)),
         "values": (values + float(trt._WRONG in content)).ravel().tolist()}
        for output, values in zip(session.get_outputs(), session.run(None, {name: images}), strict=True)
    ]  # fmt: skip
    if trt._OVERFLOWS in content:
        outputs[0]["values"][0] = -np.inf
    Path(given["exportOutput"]).write_text(json.dumps(outputs).replace("Infinity", "inf"))  # as C++ writes it
    return 0


sys.exit(main(sys.argv[1:]))
