"""The plain Vision Transformer of DPAL's students and teachers.

timm's ViT is not used because the published student has another number of heads in its last block, and its position
embedding is resized by rules of its own. Parameter names are timm's, so weights go both ways.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1

PosInterp = Literal["2d", "2d-dino", "1d"]
PosInit = Literal["trunc_normal", "uniform"]

_GLOBAL_EVERY = 3  # of blocks with windows, every third attends everywhere: 4 of 12, as ViTDet's


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The architecture of a ViT; saved in every checkpoint."""

    size: tuple[int, int] = (256, 128)  # height, width in pixels that pos_embed is stored for
    patch_size: int = 16
    width: int = 192  # channels of a token
    depth: int = 12
    heads: int = 6
    last_heads: int = 12  # heads of the last block; DPAL pairs them with the teacher's
    mlp_ratio: float = 4.0
    layer_scale: bool = False  # DINOv2 scales each residual branch per channel
    class_token: bool = True  # without one, the global token is the mean of the patches
    patch_padding: int = 0  # zeros around the image before patches are cut; 2 in Sapiens' downstream models
    pos_interp: PosInterp = "2d"
    window: tuple[int, int] | None = None  # rows, columns of patches that two of three blocks attend within

    def __post_init__(self) -> None:
        if self.window is None:
            return
        if any(part < 1 or side % part for side, part in zip(self.grid, self.window, strict=True)):
            (rows, columns), (height, width) = self.grid, self.size
            raise ConfigError(
                f"window {self.window[0]}x{self.window[1]} does not divide the {rows}x{columns} patches of "
                f"{height}x{width} pixels; give divisors of {rows} and of {columns}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that pos_embed is stored for."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "size": list(self.size), "window": None if self.window is None else list(self.window)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ViTConfig":
        """Rebuild what ``to_dict`` gave, also before there were windows."""
        window = fields.get("window")
        pairs = {"size": tuple(fields["size"]), "window": None if window is None else tuple(window)}
        return cls(**{**fields, **pairs})


class VisionTransformer(nn.Module):
    """Pre-norm ViT with learned positions; no dropout, and stochastic depth where ``set_drop_path`` asks for it.

    ``forward`` maps normalised images (B, 3, H, W), H and W multiples of the patch size, to final-norm tokens
    (B, 1 + N, width), the global token first (the class token, or the mean of the patches where there is none), N
    patches in row order.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width, rows_columns = config.width, config.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, config.class_token + math.prod(rows_columns), width))
        proj = nn.Conv2d(3, width, config.patch_size, config.patch_size, config.patch_padding)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        last = config.depth - 1
        windows = Windows(config.grid, config.window, config.class_token) if config.window else None
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.last_heads if i == last else config.heads,
                config.mlp_ratio,
                config.layer_scale,
                windows if (i + 1) % _GLOBAL_EVERY else None,
            )
            for i in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor, layer: int | None = None) -> Tensor:
        """Return the tokens after block ``layer`` (1 to depth, None for the last) and the final norm."""
        return self.finish(self.run_blocks(self.embed(images), layer))

    def attend(self, images: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Return ``forward``'s tokens and, of the same block, the qkv output (B, T, 3 * width).

        T counts the class token where there is one, and the patches.
        """
        layer = layer or self.config.depth
        x = self.run_blocks(self.embed(images), layer - 1)
        block = cast(Block, self.blocks[layer - 1])
        return self.finish(block(x)), block.attn.qkv(block.norm1(x))

    def qkv(self, images: Tensor, layer: int | None = None) -> Tensor:
        """Return ``attend``'s second value alone: the rest of the block and the final norm are not run."""
        layer = layer or self.config.depth
        block = cast(Block, self.blocks[layer - 1])
        qkv: Tensor = block.attn.qkv(block.norm1(self.run_blocks(self.embed(images), layer - 1)))
        return qkv

    def embed(self, images: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Turn images into the tokens that enter block 1; ``mask_token`` (1, 1, width) stands in for masked patches.

        Args:
            images: (B, 3, H, W), normalised.
            masked: (B, N) bool, true where a patch is hidden; None hides nothing.
            mask_token: what stands there, before positions are added.

        Raises:
            ConfigError: the model has windows, and images of another size come than they were laid out for.
        """
        x: Tensor = self.patch_embed["proj"](images)  # (B, D, rows, columns)
        grid = (x.shape[2], x.shape[3])
        if self.config.window and grid != self.config.grid:
            raise ConfigError(
                f"images of {images.shape[2]}x{images.shape[3]}, expected {self.config.size[0]}x{self.config.size[1]}: "
                f"windows are laid out for one size; resize the model with resize_student"
            )
        x = x.flatten(2).mT  # (B, N, D)
        if masked is not None and mask_token is not None:
            x = torch.where(masked[..., None], mask_token.to(x.dtype), x)
        pos = resize_positions(self.pos_embed, self.config.grid, grid, self.config.pos_interp)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + pos

    def run_blocks(self, x: Tensor, layer: int | None = None) -> Tensor:
        """Run blocks 1 to ``layer`` on what ``embed`` gave."""
        for block in self.blocks[:layer]:
            x = block(x)
        return x

    def set_drop_path(self, share: float) -> None:
        """Let training drop residual branches of a sample, ``share`` of those of the last block, linearly less before.

        Source: Huang et al., 2016 (stochastic depth).
        """
        for i, block in enumerate(self.blocks):
            cast(Block, block).drop_path = share * i / max(len(self.blocks) - 1, 1)

    def finish(self, x: Tensor) -> Tensor:
        """Apply the final norm; put the global token first where there is no class token."""
        normed: Tensor = self.norm(x)
        return normed if self.cls_token is not None else torch.cat([normed.mean(1, keepdim=True), normed], dim=1)


class Block(nn.Module):
    """One pre-norm transformer block on (B, N, width), whose attention stays within ``windows`` if there are any."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, layer_scale: bool, windows: "Windows | None" = None
    ) -> None:
        super().__init__()
        self.windows = windows
        hidden = round(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()
        self.drop_path = 0.0  # share of samples whose branch is left out in training, 0..1

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform each token."""
        x = x + self._drop(self.ls1(self._attend(self.norm1(x))))
        mlp: Tensor = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + self._drop(self.ls2(mlp))

    def _attend(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attn(x) if self.windows is None else self.windows.merge(self.attn(self.windows.split(x)))
        return mixed

    def _drop(self, branch: Tensor) -> Tensor:
        """Leave a branch (B, N, width) out for some samples; scale it for the others, so that its mean stays."""
        if not (self.training and self.drop_path):
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * (kept.to(branch.dtype) / (1 - self.drop_path))


@dataclass(frozen=True)
class Windows:
    """A grid of patches in windows, so that attention costs a share of the whole grid's.

    The class token joins every window and leaves as the mean of what the windows made of it: patches keep their view
    of it, it keeps its view of all patches, and one window over the whole grid is exactly full attention.
    """

    grid: tuple[int, int]  # rows, columns of patches
    window: tuple[int, int]  # likewise, divisors of the grid's
    class_token: bool

    def split(self, x: Tensor) -> Tensor:
        """Cut tokens (B, [1 +] N, D) to (B * windows, [1 +] tokens of a window, D)."""
        (down, across), (rows, columns) = self._counts, self.window
        patches = x[:, int(self.class_token) :].reshape(-1, down, rows, across, columns, x.shape[-1])
        patches = patches.transpose(2, 3).reshape(-1, rows * columns, x.shape[-1])
        if not self.class_token:
            return patches
        return torch.cat([x[:, :1].expand(-1, down * across, -1).reshape(-1, 1, x.shape[-1]), patches], dim=1)

    def merge(self, x: Tensor) -> Tensor:
        """Undo ``split``."""
        (down, across), (rows, columns) = self._counts, self.window
        patches = x[:, int(self.class_token) :].reshape(-1, down, across, rows, columns, x.shape[-1])
        patches = patches.transpose(2, 3).reshape(-1, math.prod(self.grid), x.shape[-1])
        if not self.class_token:
            return patches
        mean = x[:, 0].reshape(-1, down * across, x.shape[-1]).mean(1, keepdim=True)
        return torch.cat([mean, patches], dim=1)

    @property
    def _counts(self) -> tuple[int, int]:
        """Windows, down and across."""
        return self.grid[0] // self.window[0], self.grid[1] // self.window[1]


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (B, N, width)."""
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention with one qkv matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, width) to the same shape."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, width / heads)
        mixed = mix_values(q, k, v)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return projected


def mix_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of q (B, heads, M, d) over k and v (B, heads, N, d): (B, heads, M, d).

    Fused, except in bf16 on a CPU: there torch's fused kernel runs backward several times slower than three plain
    operations at the sizes of these models (bench/attention.py).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        mixed: Tensor = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return mixed
    return F.scaled_dot_product_attention(q, k, v)


def resize_positions(pos: Tensor, stored: tuple[int, int], wanted: tuple[int, int], mode: PosInterp) -> Tensor:
    """Resize a position embedding (1, [1 +] N, D) from grid ``stored`` to grid ``wanted`` (rows, columns), bicubically.

    ``2d`` resizes the grid. ``2d-dino`` does so with DINO's scale factors of (wanted + 0.1) / stored, as DPAL's teacher
    does. ``1d`` resizes the flattened grid as one sequence: the published student was trained so, though it scrambles
    the columns of any grid of another width; use it only with released weights (docs/method.md 2).
    """
    if stored == wanted:
        return pos
    width, prefix = pos.shape[-1], pos.shape[1] - math.prod(stored)  # 1 with a class token, 0 without
    cls, grid = pos[:, :prefix], pos[:, prefix:].float()
    if mode == "1d":
        resized = F.interpolate(grid.mT[:, :, None], size=(1, math.prod(wanted)), mode="bicubic")
    else:
        image = grid.mT.reshape(1, width, *stored)
        if mode == "2d":
            resized = F.interpolate(image, size=wanted, mode="bicubic")
        else:
            factors = [(w + 0.1) / s for w, s in zip(wanted, stored, strict=True)]
            resized = F.interpolate(image, scale_factor=factors, mode="bicubic")
    return torch.cat([cls, resized.flatten(2).mT.to(pos.dtype)], dim=1)


def normalize(pixels: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> Tensor:
    """Shift and scale uint8 RGB images (B, 3, H, W) by a mean and standard deviation of 0..1; float32, same device."""
    shift = torch.tensor(mean, device=pixels.device).view(3, 1, 1) * 255
    scale = torch.tensor(std, device=pixels.device).view(3, 1, 1) * 255
    return (pixels.float() - shift) / scale


def init_student(vit: VisionTransformer, generator: torch.Generator, pos_init: PosInit = "trunc_normal") -> None:
    """Initialise as DPAL does (docs/method.md 2): xavier linears and patch kernel, zero biases, normal class token.

    ``pos_init`` is the one departure: ``uniform`` is the published U[0, 1), ``trunc_normal`` (std 0.02) has zero mean.
    """
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(vit.get_parameter("patch_embed.proj.weight").flatten(1), generator=generator)
    nn.init.zeros_(vit.get_parameter("patch_embed.proj.bias"))
    if vit.cls_token is not None:
        nn.init.normal_(vit.cls_token, std=0.02, generator=generator)
    if pos_init == "uniform":
        nn.init.uniform_(vit.pos_embed, generator=generator)
    else:
        nn.init.trunc_normal_(vit.pos_embed, std=0.02, generator=generator)
