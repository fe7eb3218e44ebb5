"""The Swin Transformer of SOLIDER's teachers and of DPAL's Swin-T student.

timm's Swin is not used because these weights merge patches in another channel order, shift windows also on maps that
are smaller than one, and SOLIDER modulates the maps between its stages by a semantic weight.
"""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.errors import ModelFileError

STEM = 4  # pixels of a side of the patches that are embedded; three mergers double it to 32
_APART = -100.0  # the bias between tokens that only the shift made neighbours

# Authors' name -> ours, in order; what changes no token goes.
_NAMES = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"\.attn\.w_msa\.relative_position_bias_table$", ".attn.position_bias.table"),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^norm3\.", "norm."),
    (r"^semantic_embed_w\.(\d)\.", r"semantic.\1.scale."),
    (r"^semantic_embed_b\.(\d)\.", r"semantic.\1.shift."),
)
_UNUSED = re.compile(r"norm[012]\.|semantic_embed_[wb]\.3\.|head\.|.*\.relative_position_index$")


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """The architecture of a Swin; saved in every checkpoint."""

    size: tuple[int, int] = (256, 128)  # height, width in pixels that it is trained at; any other runs as well
    patch_size: int = 32  # pixels of a side of a token of the final map
    width: int = 768  # channels of the final map: 8 times the patch embedding's
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks of each stage
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7  # tokens of a side
    mlp_ratio: float = 4.0
    modulated: bool = False  # has SOLIDER's semantic modulation between stages

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the final map at ``size``."""
        return math.ceil(self.size[0] / self.patch_size), math.ceil(self.size[1] / self.patch_size)

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "size": list(self.size), "depths": list(self.depths), "heads": list(self.heads)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "SwinConfig":
        """Rebuild what ``to_dict`` gave."""
        return cls(**{**fields, **{name: tuple(fields[name]) for name in ("size", "depths", "heads")}})


class SwinTransformer(nn.Module):
    """Windowed attention in four stages, each but the last followed by merging 2x2 patches; no dropout.

    ``forward`` maps normalised images (B, 3, H, W), H and W multiples of 4, to tokens (B, 1 + N, width): first the
    mean of the final map, then its N = ceil(H / 32) * ceil(W / 32) patches after the final norm, in row order.
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        stages = len(config.depths)
        widths = [config.width >> (stages - 1 - i) for i in range(stages)]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, widths[0], STEM, STEM), "norm": nn.LayerNorm(widths[0])})
        self.stages = nn.ModuleList(Stage(config, i, width) for i, width in enumerate(widths))
        self.semantic = nn.ModuleList(Modulation(width) for width in widths[1:] if config.modulated)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, images: Tensor, layer: int | None = None, semantic_weight: float | None = None) -> Tensor:
        """Return the tokens after block ``layer`` and the final norm.

        Args:
            images: normalised, (B, 3, H, W).
            layer: a block of the last stage, counted over all stages from 1; None is the last.
            semantic_weight: SOLIDER's, 0 (appearance) to 1 (meaning); None leaves modulation out, unlike 0. Only for a
                modulated model.
        """
        if semantic_weight is not None and not self.config.modulated:
            raise ValueError(f"semantic_weight is {semantic_weight}, but this Swin has no semantic modulation")
        before = sum(self.config.depths[:-1])
        blocks = (self.config.depth if layer is None else layer) - before  # of the last stage
        if not 1 <= blocks <= self.config.depths[-1]:
            raise ValueError(
                f"layer is {layer}, expected a block of the last stage, {before + 1} to {self.config.depth}"
            )
        x = self.patch_embed["proj"](images).permute(0, 2, 3, 1)  # (B, H / 4, W / 4, width / 8)
        x = self.patch_embed["norm"](x)
        for i, stage in enumerate(self.stages[:-1]):
            x = stage(x)
            if semantic_weight is not None:
                x = self.semantic[i](x, semantic_weight)
        x = self.norm(self.stages[-1](x, blocks)).flatten(1, 2)
        return torch.cat([x.mean(1, keepdim=True), x], dim=1)


