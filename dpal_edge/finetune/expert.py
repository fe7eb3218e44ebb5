"""A fine-tuned model of this project that answers for a task of which a student knows little."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dpal_edge.errors import ModelFileError
from dpal_edge.files import sha256_of
from dpal_edge.models.checkpoint import limits_of, read_newest
from dpal_edge.models.human import HumanModel, load_human


@dataclass(frozen=True)
class Expert:
    """A model, how its images are normalised, and what passes on to whom it teaches. Nothing of it is trained."""

    model: HumanModel
    mean: tuple[float, ...]  # of RGB in 0..1
    std: tuple[float, ...]
    limits: str = ""  # of its use; empty: none known
    hashes: Mapping[str, str] = field(default_factory=dict)  # of its file, by name


def open_expert(path: Path, task: str, setting: str) -> Expert:
    """Open a checkpoint, or the newest one of a run folder, as the teacher of ``task`` that ``setting`` names.

    Raises:
        ModelFileError: missing, damaged, or without a head for the task.
    """
    file = read_newest(path)[0] if path.is_dir() else path
    model, metadata = load_human(file)
    if task not in model.configs:
        raise ModelFileError(f"{setting} {path}: has heads for {', '.join(model.configs)}, expected one for {task}")
    mean, std = tuple(metadata["mean"]), tuple(metadata["std"])
    return Expert(model.requires_grad_(False), mean, std, limits_of(metadata), {file.name: sha256_of(file)})
