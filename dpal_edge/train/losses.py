"""The three alignments of DPAL and the shape mask (arXiv 2508.07144; docs/method.md 5, 6)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def global_loss(students: list[Tensor], teacher: Tensor) -> Tensor:
    """Mean squared gap between decoded class tokens and the teacher's, averaged over views.

    Args:
        students: per view (B, 1, O) decoded class tokens: the global view and each local crop.
        teacher: (B, 1, O) class tokens of the global view.
    """
    return torch.stack([F.mse_loss(student, teacher) for student in students]).mean()


def local_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared gap between decoded patches and the teacher's, each patch weighted by its mask squared.

    Args:
        student: (B, N, O) decoded patches of the global view.
        teacher: (B, N, O) teacher patches of the same view.
        mask: (B, N, 1) in 0..1 from ShapeMask, or None for no weighting.
    """
    if mask is None:
        return F.mse_loss(student, teacher)
    return F.mse_loss(mask * student, mask * teacher)


def relation_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, stable: bool = True) -> Tensor:
    """KL divergence between the token-to-token attention of teacher and student, summed over keys.

    Args:
        student: (B, N, O) decoded tokens of the crowd view, class token included.
        teacher: (B, N, O) teacher tokens of the same view.
        temperature: divides both logits; 1 is published.
        stable: take log_softmax; False takes the log of the softmax as published, which can reach -inf.

    Returns:
        Scalar >= 0, mean over images and queries; 0 where relations agree.
    """
    target = relations(teacher, temperature)
    logits = _relation_logits(student, temperature)
    log_student = logits.log_softmax(-1) if stable else logits.softmax(-1).log()
    return F.kl_div(log_student, target, reduction="none").sum(-1).mean()


def relations(tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Attention of each token to all, (B, N, N), rows sum to 1: softmax of inner products by the root of the width."""
    return _relation_logits(tokens, temperature).softmax(-1)


def _relation_logits(tokens: Tensor, temperature: float) -> Tensor:
    with torch.autocast(tokens.device.type, enabled=False):  # 8 bits of bf16 leave logits of 28 an error of 0.1
        tokens = tokens.float()
        logits: Tensor = tokens @ tokens.mT / (tokens.shape[-1] ** 0.5 * temperature)
        return logits


class ShapeMask(nn.Module):
    """Where the person is, read off the teacher's patches: their first principal component, scaled to 0..1.

    ``published`` fits one exact principal component per batch and scales by its least and greatest value: the sign, and
    so whether people are 1 or 0, is arbitrary and may flip between batches. ``foreground`` (the default of a run)
    departs: patches are projected on a running mean of the batches' first components, each found by a few power
    iterations and signed so that the middle of the crops scores above their left and right edge; and the scale is
    taken from the 2nd to the 98th percentile, clipped.
    """

    direction: Tensor

    def __init__(self, width: int, *, published: bool, momentum: float = 0.9, iterations: int = 8) -> None:
        super().__init__()
        self.published = published
        self.momentum, self.iterations = momentum, iterations
        self.register_buffer("direction", torch.zeros(width))

    @torch.no_grad()
    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the mask (B, N, 1) in 0..1 for teacher patches (B, N, O) on a ``grid`` of rows and columns."""
        with torch.autocast(patches.device.type, enabled=False):  # products over a batch overflow fp16
            points = patches.float().flatten(0, 1)
            points = points - points.mean(0)
            if self.published:
                # eigh sorts ascending: the last eigenvector of the scatter matrix is the first principal component
                scores = points @ torch.linalg.eigh(points.T @ points).eigenvectors[:, -1]
                low, high = scores.min(), scores.max()
            else:
                scores = self._foreground_scores(points, grid)
                low, high = _percentiles(scores, 0.02, 0.98)
            mask: Tensor = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
            return mask.view(*patches.shape[:2], 1)

    def _foreground_scores(self, points: Tensor, grid: tuple[int, int]) -> Tensor:
        """Project centred ``points`` (B * N, O) on the signed running mean of first components."""
        known = self.direction.any()
        direction = torch.where(known, self.direction, points[points.square().sum(1).argmax()])
        for _ in range(self.iterations):
            direction = F.normalize(points.T @ (points @ direction), dim=0)
        scores = points @ direction
        rows, columns = grid
        image = scores.view(-1, rows, columns)
        middle = image[:, rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4].mean()
        edge = image[:, :, [0, -1]].mean()
        direction = torch.where(middle >= edge, direction, -direction)
        if self.training:
            mixed = F.normalize(self.momentum * self.direction + (1 - self.momentum) * direction, dim=0)
            self.direction.copy_(mixed)
            return points @ mixed
        return points @ torch.where(known, self.direction, direction)


def _percentiles(values: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Nearest-rank percentiles of a vector; torch.quantile refuses more than 16 million values."""
    ordered = values.sort().values
    last = len(ordered) - 1
    return ordered[round(low * last)], ordered[round(high * last)]
