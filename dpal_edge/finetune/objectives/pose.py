"""Training of a pose head."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpal_edge.finetune.augment import Augmentation
from dpal_edge.finetune.objective import Example, Values
from dpal_edge.finetune.objectives.crops import CropObjective
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.tasks.decoding import SIMCC_SPLIT
from dpal_edge.tasks.labels import flip_pairs
from dpal_edge.tasks.pose import Pose
from dpal_edge.tasks.sample import Split

_HEAT_SIGMA = 2.0  # cells of a heatmap (ViTPose)
_HEAT_WEIGHT = 1000.0  # brings the mean squared error of mostly empty maps to the size of a cross-entropy


class PoseObjective(CropObjective[Pose]):
    """Joints as Gaussians: cross-entropy over SimCC's bins, or mean squared error of heatmaps.

    Joints that are not labelled, or that the view leaves outside, give no loss.

    Source: SimCC (Li et al., 2022), deviation sqrt(side / 8) bins as in RTMPose; heatmaps as in ViTPose (Xu et al.,
    2022). Differs: the softmax has no temperature.
    """

    task = "pose"

    def __init__(
        self, split: Split[Pose], size: tuple[int, int], augmentation: Augmentation, kind: str, channels: int = 0
    ) -> None:
        """Prepare ``split`` for a head of ``kind``, with upsampling convolutions of ``channels`` where it has any."""
        super().__init__(split, size, augmentation)
        channels = channels if kind == "simcc" else 0
        self.head = HeadConfig(task=self.task, kind=kind, labels=split.labels, channels=channels)
        self._swapped = np.arange(len(split.labels))
        for one, other in flip_pairs(split.labels):
            self._swapped[[one, other]] = other, one

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """Return "image", "joints" (K, 2) in pixels of the view and "labelled" (K,), bool."""
        sample = self.split.samples[index]
        image, warp = self.view(sample, rng)
        joints: NDArray[np.float32] = warp.points(sample.target.joints)
        labelled = sample.target.labelled & ((joints >= 0) & (joints < self.size[::-1])).all(-1)
        order = self._swapped if warp.flipped else slice(None)
        return {"image": image, "joints": joints[order], "labelled": labelled[order]}

    def forward(self, head: nn.Module, tokens: Tensor, batch: dict[str, Tensor]) -> Values:
        """Return "loss", the mean over labelled joints."""
        output = head(tokens).float()
        joints, labelled = batch["joints"], batch["labelled"]
        loss = (
            _simcc_loss(output, joints, self.size)
            if self.head.kind == "simcc"
            else _heat_loss(output, joints, self.size)
        )
        return {"loss": (loss * labelled).sum() / labelled.sum().clamp(min=1)}


def _simcc_loss(logits: Tensor, joints: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the cross-entropy (B, K) of the two axes, less the entropy of the labels: 0 is perfect."""
    losses = []
    axes = torch.split(logits, [SIMCC_SPLIT * size[1], SIMCC_SPLIT * size[0]], -1)  # x, y
    for i, (part, side) in enumerate(zip(axes, size[::-1], strict=True)):
        bins = torch.arange(part.shape[-1], device=part.device) + 0.5
        distance = bins - joints[..., i, None] * SIMCC_SPLIT  # (B, K, bins)
        label = torch.softmax(-(distance**2) / (2 * side / 8), dim=-1)
        losses.append(F.kl_div(part.log_softmax(-1), label, reduction="none").sum(-1))
    return torch.stack(losses).mean(0)


def _heat_loss(heat: Tensor, joints: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the mean squared error (B, K) against Gaussians of height 1."""
    rows, columns = heat.shape[-2:]
    x = (torch.arange(columns, device=heat.device) + 0.5) - joints[..., 0, None] * columns / size[1]
    y = (torch.arange(rows, device=heat.device) + 0.5) - joints[..., 1, None] * rows / size[0]
    across, down = (torch.exp(-(d**2) / (2 * _HEAT_SIGMA**2)) for d in (x, y))
    return _HEAT_WEIGHT * (heat - down[..., :, None] * across[..., None, :]).square().mean((-1, -2))
