"""A profile of engines whose times are known, on devices that are folders."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from boards import agx_orin, orin_nx, pc, write
from engines import FakeClock, FakeDeviceEngine, FakeEngine

from dpal_edge.errors import ModelFileError
from dpal_edge.manifest import FileSpec, HeadSpec, InputSpec, Manifest, Stripped
from dpal_edge.profile.curves import build_curves, find_knee
from dpal_edge.profile.forms import Form
from dpal_edge.profile.report import (
    describe_heads,
    describe_measurements,
    describe_stages,
    describe_sustained,
    describe_telemetry,
    find_verdicts,
    others_share,
    rank_calls,
)
from dpal_edge.profile.sampler import Effort
from dpal_edge.profile.session import USED, CutOff, Labels, Session
from dpal_edge.profile.statistics import Summary
from dpal_edge.profile.telemetry import Telemetry

NEVER = 3600.0
HEADS = (HeadSpec(name="pose", task="pose", shape=(5,)), HeadSpec(name="embedding", task="embedding", shape=(5,)))
MANIFEST = Manifest(
    model="fake",
    input=InputSpec(name="images", size=(16, 8), mean=(0.0,) * 3, std=(1.0,) * 3),
    heads=HEADS,
    artifacts=(),
    golden=FileSpec(file="golden.npz", sha256="", bytes=0),
    stripped=Stripped(parameters_before=1, parameters_after=1, removed={}),
    provenance={},
)
IMAGES = np.zeros((2, 16, 8, 3), np.uint8)
VDD_IN = "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/curr1_input"
QUICK = Effort(least_calls=100, usual_s=0.0)


@pytest.fixture
def clock(monkeypatch):
    """One clock for the engine and the sensors."""
    fake = FakeClock()
    monkeypatch.setattr("dpal_edge.profile.telemetry.monotonic", fake)
    return fake


@contextmanager
def session_on(root, clock, **options):
    with Telemetry.open(root, interval_s=NEVER) as telemetry:
        yield Session(telemetry, options.pop("max_celsius", 95.0), clock=clock, **options)


class FakeForm(Form):
    """A form that opens an engine of a test."""

    def open(self):
        return ENGINES[self.target]


ENGINES: dict[str, FakeEngine] = {}


def form(engine, target="onnx"):
    ENGINES[target] = engine
    return FakeForm(target=target, artifact="model.onnx", path=Path("model.onnx"), graph=None, engine="onnxruntime",
                    precision="float32", computes=None)  # fmt: skip


def noisy(seed=0):
    """4 ms and 2 for each image, both with 5 % of noise, the first calls of each number slow."""
    rng, seen = np.random.default_rng(seed), {}

    def ms(count, heads):
        seen[count] = seen.get(count, 0) + 1
        return (4 + 2 * count) * (1 + 0.05 * rng.normal()) * (10 if seen[count] < 5 else 1)

    return ms


def test_it_recovers_what_the_engine_takes_by_both_clocks(tmp_path, clock):
    with session_on(agx_orin(tmp_path), clock) as session:
        session.measure_calls(form(FakeDeviceEngine(clock, noisy(2))), MANIFEST, IMAGES, (1, 2, 4, 8, 16), USED)
        found = describe_measurements(session)
    assert len(found) == 10
    held = 0
    for measurement in found:
        truth = (4 + 2 * measurement["batch"]) * (0.9 if measurement["clock"] == "device" else 1)
        assert measurement["ms"]["p50"] == pytest.approx(truth, rel=0.02)
        assert measurement["ms"]["warmup"]["calls"] >= 3
        assert measurement["ms"]["max"] < 1.3 * truth
        assert measurement["flags"] == []
        held += measurement["ms"]["p50_ci95"][0] <= truth <= measurement["ms"]["p50_ci95"][1]
    assert held >= 8
    host = next(curve for curve in build_curves(found) if curve["clock"] == "host")
    assert [point["x"] for point in host["points"]] == [1, 2, 4, 8, 16]
    assert host["knee"] == 8  # 6, 4, 3, 2.5 and 2.25 ms for each: the last step saves a tenth
    assert host["marginal_ms"] == pytest.approx(2, rel=0.1)
    assert session.clocks_told == {"fake 1.0 cpu": "a fake's own counter"}


def test_an_engine_without_a_clock_gets_none_made_up(tmp_path, clock):
    with session_on(agx_orin(tmp_path), clock) as session:
        session.measure_calls(form(FakeEngine(clock, noisy())), MANIFEST, IMAGES, (1,), USED)
        assert [m["clock"] for m in describe_measurements(session)] == ["host"]
    assert session.clocks_told == {"fake 1.0 cpu": "no clock of its own: the host's alone"}


@pytest.mark.parametrize(
    ("task", "batches", "first"), [("pose", (1, 2, 8), 8), ("pose", (1,), 2), ("detection", (1, 8), 1)]
)
def test_people_come_in_numbers_before_one_is_timed_alone(tmp_path, clock, task, batches, first):
    came = []

    def ms(count, heads):
        came.append(count)
        return 5.0

    manifest = replace(MANIFEST, heads=(HeadSpec(name="boxes", task=task, shape=(5,)),))
    with session_on(agx_orin(tmp_path), clock) as session:
        session.measure_calls(form(FakeEngine(clock, ms)), manifest, IMAGES, batches, QUICK)
        assert [m["batch"] for m in describe_measurements(session)] == [*batches]
    assert came[0] == first
    assert set(came[1 : QUICK.least_calls]) == {1}


def test_a_number_of_images_that_fails_costs_no_other(tmp_path, clock):
    def ms(count, heads):
        if count == 8:
            raise ModelFileError("out of memory")
        return 5.0

    with session_on(agx_orin(tmp_path), clock) as session:
        session.measure_calls(form(FakeEngine(clock, ms)), MANIFEST, IMAGES, (1, 2, 8), QUICK)
        assert [m["batch"] for m in describe_measurements(session)] == [1, 2]
        assert [one["reason"] for one in session.skipped] == ["out of memory"]


def test_outliers_are_shown(tmp_path, clock):
    calls = iter(range(10_000))
    engine = FakeEngine(clock, lambda count, heads: 300.0 if next(calls) in (60, 70) else 5 + 0.1 * np.random.rand())
    with session_on(agx_orin(tmp_path), clock) as session:
        session.measure_calls(form(engine), MANIFEST, IMAGES, (1,), QUICK)
        [measurement] = describe_measurements(session)
    assert measurement["ms"]["outliers"]["count"] == 2
    assert [one["ms"] for one in measurement["ms"]["outliers"]["listed"]] == [300, 300]
    assert measurement["ms"]["max"] == 300


def test_ctrl_c_keeps_the_calls_that_were_made(tmp_path, clock):
    calls = iter(range(10_000))

    def ms(count, heads):
        if next(calls) == 46:  # the first call is not counted
            raise KeyboardInterrupt
        return 5.0

    with session_on(agx_orin(tmp_path), clock) as session:
        with pytest.raises(KeyboardInterrupt):
            session.measure_calls(form(FakeEngine(clock, ms)), MANIFEST, IMAGES, (1, 2), QUICK)
        [measurement] = describe_measurements(session)
    assert measurement["ms"]["n"] == 45


def test_energy_of_a_call_and_of_a_person(tmp_path, clock):
    root = orin_nx(tmp_path)  # 4.984 V and 1.856 A
    with session_on(root, clock) as session:
        session.measure_calls(
            form(FakeEngine(clock, lambda count, heads: 10.0 * count)), MANIFEST, IMAGES, (1, 4), QUICK
        )
        one, four = describe_measurements(session)
    assert one["energy_j"]["total"]["call"] == pytest.approx(4.984 * 1.856 * 0.01, rel=1e-4)
    assert four["energy_j"]["total"]["person"] == pytest.approx(4.984 * 1.856 * 0.01, rel=1e-4)
    assert one["flags"] == [
        "clocks are not locked: GPU 306 to 1173 MHz (nvhost_podgov), CPU 730 to 1984 MHz (schedutil); "
        "lock them: sudo jetson_clocks"
    ]


def test_frames_of_several_sources_are_counted_one_by_one(tmp_path, clock):
    """Passes of 10 ms over two frames with three people in all, but a last one over a single frame with nobody."""
    with session_on(orin_nx(tmp_path), clock) as session:
        passes = iter([(2, 3)] * 99 + [(1, 0)])

        def step():
            clock.pass_ms(10)
            frames, people = next(passes)
            stages = dict.fromkeys(("glass", "detect", "model"), 10.0)
            return {**stages, "age": 10.0, "at": clock(), "frames": frames, "people": people}

        for what in ("pipeline", "sustained"):
            passes = iter([(2, 3)] * 99 + [(1, 0)])
            labels = Labels(what=what, form=form(FakeEngine(clock, noisy())), runner="fake", source="a + b", cameras=2)
            session.measure(labels, step, clocks=("glass",), decides="glass", effort=QUICK, warm=True)
        [measurement, _] = describe_measurements(session)
        told = describe_telemetry(session)
        stages = describe_stages(session.find("pipeline"), session.telemetry)
        sustained = describe_sustained(session.find("sustained"))
    joules = 4.984 * 1.856 * 0.01  # of a pass
    assert measurement["people"] == stages["people"] == pytest.approx(297 / 199, abs=1e-3)
    assert measurement["energy_j"]["total"]["call"] == pytest.approx(joules, rel=1e-3)
    assert measurement["energy_j"]["total"]["person"] == pytest.approx(joules * 100 / 297, rel=1e-3)
    assert told["per_frame"]["total"] == pytest.approx(joules * 100 / 199, rel=1e-3)
    assert told["per_person"]["total"] == pytest.approx(joules * 100 / 297, rel=1e-3)
    assert (stages["passes"], stages["frames"]) == (100, 199)
    assert sum(sustained["series"]["frames"]) == 199


def test_throttling_marks_the_numbers_that_were_taken_meanwhile(tmp_path, clock):
    root = agx_orin(tmp_path)
    write(root, {"sys/devices/platform/gpu.0/load": 990})
    slow = "sys/devices/platform/gpu.0/devfreq/17000000.ga10b/cur_freq"
    engine = form(FakeEngine(clock, lambda count, heads: 10.0))
    with session_on(root, clock) as session:
        session.measure_calls(engine, MANIFEST, IMAGES, (1,), QUICK)
        clock.pass_ms(1)
        write(root, {slow: 600_000_000})
        session.measure_calls(engine, MANIFEST, IMAGES, (2,), QUICK)
        calm, hot = describe_measurements(session)
        told = describe_telemetry(session)
    assert calm["flags"] == []
    assert hot["flags"] == ["throttled 100 % of the time: GPU clock drop 100 %"]
    assert 0 < told["throttled"]["GPU clock drop"] < 1
    assert set(told["series"]["gpu_mhz"]) == {1300.5, 600}


def test_a_rail_that_is_missing_and_garbage_in_the_sensors(tmp_path, clock):
    root = orin_nx(tmp_path)
    write(root, {VDD_IN: "\x00garbage", "sys/class/thermal/thermal_zone0/temp": "n/a", "proc/stat": "cpu0 1 2 x"})
    with session_on(root, clock) as session:
        session.measure_calls(form(FakeEngine(clock, lambda count, heads: 10.0)), MANIFEST, IMAGES, (1,), QUICK)
        told, [measurement] = describe_telemetry(session), describe_measurements(session)
    assert "total" not in measurement["energy_j"]
    assert told["missing"][0].startswith("total power: VDD_CPU_GPU_CV, VDD_SOC do not cover the whole module")
    assert told["hottest_c"] == {"gpu": 63.5}


def test_too_hot_ends_it_and_keeps_what_was_measured(tmp_path, clock):
    root = agx_orin(tmp_path)
    calls = iter(range(10_000))

    with session_on(root, clock, max_celsius=80.0) as session:

        def ms(count, heads):
            if next(calls) == 51:  # the first call is not counted
                write(root, {"sys/class/thermal/thermal_zone1/temp": 81_500})
                session.telemetry.sample()
            return 10.0

        with pytest.raises(CutOff, match="cut off: sensor tj is at 82 C, the limit is 80 C"):
            session.measure_calls(form(FakeEngine(clock, ms)), MANIFEST, IMAGES, (1, 2), QUICK)
        [measurement] = describe_measurements(session)
    assert measurement["ms"]["n"] == 51


def test_heads_by_what_is_left_out(tmp_path, clock):
    """3 ms for the backbone, 1 for each head, with noise."""
    rng = np.random.default_rng(0)
    engine = form(FakeEngine(clock, lambda count, heads: 3 + heads + 0.05 * rng.normal()))
    with session_on(agx_orin(tmp_path), clock) as session:
        session.measure_heads(engine, MANIFEST, IMAGES)
        told = describe_heads(session.find("heads"), HEADS, session.telemetry)
        assert describe_measurements(session) == []
    assert told["all"]["p50"] == pytest.approx(5, rel=0.01)
    for head in told["heads"]:
        low, high = head["marginal_ci95"]
        assert low - 0.02 <= 1 <= high + 0.02
        assert head["alone"]["p50"] == pytest.approx(4, rel=0.01)
    assert told["saving"] == pytest.approx(1 - 5 / 8, abs=0.01)


def test_a_run_that_grows_slower(tmp_path, clock):
    with session_on(agx_orin(tmp_path), clock) as session:

        def step():
            ms = 20.0 if clock() < 150 else 25.0
            clock.pass_ms(ms)
            return {"glass": 2 * ms, "detect": ms, "at": clock(), "frames": 1, "people": 0}

        labels = Labels(
            what="sustained", form=form(FakeEngine(clock, noisy())), runner="fake", source="clip", cameras=1
        )
        effort = Effort(least_calls=1, least_s=300, usual_s=300, most_s=300)
        session.measure(labels, step, clocks=("glass",), decides="glass", effort=effort, warm=True)
        told = describe_sustained(session.find("sustained"))
    assert (told["first_p50_ms"], told["last_p50_ms"], told["slower"]) == (20, 25, 0.25)
    assert told["minutes"] == 5
    assert sum(told["series"]["frames"]) == pytest.approx(150 / 0.02 + 150 / 0.025, abs=1)


def test_other_programs_are_noticed(tmp_path, clock):
    """Two cores, busy 50 % and 0 % for a second, of which this process took a fifth of a second."""
    root = orin_nx(tmp_path)
    engine = FakeEngine(clock, noisy())
    with session_on(root, clock) as session:
        labels = Labels(what="call", form=form(engine), runner="fake", batch=1, people=1)

        def step():
            clock.pass_ms(1000)
            write(root, {"proc/stat": "cpu0 150 0 0 950 0 0 0 0\ncpu1 0 0 0 1100 0 0 0 0"})
            return {"host": 1.0}

        effort = Effort(least_calls=1, least_s=0, usual_s=0)
        measured = session.measure(labels, step, clocks=("host",), decides="host", effort=effort)
        samples = session.telemetry.samples
        measured.cpu_s = 0.2
        assert others_share(measured, samples) == pytest.approx(0.15)
        assert "other programs took more than a tenth of the CPU" in describe_measurements(session)[0]["flags"]
        measured.cpu_s = 0.5
        assert others_share(measured, samples) == 0


def test_numbers_without_any_sensor_are_marked(tmp_path, clock):
    with session_on(tmp_path, clock) as session:
        session.measure_calls(form(FakeEngine(clock, noisy())), MANIFEST, IMAGES, (1,), USED)
        [measurement] = describe_measurements(session)
    assert measurement["flags"] == ["clocks are unknown"]
    assert measurement["energy_j"] is None


@pytest.mark.parametrize(
    ("each", "knee"), [([10, 5, 2.5], None), ([10, 9.5, 1], 1), ([10, 8, 7.9, 4], 2), ([10, 11], 1), ([10], None)]
)
def test_the_knee(each, knee):
    assert find_knee([1, 2, 4, 8][: len(each)], each) == knee


def report_with(p95, **changes):
    ms = Summary.of([p95] * 30).to_dict()
    measurement = {"what": "pipeline", "source": "clip", "placed": False, "clock": "glass", "ms": ms, "batch": None}
    return {
        "measurements": [measurement],
        "options": {"budget_ms": 33.0},
        "bundle": {"used": {}},
        "machine": {"clock_state": "locked"},
        "telemetry": {"throttled": {}},
        "sustained": None,
        "interrupted": None,
        **changes,
    }


def test_the_budget():
    [held] = find_verdicts(report_with(32.0), 4)
    assert (held["passed"], held["text"]) == (
        True,
        "the budget of 33 ms holds: p95 from the frames of clip to drawn people is 32.00 ms",
    )
    [missed] = find_verdicts(report_with(34.0), 4)
    assert missed["passed"] is False
    [nothing] = find_verdicts(report_with(32.0, measurements=[]), 4)
    assert nothing["passed"] is False


def test_a_faster_form_is_named():
    used = {"target": "onnx", "artifact": "a", "engine": "onnxruntime", "precision": "float32", "computes": None}
    calls = [
        {**used, "target": target, "what": "call", "clock": "host", "batch": 4, "runner": runner,
         "ms": Summary.of([ms] * 30).to_dict()}
        for target, runner, ms in (("onnx", "ort 1", 40.0), ("int8", "ov 1", 10.0))
    ]  # fmt: skip
    options = {"budget_ms": None}
    found = find_verdicts(report_with(1.0, measurements=calls, bundle={"used": used}, options=options), 4)
    assert [verdict["kind"] for verdict in found] == ["form"]
    assert found[0]["text"].startswith("int8 with ov 1 takes 10.00 ms, images 4, what run uses takes 40.00 ms")
    assert find_verdicts(report_with(1.0, measurements=calls[:1], bundle={"used": used}, options=options), 4) == []


@pytest.mark.parametrize(("task", "batch", "fastest"), [("pose", 4, "grows"), ("detection", 1, "steady")])
def test_a_detector_is_ranked_by_one_image_and_all_else_by_four(tmp_path, clock, task, batch, fastest):
    head = HeadSpec(name="boxes", task=task, shape=(5,))
    manifest = replace(MANIFEST, heads=(head,))
    with session_on(agx_orin(tmp_path), clock) as session:
        for target, ms in (("steady", (3.0, 8.0)), ("grows", (5.0, 6.0))):
            engine = FakeEngine(clock, lambda count, heads, ms=ms: ms[count > 1])
            session.measure_calls(form(engine, target), manifest, IMAGES, (1, 4), QUICK)
        assert rank_calls(describe_measurements(session), manifest.ranked_images)[0]["target"] == fastest
        session.measure_heads(form(FakeEngine(clock, noisy(), heads=("boxes",))), manifest, IMAGES)
        assert session.find("heads").labels.batch == batch
        report = report_with(1.0, measurements=describe_measurements(session), options={"budget_ms": None})
    report["bundle"]["used"] = {"target": {"grows": "steady", "steady": "grows"}[fastest]}
    [verdict] = find_verdicts(report, manifest.ranked_images)
    assert verdict["text"].startswith(f"{fastest} with fake 1.0 cpu takes")


def test_energy_of_a_pc_is_counted_exactly(tmp_path, clock):
    root = pc(tmp_path)
    counter = root / "sys/class/powercap/intel-rapl:0/energy_uj"

    def ms(count, heads):
        counter.write_text(f"{int(counter.read_text()) + 70_000}\n")  # 70 mJ
        return 5.0

    with session_on(root, clock) as session:
        session.measure_calls(form(FakeEngine(clock, ms)), MANIFEST, IMAGES, (2,), replace(QUICK, least_calls=50))
        [measurement] = describe_measurements(session)
    assert measurement["energy_j"]["package-0"] == {"call": pytest.approx(0.07), "person": pytest.approx(0.035)}
