"""The one place that imports OpenCV: it is optional here and a system package on Jetson."""

from typing import Any

from dpal_edge.errors import BackendUnavailable


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
