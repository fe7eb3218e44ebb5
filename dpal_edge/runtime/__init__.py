"""Run a bundle on a device: numpy and an engine, no torch."""

from dpal_edge.runtime.backend import open_backend
from dpal_edge.runtime.detector import Detections, Detector, HogDetector, ModelDetector
from dpal_edge.runtime.person import Person
from dpal_edge.runtime.pipeline import Pipeline
from dpal_edge.runtime.tracker import Tracker
from dpal_edge.runtime.video import Video, run_video

__all__ = [
    "Detections",
    "Detector",
    "HogDetector",
    "ModelDetector",
    "Person",
    "Pipeline",
    "Tracker",
    "Video",
    "open_backend",
    "run_video",
]
