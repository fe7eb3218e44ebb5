"""The alignments of DPAL and TinyMIM, and the shape mask (arXiv 2508.07144, 2301.01296; docs/method.md 5, 6, 9, 10)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.errors import ConfigError


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
    return _divergence(logits.log_softmax(-1) if stable else logits.softmax(-1).log(), target)


def relations(tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Attention of each token to all, (B, N, N), rows sum to 1: softmax of inner products by the root of the width."""
    return _relation_logits(tokens, temperature).softmax(-1)


def attention_losses(student: Tensor, teacher: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """KL divergences between the attention of teacher and student, of queries to keys and of values to values.

    Head is paired with head; the maps are softmax(Q K^T s) and softmax(V V^T s), s = (own head width) ** -0.5, over all
    tokens, the class token included.

    Args:
        student: (B, T, 3 * D) qkv output of one block.
        teacher: (B, T, 3 * O) qkv output of one block, of the same tokens; receives no gradient. Without a class token
            it has one less, and the student's first token is left out.
        heads: of both blocks.

    Returns:
        Two scalars >= 0, summed over keys, mean over images, heads and queries; 0 where the maps agree.

    Source: TinyMIM (arXiv 2301.01296), official code.
    """
    student = student[:, -teacher.shape[1] :]
    pairs = zip(attention_logits(student, heads), attention_logits(teacher.detach(), heads), strict=True)
    queries_keys, values_values = (_divergence(ours.log_softmax(-1), theirs.softmax(-1)) for ours, theirs in pairs)
    return queries_keys, values_values


def paired_heads(student: int, teacher: int | None, spec: str) -> int:
    """Return the number of attention heads that ``attention_losses`` pairs: both blocks must have as many.

    Args:
        student: heads of the student's last block.
        teacher: heads of the teacher's blocks; None where it has no attention over all its tokens.
        spec: what the teacher was called by.

    Raises:
        ConfigError: they differ.
    """
    if teacher is None:
        raise ConfigError(f"teacher {spec} has no attention maps over all its tokens to align with; take a ViT")
    if student != teacher:
        raise ConfigError(
            f"attention maps are aligned head by head, but the student's last block has {student} heads and teacher "
            f"{spec} has {teacher}; give --set heads=6+{teacher}, or take a teacher with {student}"
        )
    return student


def attention_logits(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Scaled products of queries with keys and of values with values, (B, heads, T, T) each, of a qkv output."""
    with torch.autocast(qkv.device.type, enabled=False):
        split = qkv.float().reshape(*qkv.shape[:2], 3, heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, width / heads)
        scale = q.shape[-1] ** -0.5
        return q @ k.mT * scale, v @ v.mT * scale


def _divergence(log_student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of rows over the last axis, the teacher's first; mean over all rows."""
    return F.kl_div(log_student, teacher, reduction="none").sum(-1).mean()


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
    taken from the 2nd to the 98th percentile, clipped. It never waits for the device.

    In training mode the batch is that of all processes together, of which each must bring as many patches: the mask
    is then the same as in one process, up to rounding. In eval mode a process looks at its own batch alone.
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
            points = points - self._mean(points.mean(0))
            if self.published:
                # eigh sorts ascending: the last eigenvector of the scatter matrix is the first principal component
                scores = points @ torch.linalg.eigh(self._mean(points.T @ points)).eigenvectors[:, -1]
                low, high = self._gather(scores).aminmax()
            else:
                scores = self._foreground_scores(points, grid)
                low, high = _percentiles(self._gather(scores), 0.02, 0.98)
            mask: Tensor = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
            return mask.view(*patches.shape[:2], 1)

    def _foreground_scores(self, points: Tensor, grid: tuple[int, int]) -> Tensor:
        """Project centred ``points`` (B * N, O) on the signed running mean of first components."""
        known = self.direction.any()
        direction = torch.where(known, self.direction, self._farthest(points))
        for _ in range(self.iterations):
            direction = F.normalize(self._mean(points.T @ (points @ direction)), dim=0)
        scores = points @ direction
        rows, columns = grid
        image = scores.view(-1, rows, columns)
        middle = image[:, rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4].mean()
        edge = (image[:, :, 0].mean() + image[:, :, -1].mean()) / 2
        direction = torch.where(self._mean(middle - edge) >= 0, direction, -direction)
        if self.training:
            mixed = F.normalize(self.momentum * self.direction + (1 - self.momentum) * direction, dim=0)
            self.direction.copy_(mixed)
            return points @ mixed
        return points @ torch.where(known, self.direction, direction)

    def _farthest(self, points: Tensor) -> Tensor:
        """Return the point of greatest norm; a tensor of one index, unlike a bare one, needs no copy to the host."""
        candidate = points.index_select(0, points.square().sum(1).argmax().view(1))
        candidates = self._gather(candidate)
        return candidates.index_select(0, candidates.square().sum(1).argmax().view(1))[0]

    @property
    def _shared(self) -> bool:
        """Whether there are other processes to agree with."""
        return self.training and dist.is_available() and dist.is_initialized()

    def _mean(self, value: Tensor) -> Tensor:
        """Average ``value`` over processes."""
        if self._shared:
            value = value.clone()
            dist.all_reduce(value)
            value /= dist.get_world_size()
        return value

    def _gather(self, value: Tensor) -> Tensor:
        """Concatenate ``value`` of all processes along the first axis."""
        if not self._shared:
            return value
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value)
        return torch.cat(parts)


def _percentiles(values: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Nearest-rank percentiles of a vector; torch.quantile refuses more than 16 million values."""
    ordered = values.sort().values
    last = len(ordered) - 1
    return ordered[round(low * last)], ordered[round(high * last)]
