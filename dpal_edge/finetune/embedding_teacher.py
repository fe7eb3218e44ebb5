"""A re-identification model of someone else as a teacher: its embeddings of crops, and the map that it pools."""

from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpal_edge.errors import BackendUnavailable, ConfigError, ModelFileError
from dpal_edge.files import sha256_of
from dpal_edge.runtime.backend import physical_cores
from dpal_edge.runtime.device import cpu_features

_BATCH = 16


class Seen(NamedTuple):
    """What a teacher makes of crops."""

    embeddings: NDArray[np.float32]  # (B, D), not normalised
    maps: NDArray[np.float32] | None  # (B, C, rows, columns), the last features with a place; None: it has none


class EmbeddingTeacher:
    """A model file that OpenVINO reads and that maps float crops (B, 3, H, W) to one embedding (B, D).

    It is run in bfloat16 where the CPU computes that fast: half the time at a cosine of 0.9997 to float32, for Open
    Model Zoo's person-reidentification-retail-0277 on a CPU with avx512_bf16.
    """

    def __init__(self, model: Any, *, bgr: bool, path: Path, precision: str) -> None:
        """Most callers want ``open``."""
        name = str(path)
        files = (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)
        self.hashes = {file.name: sha256_of(file) for file in files if file.is_file()}
        if len(model.inputs) != 1:
            raise ModelFileError(f"{name}: {len(model.inputs)} inputs, expected one of crops (B, 3, H, W)")
        shape = [side.get_length() if side.is_static else None for side in model.inputs[0].partial_shape]
        if len(shape) != 4 or shape[1] != 3 or None in shape[2:]:
            raise ModelFileError(f"{name}: its input has shape {tuple(shape)}, expected (B, 3, H, W)")
        self.size = (int(shape[2] or 0), int(shape[3] or 0))  # height, width in pixels
        if len(model.outputs) != 1:
            raise ModelFileError(f"{name}: {len(model.outputs)} outputs, expected one embedding per crop")
        pooled = _last_map(model, self.size)
        if pooled is not None:
            model.add_outputs(pooled)
        core = _open_core(name)
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        settings["INFERENCE_NUM_THREADS"] = physical_cores()
        self._run = core.compile_model(model, "CPU", settings)
        self._bgr, self._name, self._step, self._fixed = bgr, name, shape[0] or _BATCH, shape[0] is not None
        seen = self(np.zeros((self._step, *self.size, 3), np.uint8))
        self.channels = seen.embeddings.shape[1]
        self.map_channels = 0 if seen.maps is None else seen.maps.shape[1]

    @classmethod
    def open(cls, spec: str, *, precision: str | None = None) -> "EmbeddingTeacher":
        """Open ``FILE[?color=bgr]``; values are 0..255 as Open Model Zoo's models take them, RGB unless told.

        Args:
            precision: "f32" or "bf16"; None chooses.

        Raises:
            ConfigError: an unknown option.
            ModelFileError, BackendUnavailable: it cannot be opened here, or takes other inputs.
        """
        file, _, query = spec.partition("?")
        options = dict(parse_qsl(query))
        if unknown := options.keys() - {"color"}:
            raise ConfigError(f"reid_teacher {spec!r}: unknown {', '.join(unknown)}; expected FILE or FILE?color=bgr")
        if options.get("color", "rgb") not in ("rgb", "bgr"):
            raise ConfigError(f"reid_teacher {spec!r}: color is {options['color']!r}, expected rgb or bgr")
        if not Path(file).is_file():
            raise ModelFileError(f"{file}: no such file; expected a model that OpenVINO reads, such as .xml or .onnx")
        try:
            model = _open_core(file).read_model(file)
        except RuntimeError as error:
            raise ModelFileError(f"{file}: OpenVINO cannot read it ({' '.join(str(error).split())})") from error
        precision = precision or ("bf16" if cpu_features().fast_bf16 else "f32")
        return cls(model, bgr=options.get("color") == "bgr", path=Path(file), precision=precision)

    def __call__(self, crops: NDArray[np.uint8]) -> Seen:
        """Look at RGB crops (B, H, W, 3) of any size."""
        if crops.shape[1:3] != self.size:
            resized = [Image.fromarray(crop).resize(self.size[::-1], Image.Resampling.BICUBIC) for crop in crops]
            crops = np.stack([np.asarray(image) for image in resized])
        pixels = (crops[..., ::-1] if self._bgr else crops).transpose(0, 3, 1, 2).astype(np.float32)
        parts = [self._look(pixels[start : start + self._step]) for start in range(0, len(pixels), self._step)]
        maps = None if parts[0].maps is None else np.concatenate([part.maps for part in parts])
        return Seen(np.concatenate([part.embeddings for part in parts]), maps)

    def _look(self, pixels: NDArray[np.float32]) -> Seen:
        count, taken = len(pixels), np.ascontiguousarray(pixels)
        if self._fixed and count < self._step:
            taken = np.concatenate([taken, np.zeros((self._step - count, *taken.shape[1:]), np.float32)])
        outputs = [np.array(value, np.float32) for value in self._run([taken]).values()]
        if outputs[0].size % len(taken):
            shape = outputs[0].shape
            raise ModelFileError(f"{self._name}: an output of shape {shape}, expected one embedding per crop")
        return Seen(outputs[0].reshape(len(taken), -1)[:count], outputs[1][:count] if len(outputs) > 1 else None)


def _last_map(model: Any, size: tuple[int, int]) -> Any:
    """Return the last output in the graph that has rows and columns, fewer than the input; None without one."""
    for node in reversed(model.get_ordered_ops()):
        for output in node.outputs():
            shape = output.get_partial_shape()
            if shape.rank.is_static and len(shape) == 4 and all(side.is_static for side in list(shape)[1:]):
                rows, columns = (side.get_length() for side in list(shape)[2:])
                if node.inputs() and 1 < rows < size[0] and 1 < columns < size[1]:
                    return output
    return None


def _open_core(name: str) -> Any:
    try:
        from dpal_edge.runtime._openvino import core
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"{name} needs openvino: pip install 'dpal-edge[openvino]'") from error
    return core()
