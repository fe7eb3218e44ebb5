"""The page of a report: what it shows, what it leaves out, and that no text of a report can break it."""

import copy
import json
import re

import numpy as np
import pytest
from test_roofline import DEVICE, entry, group

from dpal_edge.profile.page import render_page
from dpal_edge.profile.plots import Axis, axis, stacked_bar
from dpal_edge.profile.roofline import build_roofline
from dpal_edge.profile.statistics import Summary
from tests.test_html import Checker

# Texts that a report's meaning hangs on; all others may be anything.
WORDS = {
    "call",
    "pipeline",
    "device",
    "host",
    "glass",
    "people",
    "batch",
    "cameras",
    "compute",
    "memory",
    "total",
    "age",
}
HOSTILE = "</title><script>alert(1)</script><img src=x onerror='alert(2)'>\"'&\x00"


def summary(mean, seed=0, calls=400, spike=None):
    times = mean * (1 + 0.02 * np.abs(np.random.default_rng(seed).normal(size=calls)))
    if spike:
        times[50] = spike
    return Summary.of(times, warm=True).to_dict()


def measurement(what, clock, ms, **changes):
    return {
        "what": what, "source": None, "placed": False, "target": "openvino-int8", "artifact": "model.int8.xml",
        "engine": "openvino", "runner": "openvino 1 cpu f32", "precision": "int8", "computes": None, "batch": 1,
        "people": 1, "cameras": None, "clock": clock, "ms": ms, "flags": [], "energy_j": None, **changes,
    }  # fmt: skip


def curve(x, points, **changes):
    ends = [{"x": n, "p50": ms, "p50_ci95": [ms, ms], "p95": ms * 1.1, "each": ms / n} for n, ms in points]
    return {
        "x": x, "what": "call", "clock": "host", "target": "openvino-int8", "artifact": "model.int8.xml",
        "engine": "openvino", "runner": "openvino 1 cpu f32", "precision": "int8", "computes": None, "points": ends,
        "knee": 2, "marginal_ms": 1.0, **changes,
    }  # fmt: skip


@pytest.fixture
def report():
    layers = {"model.int8.xml": {**entry(group(), group("head pose")), "calls": 9, "source": "OpenVINO counters",
              "kernels": [{"name": "fc1", "kind": "MatMul", "kernel": "brgemm", "precision": "f32", "ms": 2.0,
                           "group": "block 0 MLP", "found": "name"}], "missing": ["the weather"]}}  # fmt: skip
    return {
        "schema": 1,
        "created": "2026-11-26T21:30:00+00:00",
        "version": "0.5.0",
        "machine": {"model": "Jetson Orin Nano", "cpu": "ARM", "cores": 6, "gpus": [], "os": "Linux",
                    "power_mode": "15W",
                    "clocks": [{"name": "GPU", "min_mhz": 306, "max_mhz": 1020, "locked": False}],
                    "clock_state": "not locked", "engines": ["openvino 1"]},
        "bundle": {"path": "bundle", "name": "vit_tiny", "sha256": "84ef", "heads": [],
                   "input": {"name": "images", "size": [256, 128]},
                   "used": {"target": "openvino-int8", "artifact": "model.int8.xml", "engine": "openvino",
                            "computes": None}},
        "options": {"budget_ms": 33.0, "backends": []},
        "skipped": [{"target": "trt-int8", "artifact": "a", "engine": "tensorrt", "reason": "no GPU here"}],
        "clocks": [{"clock": "host", "told": "one call from Python"}],
        "measurements": [
            measurement("call", "device", summary(4.0)),
            measurement("call", "host", summary(5.0, 1, spike=25.0), flags=["clocks not locked: GPU"]),
            measurement("call", "host", summary(9.0, 2), batch=4),
            measurement("call", "host", summary(3.0, 3), target="onnx", engine="onnxruntime"),
            measurement("pipeline", "glass", summary(20.0, 4), source="walk.mp4", batch=None, people=2.5, cameras=1),
        ],
        "curves": [curve("batch", [(1, 5.0), (2, 8.0), (4, 15.0)]), curve("people", [(1, 9.0)], knee=None),
                   curve("cameras", [(1, 9.0), (2, 17.0)], clock="glass")],
        "heads": {"artifact": "model.onnx", "target": "onnx", "engine": "onnxruntime", "runner": "onnxruntime 1 cpu",
                  "batch": 4, "all": summary(60.0), "separate_ms": 200.0, "saving": 0.7,
                  "heads": [{"name": "pose", "task": "pose", "alone": summary(50.0), "without": summary(56.0),
                             "marginal_ms": 4.0, "marginal_ci95": [3.6, 4.4], "share": 0.07}]},
        "stages": {"source": "walk.mp4", "passes": 300, "frames": 300, "people": 2.5, "runner": "openvino",
                   "stages": [{"name": name, "ms": summary(ms)} for name, ms in
                              (("video", 2.0), ("model", 8.0), ("total", 10.0), ("age", 9.0))]},
        "sustained": {"minutes": 5.0, "window_s": 1.0, "first_p50_ms": 18.0, "last_p50_ms": 20.0, "slower": 0.11,
                      "series": {"time_s": [0, 1, 2], "p50_ms": [18.0, 19.0, 20.0], "frames": [50, 50, 50]}},
        "telemetry": {
            "missing": ["memory clock: only root"], "warnings": ["throttled 20 % of the time"],
            "energy_j": {"total": 812.3}, "per_frame": {"total": 0.31}, "per_person": {"total": 0.1},
            "throttled": {"any": 0.2}, "hottest_c": {"cpu": 71.5},
            "series": {"time_s": [0.0, 1.0, 2.0, 3.0, 4.0], "temperatures_c": {"cpu": [50, 60, None, 71, 70]},
                       "rails_mw": {"VDD_IN": [5000, 9000, 9100, 9000, 9000]},
                       "total_mw": [5000, 9000, 9100, 9000, 9000],
                       "gpu_mhz": [1020, 1020, 510, 510, 1020], "cpu_mhz": [None] * 5, "gpu_load": [0, 99, 99, 99, 99],
                       "cpu_load": [None] * 5, "throttled": [[], [], ["thermal"], ["thermal"], []]},
        },
        "layers": layers,
        "roofline": build_roofline(layers["model.int8.xml"], DEVICE),
        "verdicts": [{"kind": "budget", "passed": True, "text": "budget 33 ms: holds"},
                     {"kind": "throttled", "passed": False, "text": "the device slowed itself down"}],
        "interrupted": None,
    }  # fmt: skip


