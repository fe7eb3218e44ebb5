"""Run a bundle on a device: numpy and an engine, no torch."""

from dpal_edge.runtime.backend import open_backend
from dpal_edge.runtime.detector import Detections, Detector, HogDetector, ModelDetector
from dpal_edge.runtime.loop import run
from dpal_edge.runtime.person import Person
from dpal_edge.runtime.pipeline import Pipeline
from dpal_edge.runtime.sources import FileSource, Frame, PushSource, gather, open_source, open_sources
from dpal_edge.runtime.tracker import Tracker
from dpal_edge.runtime.video import Video

__all__ = [
    "Detections",
    "Detector",
    "FileSource",
    "Frame",
    "HogDetector",
    "ModelDetector",
    "Person",
    "Pipeline",
    "PushSource",
    "Tracker",
    "Video",
    "gather",
    "open_backend",
    "open_source",
    "open_sources",
    "run",
]
