"""Power, heat and clocks of this machine while a block of code runs.

All of it is read from sysfs, and from NVML where there is an NVIDIA GPU. tegrastats is not started: it would be a
second process beside what is measured, most containers lack it, and it tells nothing of throttling. All that it would
add is the load of the memory. Recordings of it are for :mod:`dpal_edge.profile.tegrastats`.
"""

from collections.abc import Iterator
from functools import partial
from math import inf
from pathlib import Path
from threading import Event, Lock, Thread
from time import monotonic
from types import TracebackType

from dpal_edge.profile.nvml import Card, Nvml, open_nvml
from dpal_edge.profile.samples import Rail, Sample, energy_j, metered_j, total_power_mw, warnings
from dpal_edge.profile.sysfs import Clock, Sysfs


class Telemetry:
    """A sampler of this machine's sensors, which runs in a thread while its ``with`` block does.

    ``samples`` grows by one at the start, one per interval and one at the end. Nothing is changed on the machine,
    nothing needs root, and what is absent is told in ``missing`` instead of raised.
    """

    def __init__(self, sysfs: Sysfs, nvml: Nvml | str, interval_s: float) -> None:
        self._sysfs = sysfs
        self._nvml = nvml if isinstance(nvml, Nvml) else None
        self._interval_s = interval_s
        self._lock = Lock()  # reading moves the counters on, so one reads at a time
        self._stop = Event()
        self._thread: Thread | None = None
        self.samples: list[Sample] = []
        self.model = sysfs.model()  # from the device tree; empty on a PC
        self.power_mode = sysfs.power_mode()  # of nvpmodel; None where unknown
        self.clocks: list[Clock] = sysfs.clocks()  # when opened
        self.missing = [*_missing(sysfs, nvml)]  # sentences: what is not there, and how to get it

    @classmethod
    def open(cls, root: Path = Path("/"), *, interval_s: float = 1.0) -> "Telemetry":
        """Find the sensors of the machine whose file system is ``root``; NVML is asked only for the real one."""
        if interval_s <= 0:
            raise ValueError(f"interval_s is {interval_s}, expected more than 0")
        nvml = open_nvml() if root == Path("/") else "NVIDIA GPU: not looked for in a copied file system"
        return cls(Sysfs(root), nvml, interval_s)

    def __enter__(self) -> "Telemetry":
        self.sample()
        self._thread = Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
            self._thread = None
        self.sample()
        if self._nvml:
            self._nvml.close()

    @property
    def warnings(self) -> list[str]:
        """Sentences on what makes numbers taken meanwhile doubtful: loose clocks, throttling, gaps."""
        return self.warnings_between(-inf, inf)

    def warnings_between(self, start_s: float, end_s: float) -> list[str]:
        """Return the same for numbers taken between two moments of ``time.monotonic``."""
        loose = dict.fromkeys(
            f"{clock.name} {clock.min_mhz:.0f} to {clock.max_mhz:.0f} MHz"
            + f" ({clock.governor})" * bool(clock.governor)
            for clock in self.clocks
            if not clock.locked
        )
        lock = "; lock them: sudo jetson_clocks" if _is_jetson(self._sysfs) else ""
        sentences = [f"clocks are not locked: {', '.join(loose)}{lock}"] if loose else []
        part = [sample for sample in self.samples if start_s <= (sample.time_s or 0.0) <= end_s]
        return sentences + warnings(part, self.samples)

    def sample(self) -> Sample:
        """Take a sample now, for example at a moment from which energy shall be counted."""
        with self._lock:
            sample = self._read()
            self.samples.append(sample)
        return sample

    def energy_j(self, start_s: float | None = None, end_s: float | None = None) -> dict[str, float]:
        """Return the energy between two moments of ``time.monotonic``, or between the first and the last sample.

        While the block runs a sample is taken first, so that ``end_s`` may be now.

        Returns:
            Joules by what drew them, left out where the samples do not span the time: "total" is the whole module,
            where a Jetson tells; rails by their names; "package-0", "package-0 dram" are what the CPU counted, "gpu0" a
            card. On a PC nothing measures the whole. Counted energy is exact at samples, the rest is integrated.
        """
        if self._thread:
            self.sample()
        samples = list(self.samples)
        parts = {"total": energy_j(samples, total_power_mw, start_s=start_s, end_s=end_s)}
        for name in dict.fromkeys(name for sample in samples for name in sample.rails):
            parts[name] = energy_j(samples, partial(_rail_mw, name), start_s=start_s, end_s=end_s)
        for meter in dict.fromkeys(name for sample in samples for name in sample.counters_j):
            metered = metered_j(samples, meter, start_s=start_s, end_s=end_s)
            parts[meter] = parts.get(meter) if metered is None else metered
        return {name: joules for name, joules in parts.items() if joules is not None}

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.sample()

    def _read(self) -> Sample:
        sysfs = self._sysfs
        cards = self._nvml.cards() if self._nvml else []
        gpu, emc, memory = sysfs.gpu_clock(), sysfs.emc_clock(), sysfs.memory_mb()
        return Sample(
            time_s=monotonic(),
            ram_used_mb=memory[0] if memory else None,
            ram_total_mb=memory[1] if memory else None,
            cores=sysfs.cores(),
            gpu_load=_gpu_load(sysfs, cards),
            gpu_mhz=_known(gpu.mhz) if gpu else tuple(mhz for card in cards for mhz in _known(card.mhz)),
            emc_mhz=emc.mhz if emc else None,
            temperatures_c=sysfs.temperatures_c() | {c.name: t for c in cards for t in _known(c.temperature_c)},
            rails=sysfs.rails() | {card.name: Rail(mw=mw) for card in cards for mw in _known(card.mw)},
            counters_j=sysfs.counters_j() | {card.name: joules for card in cards for joules in _known(card.joules)},
            throttled=(*sysfs.throttled(), *(f"{card.name} {why}" for card in cards for why in card.throttled)),
        )


