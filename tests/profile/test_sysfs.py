import pytest
from boards import agx_orin, monitor, nano, orin_nx, pc, thor, write

from dpal_edge.profile.samples import Core, Rail, Sample, total_power_mw
from dpal_edge.profile.sysfs import Clock, Sysfs

HWMON = "sys/bus/i2c/devices/1-0040/hwmon/hwmon3"


def _mw(sysfs):
    return {name: rail.mw for name, rail in sysfs.rails().items()}


def test_orin_nx(tmp_path):
    sysfs = Sysfs(orin_nx(tmp_path))
    assert sysfs.model() == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    assert sysfs.power_mode() == "MAXN_SUPER"
    assert _mw(sysfs) == pytest.approx({"VDD_IN": 9250.304, "VDD_CPU_GPU_CV": 2547.712, "VDD_SOC": 1990.4})
    assert sysfs.temperatures_c() == {"cpu": 65.562, "gpu": 63.5}
    assert sysfs.gpu_load() == 84.2
    assert sysfs.memory_mb() == (6250, 15625)
    gpu, cpu = sysfs.clocks()
    assert gpu == Clock(name="GPU", mhz=1173, min_mhz=306, max_mhz=1173, governor="nvhost_podgov")
    assert cpu == Clock(name="CPU", mhz=1984, min_mhz=729.6, max_mhz=1984, governor="schedutil")
    assert not gpu.locked
    assert sysfs.emc_clock() is None


def test_agx_orin_after_jetson_clocks(tmp_path):
    sysfs = Sysfs(agx_orin(tmp_path))
    assert sysfs.power_mode() == "mode 3"  # no names without nvpmodel.conf
    assert _mw(sysfs).keys() == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}
    assert total_power_mw(Sample(rails=sysfs.rails())) == pytest.approx(2400 + 400 + 4032)
    assert sysfs.gpu_load() == 0  # from gpu.0
    assert [(clock.name, clock.mhz, clock.locked) for clock in sysfs.clocks()] == [
        ("GPU", 1300.5, True),
        ("EMC", 3199, True),  # held, though its limits are apart
        ("CPU", 2201.6, True),
    ]


def test_the_memory_clock_of_agx_orin_without_jetson_clocks(tmp_path):
    root = write(agx_orin(tmp_path), {"sys/kernel/debug/bpmp/debug/clk/emc/mrq_rate_locked": 0})
    assert Sysfs(root).emc_clock() == Clock(name="EMC", mhz=3199, min_mhz=204, max_mhz=3199)


def test_nano_of_2019(tmp_path):
    sysfs = Sysfs(nano(tmp_path))
    assert sysfs.rails() == {"POM_5V_IN": Rail(mw=1750), "POM_5V_GPU": Rail(mw=0), "POM_5V_CPU": Rail(mw=366)}
    assert total_power_mw(Sample(rails=sysfs.rails())) == 1750
    assert sysfs.temperatures_c() == {"CPU": 40, "GPU": 40, "PMIC-Die": 50}
    assert sysfs.gpu_load() == 0.5
    assert sysfs.power_mode() is None


def test_thor(tmp_path):
    sysfs = Sysfs(thor(tmp_path))
    assert sysfs.power_mode() == "MAXN"
    assert sysfs.gpu_load() is None
    assert sysfs.gpu_clock() == Clock(name="GPU", mhz=315, min_mhz=315, max_mhz=1575, governor="nvhost_podgov")
    assert sysfs.emc_clock() == Clock(name="EMC", mhz=665, min_mhz=665, max_mhz=4266, governor="bwmgr")
    assert total_power_mw(Sample(rails=sysfs.rails())) == pytest.approx(16802)


def test_pc(tmp_path):
    sysfs = Sysfs(pc(tmp_path))
    assert sysfs.counters_j() == {"package-0": 0, "package-0 dram": 0}  # core is a part of it, psys contains it
    assert sysfs.temperatures_c() == {"x86_pkg_temp": 55, "acpitz": 28}
    assert sysfs.cores() == (Core(mhz=3000), Core(mhz=3100))
    assert (sysfs.model(), sysfs.gpu_load(), sysfs.gpu_clock(), sysfs.rails()) == ("", None, None, {})


def test_nothing_at_all(tmp_path):
    sysfs = Sysfs(tmp_path)
    assert (sysfs.model(), sysfs.power_mode(), sysfs.rails(), sysfs.counters_j()) == ("", None, {}, {})
    assert (sysfs.temperatures_c(), sysfs.gpu_load(), sysfs.clocks()) == ({}, None, [])
    assert (sysfs.cores(), sysfs.memory_mb(), sysfs.throttled()) == ((), None, ())


