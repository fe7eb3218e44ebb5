"""The configuration of a distillation run: one frozen dataclass, checked once, saved whole in every checkpoint."""

import dataclasses
import json
import math
import re
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dpal_edge.errors import ConfigError
from dpal_edge.models.students import STUDENTS
from dpal_edge.train.methods import find_method

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_POSITIVE = ("steps", "batch", "accumulate", "base_lr", "log_every", "save_every", "keep", "size", "local_size",
             "crowd_size")  # fmt: skip
_WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false",
          tuple[int, int]: "two whole numbers, for example 256x128"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: what every method needs. docs/method.md 8 lists what is published and what departs from it.

    In files and on the command line the fields of ``options`` stand beside the others: one flat list of names.
    """

    method: str = "dpal"  # a file of train/methods
    options: Any = None  # the settings of the method alone, an instance of its ``options`` class

    # What is distilled from what
    teacher: tuple[str, ...] = ()  # SOURCE[?key=value&...] each; models/teacher_spec.py tells the keys
    teacher_layer: int | None = None  # block to align, 1 to depth; None is the last
    data: tuple[str, ...] = ()  # folders of person crops, searched recursively, or .tar shards; paths or fsspec URLs
    student: str = "vit_tiny"
    heads: str = "6+12"  # of a ViT: 6 in all blocks but 12 in the last (published); "3" is timm's 3 everywhere
    start: Literal["random", "sliced"] = "random"  # sliced: a ViT begins as the principal part of its teacher
    pos_init: Literal["trunc_normal", "uniform"] = "trunc_normal"
    pos_interp: Literal["2d", "2d-dino", "1d"] = "2d"

    # Views, (height, width) in pixels
    size: tuple[int, int] = (256, 128)
    local_size: tuple[int, int] = (128, 96)
    crowd_size: tuple[int, int] = (256, 256)
    crowd: Literal["others", "self"] = "others"  # who is pasted: another image as well, or the image itself twice
    crowd_source: Literal["paste", "real", "mixed"] = (
        "paste"  # synthetic crowds, images of crowd_data, or half and half
    )
    crowd_data: tuple[str, ...] = ()  # folders of real multi-person images
    backgrounds: tuple[str, ...] = ()  # folders of images without people; without any, blurred crops serve
    augment: Literal["auto", "workers", "device"] = "auto"  # where colours and blur are changed; auto: device on CUDA

    # Optimisation
    steps: int = 10_000  # optimizer updates
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of blocks
    batch: int = 256  # images per update, over all processes
    accumulate: int = 1  # passes that an update is made of, each with batch / accumulate images
    base_lr: float = 2.5e-4  # peak learning rate per 256 images
    warmup: float = 0.05  # share of the run with a linearly rising learning rate: 10 of 200 epochs
    weight_decay: float = 0.05
    no_decay: Literal["embeddings", "1d"] = "embeddings"  # spare 1-D tensors (published), or tokens and queries as well
    clip: float = 3.0  # greatest gradient norm; 0 is none
    ema_decay: float = 0.9998  # of the backbone's running mean, per update, reached after a warm-up
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"  # auto: bf16 where the device computes it fast

    # The machine and the run folder
    device: str = "auto"
    compile: bool = False  # let torch.compile fuse the student's part of the update
    workers: int | None = None  # processes that decode and augment, for each training process; None chooses
    seed: int = 0  # of the initial weights, and of the data unless data_seed is given
    data_seed: int | None = None  # of the split, the order and the views
    view_variants: int | None = None  # views that an image has in all; None draws new ones in every epoch
    teacher_cache: str | None = None  # folder that keeps what the teachers said; needs view_variants
    log_every: int = 10  # updates between lines of metrics.jsonl
    save_every: int = 1000  # updates between checkpoints
    keep: int = 2  # newest checkpoints that stay
    validation_images: int = 64  # held out of training to choose between backbone and running mean; 0 is none
    probe: tuple[str, ...] = ()  # NAME=DIR each: tasks that the frozen student is probed on during training
    probe_every: int = 5000  # updates between probes
    probe_images: int = 500  # images of each split that a probe looks at
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        check_fields(self, positive=_POSITIVE, shares=("warmup", "ema_decay"))
        for name in ("clip", "weight_decay", "validation_images", "workers", "seed", "data_seed"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("view_variants", "probe_every", "probe_images"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"{name} is {value}, expected more than 0")
        if self.teacher_cache is not None and self.view_variants is None:
            raise ConfigError("teacher_cache needs views that come again: give --set view_variants=4, for example")
        if self.batch % self.accumulate:
            raise ConfigError(f"batch is {self.batch}, expected a multiple of accumulate={self.accumulate}")
        self._check_views()

    def _check_views(self) -> None:
        if self.student not in STUDENTS:
            raise ConfigError(f"student is {self.student!r}, expected one of {', '.join(STUDENTS)}")
        student = STUDENTS[self.student]
        if not re.fullmatch(r"[1-9]\d?(\+[1-9]\d?)?", self.heads) or any(student.width % n for n in self.block_heads):
            raise ConfigError(
                f"heads is {self.heads!r}, expected divisors of the width {student.width} as N, or as N+LAST for "
                f"another number in the last block"
            )
        patch = student.patch_size
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

    @property
    def block_heads(self) -> tuple[int, int]:
        """Attention heads of a ViT student's blocks and of its last one."""
        most, _, last = self.heads.partition("+")
        return int(most), int(last or most)

    @property
    def order_seed(self) -> int:
        """The seed of split, order and views."""
        return self.seed if self.data_seed is None else self.data_seed

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, those of the method's options among them, as JSON-ready values."""
        fields = dataclasses.asdict(self)
        fields |= fields.pop("options")
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


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
    """Build a config from parsed JSON, TOML or YAML values, lists standing for tuples.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or one out of range.
    """
    core = typing.get_type_hints(TrainConfig)
    method = find_method(fields.get("method", TrainConfig.method))
    own = typing.get_type_hints(method.options)
    known = (core.keys() | own.keys()) - {"options"}
    if unknown := fields.keys() - known:
        unknown_names, known_names = ", ".join(sorted(unknown)), ", ".join(sorted(known))
        name = fields.get("method", TrainConfig.method)
        raise ConfigError(f"unknown setting {unknown_names} for the method {name}; known are {known_names}")
    options = method.options(**{name: coerce(own[name], fields[name], name) for name in fields.keys() & own.keys()})
    values = {name: coerce(core[name], fields[name], name) for name in fields.keys() & core.keys()}
    return TrainConfig(options=options, **values)


