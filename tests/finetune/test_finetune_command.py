"""The command: what it says, and how options, files and presets combine."""

import json

import pytest
from click.testing import CliRunner

from dpal_edge.cli import main
from dpal_edge.errors import ConfigError
from dpal_edge.finetune.command import resolve
from tests.tasks import layouts

SMALL = [
    part
    for setting in (
        "size=[32,16]",
        "batch=4",
        "workers=0",
        "device=cpu",
        "trackers=[]",
        "precision=float32",
        "log_every=1",
    )
    for part in ("--set", setting)
]


def run(*arguments):
    return CliRunner().invoke(main, ["finetune", *map(str, arguments)])


def test_from_nothing_to_a_checkpoint(folders, tmp_path):
    out = tmp_path / "run"
    tasks = [part for task in ("pose", "attributes") for part in ("--task", f"{task}={folders[task]}")]
    result = run("--init", "random:vit_tiny", *tasks, "--out", out, "--steps", 2, *SMALL)
    assert result.exit_code == 0, result.output
    assert "model      vit_tiny of 5.49 M parameters from random:vit_tiny; heads in M: pose " in result.stderr
    assert "pose       " in result.stderr
    assert "examples, 2 in each update, simcc head" in result.stderr
    assert f"done: {out / 'checkpoints' / 'step-00000002.safetensors'}" in result.stderr
    assert f"next: dpal-edge evaluate {out}" in result.stderr
    assert result.stdout == ""
    again = run("--out", out, "--resume", "--steps", 3)
    assert again.exit_code == 0, again.output
    assert "updates    2 to 3 of 4 images" in again.stderr
    for channels, head in (
        (128, "simcc head"),
        (0, "new simcc head (the init's has another kind, other labels or channels)"),
    ):
        setting = ("--set", f"pose_channels={channels}")
        after = run("--init", out, *tasks[:2], "--out", tmp_path / str(channels), "--steps", 1, *SMALL, *setting)
        assert after.exit_code == 0, after.output
        assert f"in each update, {head}\n" in after.stderr


def test_what_comes_later_wins(folders, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("lr: 2e-4\nsteps: 9\n")
    task = (f"pose={folders['pose']}",)
    config = resolve(
        tmp_path / "run", preset="short", file=file, init="random:vit_tiny", task=task, steps=7, settings=("batch=8",)
    )
    assert (config.batch, config.lr, config.steps, config.layer_decay) == (8, 2e-4, 7, 0.75)


def test_numbers_of_tasks_are_given_one_by_one(folders, tmp_path):
    settings = ("share=pose=2", "share=parsing=1", 'weight=["pose=3"]', "weight=parsing=2")
    task = tuple(f"{name}={folders[name]}" for name in ("pose", "parsing"))
    config = resolve(tmp_path / "run", init="random:vit_tiny", task=task, settings=settings)
    assert (config.share, config.weight) == (("pose=2", "parsing=1"), ("pose=3", "parsing=2"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task=5", "task '5': expected NAME=DIR"),
        ("task=null", "task is None, expected text"),
        ("paste=true", "paste is True, expected text"),
        ("share=5", "share '5'"),
    ],
)
def test_values_of_another_type_are_one_line(folders, tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        resolve(tmp_path / "run", init="random:vit_tiny", task=(f"pose={folders['pose']}",), settings=(setting,))


def test_paths_are_kept_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layouts.write_coco(tmp_path / "coco")
    (tmp_path / "teacher.xml").touch()
    taught = ("reid_teacher=teacher.xml?color=bgr",)
    config = resolve(tmp_path / "run", init="random:vit_tiny", task=("pose=coco", "reid=coco/val"), settings=taught)
    assert config.task == (f"pose={tmp_path / 'coco'}", f"reid={tmp_path / 'coco' / 'val'}")
    assert config.reid_teacher == f"{tmp_path / 'teacher.xml'}?color=bgr"


def test_an_init_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="no init: give --init CHECKPOINT, or --init random:vit_tiny"):
        resolve(tmp_path / "run", task=("pose=x",))


def test_errors_are_one_line(tmp_path):
    result = run("--init", "random:vit_tiny", "--task", f"pose={tmp_path / 'none'}", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 'none'}")


def test_the_run_folder_tells_its_settings(folders, tmp_path):
    run(
        "--init",
        "random:vit_tiny",
        "--task",
        f"pose={folders['pose']}",
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        *SMALL,
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["steps"], config["size"], config["init"]) == (1, [32, 16], "random:vit_tiny")
