"""TensorRT's own command line, for devices whose Python cannot import TensorRT: it builds, checks and times as well."""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.files import atomic_path
from dpal_edge.runtime.tensorrt import BuildOptions, require_strong_types

_FILE = Path("/usr/src/tensorrt/bin/trtexec")  # where JetPack and NVIDIA's packages put it
_VERSION = re.compile(r"TensorRT v(?:(\d)(\d)|(\d\d)(\d\d))(\d\d)\b")  # v8602 is 8.6.2, v100300 is 10.3.0
_MIB = 1 << 20


class TrtExec:
    """A trtexec; what its release does not know is not asked of it."""

    def __init__(self, file: Path, inputs: Mapping[str, tuple[int, ...]]) -> None:
        """Ask what it knows.

        Args:
            file: the program.
            inputs: by name, the shape of one image of each input.

        Raises:
            BackendUnavailable: it does not start, or is too old.
        """
        self._file, self._inputs = file, inputs
        text = self._run("--help")
        self._known = {word.split("=")[0].strip(",") for word in text.split() if word.startswith("--")}
        self.name = "trtexec"
        if told := _VERSION.search(text):
            version = ".".join(str(int(part)) for part in told.groups() if part)
            require_strong_types(self.name, version)
            self.name = f"trtexec {version}"

    @classmethod
    def find(cls, inputs: Mapping[str, tuple[int, ...]]) -> "TrtExec":
        """Use the one on the path, or where NVIDIA's packages put it.

        Raises:
            BackendUnavailable: there is none, or it is too old.
        """
        found = shutil.which("trtexec") or (str(_FILE) if _FILE.is_file() else None)
        if found is None:
            raise BackendUnavailable(f"there is no trtexec either, on the path or at {_FILE}")
        return cls(Path(found), inputs)

    def build(self, graph: Path, engine: Path, options: BuildOptions, timing: Path) -> None:
        """Write the engine of ``graph``, as ``Builder.build``."""
        with atomic_path(engine) as temporary:
            arguments = [f"--onnx={graph}", f"--saveEngine={temporary}", f"--timingCacheFile={timing}"]
            for name, batch in zip(("min", "opt", "max"), options.batches, strict=True):
                arguments.append(f"--{name}Shapes={self._shapes(batch)}")
            arguments.append(f"--memPoolSize=workspace:{options.workspace // _MIB}")
            arguments.append(f"--builderOptimizationLevel={options.optimization_level}")
            arguments += [flag for flag in ("--stronglyTyped", "--skipInference") if flag in self._known]
            self._run(*arguments)
            if not temporary.exists():
                raise ModelFileError(f"{graph.name}: {self.name} says it is done, and wrote no engine")

    def outputs(self, engine: Path, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.float32]]:
        """Run an engine on arrays by input name; return its outputs by name.

        Raises:
            ModelFileError: it fails, or gives what is not a number.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder, f"{i}.bin") for i, name in enumerate(feeds)}
            for name, array in feeds.items():
                array.tofile(files[name])
            count = len(next(iter(feeds.values())))
            told = Path(folder, "outputs.json")
            loads = ",".join(f"{name}:{file}" for name, file in files.items())
            once = ("--iterations=1", "--duration=0", "--warmUp=0")
            self._run(f"--loadEngine={engine}", f"--shapes={self._shapes(count)}", f"--loadInputs={loads}",
                      f"--exportOutput={told}", *once)  # fmt: skip
            return {
                output["name"]: np.array(output["values"], np.float32).reshape(
                    [int(side) for side in output["dimensions"].split("x")]
                )
                for output in self._read(told)
            }

    def times(self, engine: Path, batch: int) -> list[float]:
        """Return the seconds of calls with ``batch`` images, each with its copies to the device and back."""
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder, "times.json")
            transfers = ("--includeDataTransfers",) if "--includeDataTransfers" in self._known else ()
            self._run(f"--loadEngine={engine}", f"--shapes={self._shapes(batch)}", f"--exportTimes={told}",
                      "--warmUp=200", "--duration=1", "--iterations=10", *transfers)  # fmt: skip
            return [call["latencyMs"] / 1e3 for call in self._read(told)]

    def _shapes(self, batch: int) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, (batch, *shape)))}" for name, shape in self._inputs.items())

    def _read(self, file: Path) -> Any:
        """Return what it wrote, as JSON that has no word for the ``nan`` and ``inf`` of an engine that overflows."""
        text = file.read_text(encoding="utf-8")
        try:
            return json.loads(text)
        except ValueError as error:
            raise ModelFileError(f"{self.name}: the engine gives values that are no numbers ({error})") from error

    def _run(self, *arguments: str) -> str:
        """Run it; return what it prints.

        Raises:
            ModelFileError: it fails; the last error it prints says why.
        """
        try:
            done = subprocess.run(
                [str(self._file), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
        except OSError as error:
            raise BackendUnavailable(f"{self._file} does not start ({error})") from error
        if done.returncode:
            errors = [line.strip() for line in done.stdout.splitlines() if "[E]" in line]
            reason = errors[-1] if errors else f"exit status {done.returncode}"
            raise ModelFileError(f"{self._file.name} {arguments[0]} failed: {reason}")
        return done.stdout
