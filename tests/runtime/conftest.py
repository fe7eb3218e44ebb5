from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_bundle import people_frame, write_bundle


@pytest.fixture
def bundle(tmp_path) -> Path:
    return write_bundle(tmp_path / "bundle")


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
