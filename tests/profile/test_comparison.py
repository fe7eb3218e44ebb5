import json
from copy import deepcopy

import numpy as np
import pytest

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.profile.comparison import compare
from dpal_edge.profile.statistics import Summary


def measurement(ms, *, batch=1, clock="host", seed=0):
    noise = 1 + 0.03 * np.random.default_rng(seed).normal(size=400)
    form = {
        "target": "onnx",
        "artifact": "model.onnx",
        "engine": "onnxruntime",
        "precision": "float32",
        "computes": None,
    }
    return {**form, "what": "call", "source": None, "placed": False, "runner": "onnxruntime 1.0 cpu", "batch": batch,
            "people": batch, "cameras": None, "clock": clock, "flags": [],
            "ms": Summary.of(ms * noise).to_dict()}  # fmt: skip


def report(*measurements, **machine):
    return {
        "schema": 1,
        "machine": {"model": "", "cpu": "Fake", "cores": 2, "gpus": [], "power_mode": None, "os": "Linux",
                    "engines": ["onnxruntime 1.0"], "clock_state": "locked", **machine},
        "bundle": {"name": "vit_tiny", "sha256": "a", "input": {"size": [256, 128]}, "heads": [{"name": "pose"}]},
        "measurements": list(measurements),
        "telemetry": {"throttled": {}},
        "interrupted": None,
    }  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def put(name, content):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(content))
        return folder

    return put


def many(factor=1.0, seed=0):
    return [measurement(factor * (3 + batch), batch=batch, seed=seed + batch) for batch in range(1, 31)]


def test_another_run_of_the_same_is_no_change(write):
    comparison = compare(write("a", report(*many())), write("b", report(*many(seed=100))), threshold=0.0)
    assert len(comparison.changes) == 30
    assert comparison.regressions == ()
    assert comparison.as_text() == "ok: 30 compared, 0 slower and 0 faster by more than 0 % and not by chance"


def test_a_regression_is_found_among_many_and_named(write):
    slower = many(seed=100)
    slower[3] = measurement(7 * 1.1, batch=4, seed=104)
    slower[4] = measurement(8 * 0.8, batch=5, seed=105)
    comparison = compare(write("a", report(*many())), write("b", report(*slower)), threshold=5.0)
    [regression] = comparison.regressions
    assert regression.percent == pytest.approx(10, abs=1)
    lines = comparison.as_text().splitlines()
    assert lines[0].startswith("slower")
    assert lines[0].endswith("call onnx onnxruntime 4 people host")
    assert lines[1].startswith("faster")
    assert lines[2] == "REGRESSION: 30 compared, 1 slower and 1 faster by more than 5 % and not by chance"
    assert comparison.to_dict()["regressions"] == [regression.name]


def test_the_same_people_before_one_camera_are_a_measurement_of_their_own(write):
    """Two people in the curve over people, and two before one camera: one of the two became slower."""

    def placed(source, factor, seed):
        labels = {"what": "pipeline", "source": source, "placed": True, "cameras": 1, "clock": "glass"}
        return {**measurement(20 * factor, batch=2, seed=seed), **labels}

    sources = "placed people", "placed people, 2 before each camera"
    for slow in range(2):
        before = [placed(source, 1.0, seed) for seed, source in enumerate(sources)]
        after = [placed(source, 1.5 if i == slow else 1.0, 100 + i) for i, source in enumerate(sources)]
        comparison = compare(write(f"a{slow}", report(*before)), write(f"b{slow}", report(*after)), threshold=5.0)
        [regression] = comparison.regressions
        assert regression.name == f"pipeline onnx onnxruntime {sources[slow]} 2 people 1 camera glass"


def test_flags_that_only_one_number_bears_are_shown(write):
    before, after = many(), many(1.5, seed=100)
    before[0]["flags"] = ["clocks are unknown"]
    after[0]["flags"] = ["clocks are unknown", "other programs took more than half of the CPU"]
    text = compare(write("a", report(*before)), write("b", report(*after)), threshold=5.0).as_text()
    assert "call onnx onnxruntime 1 person host [other programs took more than half of the CPU]" in text
    assert "clocks" not in text


