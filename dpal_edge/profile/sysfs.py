"""What the kernel says of power, heat and clocks, in files that are only read.

Every path lies below a root, so a copied tree is as good as a device. Sources: the kernel's documentation of hwmon,
ina3221, devfreq, cpufreq, thermal and powercap; for Jetson, NVIDIA's developer guide and kernel sources.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dpal_edge.profile.samples import Core, Rail

# Names of Jetson GPUs in the device tree, from TX2 to Thor; Nano and JetPack 6 call it "gpu".
_GPU_NODES = frozenset({"gv11b", "gp10b", "ga10b", "gb10b", "gpu"})
_THOR_GPU = "gpu-gpc-0"

# What Orin and Thor count (kernel driver tegra234 soctherm): the supply sags, or the module draws too much.
_OVER_CURRENT = {"oc1": "undervoltage", "oc2": "average over-current", "oc3": "instantaneous over-current"}

_OFFLINE_MC = -256_000


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A clock and the limits within which its governor may move it."""

    name: str  # "GPU", "EMC" (the memory) or "CPU", once for every group of cores
    mhz: float | None
    min_mhz: float
    max_mhz: float
    governor: str = ""  # empty where the kernel names none

    @property
    def locked(self) -> bool:
        """Whether it has nowhere to move, as after ``jetson_clocks``."""
        return self.min_mhz == self.max_mhz


@dataclass(frozen=True)
class _Channel:
    """A rail: the product of its files times ``mw`` is its power in mW."""

    name: str
    files: tuple[Path, ...]
    mw: float
    alarms: tuple[Path, ...] = ()


@dataclass
class _EnergyMeter:
    """A RAPL counter, which starts anew at its range."""

    name: str
    file: Path
    range_uj: int
    last_uj: int
    joules: float = 0.0