def read_config(path: Path) -> dict[str, Any]:
    """Read settings from a ``.yaml`` or ``.toml`` file, or a ``.json`` one such as a run folder's ``config.json``.

    Raises:
        ConfigError: missing, of another suffix, or not valid.
    """
    try:
        if path.suffix == ".toml":
            return dict(tomllib.loads(path.read_text(encoding="utf-8")))
        if path.suffix in (".json", ".yaml", ".yml"):
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
            if isinstance(settings, dict) and all(isinstance(name, str) for name in settings):
                return settings
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as settings ({' '.join(str(error).split())})") from error
    raise ConfigError(f"{path}: expected a .yaml, .toml or .json file of settings by name")


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


def coerce(hint: Any, value: Any, name: str) -> Any:
    """Check ``value`` against a field's type; ints pass as floats, lists as tuples, one string as a tuple of it.

    Pairs of whole numbers can be written ``256x128``, as elsewhere.

    Raises:
        ConfigError: it is of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        inner = next(a for a in arguments if a is not type(None))
        return None if value is None else coerce(inner, value, name)
    if arguments == (int, int) and isinstance(value, str) and (pair := re.fullmatch(r"(\d+)x(\d+)", value)):
        return int(pair[1]), int(pair[2])
    if origin is tuple:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        kinds = [arguments[0]] * len(items) if arguments[-1] is ... else list(arguments)
        if len(items) == len(kinds):
            return tuple(coerce(kind, item, name) for kind, item in zip(kinds, items, strict=True))
    elif origin is Literal:
        return _choice(arguments, value, name)
    elif (number := _as_plain(hint, value)) is not None:
        return number
    raise ConfigError(f"{name} is {value!r}, expected {_WORDS[hint]}")


def _choice(choices: tuple[Any, ...], value: Any, name: str) -> Any:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    return value


def _as_plain(hint: Any, value: Any) -> Any:
    """Return ``value`` as the plain type ``hint``, None if it is of another kind.

    Integers pass for text (heads=3), and text for numbers where it is one: YAML takes 1e-3 for text.
    """
    if hint is str and type(value) is int:
        return str(value)
    if hint is not float or isinstance(value, bool):
        return value if type(value) is hint else None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def check_fields(config: Any, *, positive: tuple[str, ...] = (), shares: tuple[str, ...] = ()) -> None:
    """Check a dataclass of settings: literals, seeds, ``positive`` numbers or tuples of them, ``shares`` of 0 to 1.

    Raises:
        ConfigError: the first that is wrong.
    """
    _check_literals(config)
    for name in ("seed", "data_seed"):
        if (seed := getattr(config, name, None) or 0) >= 2**63:
            raise ConfigError(f"{name} is {seed}, expected less than 2^63")
    for name in positive:
        value = getattr(config, name)
        if min(value if isinstance(value, tuple) else (value,)) <= 0:
            raise ConfigError(f"{name} is {value}, expected more than 0")
    for name in shares:
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name} is {getattr(config, name)}, expected 0 to 1")


def _check_literals(config: Any) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal and getattr(config, name) not in typing.get_args(hint):
            choices = ", ".join(typing.get_args(hint))
            raise ConfigError(f"{name} is {getattr(config, name)!r}, expected one of {choices}")
