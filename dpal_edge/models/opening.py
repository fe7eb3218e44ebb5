"""From what a ``--teacher`` names to a network with its weights in, and what is known of them."""

import contextlib
import hashlib
import io
import re
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.files import sha256_of
from dpal_edge.models.checkpoint import (
    infer_vit,
    is_ours,
    limits_of,
    load_backbone,
    load_matching,
    read_tensors,
    split_dpal,
)
from dpal_edge.models.encoders import Encoder, SwinEncoder, TimmEncoder, VitEncoder
from dpal_edge.models.layouts import Family, Weights, licence_limits, recognise, unwrap
from dpal_edge.models.swin import SwinTransformer, infer_swin
from dpal_edge.models.teacher_spec import TeacherSpec
from dpal_edge.models.vit import VisionTransformer

# Tensors that change what a ViT computes; others, such as the heads and decoders of pretraining, do not.
_COMPUTING = ("blocks.", "patch_embed.", "norm_pre.", "reg", "storage_tokens", "cls_token_pos_embed", "rope")
LEAST_MATCH = 0.95  # a teacher with fewer of its tensors found is refused: it would train a student on noise
# Tensors that begin as random numbers; others, such as norms, begin as nothing.
_NEEDED = ("blocks.", "stages.", "patch_embed.", "pos_embed", "cls_token", "reg_token")
_BLOCK = re.compile(r"(stages\.\d+\.)?blocks\.\d+\.")
_SIXTEEN_HEADS = (1152, 1280, 1408, 1664, 1792)  # widths of published ViTs (So400m, H, g, G, E) that have 16 heads


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a teacher's weights are from."""

    family: Family
    sha256: str
    keys_matched: float = 1.0
    missing: tuple[str, ...] = ()  # tensors of the model that were not found
    entry: str = ""


def open_teacher(spec: TeacherSpec) -> tuple[Encoder, Origin]:
    """Open what ``spec`` names, at its layer.

    Raises:
        ConfigError: an option that means nothing for this source, an unknown timm name, a timm model without a final
            norm, a layer that is not there, or heads that the width leaves open.
        ModelFileError: the file is missing, damaged, of an unknown layout, lacks a tensor of a block that runs, or less
            than 95 % of the model's keys match.
    """
    if spec.model:
        return _open_timm(spec)
    path = Path(spec.file)
    if path.suffix == ".safetensors" and path.is_file() and is_ours(path):
        return _open_ours(spec, path)
    weights = recognise(read_tensors(path), spec)
    encoder = _BUILDERS[weights.kind](spec, weights)
    matched, missing = _load(encoder, weights.state, path)
    return encoder, Origin(
        family=weights.family, sha256=sha256_of(path), keys_matched=matched, missing=missing, entry=weights.entry
    )


def _open_ours(spec: TeacherSpec, path: Path) -> tuple[Encoder, Origin]:
    """Open a checkpoint of this project, which tells its own architecture; ``entry`` chooses weights in it."""
    spec.refuse_others({"entry"}, "a checkpoint of this project")
    backbone, metadata = load_backbone(path, weights=spec.entry or "best")
    family = Family(
        name="model of dpal-edge",
        licence=metadata.get("licence", Family.licence),
        limits=limits_of(metadata),
        mean=tuple(metadata["mean"]),
        std=tuple(metadata["std"]),
    )
    origin = Origin(family=family, sha256=sha256_of(path), entry=str(metadata.get("weights", "")))
    encoder = _swin_encoder(spec, backbone) if isinstance(backbone, SwinTransformer) else _vit_encoder(spec, backbone)
    return encoder, origin


def _build_vit(spec: TeacherSpec, weights: Weights) -> Encoder:
    path = Path(spec.file)
    try:
        config = infer_vit(weights.state, **weights.fields)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}; for another architecture use timm:NAME@{path}") from error
    heads, last_heads = spec.heads or weights.heads or (_usual_heads(spec, config.width),) * 2
    if config.width % heads or config.width % last_heads:
        count = f"{heads}+{last_heads}" if heads != last_heads else str(heads)
        raise ConfigError(f"teacher heads {count}: {path} has tokens of {config.width} channels, expected a divisor")
    return _vit_encoder(spec, VisionTransformer(replace(config, heads=heads, last_heads=last_heads)))


