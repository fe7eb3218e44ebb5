"""A bundle whose weights stay in the checkpoint: a small graph that reads them from there, and its manifest.

So a model that ships with this package lies in it once, as the checkpoint that fine-tuning goes on from and as what the
runtime runs without torch. ONNX lets an initializer point into any file beside the graph (location, offset, length),
and the tensors of a .safetensors file are plain bytes at known offsets.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from torch import Tensor, nn

from dpal_edge.errors import ConfigError, ModelFileError, ParityError
from dpal_edge.export.artifacts import Workshop
from dpal_edge.export.bundle import (
    ExportSettings,
    draft_beside,
    make_manifest,
    open_labelled,
    read_images,
    write_golden,
)
from dpal_edge.export.folding import fold_norms
from dpal_edge.export.onnx import write_onnx
from dpal_edge.export.proof import check_parity
from dpal_edge.export.source import Source, head_outputs, open_source, output_names
from dpal_edge.export.targets import TARGETS
from dpal_edge.manifest import FileSpec, Manifest, Stripped
from dpal_edge.models.human import HumanModel
from dpal_edge.models.swin import SwinTransformer

GOLDEN_IMAGES = 2  # whole frames are large, and packages should be small
_TYPES = {"F16": TensorProto.FLOAT16, "F32": TensorProto.FLOAT}
_PARTS = {"backbone": ("backbone", "heads"), "ema": ("ema", "ema_heads")}  # of a checkpoint, by the weights taken
_SMALL = 1000  # values; the graph may hold constants of this size itself, such as what batch norms come to


class LinkedModel(nn.Module):
    """A model on uint8 RGB images (B, H, W, 3) that uses its weights as they are stored, those of batch norms apart."""

    def __init__(self, model: HumanModel, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.size = model.backbone.config.size
        self.outputs = output_names(model.configs)
        self.backbone, self.heads = model.backbone, fold_norms(model.heads)
        self.register_buffer("shift", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("scale", 255 * torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 (B, H, W, 3) to the outputs, in the order of their names."""
        normalised = (images.float().permute(0, 3, 1, 2) - self.get_buffer("shift")) / self.get_buffer("scale")
        return tuple(head_outputs(self.heads, self.backbone(normalised)).values())


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor lie in a checkpoint."""

    start: int
    length: int
    dtype: str  # of _TYPES
    transposed: bool = False  # whether the graph wants the matrix transposed


def link(checkpoint: Path, settings: ExportSettings, name: str | None = None) -> Manifest:
    """Write NAME.onnx, NAME.npz (goldens) and NAME.json (the manifest) beside the checkpoint.

    ``Pipeline.open`` and ``ModelDetector.open`` take NAME.json as a bundle. INT8 and FP16 are graphs of their own, such
    as NAME.int8.onnx, which read the same weights. Each is compared with torch first.

    Args:
        checkpoint: in a folder that may be written.
        settings: its targets may be those of ONNX and TensorRT. For another size than the checkpoint's the graphs hold
            the positions that it has there.
        name: NAME; the checkpoint's by default.

    Raises:
        ConfigError: a target of another form is asked for, or one of less than float32 of a checkpoint in float32, or
            the backbone is a Swin.
        DataError: no real images to compare on, or the folder cannot be written.
        ModelFileError: the checkpoint cannot be read, or stores weights in a type that no graph reads.
        ParityError: a graph differs from torch by more than it may; nothing is written.
    """
    source = open_source(checkpoint, settings.weights, settings.size)
    path, model = source.path, LinkedModel(source.model, source.mean, source.std)
    weights, name = _find_weights(source, model, settings.targets), name or path.stem
    images, crops, reference = read_images(source, settings)
    with draft_beside(path) as draft:
        shutil.copyfile(path, draft / path.name)  # a graph may read from files beside it only
        folder = draft / "unlinked"
        folder.mkdir()
        float32 = folder / TARGETS["onnx"].file
        write_onnx(model, float32, size=model.size, outputs=model.outputs)
        exact = check_parity(float32, crops, reference, settings.tolerance)
        golden = write_golden(draft / f"{name}.npz", crops, reference, GOLDEN_IMAGES)
        manifest = make_manifest(source, reference, (), golden, _strip(source))
        labelled = open_labelled(float32, manifest, settings)
        workshop = Workshop(folder, manifest, images, crops, reference, exact, labelled)
        made, refused = workshop.make(settings.targets)
        if refused:
            raise ParityError(f"{path}: {'; '.join(f'{one.target}: {one.reason}' for one in refused)}")
        artifacts = []
        for artifact in made:
            graph = draft / artifact.file.file.replace(float32.stem, name, 1)
            if not graph.exists():  # targets may share one
                weights.point(folder / artifact.file.file, graph)
                check_parity(graph, crops, reference, artifact.parity.tolerance)
            data = (FileSpec.of(draft / path.name),)
            artifacts.append(replace(artifact, file=FileSpec.of(graph), data=data, latency=()))
        manifest = replace(manifest, artifacts=tuple(artifacts))
        written = manifest.write(draft / f"{name}.json")
        files = dict.fromkeys(artifact.file.file for artifact in artifacts)
        for file in (*files, golden.file, written.name):  # the manifest last: until then no bundle is there
            (draft / file).replace(path.with_name(file))
    return manifest


def _find_weights(source: Source, model: LinkedModel, targets: Sequence[str]) -> "_Weights":
    """Find the weights that graphs of these targets read; refuse what they cannot."""
    if others := [target for target in targets if Path(TARGETS[target].file).suffix != ".onnx"]:
        raise ConfigError(f"target {', '.join(others)}: only ONNX graphs read their weights from a checkpoint")
    if isinstance(source.model.backbone, SwinTransformer):
        raise ConfigError(
            f"{source.path}: a Swin's position biases are not stored as a graph needs them; export a bundle"
        )
    weights = _Weights.find(source, model)
    halved = [target for target in targets if TARGETS[target].precision != "float32"]
    if halved and any(place.dtype == "F32" for place in weights.places.values()):
        raise ConfigError(f"{source.path}: stores float32, but {', '.join(halved)} read float16; save it as that")
    return weights


def _strip(source: Source) -> Stripped:
    """Count the parts of the checkpoint that the graph does not read."""
    before = source.parameters
    removed = {part: count for part, count in before.items() if part not in source.kept and count}
    after = sum(parameter.numel() for parameter in source.model.parameters())
    return Stripped(parameters_before=sum(before.values()), parameters_after=after, removed=removed)


@dataclass(frozen=True)
class _Weights:
    """Which tensors of a model lie where in its checkpoint."""

    checkpoint: Path
    places: dict[bytes, _Place]  # by content in float32; of matrices transposed as well
    constants: frozenset[str]  # tensors that a graph holds itself: the normalisation, positions of another size

    @classmethod
    def find(cls, source: Source, model: LinkedModel) -> "_Weights":
        """Compare the tensors of the model with those in the file."""
        with source.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        parts = dict(zip(("backbone", "heads"), _PARTS[source.metadata["weights"]], strict=True))
        places: dict[bytes, _Place] = {}
        constants = {name for name, _ in model.named_buffers()}
        with safe_open(source.path, framework="pt") as stored:
            for name, tensor in source.model.state_dict().items():
                if not tensor.is_floating_point():
                    continue
                part, _, rest = name.partition(".")
                entry = header[f"{parts[part]}.{rest}"]
                if entry["dtype"] not in _TYPES:
                    raise ModelFileError(
                        f"{source.path}: {name} is stored as {entry['dtype']}, expected {' or '.join(_TYPES)}; save it "
                        f"as one"
                    )
                value = stored.get_tensor(f"{parts[part]}.{rest}").float()
                if not torch.equal(value, tensor):
                    constants.add(name)
                    continue
                start, end = entry["data_offsets"]
                place = _Place(8 + length + start, end - start, entry["dtype"])
                places[value.numpy().tobytes()] = place
                if value.ndim == 2:
                    places.setdefault(value.numpy().T.tobytes(), replace(place, transposed=True))
        return cls(source.path, places, frozenset(constants))

    def point(self, graph: Path, out: Path) -> None:
        """Write ``graph`` to ``out``, reading from the checkpoint whatever is stored there."""
        proto = onnx.load(graph)
        initializers, nodes = [], []
        for tensor in proto.graph.initializer:
            array = numpy_helper.to_array(tensor)
            floats = tensor.data_type in _TYPES.values() and array.size > 1
            place = self.places.get(array.astype(np.float32).tobytes()) if floats else None
            if place is not None:
                external, made = _point(tensor, place, self.checkpoint.name)
                initializers.append(external)
                nodes += made
            elif array.size <= _SMALL or tensor.name in self.constants:
                initializers.append(tensor)
            else:
                raise ModelFileError(
                    f"{self.checkpoint}: the graph wants {tensor.name} {array.shape}, which is not stored in it; this "
                    f"is a bug, please report it"
                )
        nodes += proto.graph.node
        proto.graph.ClearField("initializer")
        proto.graph.ClearField("node")
        proto.graph.initializer.extend(initializers)
        proto.graph.node.extend(nodes)
        out.write_bytes(proto.SerializeToString(deterministic=True))


def _point(tensor: TensorProto, place: _Place, file: str) -> tuple[TensorProto, list[onnx.NodeProto]]:
    """Return an initializer that lies in ``file``, and the nodes that turn it into ``tensor``.

    Engines run these nodes once, when they load the graph.
    """
    steps = [("Transpose", {"perm": [1, 0]})] * place.transposed
    steps += [("Cast", {"to": tensor.data_type})] * (_TYPES[place.dtype] != tensor.data_type)
    names = [f"{tensor.name}.{i}" for i in range(len(steps))] + [tensor.name]
    dims = reversed(tensor.dims) if place.transposed else tensor.dims
    external = TensorProto(name=names[0], data_type=_TYPES[place.dtype], dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", place.start), ("length", place.length)):
        external.external_data.add(key=key, value=str(value))
    nodes = [
        helper.make_node(operator, [names[i]], [names[i + 1]], **settings)
        for i, (operator, settings) in enumerate(steps)
    ]
    return external, nodes
