"""File systems of devices, as far as telemetry reads them, laid out under a folder."""

from pathlib import Path


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def monitor(chip: str, hwmon: int, channels: dict[int, tuple[str, int, int]]) -> dict[str, object]:
    """An INA3221 as hwmon shows it: channel -> label, mV, mA."""
    folder = f"sys/bus/i2c/devices/{chip}/hwmon/hwmon{hwmon}"
    files: dict[str, object] = {
        f"sys/bus/i2c/devices/{chip}/name": "ina3221",
        f"{folder}/in7_label": "sum of shunt voltages",
        f"{folder}/in7_input": 1240,
        f"{folder}/curr4_input": 1600,
    }
    for channel, (label, millivolt, milliampere) in channels.items():
        files |= {
            f"{folder}/in{channel}_label": label,
            f"{folder}/in{channel}_input": millivolt,
            f"{folder}/curr{channel}_input": milliampere,
            f"{folder}/curr{channel}_max_alarm": 0,
            f"{folder}/curr{channel}_crit_alarm": 0,
        }
    return files


def zones(milli_celsius: dict[str, int]) -> dict[str, object]:
    files: dict[str, object] = {}
    for index, (name, value) in enumerate(milli_celsius.items()):
        files[f"sys/class/thermal/thermal_zone{index}/type"] = name
        files[f"sys/class/thermal/thermal_zone{index}/temp"] = value
    return files


def devfreq(name: str, node: str | None, hertz: tuple[int, int, int], governor: str) -> dict[str, object]:
    folder = f"sys/class/devfreq/{name}"
    files: dict[str, object] = {
        f"{folder}/{limit}_freq": f for limit, f in zip(("cur", "min", "max"), hertz, strict=True)
    }
    files[f"{folder}/governor"] = governor
    if node:
        files[f"{folder}/device/of_node/name"] = node + "\0"
    return files


def cpufreq(policy: int, cpus: str, kilohertz: tuple[int, int, int], governor: str) -> dict[str, object]:
    folder = f"sys/devices/system/cpu/cpufreq/policy{policy}"
    files: dict[str, object] = {
        f"{folder}/scaling_{limit}_freq": f for limit, f in zip(("cur", "min", "max"), kilohertz, strict=True)
    }
    return files | {f"{folder}/scaling_governor": governor, f"{folder}/affected_cpus": cpus}


def orin_nx(root: Path) -> Path:
    """Orin NX on JetPack 6, read by a user who is not root."""
    rails = {1: ("VDD_IN", 4984, 1856), 2: ("VDD_CPU_GPU_CV", 4976, 512), 3: ("VDD_SOC", 4976, 400)}
    return write(
        root,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
            "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet",
            "etc/nvpmodel.conf": "# < POWER_MODEL ID=2 NAME=OLD >\n< POWER_MODEL ID=0 NAME=15W >\n"
            "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=0 >",
            "proc/meminfo": "MemTotal:       16000000 kB\nMemFree:  100 kB\nMemAvailable:    9600000 kB",
            "proc/stat": "cpu  0 0 0 0\ncpu0 100 0 0 900 0 0 0 0 0 0\ncpu1 0 0 0 1000 0 0 0 0 0 0\nintr 1",
            "sys/class/thermal/cooling_device0/type": "pwm-fan",
            "sys/class/thermal/cooling_device0/cur_state": 3,
            "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert",
            "sys/class/thermal/cooling_device1/cur_state": 0,
            "sys/class/thermal/cooling_device2/type": "hot-surface-alert",
            "sys/class/thermal/cooling_device2/cur_state": 1,
            "sys/class/hwmon/hwmon2/name": "soctherm_oc",
            "sys/class/hwmon/hwmon2/oc1_event_cnt": 0,
            "sys/class/hwmon/hwmon2/oc3_event_cnt": 27,
            "sys/class/devfreq/17000000.gpu/device/load": 842,
            **devfreq("15340000.vic", "vic", (1, 2, 3), "tegra_wmark"),
            **devfreq("17000000.gpu", "gpu", (1_173_000_000, 306_000_000, 1_173_000_000), "nvhost_podgov"),
            **cpufreq(0, "0 1", (1_984_000, 729_600, 1_984_000), "schedutil"),
            **monitor("1-0040", 3, rails),
            **zones({"cpu-thermal": 65_562, "gpu-thermal": 63_500, "cv0-thermal": -256_000}),
        },
    )


