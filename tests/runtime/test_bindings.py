"""The names that our code uses of TensorRT, held against NVIDIA's real bindings of every supported line.

What our code calls is what tests/runtime/fake_gpu/tensorrt.py has, since the tests run on it; here each public name of
the fake must exist in the real packages, which are imported over empty libraries.
"""

import ctypes
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpal_edge.runtime import cuda

BINDINGS = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.16.1.11": "tensorrt-cu13-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
KEPT = Path(__file__).parents[2] / "build" / "tensorrt_bindings"
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion",
    "getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
RTX = "tensorrt-rtx"  # as installed here, with its own libraries
TELL = """
import json, sys
if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])
    import tensorrt_bindings as trt
else:
    from dpal_edge.runtime.rtx import load_bindings
    trt = load_bindings()
names = {name: dir(getattr(trt, name)) for name in dir(trt) if isinstance(getattr(trt, name), type)}
print(json.dumps({"version": trt.__version__, "module": dir(trt), "classes": names}))
"""


@pytest.fixture(scope="module", params=[*BINDINGS, RTX])
def real(request, cc, tmp_path_factory):
    """Return what the real bindings of a version have: names of the module, and of each of its classes."""
    version = request.param
    if version == RTX:
        told = subprocess.run([sys.executable, "-c", TELL], capture_output=True, text=True, check=True)
        return json.loads(told.stdout)
    folder = KEPT / version
    if not (folder / "tensorrt_bindings").exists():
        package = f"{BINDINGS[version]}=={version}"
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", folder, package]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode and "CI" not in os.environ:
            pytest.skip(f"{package} cannot be installed here: {done.stderr.splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
    empty = tmp_path_factory.mktemp("libraries")
    source = empty / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in LIBRARIES:
        soname = f"lib{name}.so.{version.partition('.')[0]}"
        subprocess.run([cc, "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", empty / soname, source], check=True)
    command = [sys.executable, "-c", TELL, str(folder)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(empty)}
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(told.stdout)


def test_every_name_that_we_use_exists(real, gpu):
    gpu(tensorrt="11.4.0" if real["version"].startswith("1.") else real["version"])  # for RTX it is younger than 11
    fake = importlib.import_module("tensorrt")
    classes = {
        name: kind for name, kind in vars(fake).items() if inspect.isclass(kind) and kind.__module__ == fake.__name__
    }
    assert classes.keys() <= real["classes"].keys()
    used = {name: {n for n in vars(kind) if not n.startswith("_")} for name, kind in classes.items()}
    used["ILogger"] = {"Severity", *fake.ILogger.Severity.__members__}
    assert used["MemoryPoolType"] == {"WORKSPACE"}  # members of enumerations are looked at, too
    missing = {name: names - set(real["classes"][name]) for name, names in used.items()}
    assert not any(missing.values()), missing
    assert {"nptype", "__version__"} <= set(real["module"])
    assert sum(map(len, used.values())) > 30  # the fake was looked at


def test_flags_are_those_of_the_version(real):
    """Before 11 a network must be told of explicit batches or may be; in 11 the flag is gone."""
    flags = real["classes"]["NetworkDefinitionCreationFlag"]
    assert "STRONGLY_TYPED" in flags
    assert ("EXPLICIT_BATCH" in flags) == real["version"].startswith("10.")


def test_every_function_that_we_call_is_in_cuda():
    """Of CUDA 13, whose library comes with TensorRT for RTX; 12 has one of them under a name that we ask for first."""
    spec = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    [folder] = spec.submodule_search_locations
    [file] = Path(folder).glob("libcudart.so.*")
    library = ctypes.CDLL(str(file))
    called = set(re.findall(r'"(cuda[A-Z]\w+)"', inspect.getsource(cuda))) | {
        "cudaGetDeviceCount",
        "cudaGetErrorString",
    }
    assert len(called) > 15
    assert {name for name in called if not hasattr(library, name)} == {"cudaGetDeviceProperties_v2"}
    with pytest.raises(cuda.BackendUnavailable, match=r"no GPU to run on \(.+ \(error \d+\)\)"):
        cuda.Cuda(library)
