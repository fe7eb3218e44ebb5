"""Export: from a checkpoint to a bundle that has proven what it is.

The graph is written, run by the engine that will serve it, compared with torch on real images, and shipped only if it
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

from dpal_edge import __version__
from dpal_edge.errors import ConfigError, DataError
from dpal_edge.export.crops import Crops, read_inputs
from dpal_edge.export.onnx import INPUT_NAME, ExportedModel, write_onnx
from dpal_edge.export.proof import Outputs, check_parity, prove_stripped, torch_outputs
from dpal_edge.export.source import DETECTION, Source, head_specs, open_source
from dpal_edge.files import sha256_of
from dpal_edge.manifest import MANIFEST_NAME, Artifact, FileSpec, InputSpec, Manifest, Stripped

GOLDEN_IMAGES = 8  # inputs that travel in the bundle with their expected outputs


@dataclass(frozen=True)
class ExportSettings:
    """What may be chosen about an export."""

    calibration: tuple[str, ...] = ()  # folders of real crops; empty takes those that the checkpoint was trained on
    size: tuple[int, int] | None = None  # height, width of the input; None is the checkpoint's
    weights: str = "best"  # backbone, ema, or the better on held-out images
    images: int = 32  # crops compared
    tolerance: float = 1e-4  # on the largest error over the largest output


def export(checkpoint: Path, out: Path, settings: ExportSettings) -> Manifest:
    """Export the model in ``checkpoint`` (a file or a run folder) as an ONNX bundle in the folder ``out``.

    Raises:
        ConfigError: ``out`` holds something that is not a bundle, or the size does not fit the patches or a head.
        DataError: no real images to compare on.
        ModelFileError: the checkpoint cannot be read, or training parts are left in the graph.
        ParityError: the written file differs from torch by more than the tolerance; ``out`` stays as it was.
    """
    if out.is_symlink() or (out.exists() and not _may_replace(out)):
        raise ConfigError(f"{out}: exists and is no bundle; choose another --out, it would be replaced")
    source = open_source(checkpoint, settings.weights, settings.size)
    crops, reference = compute_reference(source, settings)
    with draft_beside(out) as folder:
        draft = folder / "bundle"
        draft.mkdir()
        file = draft / "model.onnx"
        model = ExportedModel(source.model, source.mean, source.std)
        write_onnx(model, file, size=model.size, outputs=model.outputs)
        stripped = prove_stripped(file, model, source.parameters)
        parity = check_parity(file, crops, reference, settings.tolerance)
        artifact = Artifact(target="onnx", precision="float32", file=FileSpec.of(file), parity=parity)
        golden = write_golden(draft / "golden.npz", crops, reference, GOLDEN_IMAGES)
        manifest = make_manifest(source, reference, artifact, golden, stripped)
        manifest.write(draft)
        _replace(draft, out)
    return manifest


def compute_reference(source: Source, settings: ExportSettings) -> tuple[Crops, Outputs]:
    """Read real images and return them with what torch makes of them.

    Raises:
        DataError: there are none.
    """
    size = source.model.backbone.config.size
    frames = DETECTION in source.model.configs
    crops = read_inputs(settings.calibration, source.metadata, size, settings.images, frames=frames)
    return crops, torch_outputs(source.model, crops, source.mean, source.std)


def write_golden(path: Path, crops: Crops, reference: Outputs, count: int) -> FileSpec:
    """Write the first ``count`` images and their outputs."""
    arrays: dict[str, Any] = {"images": crops, **reference}
    np.savez_compressed(path, **{name: array[:count] for name, array in arrays.items()})
    return FileSpec.of(path)


def make_manifest(
    source: Source, reference: Outputs, artifact: Artifact, golden: FileSpec, stripped: Stripped
) -> Manifest:
    """Write down what a device needs to know of an exported model, and where it comes from."""
    size = source.model.backbone.config.size
    return Manifest(
        model=source.name,
        input=InputSpec(name=INPUT_NAME, size=size, mean=source.mean, std=source.std),
        heads=head_specs(source.model, reference),
        artifacts=(artifact,),
        golden=golden,
        stripped=stripped,
        provenance={
            "checkpoint": {
                "file": source.path.name,
                "sha256": sha256_of(source.path),
                "weights": source.metadata["weights"],
            },
            "step": source.metadata.get("step"),
            "teachers": source.metadata.get("teachers", []),
            **({"origin": origin} if (origin := source.metadata.get("origin")) else {}),
            "dpal_edge": __version__,
            "torch": torch.__version__,
        },
    )


def describe(manifest: Manifest, out: Path) -> str:
    """Say in a few lines what was written and what was proven about it."""
    [artifact] = manifest.artifacts
    parity, stripped = artifact.parity, manifest.stripped
    counts = {part: f"{count / 1e6:.2f} M" if count >= 1e4 else f"{count}" for part, count in stripped.removed.items()}
    removed = " and ".join(f"{part} {count}" for part, count in counts.items()) or "nothing"
    detects = any(head.task == DETECTION for head in manifest.heads)
    use = f"dpal-edge run BUNDLE --detector {out}" if detects else f"dpal-edge run {out}"
    return (
        f"stripped  {removed}: {stripped.parameters_before / 1e6:.2f} M parameters became "
        f"{stripped.parameters_after / 1e6:.2f} M\n"
        f"verified  largest error {parity.max_rel_error:.1e} of the largest output ({parity.head}) on {parity.images} "
        f"real {'frames' if detects else 'crops'} ({parity.backend}, tolerance {parity.tolerance:.0e})\n"
        f"wrote     {out} ({artifact.file.bytes / 1e6:.1f} MB {artifact.target}, {artifact.precision}, "
        f"input uint8 {manifest.input.size[0]}x{manifest.input.size[1]}, "
        f"outputs {', '.join(head.name for head in manifest.heads)})\n"
        f"next: {use} --source VIDEO --out annotated.mp4"
    )


@contextmanager
def draft_beside(out: Path) -> Iterator[Path]:
    """Yield a folder to write in beside ``out``; remove what is left of it.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            yield Path(folder)
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
