"""Run a bundle on a device: numpy and an engine, no torch."""

from dpal_edge.runtime.detector import Detections, HogDetector, ModelDetector
from dpal_edge.runtime.person import Person
from dpal_edge.runtime.pipeline import Pipeline
from dpal_edge.runtime.sources import Frame, PushSource, gather, open_sources
from dpal_edge.runtime.tracker import Tracker

__all__ = [
    "Detections",
    "Frame",
    "HogDetector",
    "ModelDetector",
    "Person",
    "Pipeline",
    "PushSource",
    "Tracker",
    "gather",
    "open_sources",
]
