"""The Proteus method, a baseline (arXiv 2407.10366; docs/method.md 10)."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.errors import ConfigError
from dpal_edge.models.students import Student
from dpal_edge.models.teacher import Teachers
from dpal_edge.models.vit import VisionTransformer
from dpal_edge.train.config import TrainConfig, check_fields
from dpal_edge.train.method import Method, Values, Views
from dpal_edge.train.methods.dpal import new_student


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is Proteus' own to choose; 1, 1, 1 is published."""

    token_weight: float = 1.0
    feature_weight: float = 1.0
    patch_weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("token_weight", "feature_weight", "patch_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more")


class Proteus(Method):
    """Student backbone and three heads that regress the teacher's tokens, one from a view with hidden patches.

    Departures: student, data and optimiser are those of this project, so that methods can be compared; half of the
    images are masked as published, but every second one in place of the first ones, and the masked view of the others,
    which no loss looks at, is not computed.
    """

    options = Options
    views = ("base", "masked")

    def __init__(self, backbone: Student, teachers: Teachers, options: Options) -> None:
        if not isinstance(backbone, VisionTransformer):
            raise ConfigError("method proteus hides patches of a ViT; take student vit_tiny or vit_small")
        super().__init__(backbone, teachers)
        self.settings = options
        width, patches = backbone.config.width, teachers.width("local")
        wanted = {"token": teachers.width("global"), "feature": patches, "patch": patches}
        self.heads = nn.ModuleDict(  # eps of the norms is torch's 1e-5, unlike everywhere else, as published
            {name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out)) for name, out in wanted.items()}
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))

    @classmethod
    def build(cls, config: TrainConfig, teachers: Teachers) -> "Proteus":
        """Build student and heads for ``config``, initialised from its seed.

        Raises:
            ConfigError: the student is no ViT, so single patches of it cannot be hidden.
        """
        generator = torch.Generator().manual_seed(config.seed)
        method = cls(new_student(config, generator), teachers, config.options)
        for name in method.heads:
            nn.init.xavier_uniform_(method.get_parameter(f"heads.{name}.1.weight"), generator=generator)
            nn.init.zeros_(method.get_parameter(f"heads.{name}.1.bias"))
        return method

    def targets(self, views: Views) -> Values:
        """Return the teachers' ``global`` (B, 1, O) and ``local`` (B, N, O) tokens of the view without masks."""
        return {**self.teachers(views.base, ("global", "local"))}

    def forward(self, views: Views, targets: Values, progress: float) -> Values:
        """Return ``loss`` and its terms ``token``, ``feature`` and ``patch``, mean squared gaps.

        Masks of odd images are not looked at (``Views.masked`` has none there). Every masked patch counts the same;
        without any, ``patch`` is 0.
        """
        backbone = cast(VisionTransformer, self.backbone)
        masked = cast(Tensor, views.masked)[::2]
        hidden = backbone.finish(backbone.run_blocks(backbone.embed(views.base[::2], masked, self.mask_token)))
        clean = backbone(views.base)
        first, patches = targets["global"], targets["local"]
        token = F.mse_loss(self.heads["token"](clean[:, :1]).float(), first)
        features = F.mse_loss(self.heads["feature"](clean[:, 1:]).float(), patches)
        gaps = (self.heads["patch"](hidden[:, 1:]).float() - patches[::2]).square().mean(-1)  # (B / 2, N)
        share = patches.numel() / (patches.numel() + first.numel())
        terms = {
            "token": token,
            # The published mean runs over class token and patches together, the former through its own head.
            "feature": (1 - share) * token + share * features,
            "patch": (gaps * masked).sum() / masked.sum().clamp_min(1),
        }
        options = self.settings
        total = (
            options.token_weight * terms["token"]
            + options.feature_weight * terms["feature"]
            + options.patch_weight * terms["patch"]
        )
        return {"loss": total, **terms}

    def spared_from_decay(self) -> set[str]:
        """Names of embeddings and tokens, the mask token among them."""
        return super().spared_from_decay() | {"mask_token"}


METHOD = Proteus
