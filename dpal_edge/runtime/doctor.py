"""What can run on this machine, what cannot, and how to mend it.

Nothing heavy is imported here. Every library is loaded and tried in a process of its own, so that a broken one ends up
in the report instead of ending it. ``as_json`` is what ``dpal-edge doctor --json`` prints: the fields of ``Report``, to
which later versions only add.
"""

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dpal_edge import __version__
from dpal_edge.runtime.device import CpuFeatures, Gpu, Jetson, cpu_features, gpus, jetson
from dpal_edge.runtime.rtx import load_bindings
from dpal_edge.runtime.tensorrt import SILENTLY_WRONG

SCHEMA = 1

_PROBE_SECONDS = 60.0  # loading torch takes seconds on a desktop, far more from the SD card of a small board
_LITTLE_DISK = 2.0  # GiB
_LITTLE_MEMORY = 1.0  # GiB
_GIB = 1 << 30
_COLUMNS = 96

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "safetensors",
    "pillow",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "opencv-python",
    "opencv-python-headless",
    "nvidia-ml-py",
    "numpy",
)

# Stage -> the modules it imports, of which a | b needs one, and the extras that bring them.
_STAGES = {
    "train": (
        (
            *("torch", "torchvision", "timm", "safetensors", "PIL", "yaml", "rich", "fsspec", "tensorboard"),
            *("hotcoco", "scipy"),
        ),
        "train",
    ),
    "evaluate": (("hotcoco", "PIL", "scipy"), "evaluate"),
    "export": (("torch", "safetensors", "PIL", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf"), "export"),
    "run": (("onnxruntime|openvino", "cv2"), "openvino,camera"),
}

# Packages that write the same files: whichever came last wins, the other is broken, and `pip check` says nothing.
_RIVALS = (("onnxruntime", "onnxruntime-gpu"), ("opencv-python", "opencv-python-headless"))

# Names of libraries as shown -> the module that shows they are installed.
_LIBRARIES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx_bindings",
    "opencv": "cv2",
    "torch": "torch",
}

# Each probe loads its library, does the least that proves it works, and sets ``version`` and ``devices``.
_PROBES = {
    # One Identity node, ONNX opset 13. Available providers are only what was compiled in; those that run it count.
    "onnxruntime": """
import onnxruntime as ort
from onnxruntime import InferenceSession
import numpy as np
ort.set_default_logger_severity(4)
model = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a02"
    "0801620f0a0179120a0a08080112040a02080142040a00100d"
)
version, devices = ort.__version__, []
for provider in ort.get_available_providers():
    if provider == "AzureExecutionProvider":
        continue
    session = InferenceSession(model, providers=[provider])
    if session.run(None, {"x": np.ones(1, np.float32)})[0][0] == 1 and provider in session.get_providers():
        devices.append(provider.removesuffix("ExecutionProvider"))
""",
    "openvino": """
import openvino
version, devices = openvino.__version__.split("-")[0], openvino.Core().available_devices
""",
    "tensorrt": """
import tensorrt
version, devices = tensorrt.__version__, []
tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
""",
    "tensorrt-rtx": "from typing import Any\n"
    + inspect.getsource(load_bindings)
    + """
trt = load_bindings()
version, devices = trt.__version__, []
trt.Builder(trt.Logger(trt.Logger.ERROR))
""",
    "opencv": """
import re, cv2
version = cv2.__version__
devices = ["GStreamer"] if re.search(r"GStreamer: +YES", cv2.getBuildInformation()) else []
""",
    # What breaks timm is a torchvision built for another torch; loading its library shows that without 2 s of imports.
    "torch": """
import importlib.util, pathlib, torch
version = torch.__version__
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
vision = importlib.util.find_spec("torchvision")
for folder in vision.submodule_search_locations if vision else []:
    for file in pathlib.Path(folder).glob("_C*.so"):
        torch.ops.load_library(file)
""",
}
# What it means that a ready library lists no device.
_WITHOUT_DEVICES = {
    "torch": "CPU only",
    "opencv": "no GStreamer. Files, USB cameras and RTSP work; CSI cameras and hardware decoding need the system's "
    "OpenCV (apt install python3-opencv) in a venv made with --system-site-packages",
}

# Where a probe starts, the working folder is no place to import from: a clone of openvino there is not openvino.
_BEFORE = "import sys; sys.path[:] = [p for p in sys.path if p]\n"
_AFTER = "\nimport json; print(json.dumps([str(version), list(devices)]))"


@dataclass(frozen=True, kw_only=True)
class Library:
    """An engine or framework, after it was loaded and tried in a process of its own."""

    state: str  # "ready", "absent" or "broken"
    version: str | None = None  # None unless ready
    devices: tuple[
        str, ...
    ] = ()  # CUDA devices, execution providers that ran a model, OpenVINO devices, or "GStreamer"
    reason: str = ""  # why it is broken


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Whether train, export or run can work here."""

    ready: bool
    missing: tuple[str, ...]  # modules that are absent or broken
    remedy: str  # empty where ready


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that will go wrong, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the doctor found."""

    schema: int = SCHEMA
    dpal_edge: str = __version__
    python: str
    os: str
    machine: str  # for example "x86_64"
    libc: str  # for example "glibc 2.36"
    packages: dict[str, str | None]  # version by distribution name, None where absent
    libraries: dict[str, Library]
    stages: dict[str, Stage]
    trtexec: str | None  # path
    cpu: CpuFeatures
    gpus: list[Gpu]
    jetson: Jetson | None
    disk_free_gib: float  # where the report was made
    memory_total_gib: float  # 0 where unknown, as for the next
    memory_available_gib: float
    problems: list[Problem] = field(default_factory=list)


def examine(root: Path = Path("/"), folder: Path = Path()) -> Report:
    """Look at the machine whose file system is ``root`` and at the free space of ``folder``; takes seconds."""
    libraries = _try_libraries()
    board = jetson(root)
    trtexec = root / "usr/src/tensorrt/bin/trtexec"
    memory = _memory_gib(root / "proc/meminfo")
    report = Report(
        python=platform.python_version(),
        os=_os_name(),
        machine=platform.machine(),
        libc=" ".join(platform.libc_ver()).strip() or "unknown",
        packages={name: _version(name) for name in _PACKAGES},
        libraries=libraries,
        stages={name: _stage(name, libraries, board) for name in _STAGES},
        trtexec=str(trtexec) if trtexec.is_file() else None,
        cpu=cpu_features(root / "proc/cpuinfo"),
        gpus=gpus(),
        jetson=board,
        disk_free_gib=round(shutil.disk_usage(folder).free / _GIB, 1),
        memory_total_gib=memory.get("MemTotal", 0.0),
        memory_available_gib=memory.get("MemAvailable", 0.0),
    )
    return dataclasses.replace(report, problems=[*_library_problems(report), *_machine_problems(report)])


def as_json(report: Report) -> str:
    """Return ``report`` as an indented JSON document, with what the CPU's features mean spelled out."""
    data = dataclasses.asdict(report)
    data["cpu"] |= {"fast_bf16": report.cpu.fast_bf16, "fast_int8": report.cpu.fast_int8}
    return json.dumps(data, indent=2)


def render(report: Report) -> str:
    """Return ``report`` as text for people, at most 96 columns wide."""
    parts = [
        f"dpal-edge {report.dpal_edge}, Python {report.python}, {report.os}, {report.machine}, {report.libc}",
        _section("Stages", [(name, _stage_text(stage)) for name, stage in report.stages.items()]),
        _section("Libraries, each loaded and tried", _library_rows(report)),
        _section("Packages", [("", ", ".join(f"{k} {v}" for k, v in report.packages.items() if v) or "none")]),
        _section("Machine", _machine_rows(report)),
        _section("Problems", [("!", f"{p.what}\n-> {p.remedy}") for p in report.problems] or [("", "none found")]),
    ]
    return "\n\n".join(parts)


def _try_libraries() -> dict[str, Library]:
    with ThreadPoolExecutor() as pool:
        return dict(zip(_LIBRARIES, pool.map(_try, _LIBRARIES), strict=True))


def _try(name: str) -> Library:
    """Load and try one library in a new process."""
    if not _installed(_LIBRARIES[name]):
        return Library(state="absent")
    command = [sys.executable, "-c", _BEFORE + _PROBES[name] + _AFTER]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, errors="replace")
    except subprocess.TimeoutExpired:
        return Library(state="broken", reason=f"no answer within {_PROBE_SECONDS:.0f} s")
    if done.returncode:
        return Library(state="broken", reason=_reason(done))
    version, devices = json.loads(done.stdout.splitlines()[-1])
    return Library(state="ready", version=version, devices=tuple(devices))


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0:
        return f"it crashed with signal {-done.returncode}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return textwrap.shorten(lines[-1], 200) if lines else f"exit code {done.returncode}"