def test_what_is_below_the_threshold_is_none(write):
    comparison = compare(write("a", report(*many())), write("b", report(*many(1.03, seed=100))), threshold=5.0)
    assert any(change.significant for change in comparison.changes)
    assert comparison.regressions == ()


def test_noise_beyond_the_threshold_is_none_either(write):
    """Few calls that differ wildly: the median moved by far more than the threshold, by chance."""
    rng = np.random.default_rng(5)
    first, second = (measurement(1.0) for _ in range(2))
    first["ms"] = Summary.of(rng.uniform(5, 50, 12)).to_dict()
    second["ms"] = Summary.of(rng.uniform(5, 50, 12)).to_dict()
    comparison = compare(write("a", report(first)), write("b", report(second)), threshold=5.0)
    assert abs(comparison.changes[0].percent) > 5
    assert comparison.regressions == ()


@pytest.mark.parametrize(
    ("place", "key", "value", "told"),
    [
        ("machine", "cpu", "Other", 'cpu of the machine is "Other", expected "Fake"'),
        ("machine", "power_mode", "15W", 'power_mode of the machine is "15W", expected null'),
        ("bundle", "name", "vit_small", "name of the bundle"),
        ("bundle", "heads", [], "heads of the bundle"),
    ],
)
def test_others_are_refused_in_a_line(write, place, key, value, told):
    first = report(measurement(1.0))
    second = deepcopy(first)
    second[place][key] = value
    with pytest.raises(ConfigError, match=told) as error:
        compare(write("a", first), write("b", second), threshold=5.0)
    assert "\n" not in str(error.value)
    assert "profile the same model on the same device" in str(error.value)


def test_other_numbers_of_people_share_no_measurement(write):
    first, second = report(measurement(1.0, batch=1)), report(measurement(1.0, batch=2))
    with pytest.raises(ConfigError, match="they share no measurement; give both the same --people"):
        compare(write("a", first), write("b", second), threshold=5.0)


def test_what_else_differs_is_noted(write):
    first, second = report(*many()[:2]), report(*many()[:1], engines=["onnxruntime 2.0"], clock_state="unknown")
    second["bundle"]["sha256"] = "b"
    second["interrupted"] = "interrupted by Ctrl-C or SIGTERM"
    second["telemetry"]["throttled"] = {"any": 0.5}
    assert compare(write("a", first), write("b", second), threshold=5.0).notes == (
        "the bundles differ, of the same architecture",
        'engines: ["onnxruntime 1.0"], now ["onnxruntime 2.0"]',
        'clocks: "locked", now "unknown"',
        "measured only in the first report: 1",
        "the second report was interrupted by Ctrl-C or SIGTERM",
        "the device throttled during the second report",
    )


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda r: r["machine"].pop("cpu"), "KeyError: 'cpu'"),
        (lambda r: r.pop("interrupted"), "KeyError: 'interrupted'"),
        (lambda r: r["measurements"][0].pop("cameras"), "KeyError: 'cameras'"),
        (lambda r: r["measurements"][0]["ms"].pop("blocks"), "KeyError: 'blocks'"),
        (lambda r: r["measurements"][0]["ms"].update(p50=0.0), "ValueError: a median of 0.0 ms, or of a block"),
        (lambda r: r["measurements"][0]["ms"].update(blocks=[float("nan")]), "or of a block, is no time"),
        (lambda r: r["measurements"][0].update(flags=None), "TypeError"),
        (lambda r: r.update(measurements=7), "TypeError"),
        (lambda r: r.update(telemetry=[]), "TypeError"),
    ],
)
def test_a_damaged_report_is_an_error_in_a_line(write, damage, told):
    whole = report(measurement(1.0))
    damaged = deepcopy(whole)
    damage(damaged)
    with pytest.raises(DataError, match=r"report\.json: a damaged report \(.*profile again$") as error:
        compare(write("a", whole), write("b", damaged), threshold=5.0)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ('{"schema": 7}', "schema 7, expected a profile of schema 1"),
        ("[]", "schema None"),
        ('{"schema": 1, "measurements": []}', r"a damaged report \(KeyError: 'machine'\), expected what dpal-edge .*"),
    ],
)
def test_what_is_no_report(tmp_path, write, text, told):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=told):
        compare(write("a", report(measurement(1.0))), path, threshold=5.0)
