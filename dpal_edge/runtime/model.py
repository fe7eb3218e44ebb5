"""The model of a bundle, opened: images in, the raw output of every head out, as its manifest promises."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.manifest import Artifact, HeadSpec, Manifest
from dpal_edge.runtime.backend import ENGINES, Backend, open_backend
from dpal_edge.runtime.installed import read_choice

_MAX_BATCH = 32  # images per pass: bounds the memory a crowd can take
_FIRST_FRAMES, _FIRST_PEOPLE = 1, 5  # images of the first pass: OpenVINO compiles for one or for several
_COMPILED = "trt"  # how targets begin that are compiled before they run

Outputs = dict[str, NDArray[np.float32]]  # (n, ...) by head


class Model:
    """A backend that has shown that it keeps a manifest's contract. Use it from one thread at a time."""

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        """Most callers want ``open``; the backend must be loaded from an artifact of the manifest.

        Raises:
            ModelFileError: the model has other inputs or outputs than its manifest says.
        """
        self.name = backend.name
        self.manifest = manifest
        self._backend: Backend | None = backend
        _check_inputs(backend, manifest)
        # Outputs can only be seen by running; this is also the slow first pass of most engines. Frames come one at a
        # time, people in numbers.
        count = _FIRST_FRAMES if manifest.detects else _FIRST_PEOPLE
        self.run(np.zeros((count, *manifest.input.size, 3), np.uint8))

    @classmethod
    def open(
        cls, bundle: Path, *, engine: str | None = None, device: str | None = None, threads: int | None = None
    ) -> "Model":
        """Load what ``dpal-edge install`` chose of ``bundle``, or else the first artifact that can run here.

        Hashes are checked first.

        Args:
            bundle: folder written by ``dpal-edge export``, or a manifest by its name.
            engine: the one to use, whatever is installed.
            device: the one to use, likewise; by default the engine's usual one.
            threads: CPU threads inside one operator; by default one per physical core.

        Raises:
            ModelFileError: the bundle or what was installed of it is damaged, another version of the engine was
                installed with, or the model does not fit its manifest.
            BackendUnavailable: no engine here runs any of its artifacts.
        """
        manifest = Manifest.read(bundle)
        choice = read_choice(bundle) if engine is None and device is None else None
        if choice is None:
            path = manifest.open_artifact(bundle, choose_artifact(bundle, manifest, engine=engine))
        elif choice.file is not None:
            path, engine = Path(choice.file), choice.engine
        else:
            artifact = choose_artifact(bundle, manifest, engine=choice.engine, target=choice.target)
            path, engine = manifest.open_artifact(bundle, artifact), choice.engine
        precision = choice.precision if choice else None
        backend = open_backend(path, engine=engine, device=device, threads=threads, precision=precision)
        if choice is not None and backend.name != choice.name:
            raise ModelFileError(
                f"{bundle}: installed with {choice.name}, here is {backend.name}, which was not checked; run again: "
                f"dpal-edge install {bundle}"
            )
        return cls(backend, manifest)

    def run(self, images: NDArray[np.uint8], heads: Sequence[HeadSpec] | None = None) -> Outputs:
        """Map uint8 RGB images (n, H, W, 3) of the model's size to the output of each head (n, ...); n may be 0.

        Args:
            images: as above.
            heads: that are wanted, of the manifest; None is all.

        Raises:
            ModelFileError: an output is not of the manifest's shape.
            ValueError: the model is closed.
        """
        if self._backend is None:
            raise ValueError("the model is closed; open it again")
        wanted = self.manifest.heads if heads is None else heads
        names = None if heads is None else [head.name for head in heads]
        parts = []
        for start in range(0, len(images) if wanted else 0, _MAX_BATCH):
            batch = images[start : start + _MAX_BATCH]
            parts.append(self._backend.run({self.manifest.input.name: batch}, names))
            for head in wanted:
                _check_output(head, parts[-1], len(batch))
        if len(parts) == 1:
            return parts[0]
        empty = {head.name: np.empty((0, *head.shape), np.float32) for head in wanted}
        return {name: np.concatenate([array, *(part[name] for part in parts)]) for name, array in empty.items()}

    def close(self) -> None:
        """Free the memory."""
        self._backend = None


