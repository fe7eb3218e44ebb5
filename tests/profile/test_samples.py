import numpy as np
import pytest
from test_tegrastats import ORIN_NX

from dpal_edge.profile.samples import Rail, Sample, energy_j, metered_j, throttling, total_power_mw, warnings
from dpal_edge.profile.tegrastats import parse_tegrastats


def _watts(times, watts):
    return [Sample(time_s=t, rails={"VDD_IN": Rail(mw=1000 * w)}) for t, w in zip(times, watts, strict=True)]


def _recording(*changes):
    """Lines of an Orin NX, one a second, each changed by replacing pairs of texts."""
    for second, pairs in enumerate(changes):
        line = ORIN_NX.replace("18:30:28", f"18:30:{second:02}")
        for old, new in pairs:
            line = line.replace(old, new)
        yield line


def _parsed(lines):
    return [sample for line in lines if (sample := parse_tegrastats(line))]


def test_energy_of_a_ramp():
    times = [0, 0.4, 1.1, 3, 4]
    ramp = _watts(times, [5 + 2 * t for t in times])  # its integral is 5 t + t^2
    assert energy_j(ramp) == pytest.approx(36, abs=1e-6)
    assert energy_j(ramp, start_s=0.5, end_s=2.5) == pytest.approx(16, abs=1e-6)
    assert energy_j(ramp, start_s=1.2, end_s=1.3) == pytest.approx(0.75, abs=1e-6)  # between two samples
    assert energy_j(ramp, start_s=2, end_s=2) == 0
    assert energy_j(reversed(ramp)) == pytest.approx(36, abs=1e-6)


def test_energy_adds_up_over_adjacent_windows():
    times = np.sort(np.random.uniform(0, 10, 50))
    samples = _watts(times, 10 + np.sin(times))
    whole = energy_j(samples)
    middle = float(times.mean())
    assert energy_j(samples, end_s=middle) + energy_j(samples, start_s=middle) == pytest.approx(whole, abs=1e-6)


def test_energy_is_unknown_where_samples_do_not_reach():
    samples = _watts([1, 2], [5, 5])
    assert energy_j([]) is None
    assert energy_j(samples[:1]) is None
    assert energy_j(samples, start_s=0.9) is None
    assert energy_j(samples, end_s=2.1) is None
    assert energy_j(samples, start_s=2, end_s=1) is None
    assert energy_j([Sample(rails=samples[0].rails)] * 2) is None  # lines without a time


def test_metered_energy_is_what_was_counted():
    samples = [Sample(time_s=t, counters_j={"package-0": j}) for t, j in ((0, 10.0), (1, 14.0), (5, 15.0))]
    assert metered_j(samples, "package-0") == 5
    assert metered_j(samples, "package-0", start_s=1) == 1
    assert metered_j(samples, "package-0", start_s=0.5, end_s=1) == 2
    assert metered_j(samples, "gpu0") is None


def test_a_recording_of_steady_work():
    samples = _parsed(_recording((), (), ()))
    assert energy_j(samples) == pytest.approx(2 * 17.946)
    assert throttling(samples) == {}
    assert warnings(samples) == []


def test_a_recording_of_a_gpu_held_down():
    busy, held = ("84%@[713]", "99%@[1173]"), ("84%@[713]", "99%@[713]")
    samples = _parsed(_recording([busy], [held], [held], [("84%@[713]", "10%@[306]")]))
    assert throttling(samples) == {"GPU clock drop": 0.5, "any": 0.5}
    assert warnings(samples) == ["throttled 50 % of the time: GPU clock drop 50 %"]


def test_a_busy_gpu_whose_clock_is_unknown_is_not_held_down():
    assert throttling([Sample(gpu_load=99, gpu_mhz=(1173,)), Sample(gpu_load=99), Sample(gpu_mhz=(306,))]) == {}


def test_a_recording_whose_rail_disappears_for_a_while():
    gone = [("VDD_IN 17946mW/15710mW ", "")]
    samples = _parsed(_recording((), gone, gone, [("17946mW", "7946mW")]))
    assert [total_power_mw(sample) for sample in samples] == [17946, None, None, 7946]
    assert energy_j(samples) == pytest.approx(3 * (17.946 + 7.946) / 2)
    assert warnings(samples) == ["total power was unknown in 2 of 4 samples, energy is bridged there"]


def test_a_recording_whose_rail_disappears_for_good():
    samples = _parsed(_recording((), (), [("VDD_IN 17946mW/15710mW ", "")]))
    assert energy_j(samples) == pytest.approx(17.946)
    assert energy_j(samples, end_s=samples[-1].time_s) is None


def test_a_recording_with_noise_between_its_lines():
    lines = list(_recording((), ()))
    samples = _parsed([lines[0], "", "\x00\xff[", "tegrastats: command not found", lines[0][:60], lines[1]])
    assert energy_j(samples) == pytest.approx(17.946)
    assert energy_j(_parsed(["noise"])) is None
    assert throttling([]) == {}
    assert warnings([]) == []


def test_reasons_of_the_device_are_counted_one_by_one():
    samples = [
        Sample(throttled=("VDD_IN current alarm", "gpu-throttle")),
        Sample(throttled=("gpu-throttle",)),
        Sample(),
    ]
    shares = throttling([*samples, Sample()])
    assert shares == {"VDD_IN current alarm": 0.25, "gpu-throttle": 0.5, "any": 0.5}
