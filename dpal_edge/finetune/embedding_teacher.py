"""A re-identification model of someone else as a teacher: only its embeddings of crops count."""

from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.runtime.backend import Backend, open_backend

_BATCH = 16


class EmbeddingTeacher:
    """Any model file a runtime engine opens that maps float crops (B, 3, H, W) to one embedding (B, D)."""

    def __init__(self, backend: Backend, *, bgr: bool, name: str) -> None:
        """Most callers want ``open``."""
        if len(backend.inputs) != 1:
            raise ModelFileError(f"{name}: {len(backend.inputs)} inputs, expected one of crops (B, 3, H, W)")
        [(self._input, shape)] = backend.inputs.items()
        if len(shape) != 4 or shape[1] != 3 or None in shape[2:]:
            raise ModelFileError(f"{name}: its input has shape {shape}, expected (B, 3, H, W)")
        self._backend, self._bgr, self._name = backend, bgr, name
        self._one = shape[0] == 1
        self.size = (int(shape[2] or 0), int(shape[3] or 0))  # height, width in pixels
        self.channels = self(np.zeros((1, *self.size, 3), np.uint8)).shape[1]

    @classmethod
    def open(cls, spec: str) -> "EmbeddingTeacher":
        """Open ``FILE[?color=bgr]``; values are 0..255 as Open Model Zoo's models take them, RGB unless told.

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
        return cls(open_backend(Path(file)), bgr=options.get("color") == "bgr", name=file)

    def __call__(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map RGB crops (B, H, W, 3), of any size, to embeddings (B, D), not normalised."""
        if crops.shape[1:3] != self.size:
            resized = [Image.fromarray(crop).resize(self.size[::-1], Image.Resampling.BICUBIC) for crop in crops]
            crops = np.stack([np.asarray(image) for image in resized])
        pixels = (crops[..., ::-1] if self._bgr else crops).transpose(0, 3, 1, 2).astype(np.float32)
        step = 1 if self._one else _BATCH
        parts = [self._run(pixels[start : start + step]) for start in range(0, len(pixels), step)]
        return np.concatenate(parts)

    def _run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        outputs = list(self._backend.run({self._input: np.ascontiguousarray(pixels)}).values())
        if len(outputs) != 1 or outputs[0].size % len(pixels):
            raise ModelFileError(f"{self._name}: {len(outputs)} outputs, expected one embedding per crop")
        embeddings: NDArray[np.float32] = outputs[0].reshape(len(pixels), -1).astype(np.float32)
        return embeddings