class Sysfs:
    """The sensors below one root, found once; every method reads them anew."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._channels = list(_channels(root / "sys/bus/i2c/devices"))
        self._gpu_load, self._gpu_clock = _gpu(root / "sys")
        self._policies = sorted(root.glob("sys/devices/system/cpu/cpufreq/policy*"))
        self._zones = [
            (re.sub("-therm(al)?$", "", name), zone / "temp")
            for zone in sorted(root.glob("sys/class/thermal/thermal_zone*"))
            if (name := text(zone / "type"))
        ]
        self._alerts = [
            (name, device / "cur_state")
            for device in sorted(root.glob("sys/class/thermal/cooling_device*"))
            if (name := text(device / "type")).endswith("-throttle-alert")
        ]
        self._events = {
            file: f"{_OVER_CURRENT.get(file.name[:3], file.name)} events"
            for hwmon in sorted(root.glob("sys/class/hwmon/hwmon*"))
            if text(hwmon / "name") == "soctherm_oc"
            for file in sorted(hwmon.glob("oc*_event_cnt"))
        }
        self._counts = {file: count for file in self._events if (count := number(file)) is not None}
        self._ticks: dict[int, tuple[int, int]] = {}
        self.unreadable_meters: list[Path] = []  # energy counters that are there, but not for this user
        self._meters = list(self._find_meters())

    def model(self) -> str:
        """Return the name of the board in its device tree; empty on a PC, and in a container that hides it."""
        return text(self._root / "proc/device-tree/model")

    def power_mode(self) -> str | None:
        """Return what ``nvpmodel`` last set, for example "MAXN_SUPER"; "mode 2" where its names are not readable.

        None where it left no record. What a device boots into (PM_CONFIG DEFAULT) is no proof of what it is in now.
        """
        mode = re.search(r"pmode:(\d{1,9})", text(self._root / "var/lib/nvpmodel/status"), re.ASCII)
        if not mode:
            return None
        names = text(self._root / "etc/nvpmodel.conf")
        name = re.search(rf"^\s*<\s*POWER_MODEL\s+ID=0*{int(mode[1])}\s+NAME=(\S+)", names, re.MULTILINE)
        return name[1] if name else f"mode {int(mode[1])}"

    def rails(self) -> dict[str, Rail]:
        """Read every rail of the power monitors."""
        rails = {}
        for channel in self._channels:
            values = [value for file in channel.files if (value := number(file)) is not None]
            if len(values) == len(channel.files):
                rails[channel.name] = Rail(mw=math.prod(values) * channel.mw)
        return rails

    def counters_j(self) -> dict[str, float]:
        """Read the RAPL meters: joules since this object was made, by "package-0", "package-0 dram" and so on.

        Exact to a step of the meter (61 uJ on most CPUs) for every time it goes round. That takes minutes at full load,
        and more than once between two calls would go unnoticed.
        """
        joules = {}
        for meter in self._meters:
            now = number(meter.file)
            if now is not None:
                step = now - meter.last_uj + (meter.range_uj if now < meter.last_uj else 0)
                meter.joules += step / 1e6
                meter.last_uj = now
                joules[meter.name] = meter.joules
        return joules

    def temperatures_c(self) -> dict[str, float]:
        """Read the thermal zones, the hottest of those with the same name; offline ones are left out."""
        celsius: dict[str, float] = {}
        for name, file in self._zones:
            value = number(file)
            if value is not None and value > _OFFLINE_MC:
                celsius[name] = max(value / 1000, celsius.get(name, -math.inf))
        return celsius

    def gpu_load(self) -> float | None:
        """Read how busy a Jetson's GPU is, in percent; None on Thor, whose kernel does not say."""
        tenths = number(self._gpu_load) if self._gpu_load else None
        return None if tenths is None else tenths / 10

    def clocks(self) -> list[Clock]:
        """Read the clocks of GPU, memory and CPU; those that this user may not read are left out."""
        return [
            clock
            for clock in (self.gpu_clock(), self.emc_clock(), *(_cpufreq(policy) for policy in self._policies))
            if clock
        ]

    def gpu_clock(self) -> Clock | None:
        """Read the clock of a Jetson's GPU."""
        return _devfreq("GPU", self._gpu_clock) if self._gpu_clock else None

    def emc_clock(self) -> Clock | None:
        """Read the clock of a Jetson's memory: on Thor for anyone, on Orin and Xavier for root alone."""
        folder = self._root / "sys/kernel/debug/bpmp/debug/clk/emc"
        rate, low, high = (number(folder / name) for name in ("rate", "min_rate", "max_rate"))
        if rate is None or low is None or high is None:
            return _devfreq("EMC", self._root / "sys/class/devfreq/bwmgr")
        if number(folder / "mrq_rate_locked"):  # how jetson_clocks holds it, with the limits left as they were
            low = high = rate
        return Clock(name="EMC", mhz=rate / 1e6, min_mhz=low / 1e6, max_mhz=high / 1e6)

    def cores(self) -> tuple[Core, ...]:
        """Read the CPU cores; the load is that since the previous call, and None in the first."""
        mhz: dict[int, float] = {}
        for policy in self._policies:
            khz = number(policy / "scaling_cur_freq")
            if khz is not None:
                mhz |= {int(cpu): khz / 1000 for cpu in text(policy / "affected_cpus").split() if cpu.isdecimal()}
        loads = self._loads()
        last = max([*mhz, *loads], default=-1)
        return tuple(Core(load=loads.get(cpu), mhz=mhz.get(cpu)) for cpu in range(last + 1))

    def memory_mb(self) -> tuple[int, int] | None:
        """Read how much memory is in use, all but what the kernel could give, and how much there is."""
        found = re.findall(r"^(MemTotal|MemAvailable): +(\d{1,15}) kB", text(self._root / "proc/meminfo"), re.MULTILINE)
        kib = {name: int(value) for name, value in found}
        if len(kib) < 2:
            return None
        return (kib["MemTotal"] - kib["MemAvailable"]) // 1024, kib["MemTotal"] // 1024

    def throttled(self) -> tuple[str, ...]:
        """Read why the device slows itself down now, or did since the previous call."""
        reasons = [
            f"{channel.name} current alarm"
            for channel in self._channels
            if any(number(file) for file in channel.alarms)
        ]
        reasons += [name.removesuffix("-alert") for name, state in self._alerts if number(state)]
        for file, reason in self._events.items():
            now = number(file)
            if now is None:
                continue
            if now > self._counts.get(file, now):
                reasons.append(reason)
            self._counts[file] = now
        return tuple(reasons)

    def _loads(self) -> dict[int, float | None]:
        """Return the percentage of time that each core was busy since the previous call."""
        loads: dict[int, float | None] = {}
        for line in text(self._root / "proc/stat").splitlines():
            found = re.match(r"cpu(\d{1,6}) ([\d ]+)", line, re.ASCII)
            if not found:
                continue
            # user, nice, system, idle, iowait, irq, softirq, steal; what guests use is in user and nice already.
            ticks = [int(value) for value in found[2].split()][:8]
            cpu, total, idle = int(found[1]), sum(ticks), sum(ticks[3:5])
            total_before, idle_before = self._ticks.get(cpu, (total, idle))
            passed = total - total_before
            loads[cpu] = 100 * (1 - (idle - idle_before) / passed) if passed > 0 else None
            self._ticks[cpu] = total, idle
        return loads

    def _find_meters(self) -> Iterator[_EnergyMeter]:
        """Find packages and their DRAM: other zones are parts of a package (core, uncore) or contain it (psys)."""
        for zone in sorted(self._root.glob("sys/class/powercap/intel-rapl:*")):
            name = text(zone / "name")
            if name == "dram":
                name = f"{text(zone.with_name(zone.name.rpartition(':')[0]) / 'name')} dram"
            elif not name.startswith("package"):
                continue
            now, span = number(zone / "energy_uj"), number(zone / "max_energy_range_uj")
            if now is None or span is None:
                self.unreadable_meters.append(zone / "energy_uj")
            else:
                yield _EnergyMeter(name=name, file=zone / "energy_uj", range_uj=span, last_uj=now)


