"""What a checkpoint, run folder, bundle, weights file or ONNX file holds, as one JSON-ready description."""

import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dpal_edge.errors import BackendUnavailable, DataError, ModelFileError
from dpal_edge.files import sha256_of
from dpal_edge.manifest import HeadSpec, Manifest, Verdict, manifest_path

_WEIGHTS = (".safetensors", ".pth", ".pt", ".tar", ".bin")
_CHECKPOINTS = "checkpoints"
_TOLD = {  # by the weights themselves, of a published student's architecture
    "vit": ("family", "width", "depth", "patch_size", "mlp_ratio", "layer_scale", "class_token"),
    "swin": ("family", "width", "depths", "heads", "window", "patch_size", "mlp_ratio"),
}


def describe(path: Path) -> dict[str, Any]:
    """Describe ``path``; its hashes are checked where it carries any.

    Raises:
        DataError: nothing is there, or nothing that this project reads.
        ModelFileError: it is damaged.
        BackendUnavailable: reading it needs a package that is not installed.
    """
    if manifest_path(path).exists():
        return _bundle(path)
    if (path / _CHECKPOINTS).is_dir():
        return {"kind": "run folder", **_weights(_models("checkpoint").read_newest(path)[0])}
    if path.is_file() and path.suffix == ".onnx":
        return _onnx(path)
    if path.is_file() and path.suffix in _WEIGHTS:
        return _weights(path)
    what = (
        "is neither a bundle nor a run folder" if path.is_dir() else "is not known" if path.exists() else "is missing"
    )
    raise DataError(
        f"{path}: {what}; expected a bundle, a run folder, an .onnx file, or weights ({', '.join(_WEIGHTS)})"
    )


def as_text(description: dict[str, Any], indent: int = 0) -> str:
    """Lay a description out for a person: one line per value, nested ones indented, those of a list numbered."""
    width = max((len(str(key)) for key in description), default=0)
    lines = []
    for key, value in _numbered(description):
        if isinstance(value, dict) and value:
            lines += [f"{' ' * indent}{key}", as_text(value, indent + 2)]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            lines.append(f"{' ' * indent}{key!s:{width}}  {f'{shown:,}' if type(shown) is int else shown}")
    return "\n".join(lines)


def _numbered(description: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values, each dictionary of a list as a value of its own: ``teachers 1``, ``teachers 2``."""
    for key, value in description.items():
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, dict) for item in value):
            yield from ((f"{key} {number}", item) for number, item in enumerate(value, 1))
        else:
            yield key, value


def _bundle(path: Path) -> dict[str, Any]:
    manifest = Manifest.read(path)
    manifest.file(path, manifest.golden)
    for artifact in manifest.artifacts:
        manifest.open_artifact(path, artifact)
    rows, columns = manifest.input.size
    artifacts = {
        artifact.target: {
            "file": artifact.file.file,
            "bytes": artifact.file.bytes,
            **({"weights in": [spec.file for spec in artifact.data]} if artifact.data else {}),
            "precision": artifact.precision,
            "largest error": f"{artifact.parity.max_rel_error:.1e} of the largest output"
            f"{artifact.parity.head and f' ({artifact.parity.head})'}, on {artifact.parity.images} "
            f"images with {artifact.parity.backend}",
            **({"kept in float": list(artifact.kept)} if artifact.kept else {}),
            **({"gate": [_judged(verdict) for verdict in artifact.verdicts]} if artifact.verdicts else {}),
            **{f"batch {one.batch}": f"{one.median_ms:.1f} ms where it was made" for one in artifact.latency},
        }
        for artifact in manifest.artifacts
    }
    return {
        "kind": "bundle, all files intact",
        "model": manifest.model,
        "input": f"{manifest.input.name}: uint8 RGB (B, {rows}, {columns}, 3)",
        "outputs": {head.name: _head(head) for head in manifest.heads},
        "artifacts": artifacts,
        "parameters": manifest.stripped.parameters_after,
        "stripped": manifest.stripped.removed,
        "provenance": manifest.provenance,
    }


def _judged(verdict: Verdict) -> str:
    return f"{verdict.head}: {verdict.measure} {verdict.found:.4f} (float32 {verdict.reference:.4f})"


def _head(head: HeadSpec) -> str:
    labels = f", labels: {', '.join(head.labels)}" if head.labels else ""
    return f"{head.task} {f'({head.kind}) ' if head.kind else ''}{head.shape}{labels}"


def _weights(path: Path) -> dict[str, Any]:
    checkpoint = _models("checkpoint")
    if path.suffix == ".safetensors" and checkpoint.is_ours(path):
        read = checkpoint.read_checkpoint(path)
        metadata = {key: value for key, value in read.metadata.items() if key not in ("config", "scaler")}
        return {"kind": "dpal-edge checkpoint, intact", "file": str(path), "values": read.parts, **metadata}
    loaded = checkpoint.read_tensors(path)
    state = checkpoint.flatten_published(loaded)
    if not state:
        raise ModelFileError(f"{path}: holds no tensors; its entries are {', '.join(list(loaded)[:6]) or 'none'}")
    backbone, decoder = checkpoint.split_dpal(state)
    description: dict[str, Any] = {
        "kind": "published weights",
        "file": str(path),
        "sha256": sha256_of(path),
        "entries": [key for key, value in loaded.items() if not hasattr(value, "shape")] or ["a flat state dict"],
        "values": {
            "backbone": sum(v.numel() for v in backbone.values()),
            "decoder": sum(v.numel() for v in decoder.values()),
        },
    }
    try:
        config, _ = checkpoint.infer_student(backbone)
    except ModelFileError as error:
        return {**description, "architecture": str(error)}
    architecture = _models("students").config_to_dict(config)
    told = {key: value for key, value in architecture.items() if key in _TOLD[architecture["family"]]}
    if "pos_embed" in backbone:
        told["positions"] = int(backbone["pos_embed"].shape[1])
    return {**description, "architecture": told}


def _onnx(path: Path) -> dict[str, Any]:
    onnx, protobuf = _import("onnx", "export"), _import("google.protobuf.message", "export")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (
        onnx.checker.ValidationError,
        ValueError,
        protobuf.DecodeError,
        onnx.onnx_cpp2py_export.checker.ValidationError,
    ) as error:
        raise ModelFileError(f"{path}: not a valid ONNX file ({str(error).splitlines()[0]})") from error
    kinds = onnx.TensorProto.DataType

    def tensor(value: Any) -> str:
        shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        return f"{kinds.Name(value.type.tensor_type.elem_type).lower()} ({', '.join(map(str, shape))})"

    stored: Counter[str] = Counter()
    for initializer in model.graph.initializer:
        count = 1
        for side in initializer.dims:
            count *= side
        stored[kinds.Name(initializer.data_type).lower()] += count
    return {
        "kind": "ONNX file",
        "sha256": sha256_of(path),
        "bytes": path.stat().st_size,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        "inputs": {value.name: tensor(value) for value in model.graph.input},
        "outputs": {value.name: tensor(value) for value in model.graph.output},
        "stored values": dict(stored),
        "operators": dict(Counter(node.op_type for node in model.graph.node).most_common()),
    }


def _models(module: str) -> ModuleType:
    return _import(f"dpal_edge.models.{module}", "export")


def _import(module: str, extra: str) -> ModuleType:
    """Import what only some files need, so that a bundle can be inspected on a device without torch."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"reading this file needs {error.name}: pip install 'dpal-edge[{extra}]'") from error
