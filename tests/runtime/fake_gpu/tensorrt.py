"""A TensorRT without a GPU, for tests: an engine is an ONNX file, which ONNX Runtime computes where a GPU would.

Every public name of its classes exists in the real bindings of all versions that are supported (test_bindings.py).
"""

import ctypes
import enum
import json
import os
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

__version__ = os.environ.get("FAKE_TENSORRT", "10.3.0")
# Engines of graphs that hold these names compute something else without a word, take 5 ms longer, fail on 8 images, or
# overflow (in trtexec).
_WRONG, _SLOW, _FAILS, _OVERFLOWS = (
    os.environ.get(f"FAKE_{name}", "nothing at all").encode() for name in ("WRONG", "SLOW", "FAILS", "OVERFLOWS")
)
_MAGIC = b"fake engine\n"


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4


class NetworkDefinitionCreationFlag(enum.IntEnum):
    if not __version__.startswith("11"):
        EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class ProfilingVerbosity(enum.Enum):
    DETAILED = 2


class LayerInformationFormat(enum.Enum):
    JSON = 1


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    USER_MANAGED = 2


def nptype(dtype):
    return {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}[dtype]


class ITensor:
    name = shape = None

    def __init__(self, name, shape):
        self.name, self.shape = name, tuple(side if isinstance(side, int) else -1 for side in shape)


class INetworkDefinition:
    _content = None

    @property
    def num_inputs(self):
        return len(_session(self._content).get_inputs())

    def get_input(self, i):
        return ITensor(_session(self._content).get_inputs()[i].name, _session(self._content).get_inputs()[i].shape)


class ParserError:
    def desc(self):
        return "In node 0: not a graph"


class OnnxParser:
    def __init__(self, network, logger):
        assert isinstance(logger, ILogger)
        self._network = network

    def parse_from_file(self, path):
        self._network._content = Path(path).read_bytes()
        try:
            _session(self._network._content)
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf:
            return False
        return True

    @property
    def num_errors(self):
        return 1

    def get_error(self, i):
        return ParserError()


class IOptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, name, least, best, most):
        self._shapes[name] = [list(least), list(best), list(most)]


class IHostMemory(bytes):
    pass


class ITimingCache:
    def __init__(self, content):
        self._content = content

    def serialize(self):
        return IHostMemory(self._content + b"measured\n")


class IBuilderConfig:
    profiling_verbosity = None
    builder_optimization_level = 3

    def __init__(self):
        self._workspace, self._profiles, self._cache = None, [], None

    def set_memory_pool_limit(self, pool, size):
        self._workspace = size

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)

    def create_timing_cache(self, content):
        return None if content.startswith(b"damaged") else ITimingCache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        if not isinstance(cache, ITimingCache):
            raise TypeError("set_timing_cache(): incompatible function arguments")
        if cache._content.startswith(b"of another"):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache


class Builder:
    def __init__(self, logger):
        self._logger = logger

    def create_network(self, flags):
        wanted = sum(1 << flag for flag in NetworkDefinitionCreationFlag)
        assert flags == wanted, "a strongly typed network of explicit batches"
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        self._logger.log(ILogger.Severity.INFO, "Name: a_product, LayerType: gemm, Inputs: [], Constants: ")
        if os.environ.get("FAKE_REFUSE"):
            self._logger.log(ILogger.Severity.ERROR, "Error Code 10: no implementation\nfor node 7")
            self._logger.log(ILogger.Severity.WARNING, "Some weights are not used")
            return None
        header = {"version": __version__, "profile": config._profiles[0]._shapes, "workspace": config._workspace}
        return IHostMemory(_MAGIC + json.dumps(header).encode() + b"\n" + network._content)


class Runtime:
    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, content):
        magic, header, graph = [*content.split(b"\n", 2), b"", b""][:3]
        if magic + b"\n" != _MAGIC:
            self._logger.log(ILogger.Severity.ERROR, "Serialization assertion magicTagRead == kMAGIC_TAG failed.")
            return None
        header = json.loads(header)
        if header["version"] != __version__:
            text = "The engine plan file is not compatible with this version of TensorRT, expecting library version "
            self._logger.log(ILogger.Severity.ERROR, f"{text}{__version__} got {header['version']}")
            return None
        return ICudaEngine(graph, header["profile"])


