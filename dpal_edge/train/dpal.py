"""The DPAL method: views in, losses out (arXiv 2508.07144; docs/method.md)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpal_edge.models.decoder import GLOBAL, LOCAL, RELATION, DynamicPatternDecoder, init_decoder
from dpal_edge.models.teacher import Teacher
from dpal_edge.models.vit import VisionTransformer, init_student, student_config
from dpal_edge.train.config import TrainConfig
from dpal_edge.train.losses import ShapeMask, global_loss, local_loss, relation_loss


@dataclass(frozen=True)
class Images:
    """Views of B people, normalised with the ImageNet mean and std, on the training device."""

    base: Tensor  # (B, 3, H, W)
    local: Tensor  # (L * B, 3, h, w): all first crops, then all second ones
    crowd: Tensor  # (B, 3, Hc, Wc)


class Dpal(nn.Module):
    """Student backbone, decoder, frozen teacher and shape mask as one trainable module.

    The three class-token calls of the decoder (the global view and both local crops) run as one call: the published
    loop makes five calls of equal weight, so the mean over calls counts that one threefold.
    """

    def __init__(
        self, backbone: VisionTransformer, decoder: DynamicPatternDecoder, teacher: Teacher, config: TrainConfig
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.teacher = teacher
        width = teacher.passport.width
        self.mask = None if config.mask == "none" else ShapeMask(width, published=config.mask == "published")
        self.config = config

    @classmethod
    def build(cls, config: TrainConfig, teacher: Teacher) -> "Dpal":
        """Build student and decoder for ``config``, initialised from its seed."""
        generator = torch.Generator().manual_seed(config.seed)
        heads = (6, 12) if config.heads == "6+12" else (3, 3)
        architecture = student_config(config.student, config.size, heads=heads, pos_interp=config.pos_interp)
        backbone = VisionTransformer(architecture)
        init_student(backbone, generator, config.pos_init)
        decoder = DynamicPatternDecoder(
            architecture.width, teacher.passport.width, inner_width=config.inner_width, router=config.router
        )
        init_decoder(decoder, generator, config.query_init)
        return cls(backbone, decoder, teacher, config)

    def forward(self, images: Images, progress: float) -> dict[str, Tensor]:
        """Return ``loss``, its terms, and the router's ``usage`` (3 calls, 3 experts), all on the device.

        Args:
            images: the views.
            progress: share of the run that is done, 0..1; sets the router's weight.
        """
        config, batch = self.config, len(images.base)
        teacher = self.teacher(images.base)
        teacher_crowd = self.teacher(images.crowd)
        base, local, crowd = self.backbone(images.base), self.backbone(images.local), self.backbone(images.crowd)

        first = self.decoder(torch.cat([base[:, :1], local[:, :1]]), GLOBAL)
        patches = self.decoder(base[:, 1:], LOCAL)
        tokens = self.decoder(crowd, RELATION)

        calls = 1 + len(local) // batch
        losses = {
            **self._align(images, first.tokens, patches.tokens, tokens.tokens, teacher, teacher_crowd),
            "router": (calls * first.router_loss + patches.router_loss + tokens.router_loss) / (calls + 2),
            "penalty": (calls * first.penalty + patches.penalty + tokens.penalty) / (calls + 2),
        }
        router_weight = config.router_weight if progress < config.router_warmup else config.router_weight_late
        total = (
            config.global_weight * losses["global"]
            + config.local_weight * losses["local"]
            + config.relation_weight * losses["relation"]
            + router_weight * losses["router"]
            + config.penalty_weight * losses["penalty"]
        )
        usage = torch.stack([first.usage, patches.usage, tokens.usage])
        return {"loss": total, **losses, "usage": usage}

    def _align(
        self, images: Images, first: Tensor, patches: Tensor, crowd: Tensor, teacher: Tensor, teacher_crowd: Tensor
    ) -> dict[str, Tensor]:
        """Return the three alignment losses of decoded student tokens and teacher tokens, in float32."""
        mask = None
        if self.mask is not None:
            rows, columns = (side // self.backbone.config.patch_size for side in images.base.shape[-2:])
            mask = self.mask(teacher[:, 1:], (rows, columns))
        return {
            "global": global_loss(list(torch.split(first.float(), len(images.base))), teacher[:, :1]),
            "local": local_loss(patches.float(), teacher[:, 1:], mask),
            "relation": relation_loss(
                crowd,
                teacher_crowd,
                temperature=self.config.relation_temperature,
                stable=self.config.relation == "log_softmax",
            ),
        }

    def student_state(self) -> dict[str, Tensor]:
        """Return the state that training changes: backbone, decoder and mask direction, without the teacher."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("teacher.")}

    def spared_from_decay(self) -> set[str]:
        """Names of embeddings and tokens, which docs/method.md 8 suggests to spare from weight decay."""
        return {"backbone.pos_embed", "backbone.cls_token", "decoder.queries", "decoder.router.token"}
