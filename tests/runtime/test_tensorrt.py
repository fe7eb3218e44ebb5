"""Engines on a GPU that is not there: real ctypes calls into a compiled library, and a TensorRT that computes here."""

import ctypes
import gc
import time

import numpy as np
import pytest
from tiny_bundle import SIZE, reference, write_model

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.runtime.backend import DeviceClock, open_backend
from dpal_edge.runtime.cuda import Buffer, Cuda, Stream
from dpal_edge.runtime.tensorrt import BuildOptions, build_engine, import_tensorrt


def build(tmp_path, **options):
    path = tmp_path / "model.engine"
    built = build_engine(import_tensorrt(), write_model(tmp_path / "model.onnx"), BuildOptions(**options))
    path.write_bytes(built.engine)
    return path


def crops(count):
    return np.random.default_rng(count).integers(0, 256, (count, *SIZE, 3), np.uint8)


def counter(cudart, name):
    return ctypes.c_int.in_dll(ctypes.CDLL(str(cudart)), name)


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1", "11.4.0"])
@pytest.mark.parametrize("integrated", [0, 1])
def test_an_engine_computes_what_its_graph_says(tmp_path, gpu, cudart, version, integrated):
    gpu(tensorrt=version, integrated=integrated)
    backend = open_backend(build(tmp_path))
    assert backend.name == f"tensorrt {version} Fake Orin"
    assert dict(backend.inputs) == {"images": (None, *SIZE, 3)}
    copies, launches = counter(cudart, "copies"), counter(cudart, "launches")
    for count in (1, 5, 32, 5, 1, 5):  # queued at first, launched as a graph later
        before = copies.value, launches.value
        images = crops(count)
        np.testing.assert_allclose(backend.run({"images": images})["embedding"], reference(images), rtol=1e-5)
        assert copies.value - before[0] == (0 if integrated else 2)
    assert launches.value >= 3


def test_engines_for_rtx_are_queued_each_time(tmp_path, gpu, cudart, monkeypatch):
    gpu()
    monkeypatch.setattr("dpal_edge.runtime._tensorrt_rtx.load_bindings", import_tensorrt)
    backend = open_backend(build(tmp_path).rename(tmp_path / "model.rtx"))
    assert backend.name.startswith("tensorrt-rtx ")
    launches = counter(cudart, "launches")
    before = launches.value
    for count in (1, 5, 5):
        images = crops(count)
        np.testing.assert_allclose(backend.run({"images": images})["embedding"], reference(images), rtol=1e-5)
    assert launches.value == before


def test_its_clock_counts_the_work_and_not_the_recording(tmp_path, gpu, cudart):
    gpu()
    backend = open_backend(build(tmp_path))
    assert isinstance(backend, DeviceClock)
    launches = counter(cudart, "launches")
    for launched in (0, 1, 1):
        before, start = launches.value, time.perf_counter()
        counted = backend.run_timed({"images": crops(2)})
        assert 0 < counted < 1e3 * (time.perf_counter() - start)
        assert launches.value - before == launched
    np.testing.assert_allclose(backend.run({"images": crops(2)})["embedding"], reference(crops(2)), rtol=1e-5)


def test_outputs_outlive_the_next_call(tmp_path, gpu):
    gpu()
    backend = open_backend(build(tmp_path))
    first = backend.run({"images": crops(2)})["embedding"]
    kept = first.copy()
    backend.run({"images": crops(2)[::-1].copy()})
    np.testing.assert_array_equal(first, kept)


def test_all_is_given_back(tmp_path, gpu, cudart):
    gpu()
    gc.collect()
    live = counter(cudart, "live")
    before = live.value
    backend = open_backend(build(tmp_path))
    for count in (1, 2, 2, 3, 3):
        backend.run({"images": crops(count)})
    backend.run_timed({"images": crops(3)})
    assert live.value > before
    del backend
    gc.collect()
    assert live.value == before


@pytest.mark.parametrize("room", [0, 1, 2, 3, 4])
def test_all_is_given_back_where_memory_runs_out(tmp_path, gpu, cudart, room):
    gpu()
    engine = build(tmp_path)
    gc.collect()
    live, left = counter(cudart, "live"), counter(cudart, "room")
    before, left.value = live.value, room  # activations, and two buffers of two parts
    with pytest.raises(ModelFileError, match=r"(cudaMalloc|cudaHostAlloc) failed"):
        open_backend(engine)
    left.value = 1 << 30
    gc.collect()
    assert live.value == before


def test_inputs_that_do_not_fit(tmp_path, gpu):
    gpu()
    backend = open_backend(build(tmp_path, batches=(1, 2, 4)))
    with pytest.raises(ModelFileError, match="5 images at a time, expected 1 to 4"):
        backend.run({"images": crops(5)})
    with pytest.raises(ModelFileError, match="0 images at a time"):
        backend.run({"images": crops(0)})
    with pytest.raises(ModelFileError, match="cannot run the model on these inputs"):
        backend.run({"images": crops(2).astype(np.float32)})
    with pytest.raises(ModelFileError, match="cannot run the model on these inputs"):
        backend.run({"images": crops(2)[:, 1:]})


