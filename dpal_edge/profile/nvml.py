"""NVIDIA GPUs through NVML, where the package nvidia-ml-py is installed."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

# Bits of nvmlClocksEventReasons (nvml.h) that mean the GPU is slower than asked for; idle and user settings are not.
_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU at one moment; what its driver does not tell is None or empty."""

    name: str  # "gpu0" and so on, in NVML's order
    mw: float | None  # of the whole card, which its driver averages over up to a second
    joules: float | None  # since the driver was loaded; from Volta on
    load: float | None  # percent
    mhz: float | None  # of its multiprocessors
    temperature_c: float | None
    throttled: tuple[str, ...]


class Nvml:
    """The driver's management library, opened."""

    def __init__(self, pynvml: Any) -> None:
        self._nvml = pynvml
        count = self._ask("nvmlDeviceGetCount") or 0
        handles = {f"gpu{index}": self._ask("nvmlDeviceGetHandleByIndex", index) for index in range(count)}
        self._handles = {name: handle for name, handle in handles.items() if handle is not None}

    def cards(self) -> list[Card]:
        """Read every GPU."""
        return [self._card(name, handle) for name, handle in self._handles.items()]

    def close(self) -> None:
        """Let go of the library."""
        self._ask("nvmlShutdown")

    def _card(self, name: str, handle: object) -> Card:
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption", handle)
        utilization = self._ask("nvmlDeviceGetUtilizationRates", handle)
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if reasons is None:  # drivers and packages before 535 call it so
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0
        return Card(
            name=name,
            mw=self._ask("nvmlDeviceGetPowerUsage", handle),
            joules=None if millijoules is None else millijoules / 1000,
            load=None if utilization is None else utilization.gpu,
            mhz=self._ask("nvmlDeviceGetClockInfo", handle, self._nvml.NVML_CLOCK_SM),
            temperature_c=self._ask("nvmlDeviceGetTemperature", handle, self._nvml.NVML_TEMPERATURE_GPU),
            throttled=tuple(reason for bit, reason in _REASONS.items() if reasons & bit),
        )

    def _ask(self, function: str, *arguments: object) -> Any:
        """Call one of the library's functions; None where it or its driver does not have it."""
        call: Callable[..., Any] | None = getattr(self._nvml, function, None)
        try:
            return call(*arguments) if call else None
        except self._nvml.NVMLError:
            return None


def open_nvml() -> Nvml | str:
    """Open NVML, or say in a sentence why it cannot be."""
    try:
        pynvml = import_module("pynvml")
    except ImportError:
        return "NVIDIA GPU: the package that reads one is not installed: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVIDIA GPU: its driver does not answer ({error}); in a container, start it with --gpus all"
    return Nvml(pynvml)
