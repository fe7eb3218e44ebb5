"""Export: from a checkpoint to a bundle that has proven what it is.

The graph is written, run by the engine that will serve it, compared with torch on real crops, and shipped only if it
agrees. Everything happens in a folder beside the bundle that replaces it at the end.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from dpal_edge import __version__
from dpal_edge.errors import ConfigError, DataError, ModelFileError, ParityError
from dpal_edge.export.onnx import INPUT_NAME, count_parameters, exported_model, write_onnx
from dpal_edge.files import find_images, sha256_of
from dpal_edge.manifest import MANIFEST_NAME, Artifact, FileSpec, HeadSpec, InputSpec, Manifest, Parity, Stripped
from dpal_edge.models.checkpoint import load_backbone, read_newest
from dpal_edge.models.students import Student
from dpal_edge.models.vit import normalize
from dpal_edge.runtime.backend import open_backend

Crops = NDArray[np.uint8]  # (n, height, width, 3) RGB
GOLDEN_IMAGES = 8  # crops that travel in the bundle with their expected outputs
_HEAD = "embedding"


@dataclass(frozen=True)
class ExportSettings:
    """What may be chosen about an export."""

    calibration: tuple[str, ...] = ()  # folders of real crops; empty takes those that the checkpoint was trained on
    size: tuple[int, int] | None = None  # height, width of the input; None is the checkpoint's
    weights: str = "best"  # backbone, ema, or the better on held-out images
    images: int = 32  # crops compared
    tolerance: float = 1e-4  # on the largest error over the largest output


def export(checkpoint: Path, out: Path, settings: ExportSettings) -> Manifest:
    """Export the student in ``checkpoint`` (a file or a run folder) as an ONNX bundle in the folder ``out``.

    Raises:
        ConfigError: ``out`` holds something that is not a bundle, or the size does not fit the patches.
        DataError: no real crops to compare on.
        ModelFileError: the checkpoint cannot be read, or training parts are left in the graph.
        ParityError: the written file differs from torch by more than the tolerance; ``out`` stays as it was.
    """
    if out.is_symlink() or (out.exists() and not _may_replace(out)):
        raise ConfigError(f"{out}: exists and is no bundle; choose another --out, it would be replaced")
    path = read_newest(checkpoint)[0] if checkpoint.is_dir() else checkpoint
    backbone, metadata = load_backbone(path, weights=settings.weights)
    size = settings.size or backbone.config.size
    if any(side <= 0 or side % backbone.config.patch_size for side in size):
        raise ConfigError(f"size {size}: expected positive multiples of the patch size {backbone.config.patch_size}")
    folders = settings.calibration or tuple(metadata.get("config", {}).get("data", ()))
    crops = read_crops(folders, size, settings.images)
    reference = torch_outputs(backbone, crops, metadata["mean"], metadata["std"])

    with _draft_beside(out) as draft:
        draft.mkdir()
        file = draft / "model.onnx"
        model = exported_model(backbone, size, tuple(metadata["mean"]), tuple(metadata["std"]))
        write_onnx(model, file, size=size, outputs=[_HEAD])
        stripped = prove_stripped(file, model, metadata["parameters"])
        parity = check_parity(file, crops, reference, settings.tolerance)
        golden = draft / "golden.npz"
        arrays: dict[str, Any] = {"images": crops[:GOLDEN_IMAGES], _HEAD: reference[:GOLDEN_IMAGES]}
        np.savez_compressed(golden, **arrays)
        manifest = Manifest(
            model=metadata["student"],
            input=InputSpec(name=INPUT_NAME, size=size, mean=tuple(metadata["mean"]), std=tuple(metadata["std"])),
            heads=(HeadSpec(name=_HEAD, task="embedding", shape=(backbone.config.width,)),),
            artifacts=(Artifact(target="onnx", precision="float32", file=FileSpec.of(file), parity=parity),),
            golden=FileSpec.of(golden),
            stripped=stripped,
            provenance={
                "checkpoint": {"file": path.name, "sha256": sha256_of(path), "weights": metadata["weights"]},
                "step": metadata.get("step"),
                "teachers": metadata["teachers"],
                "dpal_edge": __version__,
                "torch": torch.__version__,
            },
        )
        manifest.write(draft)
        _replace(draft, out)
    return manifest


def describe(manifest: Manifest, out: Path) -> str:
    """Say in a few lines what was written and what was proven about it."""
    [artifact] = manifest.artifacts
    parity, stripped = artifact.parity, manifest.stripped
    counts = {part: f"{count / 1e6:.2f} M" if count >= 1e4 else f"{count}" for part, count in stripped.removed.items()}
    removed = " and ".join(f"{part} {count}" for part, count in counts.items()) or "nothing"
    return (
        f"stripped  {removed}: {stripped.parameters_before / 1e6:.2f} M parameters became "
        f"{stripped.parameters_after / 1e6:.2f} M\n"
        f"verified  largest error {parity.max_rel_error:.1e} of the largest output on {parity.images} real crops "
        f"({parity.backend}, tolerance {parity.tolerance:.0e})\n"
        f"wrote     {out} ({artifact.file.bytes / 1e6:.1f} MB {artifact.target}, {artifact.precision}, "
        f"input uint8 {manifest.input.size[0]}x{manifest.input.size[1]})\n"
        f"next: dpal-edge run {out} --source VIDEO --out annotated.mp4"
    )


def read_crops(folders: tuple[str, ...], size: tuple[int, int], count: int) -> Crops:
    """Read ``count`` crops spread evenly over ``folders``, resized (bicubic) to ``size``; pass over unreadable files.

    Raises:
        DataError: no folder, or fewer than two readable images: a graph is not compared on invented input.
    """
    if not folders:
        raise DataError("no real crops to compare the exported model on; give a folder of them with --calibration DIR")
    try:
        paths = find_images(folders).paths
    except DataError as error:
        raise DataError(f"{error}; give real crops with --calibration DIR") from error
    order = [paths[i * len(paths) // min(count, len(paths))] for i in range(min(count, len(paths)))]
    crops = []
    for path in dict.fromkeys([*order, *paths]):  # the others stand in for those that cannot be read
        try:
            with Image.open(path) as image:
                crops.append(np.asarray(image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)))
        except (OSError, Image.DecompressionBombError, SyntaxError, ValueError):
            continue
        if len(crops) == count:
            break
    if len(crops) < 2:
        raise DataError(f"{', '.join(folders)}: {len(crops)} readable images, expected at least 2 crops of people")
    return np.stack(crops)


@torch.no_grad()
def torch_outputs(
    backbone: Student, crops: Crops, mean: tuple[float, ...], std: tuple[float, ...]
) -> NDArray[np.float32]:
    """Return the embeddings (n, width) of uint8 ``crops`` by the unexported model in float32."""
    images = normalize(torch.from_numpy(crops).permute(0, 3, 1, 2), mean, std)
    tokens = torch.cat([backbone(chunk) for chunk in torch.split(images, 8)])
    embeddings: NDArray[np.float32] = tokens[:, 0].numpy()
    return embeddings


def prove_stripped(file: Path, model: nn.Module, before: dict[str, int]) -> Stripped:
    """Count the weights in the written graph; they must be those of ``model`` and nothing else.

    Args:
        file: the written graph.
        model: what was written.
        before: the number of values in each part of the network that was trained; all but ``backbone`` must be gone.

    Raises:
        ModelFileError: the graph holds another number of weights, or a tensor with a training part's name.
    """
    counts = count_parameters(file)
    left = [name for name in counts if name.split(".")[0] in before.keys() - {"backbone"}]
    after = sum(counts.values())
    expected = sum({p.detach().numpy().tobytes(): p.numel() for p in model.parameters()}.values())  # equal ones once
    if left or after != expected:
        raise ModelFileError(
            f"export left {after} weights in the graph, expected the backbone's {expected}"
            f"{'; training parts: ' + ', '.join(left) if left else ''}; this is a bug, please report it"
        )
    removed = {part: count for part, count in before.items() if part != "backbone" and count}
    return Stripped(parameters_before=sum(before.values()), parameters_after=after, removed=removed)


def check_parity(file: Path, crops: Crops, reference: NDArray[np.float32], tolerance: float) -> Parity:
    """Run the written file on ``crops``, singly and as one batch, against ``reference`` (n, width).

    Raises:
        ParityError: the largest error over the largest reference value is above ``tolerance``.
    """
    backend = open_backend(file)
    batch = backend.run({INPUT_NAME: crops})[_HEAD]
    single = np.concatenate([backend.run({INPUT_NAME: crop[None]})[_HEAD] for crop in crops[:4]])
    error = max(np.abs(batch - reference).max(), np.abs(single - reference[:4]).max())
    products = (batch * reference).sum(1)
    cosine = products / (np.linalg.norm(batch, axis=1) * np.linalg.norm(reference, axis=1))
    parity = Parity(
        backend=backend.name,
        images=len(crops),
        max_abs_error=float(error),
        max_rel_error=float(error / np.abs(reference).max()),
        min_cosine=float(cosine.min()),
        tolerance=tolerance,
    )
    if not parity.max_rel_error <= tolerance:  # also when it is not a number
        raise ParityError(
            f"{file.name}: differs from torch by {parity.max_rel_error:.2e} of the largest output "
            f"on {len(crops)} crops, tolerance {tolerance:.0e} ({backend.name}); nothing was written"
        )
    return parity


@contextmanager
def _draft_beside(out: Path) -> Iterator[Path]:
    """Yield the path of a folder to write beside ``out``; remove what is left of it.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            yield Path(folder) / "bundle"
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); free some space or choose another --out, nothing "
            f"was left half-written"
        ) from error


def _may_replace(out: Path) -> bool:
    """Say whether ``out`` is an empty folder or a bundle of any schema; others have a manifest.json too."""
    if not out.is_dir():
        return False
    try:
        manifest = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not any(out.iterdir())
    return isinstance(manifest, dict) and {"schema", "artifacts", "golden"} <= manifest.keys()


def _replace(draft: Path, out: Path) -> None:
    """Put the finished folder ``draft`` in the place of ``out``, an earlier bundle or nothing."""
    old = draft.parent / "old"
    if out.exists():
        out.rename(old)
    try:
        draft.rename(out)
    except BaseException:  # also Ctrl-C: the earlier bundle must not go with the draft's folder
        if old.exists():
            old.rename(out)
        raise
