"""The students that can be trained, and what their two families share."""

from dataclasses import replace
from typing import Any

import torch

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.models.swin import SwinConfig, SwinTransformer, init_swin
from dpal_edge.models.vit import PosInit, PosInterp, VisionTransformer, ViTConfig, init_student, resize_positions

Student = VisionTransformer | SwinTransformer
StudentConfig = ViTConfig | SwinConfig

# DPAL's students (docs/method.md 2). Its ViTs have twice the heads in the last block, a trait kept from TinyMIM.
STUDENTS: dict[str, StudentConfig] = {
    "vit_tiny": ViTConfig(width=192, heads=6, last_heads=12),
    "vit_small": ViTConfig(width=384, heads=6, last_heads=12),
    "swin_tiny": SwinConfig(),
}
_FAMILIES: dict[str, type[StudentConfig]] = {"vit": ViTConfig, "swin": SwinConfig}


def student_config(
    name: str, size: tuple[int, int], *, heads: tuple[int, int] = (6, 12), pos_interp: PosInterp = "2d"
) -> StudentConfig:
    """Return the architecture ``name`` at ``size`` (height, width).

    ``heads`` (of most blocks and of the last) and ``pos_interp`` are choices of the ViTs; a Swin has neither.
    """
    config = STUDENTS[name]
    if isinstance(config, SwinConfig):
        return replace(config, size=size)
    return replace(config, size=size, heads=heads[0], last_heads=heads[1], pos_interp=pos_interp)


def build_student(config: StudentConfig) -> Student:
    """Build the student that ``config`` describes, its weights not initialised as training wants them."""
    return SwinTransformer(config) if isinstance(config, SwinConfig) else VisionTransformer(config)


def init_student_weights(student: Student, generator: torch.Generator, pos_init: PosInit = "trunc_normal") -> None:
    """Initialise as the family is; ``pos_init`` is of a ViT's position embedding."""
    if isinstance(student, SwinTransformer):
        init_swin(student, generator)
    else:
        init_student(student, generator, pos_init)


def resize_student(student: Student, size: tuple[int, int], *, window: tuple[int, int] | None = None) -> Student:
    """Return a student with the same weights that is made for images of ``size``: positions are resized to its grid.

    Args:
        size: height, width in multiples of the patch size.
        window: of a ViT, rows and columns of patches that most blocks attend within; None attends everywhere.

    Raises:
        ConfigError: the size is not of whole patches, or a window is asked of a Swin.
    """
    config = student.config
    if any(side <= 0 or side % config.patch_size for side in size):
        height, width = size
        raise ConfigError(f"size {height}x{width}: expected positive multiples of the patch size {config.patch_size}")
    if isinstance(student, SwinTransformer):
        if window is not None:
            raise ConfigError("window is a choice of ViTs; a Swin has its own")
        resized: Student = SwinTransformer(replace(student.config, size=size))
        resized.load_state_dict(student.state_dict())
        return resized
    resized = VisionTransformer(replace(student.config, size=size, pos_interp="2d", window=window))
    grid = resized.config.grid
    state = student.state_dict()
    state["pos_embed"] = resize_positions(state["pos_embed"], student.config.grid, grid, student.config.pos_interp)
    resized.load_state_dict(state)
    return resized


def config_to_dict(config: StudentConfig) -> dict[str, Any]:
    """Return the family and the fields as JSON-ready values."""
    [family] = (name for name, kind in _FAMILIES.items() if isinstance(config, kind))
    return {"family": family, **config.to_dict()}


def config_from_dict(fields: dict[str, Any]) -> StudentConfig:
    """Rebuild what ``config_to_dict`` gave; without a family, as in the first checkpoints, it is a ViT.

    Raises:
        ModelFileError: a family or field that is not known here.
    """
    fields = dict(fields)
    family = fields.pop("family", "vit")
    try:
        return _FAMILIES[family].from_dict(fields)
    except (KeyError, TypeError) as error:
        raise ModelFileError(
            f"architecture {family!r} with {', '.join(fields)} is not known here ({error}); it may come from a newer "
            f"dpal-edge"
        ) from error