def _usual_heads(spec: TeacherSpec, width: int) -> int:
    """Return the attention heads that published ViTs of this width have."""
    if width in _SIXTEEN_HEADS:
        return 16
    if width > 1024 or (width > 64 and width % 64):
        raise ConfigError(
            f"teacher {spec.text!r}: tokens of {width} channels leave the number of attention heads open; give it, as "
            f"in {spec.file}?heads={max(width // 64, 1)}"
        )
    return max(width // 64, 1)


def _build_swin(spec: TeacherSpec, weights: Weights) -> Encoder:
    path = Path(spec.file)
    try:
        swin = SwinTransformer(infer_swin(weights.state))
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    return _swin_encoder(spec, swin, weights.semantic)


def _build_timm(spec: TeacherSpec, weights: Weights) -> Encoder:
    return _timm_encoder(spec, _create_timm(spec, weights.timm, **weights.fields))


_BUILDERS = {"vit": _build_vit, "swin": _build_swin, "timm": _build_timm}


def _vit_encoder(spec: TeacherSpec, vit: VisionTransformer) -> Encoder:
    return VitEncoder(vit, _check_layer(spec, 1, vit.config.depth))


def _swin_encoder(spec: TeacherSpec, swin: SwinTransformer, semantic: float | None = None) -> Encoder:
    config = swin.config
    return SwinEncoder(swin, _check_layer(spec, config.depth - config.depths[-1] + 1, config.depth), semantic)


def _timm_encoder(spec: TeacherSpec, model: Any) -> Encoder:
    return TimmEncoder(model, _check_layer(spec, 1, len(model.blocks)))


def _open_timm(spec: TeacherSpec) -> tuple[Encoder, Origin]:
    """Open timm's ViT ``spec.model`` with weights of ``spec.file``, or of timm's hub."""
    spec.refuse_others({"entry"} if spec.file else set(), "a timm model")
    model = _create_timm(spec, spec.model, pretrained=not spec.file)
    config = model.pretrained_cfg
    stated = config.get("license") or "unknown"
    family = Family(
        name=f"timm {spec.model}",
        licence="unknown" if spec.file else stated,  # a local file may hold any weights
        limits=licence_limits(stated),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    encoder = _timm_encoder(spec, model)
    if spec.file:
        path = Path(spec.file)
        entry, flat = unwrap(read_tensors(path), spec)
        matched, missing = _load(encoder, split_dpal(flat)[0], path)
        return encoder, Origin(
            family=family, sha256=sha256_of(path), keys_matched=matched, missing=missing, entry=entry
        )
    return encoder, Origin(family=family, sha256=_hash_weights(model))


def _create_timm(spec: TeacherSpec, name: str, *, pretrained: bool = False, **fields: Any) -> Any:
    """Create timm's ViT ``name`` for images of any size, with weights of timm's hub if ``pretrained``."""
    import timm  # 3 s to import: paid only by those who use a timm model

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:4]) or "see timm.list_models()"
        raise ConfigError(f"teacher {spec.text!r}: timm {timm.__version__} has no model {name!r}; close to it: {close}")
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **fields)
    except (OSError, RuntimeError) as error:
        raise ModelFileError(
            f"teacher {spec.text!r}: its weights cannot be fetched ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); check the name and the network, or give local weights as timm:{name}@FILE"
        ) from error
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"teacher {spec.text!r}: {name} is not a ViT that takes images of any size ({error})"
        ) from error
    if not (hasattr(model, "blocks") and isinstance(model.patch_embed, timm.layers.PatchEmbed)):
        raise ConfigError(f"teacher {spec.text!r}: {name} is not a ViT: it has no sequence of blocks on one patch grid")
    if isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity):
        raise ConfigError(
            f"teacher {spec.text!r}: {name} has no final norm, and the features of a student, which end in one, are "
            f"compared with what it gives; choose a model with one"
        )
    return model


def _load(encoder: Encoder, state: dict[str, Tensor], path: Path) -> tuple[float, tuple[str, ...]]:
    """Load published weights; return the share of the network's tensors that were found, and what was not.

    Raises:
        ModelFileError: a tensor that runs is missing, too few are there, or more than the network computes with.
    """
    network = encoder.network
    if isinstance(encoder, TimmEncoder):
        state = _translate(network, state)
    _refuse_unknown(encoder, state, path)
    matched = load_matching(network, state, path, least=LEAST_MATCH)
    wanted = list(network.state_dict())
    missing = [key for key in wanted if key not in state]
    blocks = list(dict.fromkeys(found[0] for key in wanted if (found := _BLOCK.match(key))))
    idle = tuple(blocks[encoder.layer :])
    if needed := [key for key in missing if key.startswith(_NEEDED) and not key.startswith(idle)]:
        raise ModelFileError(
            f"{path}: lacks {_few(needed)}, which the tokens of block {encoder.layer} need; random numbers would teach "
            f"in their place; expected the whole file"
        )
    return matched, tuple(missing)


def _translate(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put weights under timm's names that timm, or their publisher, named."""
    translate = getattr(import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if translate is None:
        return state
    with contextlib.redirect_stdout(io.StringIO()):  # timm prints what it tries
        return dict(translate(dict(state), model))


def _few(keys: list[str]) -> str:
    return f"{', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}"


def _refuse_unknown(encoder: Encoder, state: dict[str, Tensor], path: Path) -> None:
    """Refuse weights that compute something in their own architecture and nothing in ``encoder``."""
    network = encoder.network
    what = {VitEncoder: "a plain ViT", SwinEncoder: "a Swin"}.get(type(encoder), f"timm's {type(network).__name__}")
    wanted = network.state_dict()
    if unknown := [key for key in state if key.startswith(_COMPUTING) and key not in wanted]:
        raise ModelFileError(
            f"{path}: {what} has no {_few(unknown)}, so its features would be wrong; for another architecture use "
            f"timm:NAME@{path}"
        )


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_layer(spec: TeacherSpec, first: int, depth: int) -> int:
    """Return the block to align, ``first`` to ``depth``, the last if ``spec`` names none."""
    if spec.layer is not None and not first <= spec.layer <= depth:
        raise ConfigError(f"teacher layer {spec.layer}: {spec.text} has blocks {first} to {depth}")
    return spec.layer or depth