class Reader(Checker):
    """Also collects elements, attributes and the text of a page."""

    VOID = Checker.VOID | {"circle"}

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.words = set(), set(), []

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def read(report):
    html = render_page(report)
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert reader.sources == []
    assert "script" not in reader.tags
    assert not {name for name in reader.attributes if name.startswith("on")}
    assert not re.search(r"url\(|@import|https?:", html)
    return " ".join(" ".join(reader.words).split()), html


def test_all_is_there(report):
    report["heads"]["flags"] = ["drifts"]
    report["stages"]["flags"] = ["few frames"]
    report["curves"][0]["points"][1]["flags"] = ["never became stable"]
    text, _ = read(report)
    for expected in (
        "vit_tiny on Jetson Orin Nano", "Budget 33 ms: holds", "Three clocks", "device", "host !", "glass", "p99",
        "! clocks not locked: GPU", "1 outlier: 25.00 ms", "Where a frame's time goes", "knee: 2",
        "sharing saves 70%", "5 minutes: the detector takes 18.00 ms at first", "Hottest: cpu 72 °C", "Shaded",
        "fc1", "Floors, not measurements.", "Orin Nano 8 GB Super", "no GPU here", "memory clock: only root",
        "the weather", "Throttled 20 % of the time", "bound by", "! drifts", "! few frames",
        "! never became stable", "70% !", "310 mJ !", "! clocks were not locked; the device throttled 20% of the time",
        "GPU 306 to 1020 MHz",
    ):  # fmt: skip
        assert expected in text, expected


def test_passes_over_several_cameras_are_no_frames(report):
    report["stages"].update(passes=150, source="a + b")
    report["measurements"][-1].update(cameras=2, source="a + b")
    text, html = read(report)
    assert "a + b, 150 passes over 300 frames, 2.5 people per frame" in text
    assert "from a pass over 2 cameras to drawn people" in text
    assert "glass: a pass over 2 cameras, a + b, 2.5 people per frame" in html
    assert "a frame, a + b" not in html


def test_numbers_are_those_of_the_report(report):
    text, _ = read(report)
    host = report["measurements"][1]["ms"]
    for key in ("p50", "p90", "p95", "p99", "max", "mean"):
        shown = f"{host[key]:.2f}"
        assert shown in text, key
    assert (
        f"± (95 %) {(report['measurements'][0]['ms']['ci95'][1] - report['measurements'][0]['ms']['ci95'][0]) / 2:.3f}"
        in text
    )


