"""Clocks held at their highest while a block runs; the only thing here that changes a device."""

import atexit
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dpal_edge.errors import BackendUnavailable

_TIMEOUT_S = 60.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def locked_clocks(say: Callable[[str], object]) -> Iterator[None]:
    """Hold the clocks of a Jetson (``jetson_clocks``) or of NVIDIA's cards (``nvidia-smi``) at their highest.

    They are restored when the block ends, in whatever way, and also if the interpreter ends without that.

    Args:
        say: takes a line: what was locked, and how to restore it by hand after a ``kill -9``.

    Raises:
        BackendUnavailable: neither program is here, or it fails, which both do for a user who is not root.
    """
    if shutil.which("jetson_clocks"):
        lock, restore, told = _jetson()
    elif shutil.which("nvidia-smi"):
        lock, restore, told = _cards()
    else:
        raise BackendUnavailable(
            "--lock-clocks: neither jetson_clocks nor nvidia-smi is here; set the CPU's governor yourself: "
            "sudo cpupower frequency-set -g performance"
        )
    undo = _Once(restore)
    atexit.register(undo)
    try:
        with undisturbed():
            try:
                lock()
            except BackendUnavailable:
                _restore_after_failure(undo, say)
                raise
        say(told)
        yield
    finally:
        try:
            with undisturbed():
                undo()
        finally:
            atexit.unregister(undo)


def _restore_after_failure(undo: Callable[[], None], say: Callable[[str], object]) -> None:
    """Restore where locking failed: that this fails as well is a line, and not the error that is shown."""
    try:
        undo()
    except BackendUnavailable as error:
        say(str(error))


class _Once:
    """A function that is called once, however often this is."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()


def _jetson() -> tuple[Callable[[], None], Callable[[], None], str]:
    """Return what locks a Jetson, what restores it, and a line on both."""
    folder = Path(tempfile.mkdtemp(prefix="dpal-edge-"))
    kept = folder / "clocks.conf"

    def lock() -> None:
        _run("jetson_clocks", "--store", str(kept))
        _run("jetson_clocks")

    def restore() -> None:
        if kept.exists():  # otherwise nothing was changed
            _run("jetson_clocks", "--restore", str(kept))
        shutil.rmtree(folder)

    return lock, restore, f"clocks are locked; by hand they are restored with: sudo jetson_clocks --restore {kept}"


def _cards() -> tuple[Callable[[], None], Callable[[], None], str]:
    """Return the same for NVIDIA's cards."""
    answer = _run("nvidia-smi", "--query-gpu=index,clocks.max.sm", "--format=csv,noheader,nounits")
    highest = dict(line.replace(" ", "").split(",") for line in answer.splitlines() if line.count(",") == 1)
    if not highest:
        raise BackendUnavailable(
            f"--lock-clocks: nvidia-smi answers {answer.strip()!r}, expected a line for each GPU, such as '0, 1980'; "
            f"mend the driver, or leave --lock-clocks out"
        )
    locked: list[str] = []

    def lock() -> None:
        for index, mhz in highest.items():
            locked.append(index)
            _run("nvidia-smi", "-i", index, f"--lock-gpu-clocks={mhz},{mhz}")

    def restore() -> None:
        failures = []
        for index in locked:
            try:
                _run("nvidia-smi", "-i", index, "--reset-gpu-clocks")
            except BackendUnavailable as error:  # the others are reset nevertheless
                failures.append(error)
        if failures:
            raise failures[0]

    clocks = ", ".join(f"GPU {index} at {mhz} MHz" for index, mhz in highest.items())
    by_hand = "by hand they are restored with: sudo nvidia-smi --reset-gpu-clocks"
    return lock, restore, f"clocks are locked ({clocks}); {by_hand}"


def _run(*command: str) -> str:
    """Run a program out of reach of Ctrl-C; return what it prints."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False, timeout=_TIMEOUT_S, start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnavailable(f"--lock-clocks: {' '.join(command)} failed ({error})") from error
    if done.returncode:
        reason = " ".join(done.stdout.split()) or f"exit status {done.returncode}"
        raise BackendUnavailable(f"--lock-clocks: {' '.join(command)} failed ({reason}); run as root, with sudo")
    return done.stdout


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put off signals that would end the program, until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in dict.fromkeys(came):
            signal.raise_signal(late)