def _stage(name: str, libraries: dict[str, Library], board: Jetson | None) -> Stage:
    modules, extras = _STAGES[name]
    tried = {_LIBRARIES[library]: found.state for library, found in libraries.items()}
    states = {}
    for names in modules:
        found = [tried.get(module) or ("ready" if _installed(module) else "absent") for module in names.split("|")]
        states[names.replace("|", " or ")] = next((one for one in ("ready", "broken") if one in found), "absent")
    missing = tuple(module for module, state in states.items() if state != "ready")
    if not missing:
        remedy = ""
    elif "absent" not in states.values():
        remedy = "see Problems below"
    elif name == "run" and board:
        remedy = (
            "pip install 'dpal-edge[onnxruntime]' in a venv made with --system-site-packages, to see JetPack's OpenCV"
        )
    else:
        remedy = f"pip install 'dpal-edge[{extras}]'"
    return Stage(ready=not missing, missing=missing, remedy=remedy)


def _library_problems(report: Report) -> Iterator[Problem]:
    for name, library in report.libraries.items():
        if library.state == "broken":
            yield Problem(what=f"{name} is installed but broken: {library.reason}", remedy=_mend(name))
    for rivals in _RIVALS:
        if all(report.packages[name] for name in rivals):
            yield Problem(
                what=f"{' and '.join(rivals)} are both installed and overwrite each other's files",
                remedy=f"pip uninstall -y {' '.join(rivals)}, then install only the one you need",
            )
    tensorrt = report.libraries["tensorrt"].version or ""
    if ".".join(tensorrt.split(".")[:2]) in SILENTLY_WRONG:
        yield Problem(
            what=f"TensorRT {tensorrt} is known to build ViT engines that compute wrong results without an error",
            remedy="use only engines that dpal-edge install built and found equal to the bundle's goldens; newer "
            "releases, as in JetPack 7, are not on the list",
        )