def test_hostile_texts(report):
    def poison(value):
        if isinstance(value, dict):
            return {key if key.islower() else HOSTILE: poison(one) for key, one in value.items()}
        if isinstance(value, list):
            return [poison(one) for one in value]
        return HOSTILE if isinstance(value, str) and value not in WORDS else value

    poisoned = poison(copy.deepcopy(report))
    text, html = read(poisoned)
    assert html.count("&lt;script&gt;") > 30
    assert "alert(1)" in text  # as text


def test_nothing_was_measured():
    text, _ = read({})
    assert "A model on this device" in text
    assert "times: not measured" in text


@pytest.mark.parametrize("empty", [None, {}, []])
def test_each_section_may_be_missing(report, empty):
    for key in report:
        read({name: value for name, value in report.items() if name != key})
        read({**report, key: empty})


def test_values_may_be_unknown(report):
    for m in report["measurements"]:
        m["ms"] = {**m["ms"], "p95": None, "p99": None, "ci95": None, "samples": [], "outliers": None}
    report["telemetry"]["series"]["rails_mw"] = {"VDD_IN": [None] * 5}
    report["telemetry"]["series"]["total_mw"] = [None] * 5
    report["roofline"] = build_roofline(report["layers"]["model.int8.xml"], None)
    text, html = read(report)
    assert "p95 -" in text
    assert "max from a frame to drawn people" in text
    assert "Power, W" not in html
    assert "Ceilings" not in text


def test_an_interrupted_run_says_so(report):
    text, _ = read({**report, "interrupted": "stopped by Ctrl-C"})
    assert "Stopped by Ctrl-C; what follows was measured until then" in text


def test_time_while_throttled_is_shaded(report):
    _, html = read(report)
    spans = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="[\d.]+" fill="color-mix', html)
    assert len(spans) == len(re.findall(r"aria-label=\"(?:Power|Clocks|Temperatures|Load)", html)) == 4
    left, width = map(float, spans[0])
    whole = 360 - 46 - 10
    assert left == pytest.approx(46 + whole / 2, abs=0.1)  # from 2 of 4 seconds to the sample that is well again
    assert width == pytest.approx(whole / 2, abs=0.1)


def test_gaps_of_a_series_stay_gaps(report):
    _, html = read(report)
    [plot] = re.findall(r'aria-label="Temperatures.*?</figure>', html)
    assert plot.count("<polyline") == 2
    assert plot.count('class="key"') == 1


def test_the_page_does_not_change_its_report(report):
    before = json.dumps(report)
    render_page(report)
    assert json.dumps(report) == before


@pytest.mark.parametrize(
    ("values", "options", "ends", "marks"),
    [
        ([3.0, 7.0], {}, (0, 8), [0, 2, 4, 6, 8]),
        ([3.0, 7.0], {"zero": False}, (3, 7), [3, 4, 5, 6, 7]),
        ([5.0], {"zero": False}, (5, 6), [5, 5.25, 5.5, 5.75, 6]),
        ([0.0], {}, (0, 1), [0, 0.25, 0.5, 0.75, 1]),
        ([3.8, 5.35], {"zero": False}, (3.8, 5.35), [4, 4.5, 5]),
        ([-256.0, 40.0], {}, (-256, 100), [-200, -100, 0, 100]),
        ([0.3, 200.0], {"logarithmic": True}, (0.1, 1000), [0.1, 1, 10, 100, 1000]),
        ([10.0], {"logarithmic": True}, (10, 100), [10, 100]),
    ],
)
def test_axes(values, options, ends, marks):
    found = axis(values, "ms", **options)
    assert (found.low, found.high) == ends
    assert found.marks() == pytest.approx(marks)


def test_places():
    assert Axis(0, 10, "").place(5) == 0.5
    assert Axis(0, 10, "").place(99) == 1
    assert Axis(1, 100, "", logarithmic=True).place(10) == pytest.approx(0.5)
    assert Axis(1, 100, "", logarithmic=True).place(0) == 0
    assert Axis(1, 16, "", at=(1, 4, 16)).marks() == [1, 4, 16]


def test_a_bar_of_nothing():
    assert "width" in stacked_bar([("video", 0.0, "0 ms")])
