"""Evaluating a model that is in memory, while it is fine-tuned."""

from collections.abc import Mapping
from pathlib import Path

import torch

from dpal_edge.evaluate.command import read_splits, score_tasks
from dpal_edge.evaluate.network import NetworkPredictor
from dpal_edge.models.human import HumanModel


def evaluate_model(
    model: HumanModel,
    folders: Mapping[str, Path],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device | str,
    limit: int | None = None,
    batch: int = 32,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Score ``model`` as it is, in eval mode and float32, on crops of its own size, and leave it as it was.

    No random state of torch, numpy or Python is drawn from, so training goes on as if this had not happened.

    Args:
        model: on ``device``.
        folders: data by task, each with its evaluation part, as ``tasks.table.parse_tasks`` gives them.
        mean: of RGB in 0..1, that the model's images are normalised with; ``std`` alike.
        limit: images of each split, drawn by ``seed``; None is all.

    Returns:
        Metrics by task, the most important first; those that the data leave undefined are missing.

    Raises:
        DataError, ConfigError, ModelFileError: as ``command.evaluate``.
    """
    device = torch.device(device)
    predictor = NetworkPredictor(
        model, mean=mean, std=std, device=device, description={"model": "the model in training"}
    )
    splits = read_splits(folders, limit, seed)
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        results = score_tasks(predictor, folders, splits, batch=batch, errors=False)
    finally:
        for module in in_training:
            module.training = True
    return {
        task: {name: value for name, value in result.metrics.items() if value is not None}
        for task, result in results.items()
    }
