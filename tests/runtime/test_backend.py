import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_bundle import SIZE, reference, write_model

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.runtime.backend import DeviceClock, choose_engine, open_backend, physical_cores

ENGINES = ["onnxruntime", "openvino"]


@pytest.fixture
def model(tmp_path):
    pytest.importorskip("onnxruntime")
    return write_model(tmp_path / "model.onnx")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 11])
def test_backend_matches_numpy(model, engine, count):
    pytest.importorskip(engine)
    crops = np.random.default_rng(1).integers(0, 256, (count, *SIZE, 3), np.uint8)
    backend = open_backend(model, engine=engine)
    assert backend.inputs == {"images": (None, *SIZE, 3)}
    np.testing.assert_allclose(backend.run({"images": crops})["embedding"], reference(crops), rtol=1e-5, atol=1e-6)


def test_backend_is_named_and_pinned_to_the_cpu(model):
    import onnxruntime

    backend = open_backend(model, threads=1)
    assert backend.name == f"onnxruntime {onnxruntime.__version__} cpu"
    assert backend._session.get_providers() == ["CPUExecutionProvider"]
    assert backend._session.get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_device_that_is_absent_is_refused(model, engine):
    pytest.importorskip(engine)
    with pytest.raises(BackendUnavailable, match=rf"this {engine} has no device 'tpu', expected one of: cpu"):
        open_backend(model, engine=engine, device="tpu")


def test_openvino_reads_its_own_format(model):
    openvino = pytest.importorskip("openvino")
    path = model.with_suffix(".xml")
    openvino.save_model(openvino.Core().read_model(model), path, compress_to_fp16=False)
    crops = np.random.default_rng(1).integers(0, 256, (2, *SIZE, 3), np.uint8)
    backend = open_backend(path)
    assert backend.name.startswith("openvino ")
    np.testing.assert_allclose(backend.run({"images": crops})["embedding"], reference(crops), rtol=1e-5, atol=1e-6)
    path.with_suffix(".bin").unlink()
    with pytest.raises(ModelFileError, match=r"model\.xml: openvino .* cannot load it"):
        open_backend(path)


