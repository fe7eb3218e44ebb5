"""The heads of the human tasks: final-norm tokens of a backbone in, raw outputs out.

Every head maps tokens (B, 1 + N, D), the global token first and N patches in row order, to one tensor; decoding is
``dpal_edge.tasks.decoding``. A head is built for one grid of patches, because the graph is exported for one size.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.errors import ConfigError
from dpal_edge.models.detection import PyramidHead
from dpal_edge.models.head_config import HeadConfig, Place
from dpal_edge.models.vit import Block
from dpal_edge.tasks.decoding import SIMCC_SPLIT

_UP = 4  # cells of a joint's map per side of a patch
_SIMCC_WIDTH, _SIMCC_HEADS = 256, 8
_STRIPS = 4  # of a person, for an embedding


def build_head(config: HeadConfig, place: Place) -> nn.Module:
    """Build the head that ``config`` describes.

    Raises:
        ConfigError: no such task or kind.
    """
    kinds = KINDS.get(config.task)
    if kinds is None or config.kind not in kinds:
        known = "; ".join(f"{task}: {', '.join(names)}" for task, names in KINDS.items())
        raise ConfigError(f"no {config.kind!r} head for {config.task!r}; known are {known}")
    return kinds[config.kind](config, place)


def patch_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the patches of tokens (B, 1 + N, D) as a map (B, D, rows, columns)."""
    return tokens[:, 1:].mT.reshape(tokens.shape[0], tokens.shape[2], *grid)


class Upsampling(nn.ModuleList):
    """Twice {3x3 convolution, batch norm, ReLU, bilinear x2}.

    Source: PATH's parsing head, Tang et al., 2023 (HumanBench). Differs: 128 channels by default rather than 256, for a
    student of 192.
    """

    def __init__(self, inside: int, channels: int) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
            for width in (inside, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inside, rows, columns) to (B, channels, 4 * rows, 4 * columns)."""
        for stage in self:
            x = F.interpolate(F.relu(stage(x)), scale_factor=2, mode="bilinear")
        return x


class SimCCHead(nn.Module):
    """Joints as two classifications over bins of half a pixel, of x and of y: no heatmap to search afterwards.

    Each joint has a map four times as fine as the patches: upsampled by convolutions of ``config.channels``, or, at 0,
    one convolution of the enlarged tokens. Its marginals over rows and over columns (log-sum-exp), spread over the bins
    by a linear map, are the logits of the axes: (B, K, 2 * width + 2 * height), x before y. What joints tell of each
    other is added: each one's map becomes a vector, which attends to the others'.

    Source: SimCC (Li et al., 2022) and the neck of RTMPose (Jiang et al., 2023). Differs: there the vectors alone must
    learn which cell lies where; here the marginals know it from the start and the vectors, a ViT block in place of a
    gated attention unit, begin at zero. bench/pose_heads.py compares them.
    """

    def __init__(self, config: HeadConfig, place: Place) -> None:
        super().__init__()
        height, width = place.size
        rows, columns = (_UP * side for side in place.grid)
        self.grid = place.grid
        if config.channels:
            self.upsample: nn.Module = Upsampling(place.width, config.channels)
            self.maps = nn.Conv2d(config.channels, len(config.labels), 1)
        else:
            self.upsample = nn.Upsample(scale_factor=_UP, mode="bilinear")
            self.maps = nn.Conv2d(place.width, len(config.labels), 3, padding=1)
        self.x, self.y = _spread(columns, SIMCC_SPLIT * width), _spread(rows, SIMCC_SPLIT * height)
        patches = math.prod(place.grid)
        self.embed = nn.Sequential(nn.LayerNorm(patches), nn.Linear(patches, _SIMCC_WIDTH))
        self.block = Block(_SIMCC_WIDTH, _SIMCC_HEADS, mlp_ratio=2.0, layer_scale=False)
        self.norm = nn.LayerNorm(_SIMCC_WIDTH)
        self.context = nn.Linear(_SIMCC_WIDTH, SIMCC_SPLIT * (width + height))
        nn.init.zeros_(self.context.weight)
        nn.init.zeros_(self.context.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to logits (B, K, bins of x and of y)."""
        maps = self.maps(self.upsample(patch_map(tokens, self.grid)))
        logits = torch.cat([self.x(maps.logsumexp(2)), self.y(maps.logsumexp(3))], dim=-1)
        joints = self.embed(F.avg_pool2d(maps, _UP).flatten(2))  # (B, K, hidden)
        refined: Tensor = logits + self.context(self.norm(self.block(joints)))
        return refined

    @torch.no_grad()
    def adopt(self, other: "SimCCHead") -> None:
        """Take the weights of a head of the same config for another size, interpolated over patches, cells and bins.

        Sums over them keep their size; of a spreading map only what it learned since its beginning is interpolated.
        """
        state = other.state_dict()
        share = math.prod(other.grid) / math.prod(self.grid)
        state["embed.1.weight"] = _fit(state["embed.1.weight"].unflatten(1, other.grid), self.grid).flatten(1) * share
        for name in ("embed.0.weight", "embed.0.bias"):
            state[name] = _fit(state[name].view(1, *other.grid), self.grid).flatten()
        for name, own, old in (("x", self.x, other.x), ("y", self.y, other.y)):
            start = _spread(own.in_features, own.out_features).weight
            learned = _fit((old.weight - _spread(old.in_features, old.out_features).weight)[None], start.shape)[0]
            state[f"{name}.weight"] = start + learned * (old.in_features / own.in_features)
            state[f"{name}.bias"] = _fit(old.bias[None, None], (1, own.out_features)).flatten()
        for name, columns in (("context.weight", _SIMCC_WIDTH), ("context.bias", 1)):
            axes = state[name].view(1, -1, columns).split([other.x.out_features, other.y.out_features], 1)
            fitted = [_fit(axis, (own.out_features, columns)) for axis, own in zip(axes, (self.x, self.y), strict=True)]
            state[name] = torch.cat(fitted, 1).view(self.state_dict()[name].shape)
        self.load_state_dict(state)


