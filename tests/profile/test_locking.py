"""Clocks are changed by programs that are not the real ones: they write what they were told into a log."""

import os
import signal
import subprocess
import sys

import pytest

from dpal_edge.errors import BackendUnavailable
from dpal_edge.profile.locking import locked_clocks

JETSON_CLOCKS = """#!/bin/sh
echo "jetson_clocks $*" >> "$LOG"
[ "$1" = --store ] && { [ -n "$NOT_ROOT" ] && { echo "must be run as root"; exit 1; }; echo saved > "$2"; }
[ "$1" = --restore ] && { grep -q saved "$2" || exit 3; }
[ -z "$1" ] && exit "${FAIL:-0}"
exit 0
"""
NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *query*) printf '0, 1980\\n1, 2100\\n' ;;
  *) echo "nvidia-smi $*" >> "$LOG"; case "$*" in *"$FAIL_ON"*) [ -n "$FAIL_ON" ] && exit 4 ;; esac ;;
esac
exit 0
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a program on a path that holds nothing else but the shell's own tools."""
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def put(name, text):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
        return lambda: [line.replace(str(tmp_path), "") for line in log.read_text().splitlines()]

    return put


def verbs(lines):
    return [[*line.split(), ""][1] for line in lines]


def test_a_jetson_is_stored_locked_and_restored(install, tmp_path):
    log, said = install("jetson_clocks", JETSON_CLOCKS), []
    with locked_clocks(said.append):
        assert verbs(log()) == ["--store", ""]
        kept = said[0].split()[-1]
        assert said == [f"clocks are locked; by hand they are restored with: sudo jetson_clocks --restore {kept}"]
    assert verbs(log()) == ["--store", "", "--restore"]
    assert log()[0].split()[2] == log()[2].split()[2] == kept.replace(str(tmp_path), "")
    assert not list(tmp_path.glob("dpal-edge-*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_it_is_restored_after_any_end(install, error):
    log = install("jetson_clocks", JETSON_CLOCKS)
    with pytest.raises(error), locked_clocks(lambda line: None):
        raise error
    assert verbs(log()) == ["--store", "", "--restore"]


def test_it_is_restored_if_locking_fails_halfway(install, monkeypatch):
    log = install("jetson_clocks", JETSON_CLOCKS)
    monkeypatch.setenv("FAIL", "5")
    with pytest.raises(BackendUnavailable, match=r"jetson_clocks failed \(exit status 5\)"), locked_clocks(print):
        pass
    assert verbs(log()) == ["--store", "", "--restore"]


def test_who_is_not_root_is_told_and_nothing_is_changed(install, monkeypatch):
    log = install("jetson_clocks", JETSON_CLOCKS)
    monkeypatch.setenv("NOT_ROOT", "1")
    with (
        pytest.raises(BackendUnavailable, match=r"failed \(must be run as root\); run as root, with sudo"),
        locked_clocks(print),
    ):
        pass
    assert verbs(log()) == ["--store"]


def test_cards_are_locked_at_their_highest_and_reset(install):
    log, said = install("nvidia-smi", NVIDIA_SMI), []
    with locked_clocks(said.append):
        assert log() == ["nvidia-smi -i 0 --lock-gpu-clocks=1980,1980", "nvidia-smi -i 1 --lock-gpu-clocks=2100,2100"]
    assert log()[2:] == ["nvidia-smi -i 0 --reset-gpu-clocks", "nvidia-smi -i 1 --reset-gpu-clocks"]
    assert "GPU 0 at 1980 MHz, GPU 1 at 2100 MHz" in said[0]


def test_a_card_that_refuses_leaves_none_locked(install, monkeypatch):
    log = install("nvidia-smi", NVIDIA_SMI)
    monkeypatch.setenv("FAIL_ON", "2100,2100")
    with pytest.raises(BackendUnavailable, match="exit status 4"), locked_clocks(print):
        pass
    assert log()[2:] == ["nvidia-smi -i 0 --reset-gpu-clocks", "nvidia-smi -i 1 --reset-gpu-clocks"]


@pytest.fixture
def unregistered(monkeypatch):
    """What atexit was told to forget."""
    forgotten = []
    monkeypatch.setattr("dpal_edge.profile.locking.atexit.unregister", forgotten.append)
    return forgotten


def test_a_reset_that_fails_leaves_no_other_card_locked(install, monkeypatch, unregistered):
    log = install("nvidia-smi", NVIDIA_SMI)
    monkeypatch.setenv("FAIL_ON", "-i 0 --reset")
    with pytest.raises(BackendUnavailable, match="-i 0 --reset-gpu-clocks failed"), locked_clocks(lambda line: None):
        pass
    assert log()[2:] == ["nvidia-smi -i 0 --reset-gpu-clocks", "nvidia-smi -i 1 --reset-gpu-clocks"]
    assert len(unregistered) == 1


def test_why_locking_failed_is_the_error_and_not_that_resetting_failed_too(install, monkeypatch, unregistered):
    log, said = install("nvidia-smi", NVIDIA_SMI), []
    monkeypatch.setenv("FAIL_ON", "-i")
    with pytest.raises(BackendUnavailable, match="-i 0 --lock-gpu-clocks=1980,1980 failed"), locked_clocks(said.append):
        pass
    assert log()[1:] == ["nvidia-smi -i 0 --reset-gpu-clocks"]
    assert ["-i 0 --reset-gpu-clocks failed" in line for line in said] == [True]
    assert len(unregistered) == 1


def test_a_driver_without_a_card(install):
    install("nvidia-smi", "#!/bin/sh\necho No devices were found\n")
    with (
        pytest.raises(BackendUnavailable, match="answers 'No devices were found', expected a line for each GPU"),
        locked_clocks(print),
    ):
        pass


def test_neither_program(install, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendUnavailable, match="neither jetson_clocks nor nvidia-smi is here"), locked_clocks(print):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_real_process(install, number):
    """SIGINT comes while the clocks are being locked, and again while they are restored."""
    slow = JETSON_CLOCKS.replace("exit 0", "kill -$SIGNAL $PARENT; sleep 0.05; exit 0")
    log = install("jetson_clocks", slow)
    code = (
        "import os, signal, time\n"
        "from dpal_edge.profile.locking import locked_clocks\n"
        "os.environ['PARENT'] = str(os.getpid())\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"  # SIGINT too: a shell's background jobs ignore it
        "    signal.signal(number, signal.default_int_handler)\n"
        "with locked_clocks(print):\n    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "SIGNAL": str(int(number))}, timeout=60, capture_output=True
    )
    assert b"KeyboardInterrupt" in done.stderr
    assert verbs(log())[-1] == "--restore"
