"""Engines that are built on this device, and the cache that keeps them for the next time."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from dpal_edge.errors import BackendUnavailable
from dpal_edge.files import atomic_path, sha256_of, write_text
from dpal_edge.manifest import Artifact
from dpal_edge.runtime.cuda import Cuda
from dpal_edge.runtime.installed import cache_folder, device_facts, short_hash
from dpal_edge.runtime.tensorrt import BuildOptions, build_engine, import_tensorrt

_MIB = 1 << 20
# Guesses until a device is measured: what TensorRT itself takes, and how many copies of the weights a build holds.
_RESERVE, _COPIES = 256 * _MIB, 6


class Builder(Protocol):
    """What makes an engine of a graph: TensorRT's bindings, or trtexec."""

    name: str  # with the version, for example "tensorrt 10.3.0"

    def build(self, graph: Path, engine: Path, options: BuildOptions, timing: Path) -> None:
        """Write the engine of ``graph``; ``timing`` is a timing cache to start from and to write.

        Raises:
            ModelFileError: the graph is refused.
        """
        ...


class BindingsBuilder:
    """TensorRT in this process."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Import TensorRT; ``say`` takes a line of explanation.

        Raises:
            BackendUnavailable: it is not here.
        """
        self._trt = import_tensorrt()
        self._say = say
        self.name = f"tensorrt {self._trt.__version__}"

    def build(self, graph: Path, engine: Path, options: BuildOptions, timing: Path) -> None:
        """Write the engine of ``graph``."""
        known = timing.read_bytes() if timing.exists() else b""
        built = build_engine(self._trt, graph, options, timing_cache=known)
        if known and not built.cache_taken:
            self._say(f"{timing.name} in the cache is damaged or of another TensorRT; kernels were timed anew")
        with atomic_path(engine) as temporary:
            temporary.write_bytes(built.engine)
        if built.timing_cache:
            with atomic_path(timing) as temporary:
                temporary.write_bytes(built.timing_cache)


@dataclass(frozen=True)
class Engine:
    """A built engine in the cache."""

    path: Path
    sha256: str
    reused: bool


def fit_memory(artifact: Artifact, cuda: Cuda, options: BuildOptions) -> BuildOptions:
    """Return options whose workspace the device's free memory allows.

    Raises:
        BackendUnavailable: there is too little to build at all; a build that runs out is killed without a word.
    """
    free = cuda.free_memory()
    need = _RESERVE + _COPIES * sum(spec.bytes for spec in artifact.files)
    if free < need:
        raise BackendUnavailable(
            f"{free // _MIB} MiB of the GPU's memory are free, building {artifact.file.file} takes about "
            f"{need // _MIB} MiB; stop other programs (on a Jetson its desktop, too: sudo systemctl isolate "
            f"multi-user.target)"
        )
    return replace(options, workspace=min(options.workspace, _RESERVE + (free - need) // 2))


def obtain_engine(
    artifact: Artifact, graph: Path, builder: Builder, cuda: Cuda, options: BuildOptions, say: Callable[[str], None]
) -> Engine:
    """Return the engine of ``artifact`` for this device: from the cache, or built now of its file ``graph``.

    Engines are kept by the content of graph and data, TensorRT's version, the GPU, the device's software and the
    options. A damaged one is built again; one line says so, or what the last engine was built for.

    Raises:
        ModelFileError: TensorRT refuses the graph.
        BackendUnavailable: too little memory.
    """
    facts = {"tensorrt": builder.name, "gpu": cuda.gpu, "capability": cuda.capability, **device_facts()}
    wanted = {**facts, "options": options.to_dict()}
    folder, origin = cache_folder() / "engines", short_hash([spec.sha256 for spec in artifact.files])
    engine = folder / f"{origin}-{short_hash(wanted)}.engine"
    known = _read_facts(engine)
    if engine.exists() and known.get("sha256") == sha256_of(engine):
        return Engine(engine, known["sha256"], reused=True)
    if engine.exists():
        say(f"{engine.name} in the cache is damaged; building it again")
    elif others := list(folder.glob(f"{origin}-*.engine")):
        last = _read_facts(max(others, key=lambda path: path.stat().st_mtime))
        differing = {name: value for name, value in last.items() if value != wanted.get(name, value)}
        say(f"{graph.name} was last built for {differing}, which is not this device as it is now; building it")
    timing = cache_folder() / "timing" / f"{short_hash(facts)}.cache"
    for path in (engine, timing):
        path.parent.mkdir(parents=True, exist_ok=True)
    used = fit_memory(artifact, cuda, options)
    builder.build(graph, engine, used, timing)
    digest = sha256_of(engine)
    document = {**wanted, "workspace_used": used.workspace, "graph": graph.name, "sha256": digest}
    write_text(engine.with_suffix(".json"), json.dumps(document, indent=2) + "\n")
    return Engine(engine, digest, reused=False)


def _read_facts(engine: Path) -> dict[str, Any]:
    """Return what is known of an engine in the cache; nothing where that is missing or damaged."""
    try:
        facts = json.loads(engine.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
