"""Probing a backbone that is in memory, as validation while it is trained."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from dpal_edge.probe.command import probe_tasks, read_splits
from dpal_edge.probe.network import NetworkFeatures


def probe_backbone(
    backbone: nn.Module,
    tasks: Mapping[str, Path],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    size: tuple[int, int],
    device: torch.device | str,
    limit: int | None = None,
    batch: int = 32,
    seed: int = 0,
) -> dict[str, float]:
    """Probe ``backbone`` as it is, in eval mode and float32, and leave it as it was.

    No random state of torch, numpy or Python is drawn from, so training goes on as if this had not happened.

    Args:
        backbone: maps normalised images (B, 3, H, W) to tokens (B, 1 + N, D), the global token first; on ``device``.
        tasks: data folders by name, as ``tasks.table.parse_tasks`` gives them.
        mean: of RGB in 0..1, that the backbone's images are normalised with; ``std`` alike.
        size: height, width of the crops.
        limit: images of each split, drawn by ``seed``; None is all.

    Returns:
        Metrics under names such as ``reid/mAP``; of all, higher is better.

    Raises:
        DataError, ConfigError, ModelFileError: as ``command.probe``.
    """
    device = torch.device(device)
    extractor = NetworkFeatures(
        backbone, mean=mean, std=std, size=size, device=device, description={"model": "the model in training"}
    )
    splits = read_splits(tasks, limit, seed)
    in_training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            results = probe_tasks(extractor, tasks, splits, batch=batch, seed=seed)
    finally:
        for module in in_training:
            module.training = True
    return {f"{name}/{key}": value for name, task in results.items() for key, value in task.metrics.items()}
