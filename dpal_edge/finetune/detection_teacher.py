"""A larger fine-tuned detector as a teacher: what it knows of each patch of a frame, and whom it finds where."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dpal_edge.finetune.expert import Expert, open_expert
from dpal_edge.models.human import resize_model
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

    def __init__(self, expert: Expert, *, size: tuple[int, int], patch: int) -> None:
        """Prepare the teacher of a student whose input is ``size`` (height, width), in patches of ``patch`` pixels.

        Raises:
            ConfigError: it has windows, and was laid out for another number of patches.
        """
        config = expert.model.backbone.config
        self._size = (size[0] // patch * config.patch_size, size[1] // patch * config.patch_size)
        self._expert = replace(expert, model=resize_model(expert.model, self._size).requires_grad_(False))
        self._scale = patch / config.patch_size
        self.channels, self.limits, self.hashes = config.width, expert.limits, expert.hashes

    @classmethod
    def open(cls, path: Path, *, size: tuple[int, int], patch: int) -> "DetectionTeacher":
        """Open a checkpoint or the newest one of a run folder.

        Raises:
            ModelFileError: missing, damaged, or without a head for detection.
            ConfigError: it has windows, and was laid out for another number of patches.
        """
        return cls(open_expert(path, _TASK, "detection_teacher"), size=size, patch=patch)

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> SeenFrames:
        """Look at RGB frames (B, H, W, 3), uint8, of the student's size; the caller's autocast holds for it."""
        pixels = F.interpolate(frames.permute(0, 3, 1, 2).float(), self._size, mode="bilinear", antialias=True)
        model = self._expert.model.to(frames.device)
        tokens: Tensor = model.backbone(normalize(pixels, self._expert.mean, self._expert.std))
        found = model.heads[_TASK](tokens).float()
        return SeenFrames(tokens[:, 1:].float(), torch.cat([found[..., :4] * self._scale, found[..., 4:]], dim=-1))