class Modulation(nn.Module):
    """SOLIDER's scale and shift per channel, learned functions of the semantic weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Linear(2, width)
        self.shift = nn.Linear(2, width)

    def forward(self, x: Tensor, weight: float) -> Tensor:
        """Modulate a map (..., width) by the semantic weight, 0..1, the same for every image."""
        scale, shift = (  # each layer applied to (weight, 1 - weight), without a tensor of it to copy to the device
            layer.weight[:, 0] * weight + layer.weight[:, 1] * (1 - weight) + layer.bias
            for layer in (self.scale, self.shift)
        )
        return x * F.softplus(scale) + shift


class Stage(nn.Module):
    """Blocks on maps of one size, every second one with shifted windows, and the merging of patches after them."""

    def __init__(self, config: SwinConfig, index: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(width, config.heads[index], config.window, config.mlp_ratio, shifted=bool(i % 2))
            for i in range(config.depths[index])
        )
        self.downsample = PatchMerging(width) if index + 1 < len(config.depths) else nn.Identity()

    def forward(self, x: Tensor, blocks: int | None = None) -> Tensor:
        """Run the first ``blocks`` blocks, all by default, and merge."""
        for block in self.blocks[:blocks]:
            x = block(x)
        merged: Tensor = self.downsample(x)
        return merged


class SwinBlock(nn.Module):
    """One pre-norm block on a map (B, rows, columns, width)."""

    def __init__(self, width: int, heads: int, window: int, mlp_ratio: float, *, shifted: bool) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, window // 2 if shifted else 0)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows, then transform each token."""
        x = x + self.attn(self.norm1(x))
        transformed: Tensor = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + transformed


class WindowAttention(nn.Module):
    """Self-attention within windows of ``window`` by ``window`` tokens, which start ``shift`` tokens in and wrap round.

    Maps are padded at the bottom and right to whole windows, and padded tokens are attended to, as in SOLIDER's code.
    """

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.position_bias: nn.Module = PositionBias(heads, window, shift)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, rows, columns, width) to the same shape."""
        _, rows, columns, width = x.shape
        window, head_width = self.window, width // self.heads
        down, across = self.windows(rows, columns)
        # Without bias before the padding, so that padding costs no products; padded tokens are then zeros plus bias.
        x = F.pad(F.linear(x, self.qkv.weight), (0, 0, 0, across * window - columns, 0, down * window - rows))
        x = x + self.qkv.bias.to(x.dtype)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        x = x.view(-1, down, window, across, window, 3, self.heads, head_width)
        x = x.permute(5, 0, 1, 3, 6, 2, 4, 7)  # (3, B, down, across, heads, window, window, head_width)
        bias = self.position_bias(down, across).to(x.dtype)[None]
        # Windows with a bias of their own count as heads: attention stays of four axes, which is what is fused.
        q, k, v = x.reshape(3, -1, bias.shape[1], window**2, head_width).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x.reshape(-1, down, across, self.heads, window, window, head_width).permute(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(-1, down * window, across * window, width)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        mixed: Tensor = self.proj(x[:, :rows, :columns])
        return mixed

    def windows(self, rows: int, columns: int) -> tuple[int, int]:
        """Return how many windows, down and across, cover a map."""
        return math.ceil(rows / self.window), math.ceil(columns / self.window)


class PositionBias(nn.Module):
    """What is added to the logits of windowed attention: a learned value per relative position and head.

    In shifted windows it also keeps apart tokens of parts of the map that are not neighbours.
    """

    index: Tensor

    def __init__(self, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        row, column = torch.arange(window**2) // window, torch.arange(window**2) % window
        index = (row[:, None] - row + window - 1) * (2 * window - 1) + column[:, None] - column + window - 1
        self.register_buffer("index", index, persistent=False)  # (window^2, window^2): rows of the table

    def forward(self, down: int, across: int) -> Tensor:
        """Return (heads, window^2, window^2), or for ``down * across`` shifted windows (windows * heads, ...)."""
        bias = self.table[self.index].permute(2, 0, 1)
        if not self.shift:
            return bias
        part = (self._parts(down)[:, None, :, None] * 3 + self._parts(across)[:, None]).view(-1, 1, self.window**2)
        return torch.where(part[..., None] == part[..., None, :], bias, _APART).flatten(0, 1)

    def _parts(self, count: int) -> Tensor:
        """Number the parts of one shifted axis, (count, window): before the last window, its first tokens, wrapped."""
        end = count * self.window
        place = torch.arange(end, device=self.index.device)
        return ((place >= end - self.window).long() + (place >= end - self.shift).long()).view(count, self.window)


class PatchMerging(nn.Module):
    """Merge 2x2 tokens into one of twice the width; odd maps are padded with zeros at the bottom and right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, rows, columns, width) to (B, rows / 2, columns / 2, 2 * width), rounded up."""
        _, rows, columns, width = x.shape
        if rows % 2 or columns % 2:
            x = F.pad(x, (0, 0, 0, columns % 2, 0, rows % 2))
        down, across = (rows + 1) // 2, (columns + 1) // 2
        # Channel, row, column: the order of nn.Unfold, in which these weights are stored.
        x = x.view(-1, down, 2, across, 2, width).permute(0, 1, 3, 5, 2, 4).reshape(-1, down, across, 4 * width)
        merged: Tensor = self.reduction(self.norm(x))
        return merged


def rename_swin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate the authors' names, without wrapper prefixes, to this module's; drop what changes no token."""
    renamed = {}
    for key, value in state.items():
        if not _UNUSED.match(key):
            for theirs, ours in _NAMES:
                key = re.sub(theirs, ours, key)
            renamed[key] = value
    return renamed