def test_openvino_computes_in_float32(model):
    pytest.importorskip("openvino")
    backend = open_backend(model, engine="openvino", threads=2)
    assert backend.name.endswith(" cpu f32")
    for count, streams in (1, 1), (2, 2):
        backend.run({"images": np.zeros((count, *SIZE, 3), np.uint8)})
        compiled = backend._requests[-1].get_compiled_model()
        assert str(compiled.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"
        assert compiled.get_property("INFERENCE_NUM_THREADS") == min(2, physical_cores())
        assert compiled.get_property("NUM_STREAMS") == min(streams, physical_cores())


def test_signals_are_handled_after_openvino_models_were_closed(model):
    """In the order in which they were opened, as programs close them: OpenVINO moves the stack of signal handlers."""
    pytest.importorskip("openvino")
    program = """
import os, signal, sys
import numpy as np
from pathlib import Path
from dpal_edge.runtime.backend import open_backend
backends = [open_backend(Path(sys.argv[1]), engine="openvino", threads=1) for _ in range(2)]
for backend in backends:
    backend.run({"images": np.zeros((1, *map(int, sys.argv[2:]), 3), np.uint8)})
while backends:
    backend = backends.pop(0)
    del backend
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""
    command = [sys.executable, "-c", program, str(model), *map(str, SIZE)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "handled\n"


@pytest.mark.parametrize("count", [1, 2, 11])
def test_openvino_counts_time_itself(model, count):
    pytest.importorskip("openvino")
    backend = open_backend(model, engine="openvino", threads=2)
    assert isinstance(backend, DeviceClock)
    images = np.zeros((count, *SIZE, 3), np.uint8)
    backend.run({"images": images})
    start = time.perf_counter()
    assert 0 < backend.run_timed({"images": images}) < 1e3 * (time.perf_counter() - start)


def test_onnxruntime_has_no_clock_of_its_own(model):
    pytest.importorskip("onnxruntime")
    assert not isinstance(open_backend(model, engine="onnxruntime"), DeviceClock)


def test_openvino_runs_images_side_by_side(model):
    pytest.importorskip("openvino")
    backend = open_backend(model, engine="openvino", threads=2)
    crops = np.random.default_rng(1).integers(0, 256, (15, *SIZE, 3), np.uint8)
    for count, requests in (0, 1), (1, 1), (2, 2), (3, 2), (15, 2), (1, 2):
        found = backend.run({"images": crops[:count]})["embedding"]
        np.testing.assert_allclose(found, reference(crops[:count]), rtol=1e-5, atol=1e-6)
        assert len(backend._requests) == requests
    alone = open_backend(model, engine="openvino", threads=1)
    np.testing.assert_allclose(alone.run({"images": crops})["embedding"], reference(crops), rtol=1e-5, atol=1e-6)


def test_a_precision_of_choice(model):
    pytest.importorskip("openvino")
    crops = np.random.default_rng(1).integers(0, 256, (5, *SIZE, 3), np.uint8)
    backend = open_backend(model, engine="openvino", precision="bf16")
    assert backend.name.endswith(" cpu bf16")
    np.testing.assert_allclose(backend.run({"images": crops})["embedding"], reference(crops), atol=0.05)
    with pytest.raises(BackendUnavailable, match="openvino computes in f32 or bf16, not in 'int4'"):
        open_backend(model, engine="openvino", precision="int4")
    with pytest.raises(BackendUnavailable, match="only openvino computes in a precision of choice, here 'bf16'"):
        open_backend(model, engine="onnxruntime", precision="bf16")


def test_the_engine_that_is_installed_is_taken(monkeypatch, tmp_path):
    missing = {"onnxruntime"}
    monkeypatch.setattr("dpal_edge.runtime.backend.find_spec", lambda name: None if name in missing else name)
    assert choose_engine(tmp_path / "model.onnx") == "openvino"
    assert choose_engine(tmp_path / "model.onnx", "onnxruntime") == "onnxruntime"
    missing.add("openvino")
    assert choose_engine(tmp_path / "model.onnx") == "onnxruntime"  # whose absence is then an error
    assert choose_engine(tmp_path / "model.xml") == "openvino"


def test_a_silent_fallback_is_refused(model, monkeypatch):
    from dpal_edge.runtime import _onnxruntime

    # What a CUDA build does without a driver: it lists the provider, warns, and opens the session on the CPU.
    monkeypatch.setitem(_onnxruntime.PROVIDERS, "cuda", "AzureExecutionProvider")
    available = _onnxruntime.ort.get_available_providers()
    if "AzureExecutionProvider" not in available:
        pytest.skip("this onnxruntime lists no second provider")
    monkeypatch.setattr(_onnxruntime.ort.InferenceSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailable, match="fell back from AzureExecutionProvider to CPUExecutionProvider"):
        open_backend(model, device="cuda")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_damaged_model_is_one_line(model, engine, content):
    pytest.importorskip(engine)
    model.write_bytes(model.read_bytes()[:200] if content is None else content)
    with pytest.raises(ModelFileError, match=rf"model\.onnx: {engine} .* cannot load it") as caught:
        open_backend(model, engine=engine)
    assert "\n" not in str(caught.value)


def test_a_missing_model(tmp_path):
    with pytest.raises(ModelFileError, match=r"absent\.onnx: onnxruntime .* cannot load it"):
        open_backend(tmp_path / "absent.onnx")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "feeds", [{}, {"images": np.zeros((1, *SIZE, 3), np.float32)}, {"images": np.zeros((1, 2, 2, 3), np.uint8)}]
)
def test_inputs_that_do_not_fit(model, engine, feeds):
    pytest.importorskip(engine)
    with pytest.raises(ModelFileError, match="cannot run the model on these inputs"):
        open_backend(model, engine=engine).run(feeds)


def test_unknown_engines_and_suffixes(tmp_path):
    with pytest.raises(BackendUnavailable, match=r"no engine for '\.pt' files, expected \.onnx"):
        open_backend(tmp_path / "model.pt")
    with pytest.raises(BackendUnavailable, match="no engine 'torch', expected one of: onnxruntime, openvino"):
        open_backend(tmp_path / "model.onnx", engine="torch")


def test_physical_cores_counts_at_least_one():
    assert physical_cores() >= 1
