"""One backbone with the heads of several human tasks, and its checkpoints."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.models.checkpoint import load_matching, read_checkpoint, read_newest
from dpal_edge.models.head_config import HeadConfig, Place
from dpal_edge.models.heads import build_head
from dpal_edge.models.students import Student, build_student, config_from_dict, resize_student
from dpal_edge.models.vit import ViTConfig


class HumanModel(nn.Module):
    """A backbone and, by task, its heads.

    ``forward`` maps normalised images (B, 3, H, W) of the backbone's size to the raw output of each head by task.
    """

    def __init__(self, backbone: Student, heads: Mapping[str, HeadConfig]) -> None:
        super().__init__()
        config = backbone.config
        self.backbone = backbone
        self.configs = dict(heads)
        place = Place(config.width, config.grid, config.size)
        self.heads = nn.ModuleDict({task: build_head(head, place) for task, head in heads.items()})

    def forward(self, images: Tensor, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Run the backbone once, and the heads of ``tasks`` (None: all) on its tokens."""
        tokens = self.backbone(images)
        return {task: self.heads[task](tokens) for task in (self.heads if tasks is None else tasks)}


def load_human(path: Path, *, weights: str = "best") -> tuple[HumanModel, dict[str, Any]]:
    """Load a fine-tuned model from a checkpoint or a run folder.

    Args:
        path: the file, or the run, whose newest checkpoint is taken.
        weights: ``backbone`` (as trained), ``ema`` (the running means), or ``best`` of the two by validation.

    Returns:
        The model in eval mode, float32, and the metadata: at least ``mean``, ``std``, ``heads``, ``architecture``.

    Raises:
        ModelFileError: missing, damaged, without heads, or without these weights.
    """
    file, checkpoint = read_newest(path) if path.is_dir() else (path, read_checkpoint(path))
    metadata = checkpoint.metadata
    if not metadata.get("heads"):
        raise ModelFileError(f"{file}: a backbone without heads; give it some with: dpal-edge finetune --init {file}")
    part = metadata.get("best", "backbone") if weights == "best" else weights
    parts = {"backbone": ("backbone", "heads"), "ema": ("ema", "ema_heads")}[part]
    if parts[0] not in checkpoint.parts:
        raise ModelFileError(f"{file}: holds no {part!r} weights; it has {', '.join(checkpoint.parts)}")
    heads = {task: HeadConfig.from_dict(fields) for task, fields in metadata["heads"].items()}
    model = HumanModel(build_student(config_from_dict(metadata["architecture"])), heads)
    state = {f"backbone.{name}": value for name, value in checkpoint.part(parts[0]).items()}
    state |= {f"heads.{name}": value for name, value in checkpoint.part(parts[1]).items()}
    load_matching(model, state, file, least=1.0)
    return model.eval(), {**metadata, "weights": part, "file": str(file)}


def resize_model(model: HumanModel, size: tuple[int, int]) -> HumanModel:
    """Return a model with the same weights for another input size (height, width); ``model`` itself for its own.

    Raises:
        ConfigError: the size does not fit the patches, or a head has weights for one size only.
    """
    config = model.backbone.config
    if size == config.size:
        return model
    window = config.window if isinstance(config, ViTConfig) else None  # a Swin keeps its own
    resized = HumanModel(resize_student(model.backbone, size, window=window), model.configs).eval()
    for task, head in model.heads.items():
        state, wanted = head.state_dict(), resized.heads[task].state_dict()
        if any(wanted[name].shape != value.shape for name, value in state.items()):
            raise ConfigError(
                f"size {size[0]}x{size[1]}: the {model.configs[task].kind} head for {task} works at "
                f"{config.size[0]}x{config.size[1]} only; export at that size, or fine-tune at the other"
            )
        resized.heads[task].load_state_dict(state)
    return resized
