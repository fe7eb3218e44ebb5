"""How numbers and sentences are written for people; what is unknown is a dash."""

import re
from collections.abc import Mapping
from html import escape
from typing import Any


def as_count(number: int, one: str, many: str = "") -> str:
    """Write a number of things: "1 image", "2 images"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def as_passes(stages: Mapping[str, Any]) -> str:
    """Write how often what was measured: frames of one camera, or passes over those of several."""
    frames, passes = stages["frames"], stages["passes"]
    told = as_count(frames, "frame")
    return told if frames == passes else f"{as_count(passes, 'pass', 'passes')} over {told}"


def as_ms(value: float | None) -> str:
    """Write a time in three digits at least, never more than a microsecond precise."""
    if value is None:
        return "-"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f}"


def as_decimal(value: float | None) -> str:
    """Write a number with one digit at most."""
    return "-" if value is None else f"{value:.1f}".removesuffix(".0")


def as_percent(share: float | None) -> str:
    """Write a share as a whole percentage."""
    return "-" if share is None else f"{round(100 * share)}%"


def or_dash(value: object) -> str:
    """Write what is known, or that it is not."""
    return "-" if value is None or value == "" else str(value)


def as_html(text: str) -> str:
    """Escape a sentence, and set what stands between backquotes as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
