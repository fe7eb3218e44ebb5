"""How far a model is from what the device could do: ceilings, the place of each block below them, what to try next.

A block of a model cannot be done sooner than its operations take at the device's peak rate, nor than its bytes take at
the memory's (Williams, Waterman and Patterson, Roofline, 2009). What is predicted for devices that are not here is that
floor, never a measurement: no real engine reaches it, and starting its kernels is not counted.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from dpal_edge.runtime.backend import physical_cores
from dpal_edge.runtime.device import cpu_features, jetson

_AMPERE_INT8 = 4096  # operations of a streaming multiprocessor and cycle, dense; f16 does half
_NVIDIA = (
    "NVIDIA's data sheets: multiprocessors x 4096 x GHz for dense int8, half for f16; memory clock x 2 x bus width"
)
_MEMORY = "from memory, unverified"

_SIDE, _CHAIN = 1024, 4  # of the matrices that are multiplied to find peaks, and how many products make a call
_LEAST_BYTES = 3 << 20  # that bandwidth is measured on
_SECONDS = 0.4  # that each ceiling is sought for

_SIZE = re.compile(r" \d+ GB.*| T\d+$")  # what the device tree does not tell of a module's name

_MUCH_MOVED = 0.05  # of a block's time, from which moving data is worth a word
_MUCH_QUANTIZED = 0.10
_MUCH_OUTSIDE = 0.15  # of a call, outside of kernels
_NEAR = 0.6  # of the ceiling, from which a block is done with
_FASTER = 1.5  # that another precision must be before it is named


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a device can do at most."""

    name: str
    source: str  # where that is from, in words
    bandwidth_gb_s: float  # 1e9 bytes per second
    peak_gops: Mapping[str, float]  # 1e9 operations per second, by precision; what is unknown is left out

    def floor_ms(self, operations: Mapping[str, float], size: float) -> tuple[float, str]:
        """Return the least time of so many operations by precision and so many bytes, and what it is bound by.

        Operations of a precision whose peak is unknown take no time.
        """
        computing = sum(n / self.peak_gops[kind] for kind, n in operations.items() if kind in self.peak_gops) / 1e6
        moving = size / self.bandwidth_gb_s / 1e6
        return (computing, "compute") if computing > moving else (moving, "memory")


def _orin(name: str, processors: int, ghz: float, bandwidth: float) -> Ceilings:
    int8 = processors * _AMPERE_INT8 * ghz
    return Ceilings(name=name, source=_NVIDIA, bandwidth_gb_s=bandwidth, peak_gops={"int8": int8, "f16": int8 / 2})


# Super is a power mode of JetPack 6.2. Dense rates: what is advertised counts sparse ones and DLA.
JETSONS = (
    _orin("Orin Nano 4 GB", 4, 0.625, 34),
    _orin("Orin Nano 4 GB Super", 4, 1.02, 51),
    _orin("Orin Nano 8 GB", 8, 0.625, 68),
    _orin("Orin Nano 8 GB Super", 8, 1.02, 102),
    _orin("Orin NX 8 GB", 8, 0.765, 102),
    _orin("Orin NX 16 GB", 8, 0.918, 102),
    _orin("Orin NX 16 GB Super", 8, 1.173, 102),
    _orin("AGX Orin 32 GB", 14, 0.93, 205),
    _orin("AGX Orin 64 GB", 16, 1.3, 205),
    Ceilings(name="Thor T5000", source="NVIDIA's data sheet; int8 is not stated, f16 is approximate",
             bandwidth_gb_s=273, peak_gops={"f8": 516e3, "f16": 258e3}),
    Ceilings(name="AGX Xavier", source=_MEMORY, bandwidth_gb_s=136, peak_gops={"int8": 22.6e3, "f16": 11.3e3}),
    Ceilings(name="Xavier NX", source=_MEMORY, bandwidth_gb_s=60, peak_gops={"int8": 13.5e3, "f16": 6.8e3}),
)  # fmt: skip


