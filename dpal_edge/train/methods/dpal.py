"""The DPAL method (arXiv 2508.07144; docs/method.md 1 to 9)."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.errors import ConfigError
from dpal_edge.models.decoder import (
    GLOBAL,
    LOCAL,
    MIX_DIVISOR,
    PATTERNS,
    RELATION,
    Decoded,
    Decoder,
    DynamicPatternDecoder,
    StaticDecoder,
    init_decoder,
)
from dpal_edge.models.students import Student, build_student, init_student_weights, student_config
from dpal_edge.models.teacher import Teachers
from dpal_edge.models.teacher_spec import Role
from dpal_edge.models.vit import VisionTransformer
from dpal_edge.train.config import TrainConfig, check_fields
from dpal_edge.train.losses import (
    ShapeMask,
    attention_losses,
    global_loss,
    local_loss,
    paired_heads,
    relation_loss,
)
from dpal_edge.train.method import Method, Values, Views

_INNER_STEP = 48  # the decoder splits this width into 16 heads, and into 12
_SWIN_INNER = 192  # published for the Swin student
_RECIPE_WEIGHT = {"paper": 1.0, "attn": 0.1}  # of the local and the relation loss
_DPADE_ONLY = ("router", "inner_width", "mix_divisor", "decoder_chunk")
_WEIGHTS = ("global_weight", "local_weight", "relation_weight", "router_weight", "router_weight_late", "penalty_weight")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is DPAL's own to choose; docs/method.md 8 lists what is published and what departs from it."""

    recipe: Literal["paper", "attn"] = "paper"  # attn: the authors' earlier code, docs/method.md 9
    decoder: Literal["dpade", "static", "shared"] = "dpade"  # static: a fixed map per pattern; shared: one for all
    router: Literal["soft", "oracle"] = "soft"
    query_init: Literal["normal", "zeros"] = "normal"
    inner_width: int | None = None  # narrow tokens to this before D-PaDe; None: Swin students to 192, ViTs not at all
    mix_divisor: int = MIX_DIVISOR  # of the mixed expert; 0 is the images of a pass, as in the authors' earlier code
    decoder_chunk: int | None = None  # images whose experts exist at a time, which bounds memory; None is all
    mask: Literal["foreground", "published", "none"] = "foreground"  # of the local loss; recipe attn has none
    relation: Literal["log_softmax", "softmax"] = "log_softmax"  # of recipe paper
    relation_temperature: float = 1.0  # of recipe paper
    global_weight: float = 1.0
    local_weight: float | None = None  # None: 1 in recipe paper, 0.1 in recipe attn
    relation_weight: float | None = None  # the same
    router_weight: float = 0.1  # for the first router_warmup of the run, then router_weight_late
    router_weight_late: float = 0.01
    router_warmup: float = 0.1  # share of the run: 20 of 200 epochs
    penalty_weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, positive=("relation_temperature",), shares=("router_warmup",))
        for name in (*_WEIGHTS, "mix_divisor"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.inner_width is not None and (self.inner_width <= 0 or self.inner_width % _INNER_STEP):
            raise ConfigError(f"inner_width is {self.inner_width}, expected a multiple of {_INNER_STEP}")
        if self.decoder_chunk is not None and self.decoder_chunk <= 0:
            raise ConfigError(f"decoder_chunk is {self.decoder_chunk}, expected more than 0")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if self.decoder != "dpade" and field.name in _DPADE_ONLY and value != field.default:
                raise ConfigError(f"{field.name} is {value!r}, but decoder {self.decoder!r} has no use for it; drop it")


class Dpal(Method):
    """Student backbone, decoders, frozen teachers and shape mask as one trainable module.

    The three class-token calls of the decoder (the global view and both local crops) run as one call: the published
    loop makes five calls of equal weight, so the mean over calls counts that one threefold.

    Departures: teachers of several widths get a decoder each, ``decoder.WIDTH``, which is called for their patterns
    alone. Patches of a student that cuts larger ones than its teachers (Swin) are resized to their grid.
    """

    options = Options
    views = ("base", "local", "crowd")

    def __init__(self, backbone: Student, teachers: Teachers, options: Options) -> None:
        super().__init__(backbone, teachers)
        self.settings = options
        self.heads = 0  # of the attention maps that recipe attn pairs; 0 pairs none
        if options.recipe == "attn" and isinstance(backbone, VisionTransformer):
            teacher = teachers.teacher("relation")
            self.heads = paired_heads(backbone.config.last_heads, teacher.heads, teacher.passport.spec)
        roles: tuple[Role, Role, Role] = ("global", "local", "relation" if options.recipe == "paper" else "local")
        self.widths = [str(teachers.width(role)) for role in roles]  # of what each pattern is aligned with
        self.decoder = nn.ModuleDict({width: self._decoder(width) for width in dict.fromkeys(self.widths)})
        masked = options.recipe == "paper" and options.mask != "none"
        self.mask = ShapeMask(teachers.width("local"), published=options.mask == "published") if masked else None

    @classmethod
    def build(cls, config: TrainConfig, teachers: Teachers) -> "Dpal":
        """Build student and decoders for ``config``, initialised from its seed.

        Raises:
            ConfigError: recipe attn cannot pair the attention heads of student and teacher.
        """
        generator = torch.Generator().manual_seed(config.seed)
        method = cls(new_student(config, generator), teachers, config.options)
        for decoder in method.decoder.values():
            init_decoder(cast(Decoder, decoder), generator, config.options.query_init)
        return method

    def targets(self, views: Views) -> Values:
        """Return teacher tokens of the base and the crowd view, as the recipe wants them.

        Recipe paper: ``global`` (B, 1, O), ``local`` (B, N, O) and, of the crowd, ``relation`` (B, 1 + N', O). Recipe
        attn: ``global``, ``local``, ``crowd_local`` (B, N', O), and with attention maps to pair also ``qkv`` and
        ``crowd_qkv`` (B, T, 3 * O).
        """
        crowd = cast(Tensor, views.crowd)
        if self.settings.recipe == "paper":
            return {**self.teachers(views.base, ("global", "local")), **self.teachers(crowd, ("relation",))}
        base, many = self._attend(views.base, ("global", "local")), self._attend(crowd, ("local",))
        return {**base, **{f"crowd_{name}": value for name, value in many.items()}}

    def forward(self, views: Views, targets: Values, progress: float) -> Values:
        """Return ``loss``, its terms, and with a router its ``usage/PATTERN`` (3,), all on the device.

        Args:
            views: the views.
            targets: what ``targets`` gave for them.
            progress: share of the run that is done, 0..1; sets the router's weight.
        """
        local, crowd = cast(Tensor, views.local), cast(Tensor, views.crowd)
        base_tokens, base_qkv = self._read(views.base)
        crowd_tokens, crowd_qkv = self._read(crowd)
        images, paper = len(views.base), self.settings.recipe == "paper"
        side = math.isqrt(math.prod(views.base.shape[-2:]) // targets["local"].shape[1])  # of a teacher's patch
        crowd_patches = self._cut(crowd_tokens[:, 1:], crowd, side)
        calls = (
            torch.cat([base_tokens[:, :1], self.backbone(local)[:, :1]]),
            self._cut(base_tokens[:, 1:], views.base, side),
            torch.cat([crowd_tokens[:, :1], crowd_patches], dim=1) if paper else crowd_patches,
        )
        counts = [len(tokens) // images for tokens in calls]
        decoded = [self._decode(pattern, tokens, counts[pattern]) for pattern, tokens in enumerate(calls)]
        aligned = [one.tokens.float() for one in decoded]
        terms = {"global": global_loss(list(torch.split(aligned[GLOBAL], images)), targets["global"])}
        if paper:
            terms |= self._align_paper(aligned, targets, _grid(views.base, side))
        else:
            terms |= self._align_attn(aligned, targets, base_qkv, crowd_qkv)
        for name in decoded[GLOBAL].terms:
            weighted = [count * one.terms[name] for count, one in zip(counts, decoded, strict=True)]
            terms[name] = torch.stack(weighted).sum() / sum(counts)
        weights = self._weights(progress)
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        usage = {f"usage/{PATTERNS[i]}": one.usage for i, one in enumerate(decoded) if one.usage is not None}
        return {"loss": total, **terms, **usage}

    def spared_from_decay(self) -> set[str]:
        """Names of embeddings and tokens, which docs/method.md 8 suggests to spare from weight decay."""
        own = {name for name, _ in self.decoder.named_parameters() if name.endswith((".queries", ".router.token"))}
        return super().spared_from_decay() | {f"decoder.{name}" for name in own}

    def _decoder(self, width: str) -> Decoder:
        """Build the decoder of the patterns that are aligned with teacher tokens of ``width``."""
        options, student = self.settings, self.backbone.config.width
        if options.decoder != "dpade":
            patterns = [pattern for pattern, wanted in enumerate(self.widths) if wanted == width]
            return StaticDecoder(student, int(width), patterns, shared=options.decoder == "shared")
        narrow = None if isinstance(self.backbone, VisionTransformer) else _SWIN_INNER
        return DynamicPatternDecoder(
            student,
            int(width),
            inner_width=options.inner_width or narrow,
            router=options.router,
            mix_divisor=options.mix_divisor,
            chunk=options.decoder_chunk,
        )

    def _attend(self, images: Tensor, roles: tuple[Role, ...]) -> Values:
        """Return tokens of the roles and, with attention maps to pair, ``qkv`` of the relation's teacher."""
        if not self.heads:
            return {**self.teachers(images, roles)}
        tokens, qkv = self.teachers.attend(images, "relation")
        parts = {"global": tokens[:, :1], "local": tokens[:, 1:]}
        teacher = self.teachers.teacher("relation")
        others = tuple(role for role in roles if self.teachers.teacher(role) is not teacher)
        found = {role: parts[role] for role in roles if role not in others}  # of the same forward pass
        return {**found, **(self.teachers(images, others) if others else {}), "qkv": qkv}

    def _read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the student's tokens and, with attention maps to pair, the last block's qkv."""
        if self.heads:
            return cast(VisionTransformer, self.backbone).attend(images)
        return self.backbone(images), None

    def _cut(self, tokens: Tensor, images: Tensor, side: int) -> Tensor:
        """Resize patch tokens (B, N, D) of ``images`` bicubically to a grid of patches of ``side`` pixels."""
        own = self.backbone.config.patch_size
        if own == side:
            return tokens
        coarse = tokens.float().mT.reshape(len(tokens), -1, *_grid(images, own))
        return F.interpolate(coarse, size=_grid(images, side), mode="bicubic").flatten(2).mT

    def _decode(self, pattern: int, tokens: Tensor, views: int) -> Decoded:
        decoded: Decoded = self.decoder[self.widths[pattern]](tokens, pattern, views)
        return decoded

    def _align_paper(self, aligned: list[Tensor], targets: Values, grid: tuple[int, int]) -> Values:
        """Return the local and the relation loss of recipe paper (docs/method.md 6)."""
        mask = None if self.mask is None else self.mask(targets["local"], grid)
        relation = relation_loss(
            aligned[RELATION],
            targets["relation"],
            temperature=self.settings.relation_temperature,
            stable=self.settings.relation == "log_softmax",
        )
        return {"local": local_loss(aligned[LOCAL], targets["local"], mask), "relation": relation}

    def _align_attn(
        self, aligned: list[Tensor], targets: Values, base_qkv: Tensor | None, crowd_qkv: Tensor | None
    ) -> Values:
        """Return the local and, with attention maps to pair, the relation loss of recipe attn (docs/method.md 9)."""
        base = local_loss(aligned[LOCAL], targets["local"], None)
        terms = {"local": (base + local_loss(aligned[RELATION], targets["crowd_local"], None)) / 2}
        if base_qkv is not None and crowd_qkv is not None:
            pairs = ((base_qkv, targets["qkv"]), (crowd_qkv, targets["crowd_qkv"]))
            gaps = [gap for ours, theirs in pairs for gap in attention_losses(ours, theirs, self.heads)]
            terms["relation"] = torch.stack(gaps).sum() / len(pairs)
        return terms

    def _weights(self, progress: float) -> dict[str, float]:
        options = self.settings
        default = _RECIPE_WEIGHT[options.recipe]
        return {
            "global": options.global_weight,
            "local": default if options.local_weight is None else options.local_weight,
            "relation": default if options.relation_weight is None else options.relation_weight,
            "router": options.router_weight if progress < options.router_warmup else options.router_weight_late,
            "penalty": options.penalty_weight,
        }


def new_student(config: TrainConfig, generator: torch.Generator) -> Student:
    """Build the student of ``config``, the same for every method, and initialise it from ``generator``."""
    architecture = student_config(config.student, config.size, heads=config.block_heads, pos_interp=config.pos_interp)
    student = build_student(architecture)
    init_student_weights(student, generator, config.pos_init)
    return student


def _grid(images: Tensor, side: int) -> tuple[int, int]:
    """Return the rows and columns of patches of ``side`` pixels in images (B, 3, H, W)."""
    return images.shape[-2] // side, images.shape[-1] // side


METHOD = Dpal
