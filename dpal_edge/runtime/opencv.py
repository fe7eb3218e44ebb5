"""The one place that imports OpenCV: it is optional here and a system package on Jetson."""

from typing import Any

from dpal_edge.errors import BackendUnavailable

_DEFAULT_FPS = 25.0


def frame_rate(capture: Any) -> float:
    """Return the frames per second of an open ``cv2.VideoCapture``, 25 where it does not tell or tells nonsense."""
    fps: float = capture.get(load_opencv().CAP_PROP_FPS)
    return fps if 0 < fps < 1000 else _DEFAULT_FPS


def load_opencv() -> Any:
    """Return the ``cv2`` module.

    Raises:
        BackendUnavailable: OpenCV is not installed, or one of its system libraries is missing.
    """
    try:
        import cv2
    except ImportError as error:
        raise BackendUnavailable(
            f"OpenCV cannot be imported ({error}); pip install 'dpal-edge[camera]', or on Jetson use the system's "
            f"OpenCV from a venv made with --system-site-packages"
        ) from error
    return cv2
