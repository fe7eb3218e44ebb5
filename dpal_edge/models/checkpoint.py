"""Checkpoints: safetensors with JSON metadata and a hash over every byte; and the published layouts, read safely.

Nothing here unpickles: ``.pth`` files go through ``weights_only=True``, with ``argparse.Namespace`` alone allowed
beside tensors and plain containers, because the authors' files hold their arguments in one.
"""

import argparse
import hashlib
import json
import math
import pickle
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dpal_edge.errors import ModelFileError
from dpal_edge.files import atomic_path
from dpal_edge.models.students import STUDENTS, Student, StudentConfig, build_student, config_from_dict, config_to_dict
from dpal_edge.models.swin import infer_swin, rename_swin
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD, ViTConfig

FORMAT = "dpal-edge checkpoint 1"
CHECKPOINTS = "checkpoints"  # folder of a run
_HASH_FIELD = b'"sha256":"%s"'  # in the header; quotes inside the metadata are escaped, so it occurs once
_UNSET_HASH = b"0" * 64

# Authors' name -> ours, in DPAL's decoder ("adapter"); what their code creates and never uses maps to nothing.
_DECODER_NAMES = {
    "pattern_queries": "queries",
    "down_dim": "narrow",
    "norm1": "narrow_norm",
    "norm2": "attn_norm",
    "gate.moe_tokens": "router.token",
    "gate.weight": "router.weight",
    "gate.norm": "router.norm",
    "gate.cross_attn": "router.attn",
    "attn2": "query_attn",
    "norm4": "cross_norm",
    "norm5": "expert_in_norm",
    "mlp.0": "expert",
    "mlp.2": "expert_norm",
    "after_experts.norm": "out_norm",
    "norm3": None,
    "expert_norm": None,
}
# What readers of weights raise on damaged bytes: the unpickler trusts what it reads, so nearly anything.
_DAMAGED = (
    safetensors.SafetensorError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
_NESTS = ("student", "teacher", "model", "state_dict")  # where published files keep their weights
_WRAPPERS = ("module.", "backbone_module.")  # prefixes left by data parallelism
_NOT_TRAINED = ("ema", "optimizer")  # parts of our checkpoints that repeat others or belong to no network


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]  # on the CPU

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors whose name starts with ``name`` and a dot, without that prefix."""
        return {key[len(name) + 1 :]: value for key, value in self.tensors.items() if key.startswith(f"{name}.")}

    @property
    def parts(self) -> dict[str, int]:
        """The number of values in each part: backbone, decoder, ema, optimizer, ..."""
        counts: dict[str, int] = {}
        for key, value in self.tensors.items():
            part = key.partition(".")[0]
            counts[part] = counts.get(part, 0) + value.numel()
        return dict(sorted(counts.items()))  # a file's own order varies


def limits_of(metadata: dict[str, Any]) -> str:
    """Return what limits the use of a checkpoint: its own limits, its origin's, those of what it was distilled from."""
    origin = (metadata.get("origin") or {}).get("limits", "")
    inherited = {passport.get("limits", "") for passport in metadata.get("teachers", [])} - {""}
    limits = [metadata.get("limits", ""), origin, *(f"Its teacher's: {text}" for text in sorted(inherited))]
    return " ".join(text for text in limits if text)


