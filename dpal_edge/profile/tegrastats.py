"""Lines of NVIDIA's tegrastats, from JetPack 4 to 7.

The tool's output is documented only in part and changes between releases, so every field is looked for by itself and
what is unknown is passed over.
"""

import re
from datetime import datetime, timezone

from dpal_edge.profile.samples import Core, Rail, Sample

# Numbers are at most nine digits, so that no line of noise makes one that Python refuses. A field ends at a space or at
# the end of the line; with its unit required, one that was cut off is not taken for a smaller number.
_TIME = re.compile(r"^\s*(\d\d-\d\d-\d{4} \d\d:\d\d:\d\d)(?!\S)", re.ASCII)
_RAM = re.compile(r"(?<!\S)RAM (\d{1,9})/(\d{1,9})MB(?!\S)", re.ASCII)
_CPU = re.compile(r"(?<!\S)CPU \[([^\]]*)\]")
_CORE = re.compile(r"(?:(\d{1,9})%@(\d{1,9})|off)", re.ASCII)
_EMC = re.compile(r"(?<!\S)EMC_FREQ (?:(\d{1,9})%)?(?:@(\d{1,9}))?(?!\S)", re.ASCII)
# "84%@[713]", "0%@76", "@[0,0,0]"; AGX Orin on JetPack 5.0 lists its halves as GR3D and GR3D2.
_GPU = re.compile(r"(?<!\S)GR3D\d?_FREQ (?:(\d{1,9})%)?(?:@(?:(\d{1,9})|\[(\d{1,9}(?:,\d{1,9})*)\]))?(?!\S)", re.ASCII)
_TEMPERATURE = re.compile(r"(?<!\S)([A-Za-z]\w*)@(-?\d{1,9}(?:\.\d{1,9})?)C(?:/\S*)?(?!\S)", re.ASCII)
_RAIL = re.compile(r"(?<!\S)([A-Za-z]\w*) (\d{1,9})(mW|)/(\d{1,9})\3(?!\S)", re.ASCII)

_OFFLINE_C = -256.0
# NC is a channel that is not connected; the others are memory, which looks like a rail where a line was cut off.
_NO_RAILS = frozenset({"NC", "RAM", "SWAP", "IRAM"})


def parse_tegrastats(line: str) -> Sample | None:
    """Read one line of tegrastats; None where nothing in it is known.

    ``Sample.time_s`` is the wall clock's, in seconds since 1970 as if the line, which names no time zone, were in UTC;
    None before JetPack 5, which prints no time. Of two temperatures, "current/average", the first is taken.
    """
    ram = _RAM.search(line)
    emc = _EMC.search(line)
    gpu = _GPU.findall(line)
    loads = [float(load) for load, *_ in gpu if load]
    sample = Sample(
        time_s=_seconds(line),
        ram_used_mb=int(ram[1]) if ram else None,
        ram_total_mb=int(ram[2]) if ram else None,
        cores=_cores(line),
        gpu_load=max(loads, default=None),
        gpu_mhz=tuple(float(mhz) for _, one, several in gpu for mhz in (one or several).split(",") if mhz),
        emc_load=float(emc[1]) if emc and emc[1] else None,
        emc_mhz=float(emc[2]) if emc and emc[2] else None,
        temperatures_c={
            name: float(celsius) for name, celsius in _TEMPERATURE.findall(line) if float(celsius) > _OFFLINE_C
        },
        rails={
            name: Rail(mw=float(current), average_mw=float(average))
            for name, current, _, average in _RAIL.findall(line)
            if name not in _NO_RAILS
        },
    )
    return None if sample == Sample(time_s=sample.time_s) else sample


def _seconds(line: str) -> float | None:
    found = _TIME.match(line)
    if not found:
        return None
    try:
        return datetime.strptime(found[1], "%m-%d-%Y %H:%M:%S").replace(tzinfo=timezone.utc).timestamp()
    except ValueError:  # a month 13
        return None


def _cores(line: str) -> tuple[Core, ...]:
    found = _CPU.search(line)
    cores = [_CORE.fullmatch(core.strip()) for core in found[1].split(",")] if found else []
    return tuple(
        Core(load=float(core[1]), mhz=float(core[2])) if core[1] else Core() for core in cores if core is not None
    )
