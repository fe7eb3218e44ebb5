"""The TinyMIM method, a baseline (arXiv 2301.01296; docs/method.md 10)."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from dpal_edge.errors import ConfigError
from dpal_edge.models.students import Student
from dpal_edge.models.teacher import Teachers
from dpal_edge.models.vit import VisionTransformer
from dpal_edge.train.config import TrainConfig, check_fields
from dpal_edge.train.losses import attention_losses, paired_heads
from dpal_edge.train.method import Method, Values, Views
from dpal_edge.train.methods.dpal import new_student


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is TinyMIM's own to choose; weights of 1 and sincos are published."""

    qk_weight: float = 1.0
    vv_weight: float = 1.0
    positions: Literal["learned", "sincos"] = "learned"  # sincos: a fixed table

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("qk_weight", "vv_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more")


class TinyMim(Method):
    """Student whose last block's attention maps follow those of one block of the teacher; nothing else is trained.

    The maps need the last block's norm1 and qkv alone. Its output projection, norm2 and MLP and the final norm stay as
    they were initialised, so what builds on the tokens must be fine-tuned with them.

    The teacher's block is that of its layer, the 12th of MAE-B or the 18th of MAE-L as published.

    Departures: no drop path; positions are learned unless asked otherwise; student, data and optimiser are those of
    this project, so that methods can be compared.
    """

    options = Options
    views = ("base", "clean")

    def __init__(self, backbone: Student, teachers: Teachers, options: Options) -> None:
        if not isinstance(backbone, VisionTransformer):
            raise ConfigError("method tinymim aligns the attention maps of a ViT; take student vit_tiny or vit_small")
        super().__init__(backbone, teachers)
        self.settings = options
        teacher = teachers.teacher("relation")
        self.heads = paired_heads(backbone.config.last_heads, teacher.heads, teacher.passport.spec)
        last = backbone.blocks[-1]
        for unused in (last.get_submodule("attn.proj"), last.ls1, last.norm2, last.mlp, last.ls2, backbone.norm):
            unused.requires_grad_(False)
        if options.positions == "sincos":
            table = sincos_positions(backbone.config.width, backbone.config.grid)
            backbone.pos_embed = nn.Parameter(table, requires_grad=False)

    @classmethod
    def build(cls, config: TrainConfig, teachers: Teachers) -> "TinyMim":
        """Build the student for ``config``, initialised from its seed.

        Raises:
            ConfigError: the student is no ViT, or its heads cannot be paired with the teacher's.
        """
        generator = torch.Generator().manual_seed(config.seed)
        return cls(new_student(config, generator), teachers, config.options)

    def targets(self, views: Views) -> Values:
        """Return ``qkv`` (B, T, 3 * O) of the teacher's block on the view whose colours are unchanged."""
        return {"qkv": self.teachers.attend(cast(Tensor, views.clean), "relation")[1]}

    def forward(self, views: Views, targets: Values, progress: float) -> Values:
        """Return ``loss`` and its terms ``qk`` and ``vv``, KL divergences of attention maps."""
        student = cast(VisionTransformer, self.backbone).qkv(views.base)
        queries_keys, values_values = attention_losses(student, targets["qkv"], self.heads)
        total = self.settings.qk_weight * queries_keys + self.settings.vv_weight * values_values
        return {"loss": total, "qk": queries_keys, "vv": values_values}


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Return fixed positions (1, 1 + rows * columns, width) for a ``grid``, the class token's of zeros.

    The first half of the channels tells the column, the second the row; of each half, the first half are sines of the
    index times 10000 ** -(i / n), i of n, and the second cosines. ``width`` is a multiple of 4.

    Source: MAE (arXiv 2111.06377), there for square grids.
    """
    rows, columns = grid
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter) / quarter)

    def encode(indices: Tensor) -> Tensor:
        angles = indices.flatten()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    table = torch.cat([encode(column), encode(row)], dim=1)
    return torch.cat([torch.zeros(1, width), table])[None]


METHOD = TinyMim
