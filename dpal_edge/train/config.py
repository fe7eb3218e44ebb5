"""The configuration of a distillation run: one frozen dataclass, checked once, saved whole in every checkpoint."""

import dataclasses
import json
import math
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpal_edge.errors import ConfigError
from dpal_edge.models.vit import STUDENTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_INNER_STEP = 48  # the decoder splits this width into 16 heads, and into 12
_POSITIVE = (
    "steps",
    "batch",
    "base_lr",
    "log_every",
    "save_every",
    "keep",
    "relation_temperature",
    "size",
    "local_size",
    "crowd_size",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of DPAL. docs/method.md 8 lists what is published and what departs; ``PUBLISHED`` holds the former."""

    # What is distilled from what
    teacher: str = ""  # timm:NAME, timm:NAME@FILE or FILE
    teacher_layer: int | None = None  # block to align, 1 to depth; None is the last
    teacher_heads: int | None = None  # of a ViT read from FILE; None is width / 64
    data: tuple[str, ...] = ()  # folders of person crops, searched recursively
    student: str = "vit_tiny"
    heads: Literal["6+12", "3"] = "6+12"  # 6 in all blocks but 12 in the last (published), or timm's 3 everywhere
    pos_init: Literal["trunc_normal", "uniform"] = "trunc_normal"
    pos_interp: Literal["2d", "2d-dino", "1d"] = "2d"
    inner_width: int | None = None  # narrow wide students to this before the decoder

    # Views, (height, width) in pixels
    size: tuple[int, int] = (256, 128)
    local_size: tuple[int, int] = (128, 96)
    crowd_size: tuple[int, int] = (256, 256)
    crowd: Literal["others", "self"] = "others"  # who is pasted: others of the batch, or the image itself twice
    crowd_source: Literal["paste", "real", "mixed"] = (
        "paste"  # synthetic crowds, images of crowd_data, or half and half
    )
    crowd_data: tuple[str, ...] = ()  # folders of real multi-person images
    backgrounds: tuple[str, ...] = ()  # folders of images without people; without any, blurred crops serve

    # Method
    router: Literal["soft", "oracle"] = "soft"
    query_init: Literal["normal", "zeros"] = "normal"
    mask: Literal["foreground", "published", "none"] = "foreground"
    relation: Literal["log_softmax", "softmax"] = "log_softmax"
    relation_temperature: float = 1.0
    global_weight: float = 1.0
    local_weight: float = 1.0
    relation_weight: float = 1.0
    router_weight: float = 0.1  # for the first router_warmup of the run, then router_weight_late
    router_weight_late: float = 0.01
    router_warmup: float = 0.1  # share of the run: 20 of 200 epochs
    penalty_weight: float = 1.0

    # Optimisation
    steps: int = 10_000  # optimizer updates
    batch: int = 256  # images per update
    base_lr: float = 2.5e-4  # peak learning rate per 256 images
    warmup: float = 0.05  # share of the run with a linearly rising learning rate: 10 of 200 epochs
    weight_decay: float = 0.05
    no_decay: Literal["embeddings", "1d"] = "embeddings"  # spare 1-D tensors (published), or tokens and queries as well
    clip: float = 3.0  # greatest gradient norm; 0 is none
    ema_decay: float = 0.9998  # of the backbone's running mean, per update, reached after a warm-up
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"  # auto: bf16 where the device computes it fast

    # The machine and the run folder
    device: str = "auto"
    workers: int | None = None  # processes that decode and augment; None chooses
    seed: int = 0
    log_every: int = 10  # updates between lines of metrics.jsonl
    save_every: int = 1000  # updates between checkpoints
    keep: int = 2  # newest checkpoints that stay
    validation_images: int = 64  # held out of training to choose between backbone and running mean; 0 is none

    def __post_init__(self) -> None:
        _check_literals(self)
        for name in _POSITIVE:
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) <= 0:
                raise ConfigError(f"{name} is {value}, expected more than 0")
        for name in ("router_warmup", "warmup", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        for name in ("clip", "weight_decay", "validation_images", "workers", "seed"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more")
        self._check_views()

    def _check_views(self) -> None:
        if self.inner_width is not None and (self.inner_width <= 0 or self.inner_width % _INNER_STEP):
            raise ConfigError(f"inner_width is {self.inner_width}, expected a multiple of {_INNER_STEP}")
        if self.student not in STUDENTS:
            raise ConfigError(f"student is {self.student!r}, expected one of {', '.join(STUDENTS)}")
        patch = STUDENTS[self.student].patch_size
        for name in ("size", "local_size", "crowd_size"):
            if any(side % patch for side in getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)}, expected multiples of the patch size {patch}")
        room = (self.local_size[0] + 1, 2 * self.local_size[1] + 1)
        if self.crowd_size[0] <= room[0] or self.crowd_size[1] <= room[1]:
            raise ConfigError(
                f"crowd_size is {self.crowd_size}, expected more than {room} to hold two people of {self.local_size}"
            )
        if self.crowd_source != "paste" and not self.crowd_data:
            raise ConfigError(f"crowd_source is {self.crowd_source!r} but crowd_data is empty; name a folder of crowds")
        if self.crowd_source == "paste" and self.crowd_data:
            raise ConfigError("crowd_data is given but crowd_source is 'paste'; set crowd_source to real or mixed")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


# What docs/method.md 8 calls faithful, by the names above.
PUBLISHED: dict[str, Any] = {
    "pos_init": "uniform",
    "pos_interp": "1d",
    "heads": "6+12",
    "mask": "published",
    "router": "soft",
    "query_init": "zeros",
    "crowd": "self",
    "relation": "softmax",
    "precision": "fp16",
    "clip": 0.0,
    "ema_decay": 0.996,
    "no_decay": "1d",
}
PRESETS: dict[str, dict[str, Any]] = {"default": {}, "published": PUBLISHED}


def build_config(fields: dict[str, Any]) -> TrainConfig:
    """Build a config from parsed JSON or TOML values, lists standing for tuples.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or one out of range.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := fields.keys() - known:
        raise ConfigError(f"unknown setting {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    hints = typing.get_type_hints(TrainConfig)
    return TrainConfig(**{name: _coerce(hints[name], value, name) for name, value in fields.items()})


def read_config(path: Path) -> dict[str, Any]:
    """Read settings from a ``.toml`` file, or from a ``.json`` one such as a run folder's ``config.json``.

    Raises:
        ConfigError: missing, of another suffix, or not valid.
    """
    try:
        if path.suffix == ".toml":
            return dict(tomllib.loads(path.read_text(encoding="utf-8")))
        if path.suffix == ".json":
            settings = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(settings, dict):
                return settings
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as settings ({error})") from error
    raise ConfigError(f"{path}: expected a .toml or .json file of settings by name")


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE``; the value is JSON where it is valid JSON, a string otherwise.

    Raises:
        ConfigError: no ``=`` in it.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text}: expected KEY=VALUE, for example --set batch=64")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value


def _coerce(hint: Any, value: Any, name: str) -> Any:
    """Check ``value`` against a field's type; ints pass as floats, lists as tuples, one string as a tuple of it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        inner = next(a for a in arguments if a is not type(None))
        return None if value is None else _coerce(inner, value, name)
    if origin is tuple:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        kinds = [arguments[0]] * len(items) if arguments[-1] is ... else list(arguments)
        if len(items) == len(kinds):
            return tuple(_coerce(kind, item, name) for kind, item in zip(kinds, items, strict=True))
    elif origin is Literal:
        return str(value) if type(value) is int else value  # heads=3 is parsed as a number; the config checks the rest
    elif hint is float:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif type(value) is hint:
        return value
    wanted = str(hint).replace("typing.", "") if origin else hint.__name__
    raise ConfigError(f"{name} is {value!r}, expected {wanted}")


def _check_literals(config: TrainConfig) -> None:
    for name, hint in typing.get_type_hints(TrainConfig).items():
        if typing.get_origin(hint) is Literal and getattr(config, name) not in typing.get_args(hint):
            choices = ", ".join(typing.get_args(hint))
            raise ConfigError(f"{name} is {getattr(config, name)!r}, expected one of {choices}")
