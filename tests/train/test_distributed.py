"""Two gloo processes on a CPU: the same updates as one process makes, and a clear end when one of them dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpal_edge.models.checkpoint import list_checkpoints, read_checkpoint
from dpal_edge.train.config import build_config
from dpal_edge.train.distributed import Vote, World
from dpal_edge.train.run import run_training
from tests.train.conftest import SHORT_RUN

STEPS = 6


@pytest.fixture(scope="module")
def fields(people, teacher_file):
    changed = {"batch": 8, "steps": STEPS, "save_every": 2, "validation_images": 2, "base_lr": 0.01, "trackers": []}
    return {**SHORT_RUN, "teacher": str(teacher_file), "data": [str(people)], **changed}


@pytest.fixture(scope="module")
def alone(fields, tmp_path_factory):
    """One process, eight images at a time."""
    run = tmp_path_factory.mktemp("distributed") / "alone"
    run_training(build_config(fields), run)
    return run


@pytest.fixture(scope="module")
def together(fields, tmp_path_factory):
    """Two processes, four images each."""
    run = tmp_path_factory.mktemp("distributed") / "together"
    done = subprocess.run(command(fields, run), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return run


def command(fields, run, *more):
    settings = [text for key, value in fields.items() for text in ("--set", f"{key}={json.dumps(value)}")]
    return [sys.executable, "-m", "dpal_edge", "train", "--processes", "2", "--out", str(run), *settings, *more]


def trajectory(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_trajectory(one, other, rel):
    one, other = trajectory(one), trajectory(other)
    assert [line["step"] for line in one] == [line["step"] for line in other] == list(range(1, STEPS + 1))
    for mine, theirs in zip(one, other, strict=True):
        for name in mine.keys() - {"images_per_s", "data_wait"}:
            assert mine[name] == pytest.approx(theirs[name], rel=rel), (mine["step"], name)


def newest(run):
    return read_checkpoint(list_checkpoints(run)[-1])


def test_same_global_batch_same_losses(alone, together):
    assert_same_trajectory(alone, together, rel=2e-4)
    assert newest(together).metadata["written"]["processes"] == 2
    one, other = newest(alone), newest(together)
    assert one.metadata["validation"] == pytest.approx(other.metadata["validation"], rel=2e-4)


def test_accumulation_gives_the_same_losses_but_for_the_mask(fields, tmp_path):
    fields = {**fields, "mask": "none"}
    run_training(build_config(fields), tmp_path / "whole")
    run_training(build_config({**fields, "accumulate": 4}), tmp_path / "parts")
    assert_same_trajectory(tmp_path / "whole", tmp_path / "parts", rel=2e-4)


def test_one_process_resumes_what_two_began(fields, alone, together, tmp_path):
    """The number of processes may change, and the change is recorded by name."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").mkdir()
    for path in (*(together / "checkpoints").glob("*4.safetensors"), together / "metrics.jsonl"):
        (run / path.relative_to(together)).write_bytes(path.read_bytes())
    summary = run_training(build_config(fields), run, resume=True)
    assert summary.step == STEPS
    assert_same_trajectory(alone, run, rel=2e-4)
    [change] = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert change == {"step": 4, "name": "processes", "before": 2, "after": 1}


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, process, limit_s=120):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def long_run(fields, tmp_path):
    """A run in two processes that has written its first checkpoint and would go on for long."""
    run = tmp_path / "run"
    arguments = command({**fields, "steps": 2000}, run)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: list_checkpoints(run), process)
    yield process, run, arguments
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_process_that_dies_ends_the_job_with_one_line(long_run, fields):
    process, run, _ = long_run
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert re.search(r"Error: training process [01] of 2 ended by signal 9.*--resume goes on", last), err
    assert "Traceback" not in err

    # On from there, on one process this time.
    done = newest(run).metadata["step"]
    summary = run_training(build_config({**fields, "steps": done + 2, "save_every": 2}), run, resume=True)
    assert summary.step == done + 2
    assert [line["step"] for line in trajectory(run)] == list(range(1, done + 3))


def test_a_signal_stops_both_after_the_same_update(long_run):
    process, run, _ = long_run
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert f"stopped after update {newest(run).metadata['step']}; go on with" in err
    assert "Traceback" not in err


def test_a_launcher_that_is_killed_leaves_no_process_behind(long_run):
    process, *_ = long_run
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=60)  # ends when nothing holds its standard error any more
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_vote_of_one_is_known_at_once():
    vote = Vote(World())
    assert [vote(False), vote(True)] == [False, True]


def test_more_processes_than_images_in_a_pass(fields, tmp_path):
    done = subprocess.run(command({**fields, "batch": 3}, tmp_path / "run"), capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert "batch is 3, expected a multiple of" in done.stderr
    assert "Traceback" not in done.stderr