def read_goldens(bundle: Path, manifest: Manifest) -> tuple[NDArray[np.uint8], Outputs]:
    """Return the images (n, H, W, 3) that a bundle was proven on, and the float32 outputs of torch for them.

    Raises:
        ModelFileError: the file is missing, or damaged.
    """
    file = manifest.file(bundle, manifest.golden)
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:  # never unpickles
            return arrays["images"], {head.name: arrays[head.name] for head in manifest.heads}
    except (OSError, EOFError, KeyError, MemoryError, ValueError, BadZipFile, ZlibError) as error:
        raise ModelFileError(f"{file}: not the goldens of this bundle ({error}); export it again") from error


def largest_errors(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Return by head the largest absolute error over the largest absolute value that is expected."""
    return {
        name: float(np.abs(found[name] - array).max()) / max(float(np.abs(array).max()), np.finfo(np.float32).tiny)
        for name, array in expected.items()
    }


def least_cosines(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Return by head the least cosine similarity of an image's output with what is expected; 1 where that is all 0."""
    least = {}
    for name, array in expected.items():
        a, b = (np.asarray(part, np.float64).reshape(len(array), -1) for part in (found[name], array))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines = (a * b).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny)
        least[name] = float(cosines[b.any(1)].min(initial=1.0))
    return least


def worst_head(errors: Mapping[str, float]) -> str:
    """Return the head of the largest error; one that is not a number is the largest."""
    return max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))


def check_images(array: NDArray[np.uint8], name: str, shape: tuple[int | str, ...]) -> None:
    """Raise unless ``array`` is uint8 of this shape; a named axis may have any length, but only "n" may be empty.

    Raises:
        TypeError, ValueError: it is not; ``name`` is what the caller calls it.
    """
    expected = f"({', '.join(map(str, shape))})"
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is {type(array).__name__}, expected a numpy array {expected} of uint8")
    if array.dtype != np.uint8:
        raise TypeError(f"{name} holds {array.dtype}, expected uint8 in 0..255")
    axes = zip(array.shape, shape, strict=False)
    fits = all(length == axis if isinstance(axis, int) else length or axis == "n" for length, axis in axes)
    if array.ndim != len(shape) or not fits:
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")


def choose_artifact(
    bundle: Path, manifest: Manifest, *, engine: str | None = None, target: str | None = None
) -> Artifact:
    """Return the first artifact that an installed engine reads; where none does, the first that one could.

    Args:
        bundle: where the manifest is from, for the message.
        manifest: of the bundle.
        engine: that must read it; None is any.
        target: that it must be; None is any but those that TensorRT compiles first (trt and trt-rtx).

    Raises:
        BackendUnavailable: there is none.
    """
    readable: dict[bool, Artifact] = {}  # the first with an engine that is installed, and the first without
    for artifact in manifest.artifacts:
        readers = ENGINES.get(Path(artifact.file.file).suffix, ())
        wanted = artifact.target == target if target else not artifact.target.startswith(_COMPILED)
        if wanted and readers and engine in (None, *readers):
            installed = any(find_spec(name) for name in ((engine,) if engine else readers))
            readable.setdefault(installed, artifact)
    if readable:
        return readable[max(readable)]
    held = ", ".join(artifact.target for artifact in manifest.artifacts) or "nothing"
    known = sorted({name for readers in ENGINES.values() for name in readers})
    raise BackendUnavailable(
        f"{bundle}: cannot run {target or 'any target'} with {engine or 'any engine here'}; it holds {held}, engines "
        f"are {', '.join(known)}"
    )


def _check_inputs(backend: Backend, manifest: Manifest) -> None:
    expected = {manifest.input.name: (None, *manifest.input.size, 3)}
    if dict(backend.inputs) != expected:
        raise ModelFileError(
            f"the model takes {dict(backend.inputs)}, its manifest says {expected} (None: any number of images); "
            f"export the bundle again"
        )


def _check_output(head: HeadSpec, outputs: Outputs, count: int) -> None:
    found = outputs[head.name].shape if head.name in outputs else "nothing"
    if found != (count, *head.shape):
        raise ModelFileError(
            f"the model gives {found} as {head.name!r}, its manifest says {(count, *head.shape)}; "
            f"export the bundle again"
        )
    if not np.isfinite(outputs[head.name]).all():
        raise ModelFileError(
            f"the model gives values as {head.name!r} that are infinite or not a number; try `dpal-edge install`, "
            f"which finds what computes right here"
        )
