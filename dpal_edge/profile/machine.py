"""What a report says of the machine and of the bundle, so that two reports can be told apart."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dpal_edge.files import sha256_of
from dpal_edge.manifest import Manifest, manifest_path
from dpal_edge.profile.forms import Form
from dpal_edge.profile.telemetry import Telemetry
from dpal_edge.runtime.device import cpu_features, gpus, jetson

_ENGINES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13-bindings")  # packages


def describe_machine(telemetry: Telemetry) -> dict[str, Any]:
    """Return ``report["machine"]``; no name of the host."""
    cpu, board = cpu_features(), jetson()
    locked = [clock.locked for clock in telemetry.clocks]
    return {
        "model": telemetry.model,
        "cpu": cpu.model,
        "cores": cpu.cores,
        "flags": list(cpu.flags),
        "gpus": [gpu.name for gpu in gpus()],
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "l4t": board.l4t if board else None,
        "power_mode": telemetry.power_mode,
        "clocks": [
            {
                "name": clock.name,
                "mhz": clock.mhz,
                "min_mhz": clock.min_mhz,
                "max_mhz": clock.max_mhz,
                "governor": clock.governor,
                "locked": clock.locked,
            }
            for clock in telemetry.clocks
        ],
        "clock_state": "unknown" if not locked else "locked" if all(locked) else "not locked",
        "engines": [f"{name} {found}" for name in _ENGINES if (found := _version(name))],
    }


def describe_bundle(bundle: Path, manifest: Manifest, used: Form) -> dict[str, Any]:
    """Return ``report["bundle"]``."""
    return {
        "path": str(bundle),
        "name": manifest.model,
        "sha256": sha256_of(manifest_path(bundle)),
        "input": {"name": manifest.input.name, "size": list(manifest.input.size)},
        "heads": [{"name": head.name, "task": head.task, "shape": list(head.shape)} for head in manifest.heads],
        "artifacts": [
            {
                "target": artifact.target,
                "file": artifact.file.file,
                "precision": artifact.precision,
                "bytes": sum(spec.bytes for spec in (artifact.file, *artifact.data)),
            }
            for artifact in manifest.artifacts
        ],
        "used": used.to_dict(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
