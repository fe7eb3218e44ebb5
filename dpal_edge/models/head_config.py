"""What describes a head, and the place in a model where it sits."""

from dataclasses import asdict, dataclass
from typing import Any

from dpal_edge.errors import ModelFileError


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """One head; saved in every checkpoint that has it."""

    task: str
    kind: str  # of KINDS[task]
    labels: tuple[str, ...] = ()  # joints, classes or attributes, in the order of the outputs
    channels: int = 0  # of the hidden convolutions of a head for parsing or pose, or of an embedding

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "HeadConfig":
        """Rebuild what ``to_dict`` gave.

        Raises:
            ModelFileError: a field that is not known here.
        """
        try:
            return cls(**{**fields, "labels": tuple(fields["labels"])})
        except (KeyError, TypeError) as error:
            raise ModelFileError(f"head {fields!r} is not known here ({error}); is it of a newer dpal-edge?") from error


@dataclass(frozen=True)
class Place:
    """Where a head sits: what comes from the backbone."""

    width: int  # channels of a token
    grid: tuple[int, int]  # rows, columns of patches
    size: tuple[int, int]  # height, width of the input in pixels