def _mend(name: str) -> str:
    if name.startswith("tensorrt"):
        return (
            "its libraries come from NVIDIA: install the release of the bindings, or use an image made for this JetPack"
        )
    package = {"opencv": "opencv-python-headless", "torch": "torch torchvision timm"}.get(name, name)
    return f"pip install --force-reinstall {package}"


def _machine_problems(report: Report) -> Iterator[Problem]:
    yield from _jetson_problems(report.jetson, report.libraries["opencv"])
    torch = report.libraries["torch"]
    if report.gpus and torch.state == "ready" and not torch.devices:
        yield Problem(
            what=f"torch {torch.version} cannot use the GPU, so training would run on the CPU",
            remedy=f"install a CUDA build of torch that driver {report.gpus[0].driver} supports",
        )
    if report.disk_free_gib < _LITTLE_DISK:
        yield Problem(
            what=f"only {report.disk_free_gib} GiB of disk are free here", remedy="free some or work elsewhere"
        )
    if 0 < report.memory_available_gib < _LITTLE_MEMORY:
        yield Problem(
            what=f"only {report.memory_available_gib} of {report.memory_total_gib} GiB of memory are available",
            remedy="stop other programs; on a Jetson, leave the desktop: sudo systemctl isolate multi-user.target",
        )


