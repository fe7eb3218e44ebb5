"""Open cameras and streams through OpenCV, decoded by hardware where the machine has it and by software elsewhere."""

import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, DataError
from dpal_edge.runtime.opencv import frame_rate, load_opencv

_TIMEOUT_MS = 5000  # of FFmpeg, to open and to read
_JETSON = Path("/etc/nv_tegra_release")
# Frames leave NVMM memory in nvvidconv, and of a queue only the newest is kept.
_TO_BGR = (
    "nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR ! "
    "appsink drop=1 max-buffers=1 sync=false"
)


class Capture(Protocol):
    """An open device."""

    fps: float

    def read(self) -> NDArray[np.uint8] | None:
        """Wait for the next picture as the device gives it; None when there are no more."""
        ...

    def release(self) -> None:
        """Close the device."""
        ...


class OpenCvCapture:
    """A ``cv2.VideoCapture`` that is open."""

    def __init__(self, capture: Any) -> None:
        self.fps = frame_rate(capture)
        self._capture = capture

    def read(self) -> NDArray[np.uint8] | None:
        """Wait for the next picture; None when there are no more."""
        found, image = self._capture.read()
        return image if found else None

    def release(self) -> None:
        """Close the device."""
        self._capture.release()


def open_camera(number: int) -> OpenCvCapture:
    """Open a USB camera by its number.

    Raises:
        DataError: there is none, or another program has it.
    """
    cv2 = load_opencv()
    capture = cv2.VideoCapture(number, cv2.CAP_V4L2)
    if not capture.isOpened():
        there = sorted(str(path) for path in Path("/dev").glob("video*"))
        why = f"here are {', '.join(there)}; is it in use, or is this user not in the group video?"
        raise DataError(f"camera {number} cannot be opened; {why if there else 'this machine has no /dev/video*'}")
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    return OpenCvCapture(capture)


def open_csi(sensor: int, *, width: int = 1280, height: int = 720, fps: int = 30) -> OpenCvCapture:
    """Open a Jetson's CSI camera.

    Raises:
        BackendUnavailable: this OpenCV is built without GStreamer.
        DataError: there is no such camera.
    """
    if not has_gstreamer():
        raise BackendUnavailable(
            "csi:// needs an OpenCV with GStreamer, which pip's has not: use the system's, from a venv made with "
            "--system-site-packages"
        )
    cv2 = load_opencv()
    capture = cv2.VideoCapture(csi_pipeline(sensor, width, height, fps), cv2.CAP_GSTREAMER)
    if not capture.isOpened():
        raise DataError(
            f"csi://{sensor} cannot be opened at {width}x{height}, {fps} frames/s; is nvargus-daemon running?"
        )
    return OpenCvCapture(capture)


def open_url(url: str) -> OpenCvCapture:
    """Open a stream: on a Jetson through GStreamer and its decoder, elsewhere or if that fails through FFmpeg.

    Raises:
        DataError: nobody answers, or what answers is no video.
    """
    cv2 = load_opencv()
    if _JETSON.exists() and has_gstreamer() and (pipeline := url_pipeline(url)):
        capture = cv2.VideoCapture(pipeline, cv2.CAP_GSTREAMER)
        if capture.read()[0]:  # a decoder may open, and give nothing
            return OpenCvCapture(capture)
        capture.release()  # first: some cameras serve one client at a time
    options = {
        cv2.CAP_PROP_OPEN_TIMEOUT_MSEC: _TIMEOUT_MS,
        cv2.CAP_PROP_READ_TIMEOUT_MSEC: _TIMEOUT_MS,
        # Falls back to software by itself where there is no such decoder.
        cv2.CAP_PROP_HW_ACCELERATION: cv2.VIDEO_ACCELERATION_ANY,
    }
    capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, [number for pair in options.items() for number in pair])
    if not capture.isOpened():
        raise DataError(f"{without_secrets(url)} cannot be opened: nobody answers there, or it is no video")
    return OpenCvCapture(capture)


def has_gstreamer() -> bool:
    """Say whether this OpenCV was built with GStreamer."""
    lines = load_opencv().getBuildInformation().splitlines()
    return any("GStreamer:" in line and "YES" in line for line in lines)


def csi_pipeline(sensor: int, width: int, height: int, fps: int) -> str:
    """Return GStreamer's pipeline for a CSI camera."""
    return (
        f"nvarguscamerasrc sensor-id={sensor} ! "
        f"video/x-raw(memory:NVMM),width={width},height={height},framerate={fps}/1,format=NV12 ! {_TO_BGR}"
    )


def url_pipeline(url: str) -> str | None:
    """Return GStreamer's pipeline for a stream of any codec; None for an address that would end its quotes."""
    if set(url) & set('"\\\n'):
        return None
    if url.lower().startswith(("rtsp://", "rtsps://")):
        # Its own latency is 2 s; and of its pads decodebin must take the picture's, not the sound's.
        source = f'rtspsrc location="{url}" latency=200 protocols=tcp ! application/x-rtp,media=video ! decodebin'
    else:
        source = f'uridecodebin uri="{url}"'
    return f"{source} ! {_TO_BGR}"


def without_secrets(url: str) -> str:
    """Return a URL as it may be shown: no user, no query, and no value in a path that is written like one.

    Many cameras want ``/user=NAME_password=WORD_channel=1.sdp``; and what comes before an @ is never shown, wherever it
    stands, because passwords are not always escaped.
    """
    scheme, separator, rest = url.partition("://")
    rest = re.split(r"[?#]", rest.rpartition("@")[2])[0]
    return f"{scheme}{separator}" + re.sub(r"=[^/=]*?(?=_\w+=|/|$)", "=...", rest)
