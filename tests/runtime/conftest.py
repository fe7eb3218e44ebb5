import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_bundle import people_frame, write_bundle

FAKES = Path(__file__).parent / "fake_gpu"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Keep installations of tests apart from the user's."""
    monkeypatch.setenv("DPAL_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bundle(tmp_path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture(scope="session")
def cc() -> str:
    """The C compiler; CI, which has it, skips no test for want of it."""
    found = shutil.which("cc")
    if found is None and "CI" not in os.environ:
        pytest.skip("needs a C compiler named cc, for libraries that stand in for NVIDIA's: apt install gcc")
    return found or "cc"


@pytest.fixture(scope="session")
def cudart(cc, tmp_path_factory) -> Path:
    """Compile the CUDA runtime without a GPU."""
    path = tmp_path_factory.mktemp("cuda") / "libcudart.so"
    flags = ("-shared", "-fPIC", "-Wl,-Bsymbolic", "-Wall", "-Werror")  # symbolic: it calls itself, not torch's CUDA
    subprocess.run([cc, *flags, "-o", path, FAKES / "cudart.c"], check=True)
    return path


@pytest.fixture
def gpu(cudart, monkeypatch) -> Callable[..., None]:
    """Put a GPU with a TensorRT into the machine; keywords are what the two fakes read from the environment."""

    def plug(**settings: object) -> None:
        monkeypatch.setenv("FAKE_CUDART", str(cudart))
        for name, value in settings.items():
            monkeypatch.setenv(f"FAKE_{name.upper()}", str(value))
        monkeypatch.setattr("dpal_edge.runtime.cuda._NAMES", (str(cudart),))
        monkeypatch.syspath_prepend(str(FAKES))
        sys.modules.pop("tensorrt", None)

    yield plug
    sys.modules.pop("tensorrt", None)


@pytest.fixture
def clip(tmp_path) -> Callable[[int], Path]:
    """Write an .avi of n frames at 5 frames/s in which a red and a green person walk past each other."""
    cv2 = pytest.importorskip("cv2")

    def write(frames: int) -> Path:
        path = tmp_path / "clip.avi"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5.0, (160, 96))
        for i in range(frames):
            writer.write(people_frame({"r": (10 + 4 * i, 20), "g": (120 - 4 * i, 50)}))
        writer.release()
        return path

    return write
