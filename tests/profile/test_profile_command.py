"""The command on real bundles, of models that take no time."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from boards import orin_nx, write
from click.testing import CliRunner

from dpal_edge.cli import main
from dpal_edge.errors import BackendUnavailable, ConfigError, DataError, ModelFileError
from dpal_edge.files import sha256_of
from dpal_edge.manifest import HeadSpec, Manifest
from dpal_edge.profile import command
from dpal_edge.profile.command import Options, exit_code, parse_budget, parse_people
from dpal_edge.profile.footage import CLIP, Footage, PlacedPeople
from dpal_edge.profile.forms import Form, find_forms
from dpal_edge.profile.sampler import Effort
from dpal_edge.profile.telemetry import Telemetry
from dpal_edge.profile.wording import as_passes
from dpal_edge.runtime.boxes import iou
from dpal_edge.runtime.installed import Choice, write_record
from tests.runtime.tiny_bundle import write_bundle, write_detector_bundle, write_heads_bundle

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
cv2 = pytest.importorskip("cv2")

QUICK = Effort(least_calls=3, least_s=0.0, usual_s=0.05, most_s=0.2)
EMBEDDING = HeadSpec(name="embedding", task="embedding", shape=(5,))
ATTRIBUTES = HeadSpec(name="attributes", task="attributes", shape=(2,), labels=("bag", "hat"), kind="query")


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("DPAL_EDGE_CACHE", str(tmp_path / "cache"))
    for name in ("USED", "OTHERS"):
        monkeypatch.setattr(command, name, QUICK)
    for name in ("USED", "TURNS", "ON_SOURCE"):
        monkeypatch.setattr(f"dpal_edge.profile.session.{name}", QUICK)
    monkeypatch.setattr(command, "find_ceilings", lambda layers, memory_mb: None)  # which are measured for two seconds


@pytest.fixture
def bundle(tmp_path):
    """A bundle of two heads, with a golden for both."""
    values = {EMBEDDING: np.arange(1.0, 6.0), ATTRIBUTES: np.array([1.0, -1.0])}
    folder = write_heads_bundle(tmp_path / "bundle", values, size=(16, 8))
    goldens = {"embedding": np.zeros((1, 5), np.float32), "attributes": np.zeros((1, 2), np.float32)}
    np.savez(folder / "golden.npz", images=np.zeros((1, 16, 8, 3), np.uint8), **goldens)
    manifest = Manifest.read(folder)
    replace(manifest, golden=type(manifest.golden).of(folder / "golden.npz")).write(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(main, ["profile", *map(str, arguments)], catch_exceptions=False)


def test_a_whole_profile(bundle, tmp_path):
    done = run(bundle, "--out", tmp_path / "out", "--people", "1,2", "--budget", "10s", "--minutes", "0.01")
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["schema"] == 1
    assert report["interrupted"] is None
    placed = [m for m in report["measurements"] if m["placed"]]
    assert [(m["people"], m["cameras"]) for m in placed] == [(1, 1), (2, 1), (2, 1), (4, 2), (8, 4)]
    calls = {
        (m["engine"], m["computes"], m["clock"], m["batch"]) for m in report["measurements"] if m["what"] == "call"
    }
    assert {("onnxruntime", None, "host", 1), ("openvino", None, "device", 2), ("openvino", None, "host", 2)} <= calls
    assert ("onnxruntime", None, "device", 1) not in calls
    assert {curve["x"] for curve in report["curves"]} == {"batch", "people", "cameras"}
    assert [head["name"] for head in report["heads"]["heads"]] == ["embedding", "attributes"]
    assert report["heads"]["engine"] == "onnxruntime"
    stages = [stage["name"] for stage in report["stages"]["stages"]]
    assert stages == ["video", "detect", "crop", "model", "decode", "track", "draw", "total", "age"]
    assert report["sustained"]["series"]["frames"][0] >= 1
    assert report["layers"]["model.onnx"]["file"] == "model.onnx"
    assert report["roofline"]["groups"]
    assert report["verdicts"][0]["passed"] is True
    assert {m["what"] for m in report["measurements"]} == {"call", "pipeline", "sustained"}
    assert "the budget of 10000 ms holds" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.startswith("<!doctype html>")


def test_two_sources(bundle, tmp_path):
    clip = ("--source", CLIP)
    done = run(bundle, "--out", tmp_path / "out", *clip, *clip, "--people", "1", "--backend", "onnxruntime")
    assert done.exit_code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    stages = report["stages"]
    assert stages["passes"] < stages["frames"] <= 2 * stages["passes"]
    assert f"mean ms of {as_passes(stages)} of people-detection" in done.stdout
    assert "a pass over 2 cameras" in (tmp_path / "out" / "report.html").read_text()


def test_json_a_missed_budget_and_one_engine(bundle, tmp_path):
    done = run(bundle, "--out", tmp_path / "out", "--people", "1", "--backend", "openvino", "--budget", "1us", "--json")
    assert done.exit_code == 2
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert {m["engine"] for m in report["measurements"]} == {"openvino"}
    assert report["bundle"]["used"]["engine"] == "openvino"
    assert report["heads"] is None
    assert report["verdicts"][0]["passed"] is False


def test_a_detector_has_calls_and_no_pipeline(tmp_path):
    folder = write_detector_bundle(tmp_path / "detector")
    done = run(folder, "--out", tmp_path / "out", "--people", "1,2", "--budget", "10s", "--minutes", "0.01")
    assert done.exit_code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {m["what"] for m in report["measurements"]} == {"call"}
    assert (report["stages"], report["sustained"], report["heads"]) == (None, None, None)
    assert "p95 of a call, images 1" in report["verdicts"][0]["text"] or "the slowest of a call" in done.stdout


@pytest.fixture
def broken(monkeypatch):
    """Engines that nothing opens with, though they are installed."""
    names, opened = set(), Form.open

    def refuse(form):
        if form.engine in names:
            raise BackendUnavailable(f"{form.path}: {form.engine} has no kernel for it")
        return opened(form)

    monkeypatch.setattr(Form, "open", refuse)
    return names


def test_a_form_that_does_not_open_ends_neither_heads_nor_layers(bundle, tmp_path, broken):
    broken.add("onnxruntime")
    write_record(bundle, Choice(target="onnx", engine="openvino", name="", precision=None, file=None, sha256=""), {})
    assert run(bundle, "--out", tmp_path / "out", "--people", "1").exit_code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [one["engine"] for one in report["skipped"]] == ["onnxruntime"]
    assert (report["heads"], report["interrupted"]) == (None, None)


def test_a_detector_whose_used_form_does_not_open(tmp_path, broken):
    broken.add("onnxruntime")
    folder = write_detector_bundle(tmp_path / "detector")
    done = run(folder, "--out", tmp_path / "out", "--people", "1")
    assert (done.exit_code, done.stderr) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["bundle"]["used"]["engine"] == "onnxruntime"
    assert [layers["engine"].split()[0] for layers in report["layers"].values()] == ["openvino"]
    broken.add("openvino")
    done = run(folder, "--out", tmp_path / "none", "--people", "1")
    assert done.exit_code == 1
    assert "detector: nothing here runs it (" in done.stderr
    assert "onnxruntime has no kernel for it; " in done.stderr


def test_ctrl_c_leaves_a_report(bundle, tmp_path, monkeypatch):
    calls = iter(range(100))
    measure = command.Session.measure_calls

    def interrupt(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        measure(*arguments)

    monkeypatch.setattr(command.Session, "measure_calls", interrupt)
    done = run(bundle, "--out", tmp_path / "out", "--people", "1,2")
    assert done.exit_code == 130
    assert "interrupted by Ctrl-C or SIGTERM; the report holds what came before" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [m["batch"] for m in report["measurements"] if m["what"] == "call"] == [1, 2]
    assert (report["heads"], report["roofline"], report["layers"]) == (None, None, {})


def test_an_error_in_the_end_costs_nothing_that_was_measured(bundle, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ModelFileError("model.onnx: no layers; export it again")

    monkeypatch.setattr(command, "profile_layers", fail)
    done = run(bundle, "--out", tmp_path / "out", "--people", "1", "--backend", "onnxruntime")
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"what was measured before the error is in {tmp_path / 'out'}",
        "Error: model.onnx: no layers; export it again",
    ]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["interrupted"] == "stopped by an error: model.onnx: no layers; export it again"
    assert any(m["what"] == "call" for m in report["measurements"])


@pytest.mark.parametrize("mistake", [("--source", "none.mp4"), ("--lock-clocks",)])
def test_what_ends_it_before_it_begins_leaves_no_folder(bundle, tmp_path, monkeypatch, mistake):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(bundle, "--out", tmp_path / "new" / "out", *mistake).exit_code == 1
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    assert run(bundle, "--out", tmp_path / "old" / "out", *mistake).exit_code == 1
    assert [*(tmp_path / "old").iterdir()] == []


def test_a_budget_without_a_unit_is_told_to_be_milliseconds():
    assert "or 33, which are milliseconds" in " ".join(run("--help").stdout.split())


@pytest.mark.parametrize(("broken", "kept"), [("render_page", "report.json"), ("json.dumps", "report.html")])
def test_neither_file_is_lost_through_the_other(bundle, tmp_path, monkeypatch, broken, kept):
    def fail(*_, **__):
        raise ValueError("cannot be written")

    monkeypatch.setattr(f"dpal_edge.profile.command.{broken}", fail)
    monkeypatch.setattr(command, "read_goldens", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(ValueError, match="cannot be written"):
        run(bundle, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [kept]


def test_ctrl_c_before_anything_was_measured(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "read_goldens", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    done = run(bundle, "--out", tmp_path / "out", "--people", "1", "--budget", "5ms")
    assert done.exit_code == 130
    assert (tmp_path / "out" / "report.html").exists()


def test_a_signal_to_the_real_command(bundle, tmp_path):
    code = "from dpal_edge.cli import main; main()"
    arguments = ["profile", str(bundle), "--out", str(tmp_path / "out"), "--people", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # measuring begins
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert "interrupted by Ctrl-C or SIGTERM" in out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["interrupted"]


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_hangup_that_nohup_ignores_stays_ignored(bundle, tmp_path, before):
    kept = signal.signal(signal.SIGHUP, before)
    try:
        run(bundle, "--out", tmp_path / "out", "--people", "none")
        expected = signal.SIG_IGN if before is signal.SIG_IGN else signal.default_int_handler
        assert signal.getsignal(signal.SIGHUP) is expected
    finally:
        signal.signal(signal.SIGHUP, kept)


def test_a_device_that_is_too_hot(bundle, tmp_path):
    root = write(orin_nx(tmp_path / "board"), {"sys/class/thermal/thermal_zone0/temp": 97_000})
    report = command.profile(
        bundle,
        tmp_path / "out",
        Options(people=(1,)),
        say=print,
        progress=lambda total: _Silent(),
        telemetry=Telemetry.open(root),
    )
    assert report["interrupted"] == "cut off: sensor cpu is at 97 C, the limit is 95 C"
    assert exit_code(report) == 2
    assert report["measurements"][0]["ms"]["n"] == 1
    assert report["machine"]["power_mode"] == "MAXN_SUPER"


class _Silent:
    def __enter__(self):
        return lambda steps: None

    def __exit__(self, *_):
        return None


def test_clocks_are_locked_only_when_asked(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run(bundle, "--out", tmp_path / "out", "--lock-clocks")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: --lock-clocks: neither jetson_clocks nor nvidia-smi is here")
    for name in ("jetson_clocks", "nvidia-smi"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\ncase "$*" in *query*) exit 1 ;; esac\necho "$0 $*" >> {tmp_path}/log\n')
        program.chmod(0o755)
    assert run(bundle, "--out", tmp_path / "out", "--people", "1", "--backend", "onnxruntime").exit_code == 0
    assert not (tmp_path / "log").exists()


def test_locked_clocks_are_restored_after_ctrl_c(bundle, tmp_path, monkeypatch):
    program = tmp_path / "jetson_clocks"
    program.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/log\n[ "$1" = --store ] && echo > "$2"\nexit 0\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(command, "read_goldens", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    done = run(bundle, "--out", tmp_path / "out", "--lock-clocks")
    assert done.exit_code == 130
    assert done.stderr.startswith("clocks are locked; by hand they are restored with: sudo jetson_clocks --restore")
    assert (tmp_path / "log").read_text().splitlines() == ["--store", "", "--restore"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["BUNDLE"], "profile needs a BUNDLE and --out FOLDER, or --compare with two reports"),
        (["BUNDLE", "--out", "OUT", "--people", "0,2"], "--people is '0,2', expected numbers from 1 to 256"),
        (["BUNDLE", "--out", "OUT", "--budget", "fast"], "--budget is 'fast', expected a time above 0, such as 33ms"),
        (["BUNDLE", "--out", "OUT", "--budget", "0ms"], "--budget is 0, expected a time above 0, such as 33ms"),
        (["BUNDLE", "--out", "OUT", "--budget", "9" * 400], "--budget is inf, expected a time above 0"),
        (["BUNDLE", "--out", "OUT", "--minutes", "inf"], "--minutes is inf, expected a number above 0, such as 20"),
        (["BUNDLE", "--out", "OUT", "--minutes", "nan"], "--minutes is nan, expected a number above 0"),
        (["BUNDLE", "--out", "OUT", "--minutes", "0"], "--minutes is 0, expected a number above 0"),
        (["BUNDLE", "--out", "OUT", "--max-celsius", "inf"], "--max-celsius is inf, expected a temperature above 0"),
        (["BUNDLE", "--out", "OUT", "--max-celsius", "nan"], "--max-celsius is nan, expected a temperature above 0"),
        (["--compare", "a", "b", "--threshold", "nan"], "--threshold is nan, expected a percentage of 0 or more"),
        (["--compare", "a", "b", "--threshold", "-1"], "--threshold is -1, expected a percentage of 0 or more"),
        (["BUNDLE", "--out", "OUT", "--backend", "tpu"], "no engine tpu, expected one of: onnxruntime, openvino"),
        (["BUNDLE", "--out", "OUT", "--source", "none.mp4"], "none.mp4: no such file, expected a video"),
        (
            ["BUNDLE", "--out", "BUNDLE/model.onnx"],
            "model.onnx: cannot be made or written (File exists), expected",
        ),
        (["BUNDLE", "--out", "BUNDLE/model.onnx/sub"], "(Not a directory), expected a folder to write report.json and"),
        (["BUNDLE", "--out", "BUNDLE/model.onnx/sub"], "report.html into; choose another --out"),
        (["BUNDLE", "--compare", "a", "b"], "bundle came with --compare, expected the two reports alone; leave it"),
        (["--compare", "a", "b", "--people", "1"], "--people came with --compare, expected the two reports alone"),
        (["--compare", "a", "b", "--budget", "5"], "--budget came with --compare, expected the two reports alone"),
        (["--compare", "none_a", "none_b"], "No such file or directory; expected a report.json"),
    ],
)
def test_mistakes_are_a_line(bundle, tmp_path, arguments, told):
    done = run(*(part.replace("BUNDLE", str(bundle)).replace("OUT", str(tmp_path / "out")) for part in arguments))
    assert done.exit_code == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert told in line


def test_two_profiles_are_compared(bundle, tmp_path):
    for name in "ab":
        run(bundle, "--out", tmp_path / name, "--people", "1", "--backend", "onnxruntime")
    done = run("--compare", tmp_path / "a", tmp_path / "b" / "report.json", "--threshold", "100000", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["regressions"] == []
    slow = json.loads((tmp_path / "b" / "report.json").read_text())
    for measurement in slow["measurements"]:
        ms = measurement["ms"]
        ms["p50"], ms["blocks"] = 3 * ms["p50"], [3 * block for block in np.linspace(0.9, 1.1, 20) * ms["p50"]]
    fast = json.loads((tmp_path / "a" / "report.json").read_text())
    for measurement in fast["measurements"]:
        measurement["ms"]["blocks"] = list(np.linspace(0.9, 1.1, 20) * measurement["ms"]["p50"])
    (tmp_path / "a" / "report.json").write_text(json.dumps(fast))
    (tmp_path / "b" / "report.json").write_text(json.dumps(slow))
    done = run("--compare", tmp_path / "a", tmp_path / "b")
    assert done.exit_code == 2
    assert "REGRESSION" in done.stdout


def test_what_was_built_here_is_profiled_and_what_was_not_is_told(bundle):
    manifest = Manifest.read(bundle)
    built = replace(manifest.artifacts[0], target="trt-fp16")
    forms, skipped = find_forms(bundle, replace(manifest, artifacts=(built, *manifest.artifacts)), ())
    assert [one["target"] for one in skipped] == ["trt-fp16"]
    assert (forms[0].engine, forms[0].computes, forms[0].graph) == ("onnxruntime", None, None)
    assert {form.engine for form in forms} == {"onnxruntime", "openvino"}
    assert find_forms(bundle, replace(manifest, artifacts=(built, *manifest.artifacts)), ("onnxruntime",))[1] == []
    told = f"it holds trt-fp16 for tensorrt, .*: dpal-edge install {bundle} --backend tensorrt"
    for artifacts, engines in (((built,), ()), ((built, *manifest.artifacts), ("tensorrt", "onnxruntime"))):
        with pytest.raises(BackendUnavailable, match=told):
            find_forms(bundle, replace(manifest, artifacts=artifacts), engines)


@pytest.mark.parametrize(("text", "ms"), [("33ms", 33), ("33", 33), ("0.033s", 33), ("1.5 ms", 1.5), ("900us", 0.9)])
def test_budgets(text, ms):
    assert parse_budget(text) == pytest.approx(ms)


def test_people():
    assert parse_people("8, 1,2,2") == (1, 2, 8)
    with pytest.raises(ConfigError):
        parse_people("1,,2")


def test_a_bundle_with_one_head(tmp_path):
    done = run(write_bundle(tmp_path / "one"), "--out", tmp_path / "out", "--people", "1", "--backend", "onnxruntime")
    assert done.exit_code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["heads"] is None


def test_import_leaves_torch_and_engines_unloaded():
    heavy = "{'torch', 'onnxruntime', 'openvino', 'tensorrt', 'cv2', 'onnx'}"
    code = f"import sys, dpal_edge.profile.command; print(*sys.modules.keys() & {heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_what_install_chose_comes_first(bundle, tmp_path):
    manifest = Manifest.read(bundle)
    write_record(bundle, Choice(target="onnx", engine="openvino", name="", precision=None, file=None, sha256=""), {})
    forms, _ = find_forms(bundle, manifest, ())
    assert (forms[0].engine, forms[0].computes) == ("openvino", None)
    assert find_forms(bundle, manifest, ("onnxruntime", "openvino"))[0][0].engine == "onnxruntime"
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"built here")
    built = replace(manifest, artifacts=(*manifest.artifacts, replace(manifest.artifacts[0], target="trt-fp16")))
    choice = Choice(
        target="trt-fp16", engine="tensorrt", name="", precision=None, file=str(engine), sha256=sha256_of(engine)
    )
    write_record(bundle, choice, {})
    forms, skipped = find_forms(bundle, built, ())
    assert (forms[0].path, forms[0].graph, skipped) == (engine, bundle / "model.onnx", [])
    [form] = find_forms(bundle, built, ("tensorrt",))[0]
    assert (form.path, form.engine) == (engine, "tensorrt")
    engines = ("tensorrt", "onnxruntime")
    assert [form.engine for form in find_forms(bundle, built, engines)[0]] == [*engines]
    assert [form.engine for form in find_forms(bundle, built, engines[::-1])[0]] == [*engines[::-1]]
    assert {form.engine for form in find_forms(bundle, built, ("onnxruntime",))[0]} == {"onnxruntime"}


@pytest.mark.parametrize("count", [1, 3, 16, 50])
def test_placed_people_lie_in_the_frame_and_apart(count):
    seen = []

    class Finder:
        def detect(self, frames):
            seen.append([frame.shape for frame in frames])

    found, again = PlacedPeople(Finder(), count).detect([np.zeros((432, 768, 3), np.uint8)] * 2)
    assert seen == [[(432, 768, 3)] * 2]  # one pass
    assert np.array_equal(again.boxes, found.boxes)
    assert len(found.scores) == count
    left, top, right, bottom = found.boxes.T
    assert min(left.min(), top.min()) >= 0
    assert right.max() <= 768
    assert bottom.max() <= 432
    assert np.allclose(bottom - top, 2 * (right - left))
    assert not np.triu(iou(found.boxes, found.boxes), 1).any()


def test_footage_begins_anew_where_it_ends(tmp_path):
    for name in "ab":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((8, 8, 3), ord(name), np.uint8))
    footage = Footage([str(tmp_path)])
    taken = [footage.next() for _ in range(5)]
    footage.close()
    assert [frames[tmp_path.name].image[0, 0, 0] for frames, _ in taken] == [ord(name) for name in "ababa"]
    assert [lost > 0 for _, lost in taken] == [False, False, True, False, True]


def test_footage_without_a_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="no picture in it can be decoded"):
        Footage([str(tmp_path)]).next()


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(bundle, tmp_path, monkeypatch):
    def refuse(**place):
        raise PermissionError(13, "Permission denied", str(place["dir"]))

    monkeypatch.setattr("dpal_edge.profile.command.TemporaryFile", refuse)  # root may write anywhere
    monkeypatch.setattr("dpal_edge.profile.command._Run.measure", lambda self: pytest.fail("it was measured"))
    done = run(str(bundle), "--out", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert "cannot be made or written (Permission denied), expected a folder" in done.stderr
