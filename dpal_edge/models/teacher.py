"""Teachers: any frozen model that turns images into tokens on the student's patch grid.

models/teacher_spec.py says how one is named, models/layouts.py which published files are understood,
models/opening.py opens them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.models.encoders import Encoder
from dpal_edge.models.opening import Origin, open_teacher
from dpal_edge.models.teacher_spec import ROLES, Rgb, Role, Target, TeacherSpec, parse_spec
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD

_NAMED = 8  # missing tensors that a passport names


@dataclass(frozen=True, kw_only=True)
class Passport:
    """What a run's teacher was: written into the run folder and into every checkpoint.

    Family, licence and limits are told by the layout of the file, which cannot prove where it comes from.
    """

    spec: str
    roles: tuple[Role, ...]
    family: str
    entry: str  # dictionary of the file that the weights were in; empty for the file itself, or a hub
    sha256: str  # of the weights file, or of the tensors where a hub served them
    keys_matched: float  # share of the model's tensors found in the file, 0..1
    missing: tuple[str, ...]  # the others, a few of them by name
    parameters: int
    patch_size: int
    width: int
    depth: int
    layer: int  # block whose tokens are aligned, after the final norm
    heads: str  # attention heads as in "12", or "6+12" with those of the last block; empty for timm's models and Swins
    resize: str  # how its positions are resized; empty likewise
    global_target: Target
    input_size: tuple[int, int]  # height, width that it sees of the student's base view
    grid: tuple[int, int]  # its own rows and columns of patches there
    mean: Rgb  # of RGB in 0..1
    std: Rgb
    semantic_weight: float | None  # SOLIDER's
    licence: str  # as the source states it, "unknown" otherwise
    limits: str  # what the licence is known to bar, in one sentence; empty if nothing
    note: str  # what a user should know


class Teacher(nn.Module):
    """A frozen model behind one contract, on the student's grid and normalisation, in eval mode always.

    ``forward`` maps images (B, 3, H, W), normalised with the ImageNet mean and std, to float32 tokens (B, 1 + N, D),
    the global token first, N = H / ``student_patch`` * W / ``student_patch`` patches, without a graph. Images are
    re-normalised where the teacher wants another mean and std, and resized bicubically by ``zoom`` (height, width);
    where its patches do not fall on the student's, the grid of tokens is resized bicubically.

    It computes in float32 until ``cast`` chooses another precision, whatever autocast is on outside.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, encoder: Encoder, passport: Passport, *, student_patch: int = 16, zoom: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.passport = passport
        self.student_patch = student_patch
        self.zoom = zoom or (_least_zoom(encoder.patch_size, student_patch),) * 2
        self._dtype = torch.float32
        mean, std = torch.tensor(passport.mean), torch.tensor(passport.std)
        scale = torch.tensor(IMAGENET_STD) / std
        shift = (torch.tensor(IMAGENET_MEAN) - mean) / std
        self._renormalise = not torch.equal(scale, torch.ones(3)) or bool(shift.any())
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    @property
    def heads(self) -> int | None:
        """Attention heads of the aligned block; None where it is not the attention of a plain ViT."""
        return self.encoder.heads

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode whatever the parent does."""
        return self

    def cast(self, dtype: torch.dtype) -> "Teacher":
        """Compute matrix products and attention in ``dtype`` from now on; norms and sums of blocks stay float32.

        The weights of linear layers and convolutions are converted once, and not anew for every batch as under autocast
        alone. Unlike converting the whole model this keeps float32 where activations are large.
        """
        self._dtype = dtype
        for module in self.encoder.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return float32 tokens (B, 1 + N, width)."""
        seen = self.prepare(images)
        with self._precision(images):
            tokens = self.encoder(seen)
        return self._place(tokens.float(), seen, images)

    @torch.no_grad()
    def attend(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``forward``'s tokens and, of the same block, the qkv output (B, T, 3 * width), both float32.

        T counts the class token where there is one, and the patches.

        Raises:
            ConfigError: no plain attention there, or its tokens do not fall on the student's grid.
        """
        seen = self.prepare(images)
        if (own := self._own_grid(seen)) != (grid := self._student_grid(images)):
            raise ConfigError(
                f"teacher {self.passport.spec!r}: its attention is on {own[0]}x{own[1]} patches, the student's on "
                f"{grid[0]}x{grid[1]}; TinyMIM and --recipe attn need the same grid, give a size that makes it so"
            )
        with self._precision(images):
            tokens, qkv = self.encoder.attend(seen)
        return self._place(tokens.float(), seen, images), qkv.float()

    def _precision(self, images: Tensor) -> torch.autocast:
        low = self._dtype != torch.float32
        return torch.autocast(images.device.type, dtype=self._dtype if low else None, enabled=low)

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise and resize images (B, 3, H, W) of the student's for the network."""
        images = images.float()
        if self._renormalise:
            images = images * self.scale + self.shift
        height, width = images.shape[-2:]
        wanted = _zoomed((height, width), self.zoom, self.encoder.step)
        if wanted != (height, width):
            images = F.interpolate(images, size=wanted, mode="bicubic", antialias=True)
        return images

    def _place(self, tokens: Tensor, seen: Tensor, images: Tensor) -> Tensor:
        """Choose the global token, and put the patches on the student's grid."""
        first, patches = tokens[:, :1], tokens[:, 1:]
        if self.passport.global_target != self.encoder.target:
            first = patches.mean(1, keepdim=True)
        if (own := self._own_grid(seen)) != (grid := self._student_grid(images)):
            maps = patches.mT.reshape(len(patches), -1, *own)
            patches = F.interpolate(maps, size=grid, mode="bicubic").flatten(2).mT
        return torch.cat([first, patches], dim=1)

    def _own_grid(self, seen: Tensor) -> tuple[int, int]:
        return _grid((seen.shape[-2], seen.shape[-1]), self.encoder.patch_size)

    def _student_grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.student_patch, images.shape[-1] // self.student_patch


class Teachers(nn.Module):
    """One or several teachers, each role (global, local, relation) played by one of them.

    Nothing of them belongs into a checkpoint.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        super().__init__()
        self.members = nn.ModuleList(teachers)
        self._players = {role: teacher for teacher in teachers for role in teacher.passport.roles}

    def teacher(self, role: Role) -> Teacher:
        """Return who plays ``role``."""
        return self._players[role]

    def width(self, role: Role) -> int:
        """Return the channels of the tokens for ``role``."""
        return self.teacher(role).passport.width

    @property
    def passports(self) -> list[Passport]:
        """Who they are, in the order that they were named."""
        return [teacher.passport for teacher in self.each()]

    def cast(self, dtype: torch.dtype) -> "Teachers":
        """Cast each teacher."""
        for teacher in self.each():
            teacher.cast(dtype)
        return self

    def forward(self, images: Tensor, roles: tuple[Role, ...]) -> dict[Role, Tensor]:
        """Run each teacher that ``roles`` need once on normalised images (B, 3, H, W).

        Returns:
            Float32 tokens by role: (B, 1, D) for global, (B, N, D) for local, (B, 1 + N, D) for relation; D may differ
            between roles.
        """
        cut = {"global": slice(1), "local": slice(1, None), "relation": slice(None)}
        found: dict[Role, Tensor] = {}
        for teacher in self.each():
            if played := [role for role in teacher.passport.roles if role in roles]:
                tokens = teacher(images)
                found.update((role, tokens[:, cut[role]]) for role in played)
        return found

    def attend(self, images: Tensor, role: Role) -> tuple[Tensor, Tensor]:
        """Return what ``Teacher.attend`` of who plays ``role`` returns."""
        return self.teacher(role).attend(images)

    def each(self) -> list[Teacher]:
        """Return every teacher once, in the order that they were named."""
        return list(dict.fromkeys(self._players.values()))


def load_teachers(
    specs: Sequence[str], *, layer: int | None = None, student_patch: int = 16, size: tuple[int, int] = (256, 128)
) -> Teachers:
    """Load what each ``--teacher`` names.

    Args:
        specs: one or several, as models/teacher_spec.py describes.
        layer: block to align, for a single teacher that names none itself.
        student_patch: pixels of a side of the student's tokens.
        size: height, width of the student's base view.

    Raises:
        ConfigError: a role that nobody or several play, or as load_teacher.
        ModelFileError: as load_teacher.
    """
    parsed = [parse_spec(spec) for spec in specs]
    for role in ROLES:
        players = [spec.text for spec in parsed if role in spec.roles]
        if len(players) != 1:
            who = " and ".join(players) or "nobody"
            raise ConfigError(f"teachers: {who} for {role}, expected one; tell who is for what, as in SPEC?for={role}")
    if layer is not None and len(parsed) > 1:
        raise ConfigError(
            f"teacher layer {layer}: there are {len(parsed)} teachers; tell whose, as in SPEC?layer={layer}"
        )
    return Teachers([load_teacher(spec.text, layer=layer, student_patch=student_patch, size=size) for spec in parsed])


def load_teacher(
    spec: str, *, layer: int | None = None, student_patch: int = 16, size: tuple[int, int] = (256, 128)
) -> Teacher:
    """Load the teacher that ``spec`` names; arguments as in load_teachers.

    Raises:
        ConfigError: an option that is unknown or means nothing for this source, an unknown timm name, or a layer or
            global target that the model does not have.
        ModelFileError: the file is missing, damaged, of an unknown layout, or lacks what the aligned block needs, or
            more than 5 % of the model's tensors.
    """
    parsed = parse_spec(spec)
    if layer is not None:
        if parsed.layer is not None:
            raise ConfigError(f"teacher {spec!r}: names layer {parsed.layer}, and layer {layer} is asked for; give one")
        parsed = replace(parsed, layer=layer)
    encoder, origin = open_teacher(parsed)
    return make_teacher(encoder, parsed, origin, student_patch=student_patch, size=size)


def make_teacher(
    encoder: Encoder,
    spec: TeacherSpec,
    origin: Origin,
    *,
    student_patch: int = 16,
    size: tuple[int, int] = (256, 128),
) -> Teacher:
    """Put ``encoder`` behind the contract of teachers; other arguments as in load_teachers.

    Raises:
        ConfigError: a global target that the model does not have.
    """
    target = spec.target or encoder.target
    if target not in (encoder.target, "mean"):
        raise ConfigError(
            f"teacher {spec.text!r}: global={target} is not there; it has {' and '.join({encoder.target, 'mean'})}"
        )
    least = _least_zoom(encoder.patch_size, student_patch)
    zoom = (spec.size[0] / size[0], spec.size[1] / size[1]) if spec.size else (least, least)
    seen = _zoomed(size, zoom, encoder.step)
    family = origin.family
    mean, std = spec.norm or (family.mean, family.std)
    passport = Passport(
        spec=spec.text,
        roles=spec.roles,
        family=family.name,
        entry=origin.entry,
        sha256=origin.sha256,
        keys_matched=origin.keys_matched,
        missing=_shortened(origin.missing),
        parameters=sum(p.numel() for p in encoder.parameters()),
        patch_size=encoder.patch_size,
        width=encoder.width,
        depth=encoder.depth,
        layer=encoder.layer,
        heads=encoder.all_heads,
        resize=encoder.resize,
        global_target=target,
        input_size=seen,
        grid=_grid(seen, encoder.patch_size),
        mean=mean,
        std=std,
        semantic_weight=encoder.semantic_weight,
        licence=family.licence,
        limits=family.limits,
        note=family.note.format(before_last=encoder.depth - 1),
    )
    return Teacher(encoder, passport, student_patch=student_patch, zoom=zoom)


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
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(passport).items()}


def _shortened(names: tuple[str, ...]) -> tuple[str, ...]:
    return names if len(names) <= _NAMED else (*names[:_NAMED], f"and {len(names) - _NAMED} more")


def _least_zoom(patch: int, student_patch: int) -> float:
    """Return the zoom nearest to 1 by which patches of a teacher and of the student fall on each other.

    Several patches of the one may fall on one of the other: a teacher of 32 pixels sees what a student of 16 does.
    """
    if patch <= student_patch:
        return round(student_patch / patch) * patch / student_patch
    return patch / round(patch / student_patch) / student_patch


def _zoomed(size: tuple[int, int], zoom: tuple[float, float], step: int) -> tuple[int, int]:
    height, width = (max(round(side * factor / step), 1) * step for side, factor in zip(size, zoom, strict=True))
    return height, width


def _grid(size: tuple[int, int], patch: int) -> tuple[int, int]:
    return -(-size[0] // patch), -(-size[1] // patch)