def _fit(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Interpolate maps (C, rows, columns) to other rows and columns."""
    return F.interpolate(maps[None], size, mode="bilinear")[0]


def _spread(cells: int, bins: int) -> nn.Linear:
    """Return a linear map that begins as the linear interpolation of ``cells`` values at ``bins`` places."""
    linear = nn.Linear(cells, bins)
    places = (torch.arange(bins) + 0.5) * cells / bins - 0.5
    weight = (1 - (places.clamp(0, cells - 1)[:, None] - torch.arange(cells)).abs()).clamp(min=0)
    linear.weight.data.copy_(weight)
    linear.bias.data.zero_()
    return linear


class HeatmapHead(nn.Module):
    """ViTPose's simple head: bilinear x4, ReLU, one 3x3 convolution to heat (B, K, 4 * rows, 4 * columns).

    Source: Xu et al., 2022. Differs: none.
    """

    def __init__(self, config: HeadConfig, place: Place) -> None:
        super().__init__()
        self.grid = place.grid
        self.heat = nn.Conv2d(place.width, len(config.labels), 3, padding=1)
        nn.init.normal_(self.heat.weight, std=0.001)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to heat; 1 is a joint."""
        x = F.interpolate(patch_map(tokens, self.grid), scale_factor=_UP, mode="bilinear")
        heat: Tensor = self.heat(F.relu(x))
        return heat


class UpsampleParsingHead(nn.Module):
    """PATH's parsing head: ``Upsampling``, then a 1x1 convolution: (B, C, 4 * rows, 4 * columns)."""

    def __init__(self, config: HeadConfig, place: Place) -> None:
        super().__init__()
        self.grid = place.grid
        self.stages = Upsampling(place.width, config.channels)
        self.classify = nn.Conv2d(config.channels, len(config.labels), 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to logits per class."""
        logits: Tensor = self.classify(self.stages(patch_map(tokens, self.grid)))
        return logits


class LinearParsingHead(nn.Module):
    """One linear map per patch: logits (B, C, rows, columns)."""

    def __init__(self, config: HeadConfig, place: Place) -> None:
        super().__init__()
        self.grid = place.grid
        self.classify = nn.Conv2d(place.width, len(config.labels), 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to logits per class."""
        logits: Tensor = self.classify(patch_map(tokens, self.grid))
        return logits


class BNNeckHead(nn.Module):
    """An embedding (B, channels) for re-identification: linear on global and mean patch token, then batch norm.

    Training classifies identities after the norm and pulls triplets together before it; retrieval compares what
    ``forward`` gives, by cosine.

    Source: Luo et al., 2019 (bag of tricks). Differs: the linear map, which makes the embedding's length a choice.
    """

    def __init__(self, config: HeadConfig, place: Place) -> None:
        super().__init__()
        self.project = nn.Linear(2 * place.width, config.channels)
        self.neck = nn.BatchNorm1d(config.channels)
        self.neck.bias.requires_grad_(False)

    def feature(self, tokens: Tensor) -> Tensor:
        """Return what triplets compare, (B, channels), before the norm."""
        feature: Tensor = self.project(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1))
        return feature

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to embeddings."""
        embedding: Tensor = self.neck(self.feature(tokens))
        return embedding


class LinearEmbeddingHead(nn.Module):
    """An embedding (B, channels): one linear map of the global and the mean patch token.

    For learning from another model's embeddings, whose mean is not zero as a batch norm would have it.
    """

    def __init__(self, config: HeadConfig, place: Place) -> None:
        super().__init__()
        self.project = nn.Linear(2 * place.width, config.channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to embeddings."""
        embedding: Tensor = self.project(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1))
        return embedding


