"""Run a bundle on a device: numpy and an engine, no torch."""

from dpal_edge.runtime.backend import Backend, open_backend
from dpal_edge.runtime.detector import Detections, Detector, HogDetector
from dpal_edge.runtime.pipeline import Person, Pipeline
from dpal_edge.runtime.tracker import Tracker
from dpal_edge.runtime.video import Video, run_video

__all__ = [
    "Backend",
    "Detections",
    "Detector",
    "HogDetector",
    "Person",
    "Pipeline",
    "Tracker",
    "Video",
    "open_backend",
    "run_video",
]
