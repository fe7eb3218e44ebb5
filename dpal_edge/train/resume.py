"""Whether a run folder is new, or holds a run to go on with."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Protocol

from dpal_edge.errors import ConfigError
from dpal_edge.models.checkpoint import Checkpoint, list_checkpoints, read_newest


class Settings(Protocol):
    """The settings of a run: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def steps(self) -> int:
        """Updates to do."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON-ready values."""
        ...


def checkpoint_to_resume(
    run: Path, config: Settings, may_change: Collection[str], *, resume: bool
) -> Checkpoint | None:
    """Read the newest checkpoint of ``run``; None if it has none yet.

    A setting that the run's version did not know counts as its default.

    Args:
        run: folder of the run.
        config: settings of now.
        may_change: names of settings that may differ from those of the run.
        resume: whether a run that is there is to be gone on with.

    Raises:
        ModelFileError: it is damaged; then the newest intact one before it is named.
        ConfigError: there is a run, but ``resume`` is false; or it was started with other settings, or has done more
            updates than it is to do.
    """
    if not list_checkpoints(run):
        return None
    if not resume:
        raise ConfigError(f"{run}: already holds a run; go on with it by --resume, or choose another --out")
    _, saved = read_newest(run)
    before = {**_defaults(config), **saved.metadata["config"]}
    changed = [k for k, v in config.to_dict().items() if v != before.get(k) and k not in may_change]
    if changed:
        was = ", ".join(f"{key}={before.get(key)!r}" for key in changed)
        raise ConfigError(f"{run}: cannot resume with other settings; the run has {was}; start a new run for others")
    if saved.metadata["step"] > config.steps:
        raise ConfigError(f"{run}: steps is {config.steps}, but {saved.metadata['step']} updates are done already")
    return saved


def _defaults(settings: Any) -> dict[str, Any]:
    """Return the defaults of a dataclass and of those in it, as JSON-ready values."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value, default = getattr(settings, field.name), field.default
        if dataclasses.is_dataclass(value):
            found |= _defaults(value)
        elif default is not dataclasses.MISSING:
            found[field.name] = list(default) if isinstance(default, tuple) else default
    return found