def _jetson_problems(board: Jetson | None, opencv: Library) -> Iterator[Problem]:
    if board and opencv.state == "ready" and "GStreamer" not in opencv.devices:
        yield Problem(
            what=f"OpenCV {opencv.version} lacks GStreamer, so CSI cameras and hardware decoding do not work",
            remedy="use JetPack's OpenCV: make the venv with --system-site-packages and pip uninstall the other one",
        )
    if board and board.jetpack == "5":
        yield Problem(
            what=f"JetPack 5 (L4T {board.l4t}) has Python 3.8 and TensorRT 8.5, older than this package supports",
            remedy="install JetPack 6 or 7 where the module allows it (Orin); a Xavier stays on JetPack 5",
        )


def _stage_text(stage: Stage) -> str:
    return "ready" if stage.ready else f"not ready, needs {', '.join(stage.missing)}\n-> {stage.remedy}"


def _library_rows(report: Report) -> Iterator[tuple[str, str]]:
    for name, library in report.libraries.items():
        yield name, _library_text(name, library)
    yield "trtexec", report.trtexec or "absent"


def _library_text(name: str, library: Library) -> str:
    if library.state == "absent":
        return "absent"
    if library.state == "broken":
        return f"broken: {library.reason}"
    found = ", ".join(library.devices) or _WITHOUT_DEVICES.get(name, "")
    return f"{library.version}, ready" + (f": {found}" if found else "")


def _machine_rows(report: Report) -> Iterator[tuple[str, str]]:
    cpu = report.cpu
    yield "CPU", f"{cpu.model}, {cpu.cores} logical cores; {' '.join(cpu.flags) or 'no feature of interest'}"
    yield (
        "bfloat16",
        "in hardware, so training can use it" if cpu.fast_bf16 else "emulated and slow, so train in float32",
    )
    yield (
        "int8",
        "dot products in hardware" if cpu.fast_int8 else "no dot products in hardware: expect little from int8 models",
    )
    for gpu in report.gpus:
        memory = f"{gpu.memory_mib / 1024:.0f} GiB" if gpu.memory_mib else "memory shared with the CPU"
        yield "GPU", f"{gpu.name}, {memory}, compute capability {gpu.compute_capability}, driver {gpu.driver}"
    if not report.gpus:
        yield "GPU", "no NVIDIA GPU that nvidia-smi shows"
    if report.jetson:
        found = f"JetPack {report.jetson.jetpack or 'unknown'} (L4T {report.jetson.l4t or 'unknown'})"
        yield "Jetson", f"{report.jetson.module}, {found}"
    yield "memory", f"{report.memory_available_gib} of {report.memory_total_gib} GiB available"
    yield "disk", f"{report.disk_free_gib} GiB free here"


def _section(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Lay out rows of (label, text) under ``title``: labels aligned, texts wrapped beside them."""
    rows = list(rows)
    width = max(len(label) for label, _ in rows)
    lines = [title]
    for label, text in rows:
        start = f"  {label:<{width}}  " if width else "  "
        for line in text.split("\n"):
            lines += textwrap.wrap(
                line,
                _COLUMNS,
                initial_indent=start,
                subsequent_indent=" " * len(start),
                break_long_words=False,
                break_on_hyphens=False,
            )
            start = " " * len(start)
    return "\n".join(lines)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()


def _memory_gib(meminfo: Path) -> dict[str, float]:
    """Read ``/proc/meminfo``; empty where there is none."""
    try:
        text = meminfo.read_text(encoding="utf-8")
    except OSError:
        return {}
    return {key: round(int(kib) * 1024 / _GIB, 1) for key, kib in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