class StripsEmbeddingHead(nn.Module):
    """An embedding (B, channels): one linear map of the global token and the means of four horizontal strips.

    What is worn above and below stays apart from the start.

    Source: the strips of PCB (Sun et al., 2018). Differs: four, joined by one map, and the global token.
    """

    shares: Tensor

    def __init__(self, config: HeadConfig, place: Place) -> None:
        super().__init__()
        rows, columns = place.grid
        edges = torch.linspace(0, rows, _STRIPS + 1)[:, None]
        row = torch.arange(rows)
        overlap = (torch.minimum(edges[1:], row + 1) - torch.maximum(edges[:-1], row)).clamp(min=0)  # (strips, rows)
        shares = (overlap / overlap.sum(1, keepdim=True) / columns).repeat_interleave(columns, dim=1)
        self.register_buffer("shares", shares, persistent=False)  # (strips, N): of each patch in the mean of a strip
        self.project = nn.Linear((1 + _STRIPS) * place.width, config.channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to embeddings."""
        strips = self.shares.to(tokens.dtype) @ tokens[:, 1:]  # (B, strips, D)
        embedding: Tensor = self.project(torch.cat([tokens[:, :1], strips], dim=1).flatten(1))
        return embedding


class LinearAttributeHead(nn.Module):
    """Logits (B, A) of attributes: batch norm and a linear map on the mean patch token."""

    def __init__(self, config: HeadConfig, place: Place) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(place.width)
        self.classify = nn.Linear(place.width, len(config.labels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to logits."""
        logits: Tensor = self.classify(self.norm(tokens[:, 1:].mean(1)))
        return logits


class QueryAttributeHead(nn.Module):
    """Logits (B, A): one learned query per attribute looks over all tokens, then a linear map of its own.

    It finds attributes of parts, such as boots, better than a mean does (METHOD: Query2Label, Liu et al., 2021).
    Differs: one layer of single-head cross-attention without a decoder's feed-forward part.
    """

    def __init__(self, config: HeadConfig, place: Place) -> None:
        super().__init__()
        count = len(config.labels)
        self.queries = nn.Parameter(torch.randn(count, place.width) * place.width**-0.5)
        self.key_value = nn.Linear(place.width, 2 * place.width)
        self.norm = nn.LayerNorm(place.width)
        self.weight = nn.Parameter(torch.randn(count, place.width) * place.width**-0.5)
        self.bias = nn.Parameter(torch.zeros(count))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to logits."""
        keys, values = self.key_value(tokens).chunk(2, dim=-1)
        looks = (keys @ self.queries.T * keys.shape[-1] ** -0.5).softmax(1)  # (B, 1 + N, A)
        found = self.norm(looks.mT @ values)  # (B, A, D)
        # Not (found * weight).sum(-1), which OpenVINO 2026.4 computes wrongly in the exported graph.
        logits: Tensor = torch.einsum("bad,ad->ba", found, self.weight) + self.bias
        return logits


KINDS: dict[str, dict[str, Callable[[HeadConfig, Place], nn.Module]]] = {
    "pose": {"simcc": SimCCHead, "heatmap": HeatmapHead},
    "parsing": {"upsample": UpsampleParsingHead, "linear": LinearParsingHead},
    "attributes": {"query": QueryAttributeHead, "linear": LinearAttributeHead},
    "reid": {"bnneck": BNNeckHead, "linear": LinearEmbeddingHead, "strips": StripsEmbeddingHead},
    "detection": {"pyramid": PyramidHead},
}