def text(path: Path) -> str:
    """Return what ``path`` holds, without spaces and NULs around it, or nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n\t ")
    except OSError:
        return ""


def number(path: Path) -> int | None:
    """Return the whole number that ``path`` begins with, or None where it holds none or cannot be read."""
    try:
        return int(text(path).split()[0])
    except (IndexError, ValueError):
        return None


def _channels(devices: Path) -> Iterator[_Channel]:
    """Find the rails of the INA3221 monitors; Thor has an INA238 for its input."""
    for chip in sorted(devices.glob("*")):
        if not text(chip / "name").startswith(("ina3221", "ina238")):
            continue
        for label in sorted(chip.glob("hwmon/hwmon*/in*_label")):
            # NC is not connected. Channel 7, the sum of the shunt voltages, has no current and so gives no power.
            if text(label) != "NC":
                yield _hwmon_channel(label.parent, label.name[2:-6])
        for label in sorted(chip.glob("iio:device*/rail_name_*")):  # JetPack 4
            power = label.with_name(f"in_power{label.name.removeprefix('rail_name_')}_input")
            yield _Channel(text(label), (power,), 1.0)


def _hwmon_channel(folder: Path, channel: str) -> _Channel:
    name = text(folder / f"in{channel}_label")
    alarms = tuple(sorted(folder.glob(f"curr{channel}_*_alarm")))
    power = folder / f"power{channel}_input"  # microwatts, which an INA238 has and an INA3221 has not
    if power.exists():
        return _Channel(name, (power,), 1e-3, alarms)
    return _Channel(name, (folder / f"in{channel}_input", folder / f"curr{channel}_input"), 1e-3, alarms)  # mV * mA


def _gpu(sys: Path) -> tuple[Path | None, Path | None]:
    """Find the file with a Jetson GPU's load and the folder with its clock."""
    for folder in sorted(sys.glob("class/devfreq/*")):
        if folder.name == _THOR_GPU or text(folder / "device/of_node/name") in _GPU_NODES:
            return folder / "device/load", folder
    for folder in (sys / "devices/platform/gpu.0", sys / "devices/gpu.0"):
        if (folder / "load").exists():
            return folder / "load", next(folder.glob("devfreq/*"), None)
    return None, None


def _devfreq(name: str, folder: Path) -> Clock | None:
    now, low, high = (number(folder / file) for file in ("cur_freq", "min_freq", "max_freq"))  # Hz
    if low is None or high is None:
        return None
    return Clock(
        name=name,
        mhz=None if now is None else now / 1e6,
        min_mhz=low / 1e6,
        max_mhz=high / 1e6,
        governor=text(folder / "governor"),
    )


def _cpufreq(policy: Path) -> Clock | None:
    now, low, high = (number(policy / f"scaling_{limit}_freq") for limit in ("cur", "min", "max"))  # kHz
    if low is None or high is None:
        return None
    return Clock(
        name="CPU",
        mhz=None if now is None else now / 1e3,
        min_mhz=low / 1e3,
        max_mhz=high / 1e3,
        governor=text(policy / "scaling_governor"),
    )
