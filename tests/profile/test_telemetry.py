import subprocess
import sys
import time

import pytest
from boards import agx_orin, nano, orin_nx, pc, thor, write

from dpal_edge.profile.samples import Rail
from dpal_edge.profile.telemetry import Telemetry

NEVER = 3600.0  # seconds between samples, so that only the test takes them
VDD_IN = "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/curr1_input"


@pytest.fixture
def now(monkeypatch):
    """The time that samples are stamped with; a test sets ``now[0]``."""
    moment = [100.0]
    monkeypatch.setattr("dpal_edge.profile.telemetry.monotonic", lambda: moment[0])
    return moment


def test_orin_nx(tmp_path, now):
    root = orin_nx(tmp_path)
    with Telemetry.open(root, interval_s=NEVER) as telemetry:
        write(root, {VDD_IN: 2856, "proc/stat": "cpu0 150 0 0 950 0 0 0 0\ncpu1 0 0 0 1100 0 0 0 0"})
        now[0] = 102.0
    first, last = telemetry.samples
    assert (first.time_s, last.time_s) == (100, 102)
    assert (last.ram_used_mb, last.ram_total_mb) == (6250, 15625)
    assert [core.load for core in last.cores] == [50, 0]
    assert (last.gpu_load, last.gpu_mhz, last.emc_mhz) == (84.2, (1173,), None)
    assert last.temperatures_c == {"cpu": 65.562, "gpu": 63.5}
    assert last.rails["VDD_SOC"] == Rail(mw=pytest.approx(1990.4))
    energy = telemetry.energy_j()
    assert energy.keys() == {"total", "VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    assert energy["total"] == energy["VDD_IN"] == pytest.approx(4.984 * (1.856 + 2.856), abs=1e-6)
    assert (telemetry.model, telemetry.power_mode) == (
        "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        "MAXN_SUPER",
    )
    assert telemetry.missing == ["memory clock: only root may read it on this Jetson"]
    assert telemetry.warnings == [
        "clocks are not locked: GPU 306 to 1173 MHz (nvhost_podgov), CPU 730 to 1984 MHz (schedutil); "
        "lock them: sudo jetson_clocks"
    ]


def test_agx_orin_with_all_in_order(tmp_path, now):
    with Telemetry.open(agx_orin(tmp_path), interval_s=NEVER) as telemetry:
        now[0] += 10
    assert telemetry.energy_j()["total"] == pytest.approx(68.32)
    assert (telemetry.missing, telemetry.warnings) == ([], [])


def test_nano_in_a_container_that_hides_its_name(tmp_path, now):
    root = nano(tmp_path)
    (root / "proc/device-tree/model").unlink()
    with Telemetry.open(root, interval_s=NEVER) as telemetry:
        now[0] += 1
    assert telemetry.energy_j()["total"] == pytest.approx(1.75)
    assert telemetry.missing == [
        "memory clock: only root may read it on this Jetson",
        "power mode: /var/lib/nvpmodel/status is not readable; in a container, mount /var/lib/nvpmodel",
    ]
    assert telemetry.warnings[0].endswith("sudo jetson_clocks")


def test_thor_without_vin(tmp_path, now):
    root = thor(tmp_path)
    (root / "sys/bus/i2c/devices/2-0044/hwmon/hwmon2/power1_input").unlink()
    with Telemetry.open(root, interval_s=NEVER) as telemetry:
        now[0] += 1
    assert telemetry.energy_j().keys() == {"VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"}
    assert telemetry.samples[0].gpu_load is None
    assert telemetry.missing == [
        "total power: VDD_GPU, VDD_CPU_SOC_MSS, VIN_SYS_5V0 do not cover the whole module; measure at its supply",
        "NVIDIA GPU: not looked for in a copied file system",
    ]


def test_pc_counts_energy_exactly(tmp_path, now):
    root = pc(tmp_path)
    package, memory = (root / f"sys/class/powercap/intel-rapl:0{zone}/energy_uj" for zone in ("", ":1"))
    with Telemetry.open(root, interval_s=NEVER) as telemetry:
        now[0], start = 101.0, 101.0
        package.write_text("3000000\n")
        telemetry.sample()
        now[0] = 101.7
        package.write_text("15345678\n")
        memory.write_text("2\n")
        assert telemetry.energy_j(start, 101.7) == pytest.approx(
            {"package-0": 12.345678, "package-0 dram": 2e-6}, abs=1e-9
        )
        now[0] = 105.0
    assert telemetry.energy_j()["package-0"] == pytest.approx(14.345678, abs=1e-9)
    assert telemetry.warnings == ["clocks are not locked: CPU 800 to 4700 MHz (powersave)"]


def test_meters_of_root_alone_are_said_to_be(tmp_path):
    root = pc(tmp_path)
    energy = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    energy.unlink()
    energy.mkdir()
    missing = Telemetry.open(root).missing
    assert missing[0] == (
        f"CPU energy: only root may read it; to let everyone until the next boot: sudo chmod a+r {energy}"
    )
    assert not any(sentence.startswith("power:") for sentence in missing)


def test_nothing_at_all(tmp_path):
    with Telemetry.open(tmp_path, interval_s=NEVER) as telemetry:
        pass
    assert telemetry.missing == [
        "power: neither rails (Jetson) nor RAPL counters (x86), as in most virtual machines; measure at the plug",
        "NVIDIA GPU: not looked for in a copied file system",
        "temperatures: no thermal zone is readable, as in most virtual machines",
        "CPU clocks: no cpufreq here, as in most virtual machines",
    ]
    assert (telemetry.energy_j(), telemetry.warnings) == ({}, [])


def test_throttling_and_a_rail_that_disappears(tmp_path, now):
    root = orin_nx(tmp_path)
    with Telemetry.open(root, interval_s=NEVER) as telemetry:
        (root / VDD_IN).unlink()
        write(root, {"sys/class/hwmon/hwmon2/oc3_event_cnt": 28})
        now[0] += 1
        telemetry.sample()
        telemetry.sample()
        write(root, {VDD_IN: 1856})
        now[0] += 1
    assert telemetry.energy_j()["total"] == pytest.approx(2 * 9.250304)
    assert telemetry.warnings[1:] == [
        "throttled 25 % of the time: instantaneous over-current events 25 %",
        "total power was unknown in 2 of 4 samples, energy is bridged there",
    ]


def test_samples_come_by_themselves_until_the_block_ends(tmp_path):
    deadline = time.monotonic() + 60
    with Telemetry.open(orin_nx(tmp_path), interval_s=0.001) as telemetry:
        while len(telemetry.samples) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
    count = len(telemetry.samples)
    assert count >= 6
    times = [sample.time_s for sample in telemetry.samples]
    assert times == sorted(times)
    time.sleep(0.01)
    assert len(telemetry.samples) == count


def test_an_error_in_the_block_ends_sampling_and_passes_through(tmp_path):
    telemetry = Telemetry.open(tmp_path, interval_s=0.001)
    with pytest.raises(RuntimeError, match="mine"), telemetry:
        raise RuntimeError("mine")
    assert telemetry.samples[-1].time_s is not None


def test_this_machine_whatever_it_is():
    with Telemetry.open(interval_s=NEVER) as telemetry:
        pass
    assert len(telemetry.samples) == 2
    assert all(isinstance(sentence, str) for sentence in telemetry.missing + telemetry.warnings)


@pytest.mark.parametrize("interval_s", [0, -1])
def test_an_interval_is_positive(tmp_path, interval_s):
    with pytest.raises(ValueError, match="expected more than 0"):
        Telemetry.open(tmp_path, interval_s=interval_s)


def test_nothing_is_written(tmp_path):
    root = orin_nx(tmp_path)
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    with Telemetry.open(root, interval_s=NEVER):
        pass
    assert {file: file.read_bytes() for file in root.rglob("*") if file.is_file()} == before


def test_import_leaves_torch_and_nvml_unloaded():
    code = "import sys, dpal_edge.profile.telemetry; print(*sys.modules.keys() & {'torch', 'pynvml', 'click'})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