def write_checkpoint(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write ``tensors`` and JSON-ready ``metadata`` to ``path``, atomically, with a hash over every byte."""
    cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    header = {"format": FORMAT, "sha256": _UNSET_HASH.decode(), "dpal_edge": json.dumps(metadata)}
    content = safetensors.torch.save(cpu, header)
    digest = hashlib.sha256(content).hexdigest()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        # The hash is taken with zeros in its own place, so it covers the header as well.
        start = content.index(_HASH_FIELD % _UNSET_HASH) + _HASH_FIELD.index(b"%")
        for piece in (content[:start], digest.encode(), memoryview(content)[start + len(digest) :]):
            file.write(piece)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of ours from ``path`` and check its hash.

    Raises:
        ModelFileError: missing, cut short, damaged, or not a dpal-edge checkpoint.
    """
    content = _read_bytes(path)
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        found, stated = header.get("format"), str(header.get("sha256"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{path}: damaged, or not a dpal-edge checkpoint: its header cannot be read") from error
    if found != FORMAT:
        raise ModelFileError(f"{path}: not a dpal-edge checkpoint (format {found!r}, not {FORMAT!r})")
    unset, written = _HASH_FIELD % _UNSET_HASH, _HASH_FIELD % stated.encode(errors="replace")
    digest = hashlib.sha256(content.replace(written, unset, 1)).hexdigest()
    if digest != stated:
        raise ModelFileError(f"{path}: damaged: its sha256 is not the one written in it; a byte changed, or it was cut")
    return Checkpoint(metadata=json.loads(header["dpal_edge"]), tensors=safetensors.torch.load(content))


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first; none if there is no such folder."""
    return sorted((run / CHECKPOINTS).glob("step-*.safetensors"))


def read_newest(run: Path) -> tuple[Path, Checkpoint]:
    """Find and read the newest checkpoint of a run folder, by its step.

    Raises:
        ModelFileError: there is none, or it is damaged; then the newest intact one before it is named.
    """
    paths = list_checkpoints(run)
    if not paths:
        raise ModelFileError(f"{run}: no checkpoint in {run / CHECKPOINTS}; expected a training run that has saved one")
    try:
        return paths[-1], read_checkpoint(paths[-1])
    except ModelFileError as error:
        raise ModelFileError(f"{error}; {_offer_earlier(paths)}") from error


def _offer_earlier(paths: list[Path]) -> str:
    """Name the newest intact checkpoint before the last of ``paths``, which is damaged."""
    for path in reversed(paths[:-1]):
        try:
            read_checkpoint(path)
        except ModelFileError:
            continue
        return f"the previous one, {path.name}, is intact: remove {paths[-1].name} to go on from it"
    return "no earlier checkpoint is intact: start a new run"


def read_tensors(path: Path) -> dict[str, Any]:
    """Read any published weights file, ``.safetensors`` or a torch file, as plain containers; execute nothing.

    Raises:
        ModelFileError: missing, damaged, or holding something that only unpickling would load.
    """
    content_error = f"{path}: cannot be read as weights"
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file; expected weights as .safetensors, .pth, .pt or .tar")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelFileError(
            f"{content_error}: it is damaged, or holds code that is never run here ({_reason(error)})"
        ) from error
    except _DAMAGED as error:
        raise ModelFileError(f"{content_error}: damaged or cut short ({_reason(error)})") from error
    if not isinstance(loaded, dict):
        raise ModelFileError(f"{content_error}: it holds a {type(loaded).__name__}, expected a dictionary of tensors")
    return loaded


def flatten_published(loaded: dict[str, Any], nest: str | None = None) -> dict[str, Tensor]:
    """Return the state dict inside a published file, without wrapper prefixes.

    ``nest`` picks one of the file's dictionaries (``teacher`` is the EMA student in DPAL's files); None takes the first
    that is there, or else the file itself.
    """
    nests = (nest,) if nest else _NESTS
    state = next((loaded[name] for name in nests if isinstance(loaded.get(name), dict)), None)
    if state is None:
        state = {} if nest else loaded
    flat = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            for wrapper in _WRAPPERS:
                key = key.removeprefix(wrapper)
            flat[key] = value
    return flat


def split_dpal(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a flat state dict in DPAL's layout into backbone and decoder, the decoder under this project's names.

    A file with a bare backbone (no ``backbone.`` prefix, as released) gives an empty decoder.
    """
    prefixed = any(key.startswith("backbone.") for key in state)
    backbone: dict[str, Tensor] = {}
    decoder: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("adapter."):
            renamed = decoder_name(key.removeprefix("adapter."), narrowed="adapter.down_dim.weight" in state)
            if renamed:
                decoder[renamed] = value
        elif key.startswith("backbone.") or not prefixed:
            backbone[key.removeprefix("backbone.")] = value
    return {key: value for key, value in backbone.items() if not key.startswith("inter_norm.")}, decoder


def infer_vit(state: dict[str, Tensor], **known: Any) -> ViTConfig:
    """Read the architecture of a ViT off its state dict; what weights cannot tell (heads, size) comes as ``known``.

    Without ``size``, a square number of positions is taken as a square image, any other as twice as high as wide.

    Raises:
        ModelFileError: the keys are not those of a ViT.
    """
    try:
        kernel, positions = state["patch_embed.proj.weight"], state["pos_embed"]
        linear = state["blocks.0.mlp.fc1.weight"]
    except KeyError as error:
        example = ", ".join(list(state)[:3]) or "no tensors"
        raise ModelFileError(f"not a ViT: {error} is missing; the keys begin {example}") from error
    if (kernel.ndim, positions.ndim, linear.ndim) != (4, 3, 2) or not kernel.numel() * linear.numel():
        shapes = f"{tuple(kernel.shape)}, {tuple(positions.shape)} and {tuple(linear.shape)}"
        raise ModelFileError(f"not a ViT on images: its patch kernel, positions and first linear have shapes {shapes}")
    (hidden, width), patch = linear.shape, kernel.shape[-1]
    class_token = "cls_token" in state
    count = positions.shape[1] - class_token
    columns = math.isqrt(count) if math.isqrt(count) ** 2 == count else math.isqrt(count // 2)
    found = ViTConfig(
        size=(count // max(columns, 1) * patch, columns * patch),
        patch_size=patch,
        width=width,
        depth=1 + max(int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d{1,3}\.", key, re.ASCII)),
        mlp_ratio=hidden / width,
        layer_scale="blocks.0.ls1.gamma" in state,
        class_token=class_token,
    )
    config = replace(found, **known)
    if math.prod(config.grid) != count:
        raise ModelFileError(
            f"{count} positions do not fit {config.size[0]}x{config.size[1]} pixels in patches of {patch}; "
            f"give the size"
        )
    return config


def infer_student(state: dict[str, Tensor], **known: Any) -> tuple[StudentConfig, dict[str, Tensor]]:
    """Read the architecture of a published student's backbone off its state dict; return it, and the dict in our names.

    ``known`` is as in ``infer_vit``; by default a ViT's positions are resized in 1-D, as those students were trained.

    Raises:
        ModelFileError: neither a ViT nor a Swin.
    """
    if any(key.startswith("stages.") for key in state):
        # DPAL's Swin was built from SOLIDER's code: its file has a semantic modulation that the student never runs.
        renamed = {key: value for key, value in rename_swin(state).items() if not key.startswith("semantic.")}
        return replace(infer_swin(renamed), **known), renamed
    return infer_vit(state, **{"pos_interp": "1d", **known}), state


def load_backbone(path: Path, *, weights: str = "best", **known: Any) -> tuple[Student, dict[str, Any]]:
    """Load the student backbone of one of our checkpoints or of a published DPAL file.

    Args:
        path: the checkpoint.
        weights: ``backbone`` (as trained), ``ema`` (its running mean), or ``best`` of the two by validation loss; in
            published files ``ema`` is what they call teacher.
        known: for published files, fields of the configuration that weights cannot tell; by default a ViT has 6 and
            12 heads, and positions resized in 1-D, as those were trained.

    Returns:
        The backbone in eval mode, and metadata with at least ``mean``, ``std``, ``teachers`` (their passports) and
        ``parameters`` (of all that computed in training, by part; ``teacher`` is the sum of all teachers).

    Raises:
        ModelFileError: missing, damaged, not a student, or ``weights`` that the file does not hold.
    """
    ours = path.suffix == ".safetensors" and is_ours(path)
    config, state, metadata = _our_backbone(path, weights) if ours else _published_backbone(path, weights, known)
    backbone = build_student(config)
    load_matching(backbone, state, path, least=1.0)
    return backbone.eval(), metadata


def load_matching(module: torch.nn.Module, state: dict[str, Tensor], path: Path, *, least: float) -> float:
    """Load ``state`` into ``module`` and return the share of its tensors that were found, 0..1.

    Raises:
        ModelFileError: less than ``least`` of the module's tensors are in ``state``, or one has another shape there.
    """
    wanted = module.state_dict()
    for key, value in state.items():
        if key in wanted and value.shape != wanted[key].shape:
            shapes = f"{tuple(value.shape)}, the model's is {tuple(wanted[key].shape)}"
            raise ModelFileError(f"{path}: {key} has shape {shapes}; these are the weights of another architecture")
    matching = {key: value for key, value in state.items() if key in wanted}
    share = len(matching) / len(wanted)
    if share < least:
        missing = [key for key in wanted if key not in matching]
        raise ModelFileError(
            f"{path}: {100 * share:.1f} % of the model's {len(wanted)} tensors match, expected at least "
            f"{100 * least:.0f} %; missing: {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}; is this the right file?"
        )
    module.load_state_dict(matching, strict=False)
    return share


def _our_backbone(path: Path, weights: str) -> tuple[StudentConfig, dict[str, Tensor], dict[str, Any]]:
    checkpoint = read_checkpoint(path)
    parts, metadata = checkpoint.parts, checkpoint.metadata
    part = metadata.get("best", "backbone") if weights == "best" else weights
    if part not in parts:
        raise ModelFileError(f"{path}: holds no {part!r} weights; it has {', '.join(parts)}")
    # The first checkpoints had one teacher.
    teachers = metadata["teachers"] if "teachers" in metadata else [metadata["teacher"]]
    parameters = {name: count for name, count in parts.items() if name not in _NOT_TRAINED}
    parameters["teacher"] = sum(passport["parameters"] for passport in teachers)
    facts = {**metadata, "teachers": teachers, "parameters": parameters, "weights": part}
    return config_from_dict(metadata["architecture"]), checkpoint.part(part), facts


def _published_backbone(
    path: Path, weights: str, known: dict[str, Any]
) -> tuple[StudentConfig, dict[str, Tensor], dict[str, Any]]:
    loaded = read_tensors(path)
    part = "backbone" if weights == "best" else weights
    nest = {"backbone": None, "ema": "teacher"}.get(part, part)
    state, decoder = split_dpal(flatten_published(loaded, nest))
    if not state:
        raise ModelFileError(f"{path}: holds no {part!r} weights; its entries are {', '.join(list(loaded)[:6])}")
    try:
        config, state = infer_student(state, **{**_published_size(loaded), **known})
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    if isinstance(config, ViTConfig) and (config.width % config.heads or config.width % config.last_heads):
        raise ModelFileError(
            f"{path}: tokens of {config.width} channels do not divide into {config.heads} heads, {config.last_heads} "
            f"in the last block, which DPAL's students have; expected one of these"
        )
    family = config_to_dict(config)["family"]
    metadata: dict[str, Any] = {
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "student": next((name for name, student in STUDENTS.items() if _alike(student, config)), family),
        "teachers": [],
        "parameters": {
            name: sum(value.numel() for value in values.values())
            for name, values in (("backbone", state), ("decoder", decoder))
        },
        "weights": part,
    }
    return config, state, metadata


def _alike(one: StudentConfig, other: StudentConfig) -> bool:
    return type(one) is type(other) and (one.width, one.depth) == (other.width, other.depth)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); expected a checkpoint") from error


def is_ours(path: Path) -> bool:
    """Say whether a .safetensors file was written here, by its metadata, also if it is damaged elsewhere."""
    try:
        with path.open("rb") as file:
            start = file.read(1 << 20)  # metadata come first in the header
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); expected a checkpoint") from error
    return b'"dpal_edge"' in start


def _published_size(loaded: dict[str, Any]) -> dict[str, Any]:
    height, width = (getattr(loaded.get("args"), name, None) for name in ("height", "width"))
    return {"size": (height, width)} if type(height) is type(width) is int else {}


def decoder_name(key: str, *, narrowed: bool) -> str | None:
    """Translate a name of the authors' decoder; None for what their code creates and never uses."""
    if key.startswith("norm1.") and not narrowed:
        return None  # created, and used only behind down_dim
    for theirs, ours in _DECODER_NAMES.items():
        if key == theirs or key.startswith(f"{theirs}."):
            return ours and ours + key.removeprefix(theirs)
    return key