def _known(value: float | None) -> tuple[float, ...]:
    return () if value is None else (value,)


def _rail_mw(name: str, sample: Sample) -> float | None:
    return sample.rails[name].mw if name in sample.rails else None


def _gpu_load(sysfs: Sysfs, cards: list[Card]) -> float | None:
    load = sysfs.gpu_load()
    return max((card.load for card in cards if card.load is not None), default=None) if load is None else load


def _is_jetson(sysfs: Sysfs) -> bool:
    """Whether this is a Jetson: a container may hide the device tree, but not the GPU's clock."""
    model = sysfs.model()
    return "NVIDIA" in model or "Jetson" in model or (not model and sysfs.gpu_clock() is not None)


def _missing(sysfs: Sysfs, nvml: Nvml | str) -> Iterator[str]:
    yield from _missing_power(sysfs)
    if isinstance(nvml, str) and sysfs.gpu_load() is None:
        yield nvml
    if not sysfs.temperatures_c():
        yield "temperatures: no thermal zone is readable, as in most virtual machines"
    clocks = {clock.name for clock in sysfs.clocks()}
    if "CPU" not in clocks:
        yield "CPU clocks: no cpufreq here, as in most virtual machines"
    if _is_jetson(sysfs):
        if "EMC" not in clocks:
            yield "memory clock: only root may read it on this Jetson"
        if sysfs.power_mode() is None:
            yield "power mode: /var/lib/nvpmodel/status is not readable; in a container, mount /var/lib/nvpmodel"


def _missing_power(sysfs: Sysfs) -> Iterator[str]:
    rails = sysfs.rails()
    if rails and total_power_mw(Sample(rails=rails)) is None:
        yield f"total power: {', '.join(rails)} do not cover the whole module; measure at its supply"
    if sysfs.unreadable_meters:
        files = " ".join(map(str, sysfs.unreadable_meters))
        yield f"CPU energy: only root may read it; to let everyone until the next boot: sudo chmod a+r {files}"
    if not rails and not sysfs.counters_j() and not sysfs.unreadable_meters:
        yield "power: neither rails (Jetson) nor RAPL counters (x86), as in most virtual machines; measure at the plug"
