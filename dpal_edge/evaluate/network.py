"""Torch models as predictors: checkpoints, and models in training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.evaluate.predictor import DETECTION, REID, Choice, HeadInfo, Precision, Raw, check_finite, head_info
from dpal_edge.files import sha256_of
from dpal_edge.models.checkpoint import CHECKPOINTS, is_ours, load_backbone, read_checkpoint, read_newest
from dpal_edge.models.human import HumanModel, load_human
from dpal_edge.models.students import config_to_dict
from dpal_edge.models.vit import normalize
from dpal_edge.probe.network import choose_device
from dpal_edge.tasks.image import Pixels

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NetworkPredictor:
    """A backbone with heads. Without a head for re-identification its global token is the embedding, as in bundles."""

    def __init__(
        self,
        model: HumanModel,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        precision: Precision = "float32",
        description: dict[str, Any],
    ) -> None:
        """Wrap ``model``, in eval mode and on ``device``, which wants RGB in 0..1 less ``mean`` over ``std``."""
        self.size = model.backbone.config.size
        heads = {task: head_info(task, config.kind, config.labels) for task, config in model.configs.items()}
        if not {REID, DETECTION} & heads.keys():
            heads[REID] = HeadInfo(REID)
        self.heads: Mapping[str, HeadInfo] = heads
        self.description = {
            **description,
            "size": list(self.size),
            "engine": f"torch {torch.__version__}",
            "device": str(device),
            "precision": precision,
        }
        self._model, self._mean, self._std = model, mean, std
        self._device, self._dtype = device, _DTYPES[precision]

    @torch.no_grad()  # not inference mode: a model in training may keep what it computes here
    def __call__(self, images: Pixels, task: str) -> Raw:
        """Run the backbone and one head."""
        pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            raw = self._run(normalize(pixels, self._mean, self._std), task)
        return check_finite(raw.float().cpu().numpy(), self.description["model"], task)

    def _run(self, images: Tensor, task: str) -> Tensor:
        if task in self._model.heads:
            outputs: dict[str, Tensor] = self._model(images, (task,))
            return outputs[task]
        tokens: Tensor = self._model.backbone(images)
        return tokens[:, 0]


def load(path: Path, choice: Choice) -> NetworkPredictor:
    """Open a checkpoint, or the newest one of a run folder.

    Raises:
        ModelFileError, ConfigError, BackendUnavailable: as ``predictor.open_predictor``.
    """
    precision = choice.precision or "float32"
    if precision not in _DTYPES:
        raise ConfigError(f"precision {precision!r}: expected one of: {', '.join(_DTYPES)}")
    device = choose_device(choice.device)
    file = _find(path)
    model, metadata = _open(file, choice.weights or "best")
    description = {
        "model": str(path),
        "kind": "checkpoint",
        "architecture": metadata.get("student") or config_to_dict(model.backbone.config)["family"],
        "file": str(file),
        "sha256": sha256_of(file),
        "weights": metadata["weights"],
        "step": metadata.get("step"),
    }
    return NetworkPredictor(
        model.to(device),
        mean=tuple(metadata["mean"]),
        std=tuple(metadata["std"]),
        device=device,
        precision=precision,
        description=description,
    )


def _find(path: Path) -> Path:
    """Return the weights file that ``path`` is, or the newest checkpoint of the run that it is."""
    if not path.is_dir():
        return path
    if not (path / CHECKPOINTS).is_dir():
        raise ModelFileError(
            f"{path}: neither a bundle nor a run folder; it holds no manifest.json and no {CHECKPOINTS}"
        )
    return read_newest(path)[0]


def _open(file: Path, weights: str) -> tuple[HumanModel, dict[str, Any]]:
    """Load a model with its heads, or a backbone that has none."""
    if file.suffix == ".safetensors" and is_ours(file) and read_checkpoint(file).metadata.get("heads"):
        return load_human(file, weights=weights)
    backbone, metadata = load_backbone(file, weights=weights)
    return HumanModel(backbone, {}).eval(), metadata