def agx_orin(root: Path) -> Path:
    """AGX Orin after jetson_clocks, read by root."""
    return write(
        root,
        {
            "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
            "var/lib/nvpmodel/status": "pmode:0003",
            "sys/devices/platform/gpu.0/load": 0,
            "sys/devices/platform/gpu.0/devfreq/17000000.ga10b/cur_freq": 1_300_500_000,
            "sys/devices/platform/gpu.0/devfreq/17000000.ga10b/min_freq": 1_300_500_000,
            "sys/devices/platform/gpu.0/devfreq/17000000.ga10b/max_freq": 1_300_500_000,
            "sys/kernel/debug/bpmp/debug/clk/emc/rate": 3_199_000_000,
            "sys/kernel/debug/bpmp/debug/clk/emc/min_rate": 204_000_000,
            "sys/kernel/debug/bpmp/debug/clk/emc/max_rate": 3_199_000_000,
            "sys/kernel/debug/bpmp/debug/clk/emc/mrq_rate_locked": 1,
            **cpufreq(0, "0 1 2 3", (2_201_600, 2_201_600, 2_201_600), "schedutil"),
            **monitor(
                "1-0040", 1, {1: ("VDD_GPU_SOC", 5000, 480), 2: ("VDD_CPU_CV", 5000, 80), 3: ("VIN_SYS_5V0", 5040, 800)}
            ),
            **monitor("1-0041", 2, {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 3000, 100), 3: ("NC", 0, 0)}),
            **zones({"cpu-thermal": 42_593, "tj-thermal": 42_593}),
        },
    )


def nano(root: Path) -> Path:
    """Nano of 2019 on JetPack 4: iio instead of hwmon."""
    iio = "sys/bus/i2c/devices/6-0040/iio:device0"
    return write(
        root,
        {
            "proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0",
            "sys/bus/i2c/devices/6-0040/name": "ina3221x",
            f"{iio}/rail_name_0": "POM_5V_IN",
            f"{iio}/in_power0_input": 1750,
            f"{iio}/rail_name_1": "POM_5V_GPU",
            f"{iio}/in_power1_input": 0,
            f"{iio}/rail_name_2": "POM_5V_CPU",
            f"{iio}/in_power2_input": 366,
            "sys/class/devfreq/57000000.gpu/device/load": 5,
            **devfreq("57000000.gpu", "gpu", (76_800_000, 76_800_000, 921_600_000), "nvhost_podgov"),
            **cpufreq(0, "0 1 2 3", (1_224_000, 102_000, 1_479_000), "schedutil"),
            **zones({"CPU-therm": 40_000, "GPU-therm": 40_000, "PMIC-Die": 50_000}),
        },
    )


def thor(root: Path) -> Path:
    """Thor on JetPack 7: no GPU load, a memory clock that anyone may read, its input on a monitor of its own."""
    return write(
        root,
        {
            "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
            "var/lib/nvpmodel/status": "pmode:0000",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >",
            **devfreq("gpu-gpc-0", None, (315_000_000, 315_000_000, 1_575_000_000), "nvhost_podgov"),
            **devfreq("gpu-nvd-0", None, (1, 2, 3), "nvhost_podgov"),
            **devfreq("bwmgr", None, (665_000_000, 665_000_000, 4_266_000_000), "bwmgr"),
            **cpufreq(0, "0 1", (972_000, 972_000, 2_601_000), "schedutil"),
            **monitor(
                "2-0040", 1, {1: ("VDD_GPU", 0, 0), 2: ("VDD_CPU_SOC_MSS", 9000, 615), 3: ("VIN_SYS_5V0", 5040, 1000)}
            ),
            "sys/bus/i2c/devices/2-0044/name": "ina238",
            "sys/bus/i2c/devices/2-0044/hwmon/hwmon2/in1_label": "VIN",
            "sys/bus/i2c/devices/2-0044/hwmon/hwmon2/power1_input": 16_802_000,
            **zones({"cpu-thermal": 30_468, "tj-thermal": 31_218}),
        },
    )


def pc(root: Path) -> Path:
    """An x86 workstation whose energy counters anyone may read."""
    rapl = "sys/class/powercap/intel-rapl"
    return write(
        root,
        {
            f"{rapl}:0/name": "package-0",
            f"{rapl}:0/energy_uj": 1_000_000,
            f"{rapl}:0/max_energy_range_uj": 262_143_328_850,
            f"{rapl}:0:0/name": "core",
            f"{rapl}:0:0/energy_uj": 5,
            f"{rapl}:0:0/max_energy_range_uj": 262_143_328_850,
            f"{rapl}:0:1/name": "dram",
            f"{rapl}:0:1/energy_uj": 0,
            f"{rapl}:0:1/max_energy_range_uj": 65_712_999_613,
            f"{rapl}:1/name": "psys",
            f"{rapl}:1/energy_uj": 7,
            f"{rapl}:1/max_energy_range_uj": 262_143_328_850,
            **cpufreq(0, "0", (3_000_000, 800_000, 4_700_000), "powersave"),
            **cpufreq(1, "1", (3_100_000, 800_000, 4_700_000), "powersave"),
            **zones({"x86_pkg_temp": 55_000, "acpitz": 20_000}) | {"sys/class/thermal/thermal_zone2/type": "acpitz"},
            "sys/class/thermal/thermal_zone2/temp": 28_000,
        },
    )
