"""The examples run, and what is deployed is at least well written."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpal_edge.cli import main

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "dpal_edge" / "assets"
BUNDLE = ASSETS / "dpal_vit_tiny.json"
CLIP = ASSETS / "one-by-one-person-detection.mp4"
EMPTY_ROOM = ASSETS / "people-detection.264"
DEPLOY = ROOT / "deploy"

cv2 = pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")


def run_example(name, *arguments):
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_smallest_app_is_small_and_sees_somebody_come():
    assert re.search(r"#1 comes", run_example("camera_app", BUNDLE, CLIP, "--frames", 66))
    code = (ROOT / "examples" / "camera_app.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in code if line.strip()]) < 30


def test_many_cameras():
    told = run_example("many_cameras", BUNDLE, CLIP, EMPTY_ROOM, "--passes", 12, "--serve", 0)
    assert re.search(r"live on http://127\.0\.0\.1:[1-9]\d*/", told)
    assert re.search(rf"{CLIP.name}: \d+ people, [\d.]+ frames/s \| {EMPTY_ROOM.name}: ", told.splitlines()[-1])


def test_counting_at_a_line():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from line_counter import LineCounter
    finally:
        sys.path.pop(0)
    from dpal_edge.runtime import Person

    counter = LineCounter((100, 0, 100, 50))  # down; its right is where x is less
    for x in (130, 110, 95, 60, 98, 120):  # there and back
        counter.add([Person((x - 10.0, 0.0, x + 10.0, 40.0), 0.9, 1)])
    for x in (90, 110):  # below the end of the line
        counter.add([Person((x - 10.0, 0.0, x + 10.0, 90.0), 0.9, 2)])
    assert dict(counter.crossed) == {"to the right": 1, "to the left": 1}
    for track in range(5000):
        counter.add([Person((0.0, 0.0, 1.0, 1.0), 0.9, track)])
    assert len(counter._places) == 1000
    assert re.fullmatch(
        r"\d+ to the left, \d+ to the right\n", run_example("line_counter", BUNDLE, CLIP, "--frames", 15)
    )


def test_finding_a_person_in_a_folder(tmp_path):
    capture = cv2.VideoCapture(str(CLIP))
    frames = [capture.read()[1] for _ in range(200)]
    capture.release()
    for number in (40, 120, 199):
        cv2.imwrite(str(tmp_path / f"{number}.png"), frames[number][100:400, 250:500])
    lines = run_example("find_person", BUNDLE, tmp_path / "120.png", tmp_path, "--best", 2).splitlines()
    assert len(lines) == 2
    score, path = lines[0].split()
    assert float(score) == pytest.approx(1, abs=1e-3)
    assert Path(path) == tmp_path / "120.png"
    frame = tmp_path / "frames" / "120.png"
    frame.parent.mkdir()
    cv2.imwrite(str(frame), frames[120])
    [line] = run_example("find_person", BUNDLE, frame, frame.parent, "--detect").splitlines()
    assert float(line.split()[0]) == pytest.approx(1, abs=1e-3)
    capture = cv2.VideoCapture(str(EMPTY_ROOM))
    cv2.imwrite(str(frame.with_name("empty.png")), capture.read()[1])
    capture.release()
    assert run_example("find_person", BUNDLE, frame, frame.parent, "--detect").splitlines()[-1].startswith("-1.0000")


def test_the_unit_starts_what_exists(tmp_path, monkeypatch):
    source = "rtsp://user:password@camera.local/stream"
    monkeypatch.setenv("DPAL_EDGE_SOURCE", source)
    for name, expected in (("dpal-edge", {"sources": (source,)}), ("dpal-edge-install", {"as_json": False})):
        unit = (DEPLOY / f"{name}.service").read_text(encoding="utf-8")
        [start] = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
        program, command, *arguments = shlex.split(start)
        assert Path(program).name == "dpal-edge"
        context = main.commands[command].make_context(command, arguments)
        assert context.params.items() >= expected.items()
        assert "password" not in start
        (tmp_path / f"{name}.service").write_text(unit.replace(program, sys.executable), encoding="utf-8")
    if shutil.which("systemd-analyze"):
        units = sorted(tmp_path.glob("*.service"))
        done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
        assert "dpal-edge" not in done.stderr, done.stderr


def test_the_build_has_memory_that_a_run_has_not():
    run, build = ((DEPLOY / f"{name}.service").read_text() for name in ("dpal-edge", "dpal-edge-install"))
    assert "MemoryMax=" in run
    assert "MemoryMax=" not in build
    assert "After=network-online.target dpal-edge-install.service" in run
    for name in ("Environment", "StateDirectory", "User", "DynamicUser"):  # one reads what the other writes
        [one], [other] = (re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE) for unit in (run, build))
        assert one == other


def test_the_container_is_sent_what_the_package_is_made_of():
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignore[0] == "*"
    let_through = {line[1:] for line in ignore if line.startswith("!")}
    assert let_through == {"dpal_edge", "pyproject.toml", "README.md", "LICENSE", "NOTICE"}
    assert all((ROOT / name).exists() for name in let_through)


def test_the_container_recipe_passes_its_linter():
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, DEPLOY / "Dockerfile.jetson"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