def find_ceilings(layers: Mapping[str, Any], *, memory_mb: int | None = None) -> Ceilings | None:
    """Return the ceilings of what ran an entry of "layers": measured on a CPU, from the table on a Jetson.

    Takes about two seconds on a CPU.

    Args:
        layers: as ``profile_layers`` returns it.
        memory_mb: of this machine, which tells modules of one name apart.

    Returns:
        None where neither is known, as for a desktop's GPU.
    """
    if " cpu" in layers["engine"]:
        size = sum((g["weight_bytes"] or 0) + (g["activation_bytes"] or 0) for g in layers["groups"])
        return measure_ceilings(int(size))
    board = jetson()
    return jetson_ceilings(board.module, memory_mb) if board else None


def jetson_ceilings(module: str, memory_mb: int | None) -> Ceilings | None:
    """Return the row of the table for a module as the device tree calls it; None where there is none.

    Where a module has a Super mode its rates are returned, because a floor must not be too high.

    Args:
        module: for example "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super".
        memory_mb: its memory, of which the system hides some; None takes the largest of its name.
    """
    said = module.replace("Jetson ", "").lower()
    rows = [row for row in JETSONS if _SIZE.sub("", row.name).lower() in said]
    if not rows:
        return None
    sizes = sorted({int(word) for row in rows for word in row.name.split() if word.isdigit()})
    size = next(
        (one for one in sizes if memory_mb is not None and memory_mb / 1024 <= one), sizes[-1] if sizes else None
    )
    return max((row for row in rows if size is None or f" {size} GB" in row.name), key=lambda row: row.peak_gops["f16"])


def measure_ceilings(size: int) -> Ceilings:
    """Measure this machine's CPU: products of large matrices in each precision, and streaming through memory.

    Memory is streamed through as many bytes as the model has, because that is what it can be fast on: what fits a
    cache comes from there at every call. Products are OpenVINO's where it is installed, else numpy's in f32 alone.

    Args:
        size: bytes of the model's weights and activations.
    """
    if find_spec("openvino"):
        kinds = ("f32", "bf16", "int8") if cpu_features().fast_bf16 else ("f32", "int8")
        how = "OpenVINO"
        calls = {kind: _openvino_product(kind) for kind in kinds}
    else:
        how = "numpy; other precisions need OpenVINO"
        calls = {"f32": _numpy_product()}
    operations = 2 * _SIDE**3 * _CHAIN
    size = max(size, _LEAST_BYTES)
    return Ceilings(
        name=cpu_features().model,
        source=f"measured: the best of products of {_SIDE} x {_SIDE} matrices ({how}), and of adding arrays of "
        f"{size / 1e6:.0f} MB in all, on {physical_cores()} threads",
        bandwidth_gb_s=measure_bandwidth(size),
        peak_gops={kind: operations / _least_seconds(call) / 1e9 for kind, call in calls.items()},
    )


