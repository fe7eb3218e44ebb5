"""SIGKILL at any moment loses nothing: each restart resumes, and the weights are those of a run left in peace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpal_edge.models.checkpoint import list_checkpoints, read_checkpoint
from dpal_edge.train.config import build_config
from dpal_edge.train.run import run_training
from tests.train.conftest import SHORT_RUN

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fields(people, teacher_file):
    return {**SHORT_RUN, "teacher": str(teacher_file), "data": [str(people)], "save_every": 1, "trackers": []}


def kill(run, fields, *how):
    command = [sys.executable, "-m", "tests.train.killer", str(run), json.dumps(fields), *map(str, how)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_as_if_left_in_peace(run, fields, peaceful):
    run_training(build_config(fields), peaceful)
    last, expected = (read_checkpoint(list_checkpoints(folder)[-1]) for folder in (run, peaceful))
    assert last.metadata["step"] == expected.metadata["step"] == fields["steps"]
    assert last.tensors.keys() == expected.tensors.keys()
    for name, value in last.tensors.items():
        assert value.equal(expected.tensors[name]), name
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, fields["steps"] + 1))
    assert not list(run.glob("**/.*.partial*"))  # what a killed process left is gone


def test_killed_at_thirty_random_moments(tmp_path, fields):
    run, fields = tmp_path / "run", {**fields, "steps": 31}
    kills = kill(run, fields, 30, 0)
    assert len(kills) == 30
    assert len({shot["step"] for shot in kills}) > 5  # it got on between them
    assert_as_if_left_in_peace(run, fields, tmp_path / "peaceful")


@pytest.mark.parametrize("call", ["fsync", "replace", "unlink"])
def test_killed_in_each_step_of_saving(tmp_path, fields, call):
    run = tmp_path / "run"
    kills = kill(run, fields, call)
    assert len(kills) >= 5  # each file that is written passes through here
    assert any(shot["half_written"] for shot in kills) or call == "unlink"
    assert_as_if_left_in_peace(run, fields, tmp_path / "peaceful")
