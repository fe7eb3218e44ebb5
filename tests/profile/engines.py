"""Engines whose times are known, and the clock that they move."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


class FakeClock:
    """Seconds that pass only when told so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def pass_ms(self, ms: float) -> None:
        self.seconds += ms / 1e3


@dataclass
class FakeEngine:
    """A backend that takes ``ms(images, outputs)`` of a clock's time, of which ``device`` is the engine's own."""

    clock: FakeClock
    ms: Callable[[int, int], float]
    device: float = 0.9
    name: str = "fake 1.0 cpu"
    inputs: dict = field(default_factory=lambda: {"images": (None, 16, 8, 3)})
    heads: tuple = ("pose", "embedding")

    def run(self, feeds, outputs=None):
        count = len(feeds["images"])
        names = self.heads if outputs is None else outputs
        self.clock.pass_ms(self.ms(count, len(names)))
        return {name: np.zeros((count, 5), np.float32) for name in names}


class FakeDeviceEngine(FakeEngine):
    """One that counts itself."""

    device_clock = "a fake's own counter"

    def run_timed(self, feeds):
        before = self.clock()
        self.run(feeds)
        return 1e3 * self.device * (self.clock() - before)
