import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dpal_edge.runtime import doctor
from dpal_edge.runtime.device import Gpu
from dpal_edge.runtime.doctor import Library, as_json, examine, render

READY = {
    "onnxruntime": Library(state="ready", version="1.31.1", devices=("CPU",)),
    "openvino": Library(state="ready", version="2026.4.1", devices=("CPU",)),
    "tensorrt": Library(state="absent"),
    "tensorrt-rtx": Library(state="absent"),
    "opencv": Library(state="ready", version="4.14.0", devices=("GStreamer",)),
    "torch": Library(state="ready", version="2.15.0", devices=("NVIDIA H100",)),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that installs a package of the given code, here and for every probe."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def install(name, code):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code + "\n")

    return install


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that examines a simulated machine: its libraries, its files, and no GPU."""

    def simulate(files=(), versions=(), **libraries):
        for name, text in dict(files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        found = READY | {name.replace("_", "-"): library for name, library in libraries.items()}
        monkeypatch.setattr(doctor, "_try", found.get)
        monkeypatch.setattr(doctor, "_version", dict(versions).get)
        monkeypatch.setattr(doctor, "_installed", lambda module: module != "no_such_module")
        monkeypatch.setattr(doctor, "gpus", list)
        return examine(tmp_path)

    return simulate


def _texts(report):
    return [f"{problem.what} -> {problem.remedy}" for problem in report.problems]


def test_library_that_works_is_ready():
    ort = pytest.importorskip("onnxruntime")
    found = doctor._try("onnxruntime")
    assert (found.state, found.version) == ("ready", ort.__version__)
    assert "CPU" in found.devices  # it ran the one-node model there


def test_openvino_lists_its_devices():
    pytest.importorskip("openvino")
    found = doctor._try("openvino")
    assert found.state == "ready"
    assert "CPU" in found.devices


def test_rtx_compiler_loads_over_the_libraries_of_another_package():
    if find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("the compiler is not installed")
    found = doctor._try("tensorrt-rtx")
    assert found.state == "ready"
    assert found.version


def test_opencv_from_the_package_index_lacks_gstreamer():
    cv2 = pytest.importorskip("cv2")
    found = doctor._try("opencv")
    assert (found.state, found.version) == ("ready", cv2.__version__)
    assert bool(found.devices) == bool(re.search("GStreamer: +YES", cv2.getBuildInformation()))


def test_absent_library(monkeypatch):
    monkeypatch.setitem(doctor._LIBRARIES, "tensorrt", "no_such_module")
    assert doctor._try("tensorrt") == Library(state="absent")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "raise OSError('libnvdla_compiler.so: cannot open shared object file: No such file or directory')",
            "OSError: libnvdla_compiler.so: cannot open shared object file: No such file or directory",
        ),
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("import os; os.abort()", "it crashed with signal 6"),
        ("import os; os._exit(3)", "exit code 3"),
        ("", "AttributeError: module 'tensorrt' has no attribute '__version__'"),
    ],
)
def test_broken_library_is_reported_with_its_reason(package, code, reason):
    package("tensorrt", code)
    found = doctor._try("tensorrt")
    assert (found.state, found.version) == ("broken", None)
    assert found.reason.startswith(reason)


def test_library_that_hangs_is_broken(package, monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 0.5)
    package("tensorrt", "import time; time.sleep(60)")
    assert doctor._try("tensorrt").reason == "no answer within 0 s"


def test_library_that_talks_on_standard_output(package):
    package(
        "tensorrt",
        "print('[TRT] hello')\n"
        "__version__ = '10.16.2'\n"
        "class Logger:\n    ERROR = 1\n    def __init__(self, level): pass\n"
        "class Runtime:\n    def __init__(self, logger): pass",
    )
    assert doctor._try("tensorrt") == Library(state="ready", version="10.16.2")


def test_working_folder_is_not_imported_from(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    (tmp_path / "cv2.py").write_text("raise OSError('a clone, not the package')\n")
    monkeypatch.chdir(tmp_path)
    assert doctor._try("opencv").state == "ready"


def test_healthy_machine_has_no_problem(machine):
    report = machine()
    assert report.problems == []
    assert report.stages["run"].ready
    assert "none found" in render(report)


def test_broken_engine_stops_its_stages_and_has_a_remedy(machine):
    broken = Library(state="broken", reason="ImportError: libgomp.so.1")
    report = machine(onnxruntime=broken)
    assert report.stages["run"].ready  # with the other engine
    assert report.stages["export"].missing == ("onnxruntime",)
    assert _texts(report) == [
        "onnxruntime is installed but broken: ImportError: libgomp.so.1 -> pip install --force-reinstall onnxruntime"
    ]
    stage = machine(onnxruntime=broken, openvino=Library(state="absent")).stages["run"]
    assert (stage.ready, stage.missing) == (False, ("onnxruntime or openvino",))


def test_absent_module_names_the_extra(machine, monkeypatch):
    monkeypatch.setitem(doctor._STAGES, "train", (("torch", "no_such_module"), "train"))
    stage = machine().stages["train"]
    assert (stage.ready, stage.missing) == (False, ("no_such_module",))
    assert stage.remedy == "pip install 'dpal-edge[train]'"


@pytest.mark.parametrize(
    ("version", "bad"), [("10.3.0", True), ("10.4.0.26", True), ("10.13.3.9", False), ("10.30", False)]
)
def test_tensorrt_known_to_build_wrong_engines(machine, version, bad):
    report = machine(tensorrt=Library(state="ready", version=version))
    assert [f"TensorRT {version} is known to build" in text for text in _texts(report)] == [True] * bad


def test_rival_packages(machine):
    report = machine(versions={"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"})
    assert "onnxruntime and onnxruntime-gpu are both installed" in _texts(report)[0]


JETPACK_6 = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd42\n",
    "proc/meminfo": "MemTotal:        7802984 kB\nMemFree:          123 kB\nMemAvailable:     600000 kB\n",
    "usr/src/tensorrt/bin/trtexec": "",
}
JETPACK_7 = JETPACK_6 | {
    "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64\n",
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/meminfo": "MemTotal:      128000000 kB\nMemAvailable: 120000000 kB\n",
}


def test_jetpack_6_with_an_opencv_from_the_package_index(machine):
    report = machine(JETPACK_6, opencv=Library(state="ready", version="4.14.0"))
    assert report.jetson.jetpack == "6.2"
    assert report.trtexec.endswith("usr/src/tensorrt/bin/trtexec")
    assert [text.split(" -> ")[0] for text in _texts(report)] == [
        "OpenCV 4.14.0 lacks GStreamer, so CSI cameras and hardware decoding do not work",
        "only 0.6 of 7.4 GiB of memory are available",
    ]
    assert "NVIDIA Jetson Orin Nano Developer Kit, JetPack 6.2 (L4T 36.4.3)" in render(report)


def test_jetpack_7_without_an_engine(machine, monkeypatch):
    monkeypatch.setitem(doctor._STAGES, "run", (("no_such_module", "cv2"), "onnxruntime,camera"))
    report = machine(JETPACK_7)
    assert report.jetson.jetpack == "7.0"
    assert report.problems == []
    assert "--system-site-packages" in report.stages["run"].remedy


def test_jetpack_5_is_too_old(machine):
    release = "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64\n"
    report = machine(JETPACK_7 | {"etc/nv_tegra_release": release})
    assert "JetPack 5 (L4T 35.4.1) has Python 3.8" in _texts(report)[0]


def test_gpu_that_torch_cannot_use(machine, monkeypatch):
    machine(torch=Library(state="ready", version="2.15.0+cpu"))
    card = Gpu(name="NVIDIA L4", memory_mib=23034, driver="535.1", compute_capability="8.9")
    monkeypatch.setattr(doctor, "gpus", lambda: [card])
    report = examine()
    assert "torch 2.15.0+cpu cannot use the GPU" in _texts(report)[0]
    assert "NVIDIA L4, 22 GiB, compute capability 8.9, driver 535.1" in render(report)


def test_full_disk(machine):
    report = dataclasses.replace(machine(), disk_free_gib=0.4)
    assert [problem.what for problem in doctor._machine_problems(report)] == ["only 0.4 GiB of disk are free here"]


def test_text_fits_a_terminal(machine):
    long = "libnvinfer.so.10: cannot open shared object file: No such file or directory (needed by tensorrt)" * 2
    text = render(
        machine(tensorrt=Library(state="broken", reason=long), opencv=Library(state="ready", version="4.14.0"))
    )
    assert max(map(len, text.splitlines())) <= 96
    assert re.search(r"openvino +2026\.4\.1, ready: CPU\n", text)


def test_json_has_the_documented_fields(machine):
    data = json.loads(as_json(machine(JETPACK_6)))
    assert set(data) == {field.name for field in dataclasses.fields(doctor.Report)}
    assert data["schema"] == 1
    assert set(data["libraries"]) == {"onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "opencv", "torch"}
    assert set(data["libraries"]["torch"]) == {"state", "version", "devices", "reason"}
    assert set(data["stages"]) == {"train", "evaluate", "export", "run"}
    assert data["cpu"] == {
        "model": "ARM part 0xd42",
        "cores": 1,
        "flags": ["asimddp"],
        "fast_bf16": False,
        "fast_int8": True,
    }
    assert set(data["problems"][0]) == {"what", "remedy"}


def test_stages_import_what_their_extras_bring():
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for stage in ("train", "export"):
        extra = re.search(rf"^{stage} = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)[1]
        unconditional = re.findall(r'^    "([\w-]+)[^;\n]*",$', extra, re.MULTILINE)
        modules = {"pillow": "PIL", "pyyaml": "yaml"}
        assert {modules.get(name, name) for name in unconditional} == set(doctor._STAGES[stage][0])


def test_doctor_process_imports_no_engine():
    code = (
        "import sys; from dpal_edge.runtime import doctor\n"
        "doctor._LIBRARIES['torch'] = 'no_such_module'  # its probe takes seconds\n"
        "doctor.render(doctor.examine()); print(*sys.modules.keys() & {'torch', 'onnxruntime', 'openvino', 'cv2'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
