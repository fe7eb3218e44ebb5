"""A larger fine-tuned detector as a teacher: what it knows of each patch of a frame, and whom it finds where."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dpal_edge.errors import ModelFileError
from dpal_edge.files import sha256_of
from dpal_edge.models.checkpoint import limits_of, read_newest
from dpal_edge.models.human import HumanModel, load_human, resize_model
from dpal_edge.models.vit import normalize

_TASK = "detection"


@dataclass(frozen=True)
class SeenFrames:
    """What a teacher says of frames, float32."""

    patches: Tensor  # (B, N, C), of the same places as the student's patches
    found: Tensor  # (B, M, 5), as the student's head gives it: boxes in pixels of the student's input, and logits


class DetectionTeacher:
    """A model of this project with a head for detection. No ``nn.Module``: nothing of it is trained or saved.

    It looks at frames resized to as many patches as the student has, so that patches and locations of both are of the
    same places, whatever their sizes in pixels.
    """

    def __init__(
        self,
        model: HumanModel,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        size: tuple[int, int],
        patch: int,
        limits: str = "",
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare a teacher of a student whose input is ``size`` (height, width), in patches of ``patch`` pixels.

        Most callers want ``open``, which knows the limits of its use and the hash of its file by name.

        Raises:
            ConfigError: it has windows, and was laid out for another number of patches.
        """
        own = model.backbone.config.patch_size
        self._size = (size[0] // patch * own, size[1] // patch * own)
        self._model = resize_model(model, self._size).requires_grad_(False).eval()
        self._mean, self._std, self._scale = mean, std, patch / own
        self.channels = model.backbone.config.width
        self.limits, self.hashes = limits, hashes or {}

    @classmethod
    def open(cls, path: Path, *, size: tuple[int, int], patch: int) -> "DetectionTeacher":
        """Open a checkpoint or the newest one of a run folder.

        Raises:
            ModelFileError: missing, damaged, or without a head for detection.
            ConfigError: it has windows, and was laid out for another number of patches.
        """
        file = read_newest(path)[0] if path.is_dir() else path
        model, metadata = load_human(file)
        if _TASK not in model.configs:
            raise ModelFileError(
                f"detection_teacher {path}: has heads for {', '.join(model.configs)}, expected one for {_TASK}"
            )
        mean, std = tuple(metadata["mean"]), tuple(metadata["std"])
        hashes = {file.name: sha256_of(file)}
        return cls(model, mean, std, size=size, patch=patch, limits=limits_of(metadata), hashes=hashes)

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> SeenFrames:
        """Look at RGB frames (B, H, W, 3), uint8, of the student's size; the caller's autocast holds for it."""
        pixels = F.interpolate(frames.permute(0, 3, 1, 2).float(), self._size, mode="bilinear", antialias=True)
        model = self._model.to(frames.device)
        tokens: Tensor = model.backbone(normalize(pixels, self._mean, self._std))
        found = model.heads[_TASK](tokens).float()
        return SeenFrames(tokens[:, 1:].float(), torch.cat([found[..., :4] * self._scale, found[..., 4:]], dim=-1))