def test_engines_of_another_version_or_of_nothing(tmp_path, gpu):
    gpu(tensorrt="10.3.0")
    path = build(tmp_path)
    gpu(tensorrt="10.16.1")
    with pytest.raises(ModelFileError, match=r"expecting library version 10\.16\.1 got 10\.3\.0.*dpal-edge install"):
        open_backend(path)
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(ModelFileError, match="magicTagRead"):
        open_backend(path)


def test_machines_without(tmp_path, gpu, monkeypatch):
    gpu()
    path = build(tmp_path)
    with pytest.raises(BackendUnavailable, match="tensorrt has no device 'cpu', expected gpu"):
        open_backend(path, device="cpu")
    gpu(devices=0)
    with pytest.raises(BackendUnavailable, match=r"CUDA has no GPU to run on \(no device\)"):
        open_backend(path)
    monkeypatch.setattr("dpal_edge.runtime.cuda._NAMES", ("libnothing.so",))
    with pytest.raises(BackendUnavailable, match="libcudart was not found"):
        open_backend(path)


def test_no_tensorrt_and_one_that_is_too_old(gpu):
    with pytest.raises(BackendUnavailable, match=r"cannot be imported.*system-site-packages"):
        import_tensorrt()
    gpu(tensorrt="8.6.2")
    with pytest.raises(BackendUnavailable, match=r"TensorRT 8\.6\.2 is older.*JetPack 6\.1"):
        import_tensorrt()


def test_an_engine_for_rtx_that_install_cannot_build(tmp_path, gpu, monkeypatch):
    gpu(tensorrt="10.3.0")
    monkeypatch.setattr("dpal_edge.runtime._tensorrt_rtx.load_bindings", import_tensorrt)
    path = build(tmp_path).rename(tmp_path / "model.rtx")
    assert open_backend(path).name == "tensorrt-rtx 10.3.0 Fake Orin"
    gpu(tensorrt="10.16.1")
    with pytest.raises(
        ModelFileError, match=r"tensorrt-rtx 10\.16\.1 cannot load it.*export the bundle again with this"
    ):
        open_backend(path)


def test_graphs_that_are_refused(tmp_path, gpu):
    gpu(refuse=1)
    with pytest.raises(ModelFileError, match=r"cannot build it .Error Code 10: no implementation for node 7"):
        build(tmp_path)
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(ModelFileError, match=r"text\.onnx: TensorRT 10\.3\.0 does not take it .In node 0: not a graph"):
        build_engine(import_tensorrt(), tmp_path / "text.onnx", BuildOptions())


def test_what_was_measured_starts_the_next_build(tmp_path, gpu):
    gpu()
    graph = write_model(tmp_path / "model.onnx")
    assert build_engine(import_tensorrt(), graph, BuildOptions()).timing_cache == b""
    first = build_engine(import_tensorrt(), graph, BuildOptions(), timing_cache=b"")
    again = build_engine(import_tensorrt(), graph, BuildOptions(), timing_cache=first.timing_cache)
    assert (first.timing_cache, again.timing_cache) == (b"measured\n", b"measured\nmeasured\n")
    assert again.cache_taken


@pytest.mark.parametrize("known", [b"damaged", b"of another GPU"])
def test_what_was_measured_and_cannot_be_used(tmp_path, gpu, known):
    gpu()
    graph = write_model(tmp_path / "model.onnx")
    built = build_engine(import_tensorrt(), graph, BuildOptions(), timing_cache=known)
    assert (built.timing_cache, built.cache_taken) == (b"measured\n", False)


def test_cuda_says_what_failed(gpu):
    gpu()
    cuda = Cuda.open()
    assert (cuda.gpu, cuda.capability, cuda.free_memory()) == ("Fake Orin", "8.7", 4 << 30)
    with pytest.raises(ModelFileError, match=r"cudaMemcpyAsync failed: invalid argument \(error 1\)"):
        cuda.call("cudaMemcpyAsync", None, None, 0, 7, None)


def test_a_failure_within_a_recording_ends_it(gpu):
    gpu()
    cuda = Cuda.open()
    stream = Stream(cuda)

    def fail():
        raise ModelFileError("no")

    with pytest.raises(ModelFileError, match="no"):
        stream.record(fail)
    stream.wait()  # the library refuses while a capture is under way
    buffer = Buffer(cuda, 4)
    buffer.bytes[:] = 7
    buffer.upload(stream, 4)
    buffer.bytes[:] = 0
    buffer.download(stream, 4)
    assert buffer.bytes.tolist() == [7] * 4
