"""Facts about this machine: CPU features, NVIDIA GPUs, Jetson module and JetPack."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# What decides speed: vector width, int8 dot products and bfloat16, as the kernel spells them on x86-64 and aarch64.
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
)
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})

# L4T version, or the start of it -> JetPack. 35 covers JetPack 5.0 to 5.1.6.
_JETPACKS = {
    "35": "5",
    "36.3": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5": "6.2.2",
    "38.2": "7.0",
    "38.4": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}

_QUERY_SECONDS = 5.0  # nvidia-smi answers within one; a wedged driver never does


@dataclass(frozen=True, kw_only=True)
class CpuFeatures:
    """The CPU and those of its features that decide how fast a model trains and runs."""

    model: str  # "unknown" where the kernel does not tell
    cores: int  # logical processors
    flags: tuple[str, ...]  # for example "avx512_vnni"; what does not matter to this package is left out

    @property
    def fast_bf16(self) -> bool:
        """Whether bfloat16 products run in hardware; without, training in bfloat16 is slower than in float32."""
        return not _BF16_FLAGS.isdisjoint(self.flags)

    @property
    def fast_int8(self) -> bool:
        """Whether int8 dot products run in hardware; without, an int8 model gains little over float32."""
        return not _INT8_FLAGS.isdisjoint(self.flags)


@dataclass(frozen=True, kw_only=True)
class Jetson:
    """An NVIDIA Jetson module and its system software."""

    module: str  # for example "NVIDIA Jetson Orin Nano Developer Kit"
    l4t: str | None  # for example "36.4.3"; None in a container, which does not see it
    jetpack: str | None  # for example "6.2"; None where ``l4t`` is unknown or newer than this package


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it."""

    name: str
    memory_mib: int | None  # None where memory is shared with the CPU, as on Jetson
    driver: str
    compute_capability: str  # for example "9.0"


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> CpuFeatures:
    """Read the kernel's description of the CPU; features stay empty where ``cpuinfo`` is missing."""
    first: dict[str, str] = {}  # every key of the first processor that has it
    cores = 0
    for line in _text(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        cores += key.strip() == "processor"
        first.setdefault(key.strip(), value.strip())
    known = first.get("flags", first.get("Features", "")).split()
    model = first.get("model name") or (f"ARM part {first['CPU part']}" if "CPU part" in first else "unknown")
    return CpuFeatures(
        model=model,
        cores=cores or os.cpu_count() or 1,
        flags=tuple(flag for flag in _FLAGS if flag in known),
    )


def jetson(root: Path = Path("/")) -> Jetson | None:
    """Describe the Jetson whose file system is ``root``; None on any other machine."""
    module = _text(root / "proc/device-tree/model").strip("\0\n ")
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release"))
    if not release and "Jetson" not in module:
        return None
    l4t = f"{release[1]}.{release[2]}" if release else None
    return Jetson(module=module or "unknown", l4t=l4t, jetpack=_jetpack(l4t) if l4t else None)


def gpus(command: str = "nvidia-smi") -> list[Gpu]:
    """List the NVIDIA GPUs; empty without a GPU, a driver or an answer within 5 seconds."""
    query = [command, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [_gpu(line) for line in answer.stdout.splitlines() if line.count(",") >= 3]


def _gpu(line: str) -> Gpu:
    name, memory, driver, capability = (part.strip() for part in line.rsplit(",", 3))
    return Gpu(
        name=name,
        memory_mib=int(memory) if memory.isdigit() else None,  # "[N/A]" on Jetson
        driver=driver,
        compute_capability=capability,
    )


def _jetpack(l4t: str) -> str | None:
    """Look up the longest known start of ``l4t``, cut at its dots."""
    parts = l4t.split(".")
    starts = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((_JETPACKS[start] for start in starts if start in _JETPACKS), None)


def _text(path: Path) -> str:
    """Return what ``path`` holds, or nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
