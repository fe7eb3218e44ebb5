import sys
from types import SimpleNamespace

import pytest

from dpal_edge.profile.nvml import Card, Nvml, open_nvml
from dpal_edge.profile.sysfs import Sysfs
from dpal_edge.profile.telemetry import Telemetry


class NVMLError(Exception):
    pass


def _not_supported(*_):
    raise NVMLError("Not Supported")


def _library(**changes):
    """As much of nvidia-ml-py as is used, with one GPU."""
    functions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
        "nvmlDeviceGetPowerUsage": lambda handle: 71_500,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 5_000_250,
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=97, memory=20),
        "nvmlDeviceGetClockInfo": lambda handle, clock: {1: 1755}[clock],
        "nvmlDeviceGetTemperature": lambda handle, sensor: {0: 66}[sensor],
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x1 | 0x4 | 0x40,
    }
    return SimpleNamespace(
        **functions | {"NVMLError": NVMLError, "NVML_CLOCK_SM": 1, "NVML_TEMPERATURE_GPU": 0} | changes
    )


def test_a_card():
    assert Nvml(_library()).cards() == [
        Card(
            name="gpu0",
            mw=71_500,
            joules=5000.25,
            load=97,
            mhz=1755,
            temperature_c=66,
            throttled=("power cap", "hardware thermal slowdown"),
        )
    ]


def test_a_driver_that_tells_nothing():
    asked = [name for name in vars(_library()) if name.startswith("nvmlDeviceGet")]
    silent = {
        name: _not_supported for name in asked if name not in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex")
    }
    nothing = Card(name="gpu0", mw=None, joules=None, load=None, mhz=None, temperature_c=None, throttled=())
    assert Nvml(_library(**silent)).cards() == [nothing]
    assert Nvml(_library(nvmlDeviceGetHandleByIndex=_not_supported)).cards() == []
    assert Nvml(_library(nvmlDeviceGetCount=_not_supported)).cards() == []
    Nvml(_library(nvmlShutdown=_not_supported)).close()


def test_an_older_package_has_throttle_reasons():
    library = _library(nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x20)
    del library.nvmlDeviceGetCurrentClocksEventReasons
    assert Nvml(library).cards()[0].throttled == ("software thermal slowdown",)


def test_opening(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in open_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", _library(nvmlInit=_not_supported))
    assert "does not answer (Not Supported)" in open_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", _library())
    assert isinstance(open_nvml(), Nvml)


def test_a_card_in_telemetry(tmp_path):
    closed, joules = [], iter([100_000, 160_000])
    library = _library(
        nvmlShutdown=lambda: closed.append(True), nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(joules)
    )
    with Telemetry(Sysfs(tmp_path), Nvml(library), interval_s=3600) as telemetry:
        pass
    sample = telemetry.samples[0]
    assert (sample.gpu_load, sample.gpu_mhz, sample.temperatures_c) == (97, (1755,), {"gpu0": 66})
    assert sample.rails["gpu0"].mw == 71_500
    assert telemetry.energy_j() == {"gpu0": 60}  # as counted, not as integrated
    assert telemetry.warnings == [
        "throttled 100 % of the time: gpu0 hardware thermal slowdown 100 %, gpu0 power cap 100 %"
    ]
    assert closed == [True]
    assert not any(sentence.startswith("NVIDIA GPU") for sentence in telemetry.missing)


@pytest.mark.parametrize("counted", [[], [100_000]])
def test_energy_is_integrated_where_a_card_does_not_count_it(tmp_path, monkeypatch, counted):
    moments, joules = iter([10.0, 12.0]), iter(counted)
    monkeypatch.setattr("dpal_edge.profile.telemetry.monotonic", lambda: next(moments))
    library = _library(nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(joules, None) or _not_supported())
    with Telemetry(Sysfs(tmp_path), Nvml(library), interval_s=3600) as telemetry:
        pass
    assert telemetry.energy_j() == pytest.approx({"gpu0": 143})