def infer_swin(state: dict[str, Tensor]) -> SwinConfig:
    """Read the architecture of a Swin off its state dict, in this module's names; the size is the default.

    Raises:
        ModelFileError: the tensors are not those of a Swin of four stages on patches of 4 pixels.
    """
    depths = [0, 0, 0, 0]
    for key in state:
        if found := re.match(r"stages\.([0-3])\.blocks\.(\d{1,3})\.", key, re.ASCII):
            depths[int(found[1])] = max(depths[int(found[1])], int(found[2]) + 1)
    try:
        tables = [state[f"stages.{i}.blocks.0.attn.position_bias.table"] for i in range(4)]
        kernel = state["patch_embed.proj.weight"]
        hidden, narrow = state["stages.0.blocks.0.mlp.fc1.weight"].shape
        (width,) = state["norm.weight"].shape
        heads = tuple(table.shape[1] for table in tables)
    except (KeyError, ValueError, IndexError) as error:
        example = ", ".join(list(state)[:3]) or "no tensors"
        raise ModelFileError(f"not a Swin: {error} is missing or misshapen; the keys begin {example}") from error
    window = (math.isqrt(tables[0].shape[0]) + 1) // 2
    widths = [width >> (3 - i) for i in range(4)]
    if (
        not narrow
        or tuple(kernel.shape) != (narrow, 3, STEM, STEM)
        or width != 8 * narrow
        or (2 * window - 1) ** 2 != tables[0].shape[0]
        or any(count < 1 or wide % count for wide, count in zip(widths, heads, strict=True))
    ):
        raise ModelFileError(
            f"not a Swin: patch kernel {tuple(kernel.shape)}, final norm of {width} channels, bias tables of heads "
            f"{heads} and {tables[0].shape[0]} rows do not fit together"
        )
    return SwinConfig(
        width=width,
        depths=tuple(depths),
        heads=heads,
        window=window,
        mlp_ratio=hidden / narrow,
        modulated=any(key.startswith("semantic.") for key in state),
    )


def init_swin(swin: SwinTransformer, generator: torch.Generator) -> None:
    """Initialise as Swin is (Liu et al., 2021): truncated normal (std 0.02) weights and bias tables, zero biases."""
    for module in swin.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, PositionBias):
            nn.init.trunc_normal_(module.table, std=0.02, generator=generator)
