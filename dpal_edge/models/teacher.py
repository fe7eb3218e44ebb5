"""Teachers: any frozen model that turns images into tokens on the student's patch grid."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.files import sha256_of
from dpal_edge.models.checkpoint import (
    flatten_published,
    infer_vit,
    is_ours,
    load_backbone,
    load_matching,
    read_tensors,
    split_dpal,
)
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer

# Tensors that change what a ViT computes; others, such as the heads and decoders of pretraining, do not.
_COMPUTING = ("blocks.", "patch_embed.", "norm_pre.", "reg", "storage_tokens", "cls_token_pos_embed", "rope")
LEAST_MATCH = 0.95  # a teacher with fewer of its tensors found is refused: it would train a student on noise


@dataclass(frozen=True, kw_only=True)
class Passport:
    """What a run's teacher was: written into the run folder and into every checkpoint."""

    spec: str
    sha256: str  # of the weights file, or of the tensors where a hub served them
    keys_matched: float  # share of the model's tensors found in the file, 0..1
    parameters: int
    patch_size: int
    width: int
    layer: int  # block whose tokens are aligned, after the final norm
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str  # as the source states it, "unknown" otherwise


class Teacher(nn.Module):
    """A frozen model behind one contract, on the student's grid and normalisation.

    ``forward`` maps images (B, 3, H, W), normalised with the ImageNet mean and std, to float32 tokens (B, 1 + N, D),
    the global token first, N = H / ``student_patch`` * W / ``student_patch`` patches. Images are resized so that the
    teacher's patches fall on that grid, and re-normalised where the teacher wants another mean and std.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, tokens: Callable[[Tensor], Tensor], passport: Passport, student_patch: int
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.passport = passport
        self.student_patch = student_patch
        self._tokens = tokens
        mean, std = torch.tensor(passport.mean), torch.tensor(passport.std)
        scale = torch.tensor(IMAGENET_STD) / std
        shift = (torch.tensor(IMAGENET_MEAN) - mean) / std
        self._renormalise = not torch.equal(scale, torch.ones(3)) or bool(shift.any())
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode whatever the parent does."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return float32 tokens (B, 1 + N, width) without a graph."""
        if self._renormalise:
            images = images * self.scale + self.shift
        if self.passport.patch_size != self.student_patch:
            size = [side // self.student_patch * self.passport.patch_size for side in images.shape[-2:]]
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        return self._tokens(images).float()


def load_teacher(
    spec: str,
    *,
    layer: int | None = None,
    heads: int | None = None,
    student_patch: int = 16,
    size: tuple[int, int] | None = None,
) -> Teacher:
    """Load the teacher that ``spec`` names.

    Args:
        spec: ``timm:NAME`` (pretrained weights from timm's hub), ``timm:NAME@FILE`` (local weights into timm's
            architecture), or ``FILE`` (a plain ViT in timm's or DPAL's layout, positions resized as DPAL does; or
            a checkpoint of this project).
        layer: block whose tokens are taken, 1 to depth; None is the last. The final norm is applied in either case.
        heads: attention heads of a ViT read from FILE; by default width / 64, as in ViT-S, -B and -L.
        student_patch: patch size of the student, in pixels.
        size: image (height, width) that FILE stores positions for, if they are neither square nor 2:1.

    Raises:
        ConfigError: an unknown timm name, or a layer that the model does not have.
        ModelFileError: the file is missing, damaged, or less than 95 % of its keys match.
    """
    if spec.startswith("timm:"):
        if heads is not None:
            raise ConfigError(f"teacher heads {heads}: {spec} has its own; leave teacher_heads out")
        return _timm_teacher(spec, layer, student_patch)
    path = Path(spec)
    vit, matched = _read_vit(path, heads, size)
    layer = _check_layer(spec, layer, vit.config.depth)
    passport = Passport(
        spec=spec,
        sha256=sha256_of(path),
        keys_matched=matched,
        parameters=sum(p.numel() for p in vit.parameters()),
        patch_size=vit.config.patch_size,
        width=vit.config.width,
        layer=layer,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="unknown",
    )
    return Teacher(vit, lambda images: vit(images, layer), passport, student_patch)


def _read_vit(path: Path, heads: int | None, size: tuple[int, int] | None) -> tuple[VisionTransformer, float]:
    """Read a plain ViT, and the share of its tensors that the file holds; a checkpoint of ours tells its own heads."""
    if path.suffix == ".safetensors" and path.is_file() and is_ours(path):
        if heads is not None:
            raise ConfigError(f"teacher heads {heads}: {path} tells its own; leave teacher_heads out")
        return load_backbone(path)[0], 1.0
    state, _ = split_dpal(flatten_published(read_tensors(path)))
    known: dict[str, Any] = {"size": size} if size else {}
    try:
        config = infer_vit(state, pos_interp="2d-dino", **known)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}; for another architecture use timm:NAME@{path}") from error
    heads = heads or max(config.width // 64, 1)
    if config.width % heads:
        raise ConfigError(f"teacher heads {heads}: {path} has tokens of {config.width} channels, expected a divisor")
    vit = VisionTransformer(replace(config, heads=heads, last_heads=heads))
    wanted = vit.state_dict()
    if unknown := [key for key in state if key.startswith(_COMPUTING) and key not in wanted]:
        raise ModelFileError(
            f"{path}: a plain ViT has no {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}, so its features "
            f"would be wrong; for another architecture use timm:NAME@{path}"
        )
    return vit, load_matching(vit, state, path, least=LEAST_MATCH)


def _timm_model(spec: str, name: str, file: str) -> tuple[Any, float]:
    """Create timm's ViT ``name`` with weights of ``file``, or of timm's hub; return it and the share of keys found."""
    import timm  # 3 s to import: paid only by those who name a timm model

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:4]) or "see timm.list_models()"
        raise ConfigError(f"teacher {spec!r}: timm {timm.__version__} has no model {name!r}; close to it: {close}")
    try:
        model = timm.create_model(name, pretrained=not file, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        raise ConfigError(f"teacher {spec!r}: {name} is not a ViT that takes images of any size ({error})") from error
    except (OSError, RuntimeError) as error:
        raise ModelFileError(
            f"teacher {spec!r}: its weights cannot be fetched ({type(error).__name__}: {str(error).splitlines()[0]}); "
            f"check the name and the network, or give local weights as timm:{name}@FILE"
        ) from error
    if not hasattr(model, "blocks"):
        raise ConfigError(f"teacher {spec!r}: {name} is not a ViT: it has no sequence of blocks on one patch grid")
    if not file:
        return model, 1.0
    state = flatten_published(read_tensors(Path(file)))
    return model, load_matching(model, state, Path(file), least=LEAST_MATCH)


def _timm_teacher(spec: str, layer: int | None, student_patch: int) -> Teacher:
    name, _, file = spec.removeprefix("timm:").partition("@")
    model, matched = _timm_model(spec, name, file)
    layer = _check_layer(spec, layer, len(model.blocks))
    config = model.pretrained_cfg
    passport = Passport(
        spec=spec,
        sha256=sha256_of(Path(file)) if file else _hash_weights(model),
        keys_matched=matched,
        parameters=sum(p.numel() for p in model.parameters()),
        patch_size=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        layer=layer,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        licence="unknown" if file else config.get("license") or "unknown",  # a local file may hold any weights
    )

    def tokens(images: Tensor) -> Tensor:
        [taken] = model.forward_intermediates(
            images, indices=[layer - 1], norm=True, stop_early=True, output_fmt="NLC", return_prefix_tokens=True,
            intermediates_only=True,
        )  # fmt: skip
        patches, prefix = taken if isinstance(taken, tuple) else (taken, None)  # no tuple without prefix tokens
        # The class token comes before registers; without one, registers may still be there.
        first = prefix[:, :1] if prefix is not None and model.cls_token is not None else patches.mean(1, keepdim=True)
        return torch.cat([first, patches], dim=1)

    return Teacher(model, tokens, passport, student_patch)


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_layer(spec: str, layer: int | None, depth: int) -> int:
    if layer is not None and not 1 <= layer <= depth:
        raise ConfigError(f"teacher layer {layer}: {spec} has blocks 1 to {depth}")
    return layer or depth


def check_features(teacher: Teacher, images: Tensor) -> dict[str, float]:
    """Run the teacher on real crops (B, 3, H, W), normalised, and refuse one that says nothing.

    Returns:
        ``std``: mean over channels of the global token's deviation between crops; ``cosine``: mean cosine similarity of
        different crops' global tokens, -1..1.

    Raises:
        ModelFileError: features that are not finite, or the same for every crop.
    """
    tokens = teacher(images)
    if not tokens.isfinite().all():
        raise ModelFileError(
            f"teacher {teacher.passport.spec}: gives values that are not finite on real crops; wrong weights?"
        )
    first = tokens[:, 0]
    unit = F.normalize(first, dim=-1)
    pairs = unit @ unit.T
    off_diagonal = (pairs.sum() - pairs.trace()) / max(len(first) * (len(first) - 1), 1)
    check = {"std": first.std(0, unbiased=False).mean().item(), "cosine": off_diagonal.item()}
    if len(first) > 1 and check["std"] < 1e-4:
        raise ModelFileError(
            f"teacher {teacher.passport.spec}: gives the same features for {len(first)} different crops; wrong weights?"
        )
    return check


def passport_fields(passport: Passport) -> dict[str, Any]:
    """Return the passport as JSON-ready values."""
    return {**asdict(passport), "mean": list(passport.mean), "std": list(passport.std)}
