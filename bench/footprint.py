"""What an installation weighs: the megabytes that each extra puts into a clean environment, and whether torch is there.

    python bench/footprint.py [--out bench/results/footprint.json]

Needs the network or pip's cache. Without what every virtual environment has of its own (pip and its like).
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXTRAS = ("openvino", "onnxruntime", "openvino,camera,serve")


def main() -> None:
    """Measure, and file what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "footprint.json")
    options = parser.parse_args()
    results: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine(), "extras": {}}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"  # pip would leave its build in the tree
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "tests", "bench"))
        pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, str(source))
        [wheel] = Path(folder).glob("*.whl")
        results["wheel_mb"] = megabytes([wheel])
        for extras in EXTRAS:
            results["extras"][extras] = install(wheel, extras, Path(folder) / extras)
            print(extras, results["extras"][extras]["mb"], flush=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def install(wheel: Path, extras: str, environment: Path) -> dict[str, Any]:
    """Install the wheel with ``extras`` into a new environment; return its size, its parts, and how fast it starts."""
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    before = files_in(environment)
    pip(str(python), "install", f"{wheel}[{extras}]")
    added = files_in(environment) - before
    sizes = {file: file.stat().st_size for file in added}
    packages: dict[str, int] = {}
    for file, size in sizes.items():
        _, inside, rest = str(file.relative_to(environment)).rpartition("site-packages/")
        name = rest.split("/")[0] if inside else "scripts"
        packages[name] = packages.get(name, 0) + size
    largest = sorted(packages.items(), key=lambda item: -item[1])[:8]
    start = time.perf_counter()
    subprocess.run([environment / "bin" / "dpal-edge", "--help"], check=True, stdout=subprocess.DEVNULL)
    return {
        "mb": megabytes(list(added)),
        "torch": any(name.startswith("torch") for name in packages),
        "largest_mb": {name: round(size / 1e6, 1) for name, size in largest},
        "help_s": round(time.perf_counter() - start, 2),
    }


def files_in(folder: Path) -> set[Path]:
    """Return the files below a folder, links apart."""
    return {path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def megabytes(files: list[Path]) -> float:
    """Return the size of files in MB of 1e6 bytes."""
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)


def pip(python: str, *arguments: str) -> None:
    """Run pip of an environment."""
    subprocess.run([python, "-m", "pip", "-qq", "--disable-pip-version-check", *arguments], check=True)


if __name__ == "__main__":
    main()