def measure_bandwidth(size: int) -> float:
    """Return the best 1e9 bytes per second of a sum of two arrays into a third, three arrays of ``size`` bytes in all.

    Source: STREAM (McCalpin, 1995), the kernel "Add": two arrays are read and one is written.
    """
    threads = physical_cores()
    values = max(size // (3 * threads * 8), 1)
    arrays = [[np.full(values, float(i)) for i in range(3)] for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _least_seconds(lambda: list(pool.map(lambda a: np.add(a[0], a[1], out=a[2]), arrays)))
    return 3 * 8 * values * threads / seconds / 1e9


def build_roofline(
    layers: Mapping[str, Any], ceilings: Ceilings | None, *, others: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Place each block of an entry of "layers" below the ceilings, JSON-ready; docs/profile.md describes it.

    Args:
        layers: as ``profile_layers`` returns it.
        ceilings: of what ran it; None where unknown, so that only the work of each block is told.
        others: entries of the same run, which may show that another artifact is the better one here.
    """
    groups = [_place(group, layers, ceilings) for group in layers["groups"]]
    known = [group for group in groups if group["operations"] is not None]
    floor = sum(group["floor_ms"] or 0.0 for group in known)
    total = {
        "ms": layers["plain_ms"],
        "operations": sum(group["operations"] for group in known),
        "bytes": sum(group["bytes"] for group in known),
        "floor_ms": floor or None,
        "achieved_share": floor / layers["plain_ms"] if floor else None,
    }
    return {
        "file": layers["file"],
        "engine": layers["engine"],
        "batch": layers["batch"],
        "device": ceilings and {**asdict(ceilings), "peak_gops": dict(ceilings.peak_gops)},
        "groups": groups,
        "total": total,
        "advice": advise(layers, groups, ceilings, others),
        "floors": jetson_floors(layers) if known else [],
    }


def jetson_floors(layers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each Jetson of the table the least time that the same call could take: a floor, no measurement.

    What the file quantizes counts as int8 where the module's rate is known, all else as f16. Weights are read once,
    and nothing else: what flows between layers may stay on the chip.
    """
    known = [group for group in layers["groups"] if group["operations"] is not None]
    operations, int8 = (sum(group[key] for group in known) for key in ("operations", "int8_operations"))
    weights = sum(group["half_weight_bytes"] for group in known)
    floors = []
    for device in JETSONS:
        fast = int8 if "int8" in device.peak_gops else 0
        floor, bound = device.floor_ms({"int8": fast, "f16": operations - fast}, weights)
        floors.append({"device": device.name, "floor_ms": floor, "bound": bound, "source": device.source})
    return floors


def advise(
    layers: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], ceilings: Ceilings | None,
    others: Sequence[Mapping[str, Any]] = (),
) -> list[str]:  # fmt: skip
    """Return what to try next, in sentences, that which touches most of the time first."""
    found: list[tuple[float, str]] = []
    quantized = any(group["int8_operations"] for group in layers["groups"])
    faster = [
        other for other in others
        if quantized and other["batch"] == layers["batch"] and other["plain_ms"] < layers["plain_ms"]
        and not any(group["int8_operations"] for group in other["groups"])
    ]  # fmt: skip
    if faster:
        best = min(faster, key=lambda other: other["plain_ms"])
        found.append((layers["plain_ms"], f"INT8 is slower here: {layers['plain_ms']:.2f} ms, and {best['file']} on "
                      f"{best['engine']} takes {best['plain_ms']:.2f} ms; use that"))  # fmt: skip
    if (outside := layers["unaccounted_share"]) > _MUCH_OUTSIDE:
        found.append((outside * layers["host_ms"], f"{outside:.0%} of a call is outside of kernels (starting them, "
                      "copies, Python); larger batches share that"))  # fmt: skip
    reasons: dict[str, float] = {}
    for group in groups:
        for rule, ms in group["rules"].items():
            reasons[rule] = reasons.get(rule, 0.0) + ms
    found += [(ms, f"{rule}: {_WORDS[rule]} ({ms:.2f} of {layers['sum_ms']:.2f} ms)")
              for rule, ms in reasons.items() if rule != _DONE]  # fmt: skip
    return [text for _, text in sorted(found, key=lambda item: -item[0])]


# What each rule of _rules says, in a sentence.
_DONE = "at the ceiling"
_WORDS = {
    "attention in parts": "the two products and the softmax of attention are kernels of their own; OpenVINO fuses "
    "them, and so does TensorRT where what surrounds them is f16",
    "int8 not used": "what the file quantizes is computed in float here, with the rounding of int8 and without its "
    "speed; use the float artifact, or an engine that has int8 kernels",
    "quantizing": "kernels of their own turn floats into int8 and back, which other engines fuse into products",
    "moving data": "kernels that compute nothing: transposes, reorders, casts; the list of kernels names them",
    "bf16 is faster": "products are in f32 where bf16 is much faster here; OpenVINO computes in bf16 on request, "
    "and `dpal-edge install` tells whether that is accurate enough",
    "weights": "the time is that of reading weights, whatever the number of images; more images per call cost little",
    "small kernels": "far below both ceilings: many kernels, each too short to fill the device; more images per call, "
    "or kernels fused, help",
    _DONE: "near what the device can do; only fewer operations, or a lower precision, make it faster",
}


def _place(group: Mapping[str, Any], layers: Mapping[str, Any], ceilings: Ceilings | None) -> dict[str, Any]:
    """Return the place of one block."""
    if group["operations"] is None:
        return {"group": group["group"], "ms": group["ms"], "operations": None, "bytes": None, "intensity": None,
                "precision": None, "bound": None, "ceiling_gops": None, "achieved_gops": None, "floor_ms": None,
                "achieved_share": None, "rules": {}, "next": ""}  # fmt: skip
    size = group["weight_bytes"] + group["activation_bytes"]
    operations = executed_operations(group)
    floor, bound = ceilings.floor_ms(operations, size) if ceilings else (None, None)
    placed = {
        "group": group["group"],
        "ms": group["ms"],
        "operations": group["operations"],
        "bytes": size,
        "intensity": group["operations"] / size if size else None,
        "precision": max(operations, key=lambda kind: operations[kind]) if group["operations"] else None,
        "bound": bound,
        "ceiling_gops": group["operations"] / floor / 1e6 if floor else None,
        "achieved_gops": group["operations"] / group["ms"] / 1e6 if group["ms"] else None,
        "floor_ms": floor,
        "achieved_share": floor / group["ms"] if floor and group["ms"] else None,
    }
    rules = _rules(group, placed, layers, ceilings)
    return {**placed, "rules": rules, "next": _WORDS[next(iter(rules))] if rules else ""}


def executed_operations(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the operations of a block by the precision that its kernels really computed in."""
    kinds: Mapping[str, float] = group["precisions"]
    floats = {kind: ms for kind, ms in kinds.items() if kind != "int8"}
    other = max(floats, key=lambda kind: floats[kind]) if floats else "f32"
    int8 = group["int8_operations"] if "int8" in kinds else 0
    return {kind: n for kind, n in (("int8", int8), (other, group["operations"] - int8)) if n}


def _rules(
    group: Mapping[str, Any], placed: Mapping[str, Any], layers: Mapping[str, Any], ceilings: Ceilings | None
) -> dict[str, float]:
    """Return the rules that a block meets, and the milliseconds that each is about, the most telling first."""
    ms = group["ms"]
    if not ms:
        return {}
    attention, share, floor = layers["attention"], placed["achieved_share"], placed["floor_ms"] or 0.0
    peaks = ceilings.peak_gops if ceilings else {}
    f32, bf16 = peaks.get("f32", 0.0), peaks.get("bf16", 0.0)
    compute, far = placed["bound"] == "compute", share is not None and share < _NEAR
    unfused = group["group"].endswith("attention") and bool(attention) and not attention["fused"]
    checks = {
        "attention in parts": (unfused, ms),
        "int8 not used": (bool(group["int8_operations"]) and "int8" not in group["precisions"], ms),
        "quantizing": (group["quantize_ms"] > _MUCH_QUANTIZED * ms, group["quantize_ms"]),
        "moving data": (group["movement_ms"] > _MUCH_MOVED * ms, group["movement_ms"]),
        "bf16 is faster": (compute and placed["precision"] == "f32" and bf16 > _FASTER * f32, ms),
        "weights": (placed["bound"] == "memory" and group["weight_bytes"] > group["activation_bytes"], ms),
        "small kernels": (far and group["kernels"] > 1, ms - floor),
        _DONE: (share is not None and not far, ms),
    }
    return {rule: at_stake for rule, (met, at_stake) in checks.items() if met}


def _least_seconds(call: Callable[[], object]) -> float:
    """Return the shortest of the calls within a moment; a ceiling is what a machine does undisturbed."""
    call()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _numpy_product() -> Callable[[], object]:
    matrix = np.random.default_rng(0).normal(size=(_SIDE, _SIDE)).astype(np.float32)
    return lambda: [matrix @ matrix for _ in range(_CHAIN)]


def _openvino_product(precision: str) -> Callable[[], object]:
    """Return a call that multiplies square matrices, one after the other."""
    import openvino as ov
    from openvino import opset13 as ops

    from dpal_edge.runtime._openvino import core, settings

    rng = np.random.default_rng(0)
    value = start = ops.parameter([_SIDE, _SIDE], np.float32)
    for _ in range(_CHAIN):
        weight = ops.constant(rng.normal(0, _SIDE**-0.5, (_SIDE, _SIDE)).astype(np.float32))
        if precision == "int8":
            bounds = [ops.constant(np.float32(bound)) for bound in (-4.0, 4.0)]
            value, weight = (ops.fake_quantize(one, *bounds, *bounds, 255) for one in (value, weight))
        value = ops.matmul(value, weight, transpose_a=False, transpose_b=False)
    how = settings("cpu", physical_cores(), "f32" if precision == "int8" else precision, 1)
    request = core().compile_model(ov.Model([value], [start]), "CPU", how).create_infer_request()
    data = rng.normal(size=(_SIDE, _SIDE)).astype(np.float32)
    return lambda: request.infer({0: data})
