"""Features of torch models: students, teachers, and students that learned nothing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpal_edge.errors import BackendUnavailable, ConfigError, ModelFileError
from dpal_edge.files import sha256_of
from dpal_edge.models.checkpoint import CHECKPOINTS, load_backbone, read_newest
from dpal_edge.models.students import STUDENTS, Student, build_student, init_student_weights, student_config
from dpal_edge.models.swin import SwinTransformer
from dpal_edge.models.teacher import load_teacher, passport_fields
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD, normalize
from dpal_edge.probe.features import Features, check_finite
from dpal_edge.tasks.image import Pixels

_DEFAULT_SIZE = (256, 128)  # height, width in pixels, of what tells none: teachers and random students
_PATCH = 16  # pixels of a patch of the students' grid, which teachers are put on

Size = tuple[int, int]


class NetworkFeatures:
    """A function from normalised images to tokens, as an extractor."""

    has_patches = True

    def __init__(
        self,
        tokens: Callable[[Tensor], Tensor],
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: Size,
        device: torch.device,
        description: dict[str, Any],
    ) -> None:
        """Wrap ``tokens``: images (B, 3, H, W) on ``device`` to (B, 1 + rows * columns, D), the global token first.

        Raises:
            ConfigError: ``size`` is not made of whole patches.
        """
        if any(side < 1 or side % _PATCH for side in size):
            raise ConfigError(f"size {size[0]}x{size[1]}: expected height and width in multiples of {_PATCH} pixels")
        self.size = size
        self.description = {**description, "size": list(size), "device": str(device)}
        self._tokens = tokens
        self._mean, self._std = mean, std
        self._device = device

    @torch.no_grad()  # not inference mode: a backbone in training may keep what it computes here
    def __call__(self, crops: Pixels) -> Features:
        """Map crops to tokens."""
        images = torch.from_numpy(crops).to(self._device).permute(0, 3, 1, 2)
        tokens = self._tokens(normalize(images, self._mean, self._std)).float().cpu().numpy()
        patches = tokens[:, 1:].reshape(len(tokens), *grid_of(tokens.shape[1] - 1, self.size), -1)
        return check_finite(Features(tokens[:, 0], patches), self.description["model"])


def load(model: str, *, size: Size | None, layer: int | None, device: str, seed: int) -> NetworkFeatures:
    """Open a run folder, a checkpoint or published weights, ``teacher:SPEC``, ``timm:NAME`` or ``random:STUDENT``.

    Raises:
        ModelFileError, ConfigError, BackendUnavailable: as ``features.open_extractor``.
    """
    place = choose_device(device)
    if model.startswith(("teacher:", "timm:")):
        return open_teacher(model.removeprefix("teacher:"), size=size or _DEFAULT_SIZE, layer=layer, device=place)
    if model.startswith("random:"):
        backbone = random_student(model.removeprefix("random:"), size or _DEFAULT_SIZE, seed)
        facts: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        told: dict[str, Any] = {"kind": "random weights", "seed": seed}
    else:
        path = _find_weights(Path(model))
        backbone, facts = load_backbone(path)
        told = {"kind": "checkpoint", "file": str(path), "sha256": sha256_of(path)}
        told |= {key: facts[key] for key in ("student", "weights", "step") if key in facts}
    layer = _check_layer(model, backbone, layer)
    backbone = backbone.to(place).eval()
    return NetworkFeatures(
        lambda images: backbone(images, layer),
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        size=size or backbone.config.size,
        device=place,
        description={"model": model, **told, "layer": layer},
    )


def open_teacher(spec: str, *, size: Size, layer: int | None, device: torch.device) -> NetworkFeatures:
    """Open a teacher on the students' grid for crops of ``size``.

    Raises:
        ModelFileError, ConfigError: as ``models.teacher.load_teacher``.
    """
    teacher = load_teacher(spec, layer=layer, student_patch=_PATCH, size=size).to(device)
    return NetworkFeatures(
        teacher,
        mean=IMAGENET_MEAN,  # a teacher changes them to its own
        std=IMAGENET_STD,
        size=size,
        device=device,
        description={"model": spec, "kind": "teacher", **passport_fields(teacher.passport)},
    )


def random_student(name: str, size: Size, seed: int) -> Student:
    """Return a student as training begins with it.

    Raises:
        ConfigError: there is no student of this name.
    """
    if name not in STUDENTS:
        raise ConfigError(f"random:{name}: no student {name!r}, expected one of: {', '.join(STUDENTS)}")
    student = build_student(student_config(name, size))
    init_student_weights(student, torch.Generator().manual_seed(seed))
    return student


def choose_device(name: str) -> torch.device:
    """Return the device ``name``; ``auto`` is CUDA where it is there.

    Raises:
        ConfigError: none of auto, cpu and cuda.
        BackendUnavailable: CUDA is asked for and not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {name!r}: expected auto, cpu or cuda")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise BackendUnavailable("device 'cuda': this torch sees no CUDA device; use cpu or auto")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def grid_of(patches: int, size: Size) -> Size:
    """Return rows and columns of the grid of square patches on an image of ``size`` (height, width).

    Raises:
        ModelFileError: so many patches form no such grid.
    """
    rows = round(math.sqrt(patches * size[0] / size[1]))
    columns = round(math.sqrt(patches * size[1] / size[0]))
    if rows * columns != patches:
        raise ModelFileError(f"{patches} patch tokens of {size[0]}x{size[1]} pixels form no grid of square patches")
    return rows, columns


def _find_weights(path: Path) -> Path:
    """Return the weights file that ``path`` is, or the newest checkpoint of the run that it is."""
    if not path.is_dir():
        return path
    if not (path / CHECKPOINTS).is_dir():
        raise ModelFileError(
            f"{path}: neither a bundle nor a run folder; it holds no manifest.json and no {CHECKPOINTS}"
        )
    return read_newest(path)[0]


def _check_layer(model: str, backbone: Student, layer: int | None) -> int:
    """Return the block to take, 1 to depth; of a Swin, one of its last stage."""
    depth = backbone.config.depth
    first = depth - backbone.config.depths[-1] + 1 if isinstance(backbone, SwinTransformer) else 1
    if layer is not None and not first <= layer <= depth:
        raise ConfigError(f"layer {layer}: of {model} the blocks {first} to {depth} can be taken")
    return layer or depth
