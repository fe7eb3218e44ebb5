"""What ``dpal-edge install`` left on this device: engines, and which form of a bundle is the fastest that passed."""

import json
import os
import platform
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dpal_edge.errors import ModelFileError
from dpal_edge.files import sha256_of, write_text
from dpal_edge.manifest import manifest_path
from dpal_edge.runtime.device import cpu_features, jetson

SCHEMA = 2
BUILT_TARGETS = ("trt-fp16", "trt-int8")  # that TensorRT compiles on the device
CACHE_VARIABLE = "DPAL_EDGE_CACHE"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The form of a bundle that is used on this device."""

    target: str
    engine: str
    name: str  # of the engine that was checked, with its version and device
    precision: str | None  # that the engine was told to compute in; None: the file's own
    file: str | None  # that was built here; None: the bundle's own
    sha256: str  # of that file; empty without one, since the manifest has the bundle's


def cache_folder() -> Path:
    """Return where engines are kept: $DPAL_EDGE_CACHE, or dpal-edge in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(home) / "dpal-edge")


def device_facts() -> dict[str, str]:
    """Return what tells this device from another: its module or CPU, and its system software."""
    board = jetson()
    if board:
        return {"module": board.module, "l4t": board.l4t or "unknown"}
    return {"module": cpu_features().model, "machine": platform.machine()}


def short_hash(value: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a JSON-ready value."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def record_path(bundle: Path) -> Path:
    """Return where an installation of ``bundle`` is recorded: by the content of its manifest, which names all files."""
    return cache_folder() / "bundles" / f"{sha256_of(manifest_path(bundle))[:16]}.json"


def write_record(bundle: Path, choice: Choice, found: dict[str, Any]) -> Path:
    """Record what an installation chose, and all it found; return the path."""
    path = record_path(bundle)
    document = {"schema": SCHEMA, "bundle": str(bundle.resolve()), "device": device_facts(), "choice": vars(choice)}
    write_text(path, json.dumps({**document, **found}, indent=2) + "\n")
    return path


def read_choice(bundle: Path) -> Choice | None:
    """Return what was installed of ``bundle`` on this device; None where nothing was.

    Raises:
        ModelFileError: the record is damaged, of another device, or names an engine that is missing or was changed.
    """
    path = record_path(bundle)
    if not path.exists():
        return None
    again = f"run again: dpal-edge install {bundle}"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ModelFileError(f"{path}: schema {document['schema']}, expected {SCHEMA}; {again}")
        choice, device = Choice(**document["choice"]), document["device"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path}: not a record of an installation ({error}); {again}") from error
    if device != device_facts():
        raise ModelFileError(f"{path}: installed on {device}, this is {device_facts()}; {again}")
    if choice.file is not None:
        engine = Path(choice.file)
        if not engine.is_file():
            raise ModelFileError(f"{engine}: the installed engine is missing; {again}")
        if sha256_of(engine) != choice.sha256:
            raise ModelFileError(f"{engine}: the installed engine is damaged or replaced; {again}")
    return choice