def test_the_default_mode_is_not_taken_for_the_current_one(tmp_path):
    root = orin_nx(tmp_path)
    (root / "var/lib/nvpmodel/status").unlink()
    assert Sysfs(root).power_mode() is None


def test_rapl_counts_on_where_its_counter_starts_anew(tmp_path):
    root = pc(tmp_path)
    energy, span = root / "sys/class/powercap/intel-rapl:0/energy_uj", 262_143_328_850
    sysfs = Sysfs(root)
    energy.write_text(f"{span - 500_000}\n")
    assert sysfs.counters_j()["package-0"] == pytest.approx((span - 1_500_000) / 1e6, abs=1e-9)
    energy.write_text("250000\n")
    assert sysfs.counters_j()["package-0"] == pytest.approx((span - 750_000) / 1e6, abs=1e-9)
    energy.write_text("250000\n")
    assert sysfs.counters_j()["package-0"] == pytest.approx((span - 750_000) / 1e6, abs=1e-9)


def test_rapl_of_root_alone(tmp_path):
    root = pc(tmp_path)
    energy = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    energy.unlink()
    energy.mkdir()  # which root cannot read as a file either
    sysfs = Sysfs(root)
    assert sysfs.unreadable_meters == [energy]
    assert sysfs.counters_j() == {"package-0 dram": 0}


def test_loads_are_those_since_the_previous_reading(tmp_path):
    root = orin_nx(tmp_path)
    sysfs = Sysfs(root)
    assert sysfs.cores() == (Core(mhz=1984), Core(mhz=1984))
    # cpu0: 100 ticks, 60 of them busy, 50 in a guest; cpu1: 50 busy and 50 waiting for a disk; cpu3 came online.
    write(root, {"proc/stat": "cpu0 150 0 10 940 0 0 0 0 50 0\ncpu1 50 0 0 1000 50 0 0 0 0 0\ncpu3 1 0 0 1"})
    assert sysfs.cores() == (Core(load=60, mhz=1984), Core(load=50, mhz=1984), Core(), Core())
    assert sysfs.cores()[0].load is None  # no time has passed


def test_throttling(tmp_path):
    root = orin_nx(tmp_path)
    sysfs = Sysfs(root)
    assert sysfs.throttled() == ()  # the fan cools, the case is hot, and 27 events were before
    write(root, {"sys/class/hwmon/hwmon2/oc3_event_cnt": 30, f"{HWMON}/curr1_crit_alarm": 1})
    write(root, {"sys/class/thermal/cooling_device1/cur_state": 1})
    assert sysfs.throttled() == ("VDD_IN current alarm", "gpu-throttle", "instantaneous over-current events")
    write(root, {f"{HWMON}/curr1_crit_alarm": 0, "sys/class/thermal/cooling_device1/cur_state": 0})
    assert sysfs.throttled() == ()


def test_events_are_seen_across_a_reading_that_failed(tmp_path):
    root = orin_nx(tmp_path)
    sysfs = Sysfs(root)
    write(root, {"sys/class/hwmon/hwmon2/oc3_event_cnt": "busy"})
    assert sysfs.throttled() == ()
    write(root, {"sys/class/hwmon/hwmon2/oc3_event_cnt": 28})
    assert sysfs.throttled() == ("instantaneous over-current events",)


@pytest.mark.parametrize("content", ["", "garbage", "9" * 5000, "\udcff"])
def test_unreadable_files_are_as_good_as_absent(tmp_path, content):
    root = orin_nx(tmp_path)
    for file in root.rglob("*"):
        if file.is_file() and not file.name.endswith(("label", "type", "name")):
            file.write_bytes(content.encode("utf-8", "surrogateescape"))
    sysfs = Sysfs(root)
    assert (sysfs.rails(), sysfs.temperatures_c(), sysfs.gpu_load(), sysfs.clocks()) == ({}, {}, None, [])
    assert (sysfs.cores(), sysfs.memory_mb(), sysfs.throttled(), sysfs.power_mode()) == ((), None, (), None)


def test_a_rail_that_disappears(tmp_path):
    root = orin_nx(tmp_path)
    sysfs = Sysfs(root)
    (root / HWMON / "curr1_input").unlink()
    assert sysfs.rails().keys() == {"VDD_CPU_GPU_CV", "VDD_SOC"}


def test_other_chips_are_not_taken_for_power_monitors(tmp_path):
    root = write(tmp_path, monitor("1-0040", 0, {1: ("VDD_IN", 5000, 1000)}))
    write(root, {"sys/bus/i2c/devices/1-0040/name": "tmp451"})
    assert Sysfs(root).rails() == {}