class ICudaEngine:
    def __init__(self, content, profile):
        self._session, self._profile, self._content = _session(content), profile, content
        self._tensors = {t.name: t for t in (*self._session.get_inputs(), *self._session.get_outputs())}

    @property
    def num_io_tensors(self):
        return len(self._tensors)

    def get_tensor_name(self, i):
        return list(self._tensors)[i]

    def get_tensor_mode(self, name):
        entering = name in {tensor.name for tensor in self._session.get_inputs()}
        return TensorIOMode.INPUT if entering else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return self._tensors[name].type

    def get_tensor_shape(self, name):
        return tuple(side if isinstance(side, int) else -1 for side in self._tensors[name].shape)

    def get_tensor_profile_shape(self, name, profile):
        return [tuple(shape) for shape in self._profile[name]]

    device_memory_size_v2 = 4096

    def create_execution_context(self, strategy):
        assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self)

    def create_engine_inspector(self):
        return EngineInspector(self)


class IProfiler:
    pass


class EngineInspector:
    execution_context = None

    def __init__(self, engine):
        self._engine = engine

    def get_engine_information(self, form):
        assert form == LayerInformationFormat.JSON
        assert self.execution_context is not None, "shapes would be unknown"
        return json.dumps({"Layers": _layers(self._engine._content), "Bindings": []})


class IExecutionContext:
    profiler = None

    def __init__(self, engine):
        self._engine, self._addresses, self._shapes, self._queued = engine, {}, {}, []
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._compute)

    def set_device_memory(self, address, size):
        assert address
        assert size >= self._engine.device_memory_size_v2
        self._addresses["activations"] = address

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def set_input_shape(self, name, shape):
        least, _, most = self._engine._profile[name]
        assert all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True))
        self._shapes[name] = tuple(shape)
        return True

    def execute_async_v3(self, stream):
        assert stream
        assert "activations" in self._addresses
        if _FAILS in self._engine._content and any(shape[0] == 8 for shape in self._shapes.values()):
            return False
        self._queued.append(dict(self._shapes))
        began = time.perf_counter()
        cuda.fakeQueue(self._call, len(self._queued) - 1)
        if self.profiler is not None:
            layers = _layers(self._engine._content)
            for layer in layers:
                self.profiler.report_layer_time(layer["Name"], 1e3 * (time.perf_counter() - began) / len(layers))
        return True

    def _compute(self, number):
        session = self._engine._session
        if self._queued[number] != self._shapes:
            return  # a record whose context has other shapes by now: what it does is not defined
        feeds = {i.name: self._array(i, self._queued[number][i.name]) for i in session.get_inputs()}
        found = session.run(None, feeds)
        for tensor, values in zip(session.get_outputs(), found, strict=True):
            self._array(tensor, values.shape)[...] = values + float(_WRONG in self._engine._content)
        time.sleep(0.05 * (_SLOW in self._engine._content))

    def _array(self, tensor, shape):
        dtype = np.dtype(nptype(tensor.type))
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_uint8 * size).from_address(self._addresses[tensor.name])
        return np.frombuffer(memory, dtype).reshape(shape)


def _layers(content):
    """Tell layers as the real inspector does: two nodes of the graph in each, called after both or after nothing."""
    nodes = onnx.load_from_string(content).graph.node
    names = [node.name or f"{node.op_type}_{i}" for i, node in enumerate(nodes)]
    layers = []
    for i in range(0, len(names), 2):
        made_of = names[i : i + 2]
        layers.append(
            {
                "Name": " + ".join(made_of) if i % 4 else f"__myl_{nodes[i].op_type}_myl0_{i}",
                "LayerType": "gemm" if "MatMul" in {node.op_type for node in nodes[i : i + 2]} else "kgen",
                "Inputs": [{"Name": nodes[i].input[0], "Format/Datatype": "Row major linear FP16 format"}],
                "TacticName": "fake_tactic",
                "Metadata": "\x1e".join(f"[ONNX Layer: {name}]" for name in made_of),
            }
        )
    return layers


cuda = ctypes.CDLL(os.environ["FAKE_CUDART"])


def _session(content):
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
